"""Noise schedules of diffusion: how much noise there is at time t in [0, 1].

A noisy field is z = alpha x + sigma e with e a standard Gaussian and alpha^2 + sigma^2 = 1. All of it follows
from gamma = ln(sigma^2 / alpha^2), which rises with t: Kingma et al. 2021 (arXiv:2107.00630), section 3.2.
"""

import abc
from typing import Annotated, Literal

import torch
from pydantic import Field as Constraint
from pydantic import PositiveInt, field_validator
from torch import Tensor, nn

from galdist.config import StrictModel


def signal_and_noise(gamma: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma where ln(sigma^2 / alpha^2) is ``gamma``."""
    return torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()


class _Config(StrictModel):
    gamma: tuple[float, float] = (-13.3, 13.3)
    """gamma at t = 0 and at t = 1."""
    learned: bool = True
    """Whether these two are learned, by the bound itself; else they stay."""

    @field_validator("gamma")
    @classmethod
    def _rises(cls, gamma: tuple[float, float]) -> tuple[float, float]:
        if not gamma[0] < gamma[1]:
            raise ValueError(f"gamma is {gamma}; noise grows with t: the first must be below the second")
        return gamma


class LinearConfig(_Config):
    """gamma is linear in t."""

    kind: Literal["linear"] = "linear"

    def build(self) -> "NoiseSchedule":
        return LinearSchedule(self.gamma, self.learned)


class MonotoneConfig(_Config):
    """gamma is a monotone network of t, learned to lower the variance of the loss."""

    kind: Literal["monotone"]
    hidden: PositiveInt = 1024
    """Width of its hidden layer."""

    def build(self) -> "NoiseSchedule":
        return MonotoneSchedule(self.gamma, self.learned, self.hidden)


ScheduleConfig = Annotated[LinearConfig | MonotoneConfig, Constraint(discriminator="kind")]


class NoiseSchedule(nn.Module, abc.ABC):
    """gamma(t) = gamma_0 + (gamma_1 - gamma_0) s(t), with s rising from 0 to 1.

    Parameters
    ----------
    gamma
        gamma_0 and gamma_1, where they start.
    learned
        whether they are learned.
    """

    def __init__(self, gamma: tuple[float, float], learned: bool) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.tensor(gamma[0]), learned)
        self._span = nn.Parameter(torch.tensor(gamma[1] - gamma[0]), learned)

    @property
    def span(self) -> Tensor:
        """gamma_1 - gamma_0."""
        return self._span.abs()

    @abc.abstractmethod
    def shape(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """s and ds/dt, of the shape of ``t``."""

    def forward(self, t: Tensor) -> Tensor:
        """gamma(t), of the shape of ``t``."""
        return self.first + self.span * self.shape(t)[0]


class LinearSchedule(NoiseSchedule):
    """s = t."""

    def shape(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return t, torch.ones_like(t)


class MonotoneSchedule(NoiseSchedule):
    """s is a network of positive weights: u + w . sigmoid(v u + c) with u = a t + b, scaled to [0, 1].

    Kingma et al. 2021 (arXiv:2107.00630), appendix H. It starts close to a straight line.
    """

    def __init__(self, gamma: tuple[float, float], learned: bool, hidden: int) -> None:
        super().__init__(gamma, learned)
        self.slope = nn.Parameter(torch.ones(()))
        self.offset = nn.Parameter(torch.zeros(()))
        # Steps of different steepness, spread over [0, 1].
        self.inner = nn.Parameter(torch.empty(hidden).uniform_(1.0, 10.0))
        self.centers = nn.Parameter(-self.inner.detach() * torch.rand(hidden))
        self.outer = nn.Parameter(torch.full((hidden,), 0.1 / hidden))

    def _rise(self, t: Tensor) -> tuple[Tensor, Tensor]:
        slope, inner, outer = self.slope.abs(), self.inner.abs(), self.outer.abs()
        u = slope * t + self.offset
        step = torch.sigmoid(inner * u[..., None] + self.centers)
        rise = u + (outer * step).sum(-1)
        return rise, slope * (1 + (outer * inner * step * (1 - step)).sum(-1))

    def shape(self, t: Tensor) -> tuple[Tensor, Tensor]:
        ends, _ = self._rise(torch.tensor([0.0, 1.0], dtype=t.dtype, device=t.device))
        rise, slope = self._rise(t)
        return (rise - ends[0]) / (ends[1] - ends[0]), slope / (ends[1] - ends[0])
