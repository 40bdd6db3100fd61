"""Distributions of the number of galaxies in a voxel, whose parameters a network gives."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Likelihood = Literal[
    "poisson", "negative-binomial", "zero-inflated-poisson", "zero-inflated-negative-binomial"
]

_LEAST = 1e-6  # of the dispersion: a smaller one is Poisson's to all purposes, and loses digits
_NEGLIGIBLE = 1e-18  # probability beyond the mean at which a draw ends: the sum of all before is rounded


@dataclass(frozen=True)
class Counts:
    """A Poisson or negative binomial distribution of each voxel, with or without an excess of zeros.

    All tensors are float64, of one shape: logarithms of gamma functions cancel.
    """

    rate: Tensor
    """Mean mu of the distribution without the excess of zeros."""
    dispersion: Tensor | None = None
    """a of the negative binomial's variance mu + a mu^2; None for Poisson's."""
    excess: Tensor | None = None
    """Log-odds of a zero that is none of the distribution's own; None where there are none."""

    @staticmethod
    def n_parameters(likelihood: Likelihood) -> int:
        """Numbers a voxel that `of` takes."""
        return 1 + ("binomial" in likelihood) + likelihood.startswith("zero")

    @classmethod
    def of(cls, raw: Tensor, likelihood: Likelihood) -> "Counts":
        """From what a network gives, real numbers ``(batch, n_parameters, z, y, x)``; tensors of the
        distribution are ``(batch, 1, z, y, x)``."""
        parameters = list(raw.double().split(1, 1))
        rate = F.softplus(parameters.pop(0)) + 1e-12
        dispersion = F.softplus(parameters.pop(0)) + _LEAST if "binomial" in likelihood else None
        return cls(rate, dispersion, parameters.pop(0) if parameters else None)

    @staticmethod
    def start(likelihood: Likelihood, mean: float) -> list[float]:
        """What a network gives that knows nothing but the mean count: little dispersion, few zeros."""
        return [math.log(math.expm1(mean)), *[-2.0] * (Counts.n_parameters(likelihood) - 1)]

    def log_prob(self, n: Tensor) -> Tensor:
        """ln P(n) of counts ``n``."""
        n = n.to(self.rate.dtype)
        if self.dispersion is None:
            log_p = n * self.rate.log() - self.rate - torch.lgamma(n + 1)
        else:
            a, r = self.dispersion, 1 / self.dispersion
            log_p = torch.lgamma(n + r) - torch.lgamma(r) - torch.lgamma(n + 1)
            log_p = log_p - (r + n) * torch.log1p(a * self.rate) + n * (a * self.rate).log()
        if self.excess is None:
            return log_p
        own = F.logsigmoid(-self.excess) + log_p
        return torch.where(n == 0, torch.logaddexp(F.logsigmoid(self.excess), own), own)

    def log_probs(self, most: int) -> Tensor:
        """ln P(n) of n = 0 to ``most``, along axis 1: each from the one before."""
        mu = self.rate
        a = torch.zeros_like(mu) if self.dispersion is None else self.dispersion
        none = -mu if self.dispersion is None else -torch.log1p(a * mu) / a
        odds = mu / (1 + a * mu)
        log_p = torch.cat([none, *((odds * (1 + n * a) / (n + 1)).log() for n in range(most))], 1).cumsum(1)
        if self.excess is None:
            return log_p
        own = F.logsigmoid(-self.excess) + log_p
        return torch.cat([torch.logaddexp(F.logsigmoid(self.excess), own[:, :1]), own[:, 1:]], 1)

    def mean(self) -> Tensor:
        """Mean of the counts."""
        return self.rate if self.excess is None else self.rate * torch.sigmoid(-self.excess)

    def occupied(self) -> Tensor:
        """Probability of one or more."""
        return -torch.expm1(self.log_prob(torch.zeros_like(self.rate)))

    def quantile(self, u: Tensor) -> Tensor:
        """The least count whose cumulative probability exceeds ``u`` in [0, 1), float64, of a shape that
        voxels broadcast to: a draw, where ``u`` is uniform."""
        flat = [
            None if value is None else value.expand(u.shape).reshape(-1)
            for value in (self.rate, self.dispersion, self.excess)
        ]
        left, cumulative = u.reshape(-1), torch.zeros_like(u).reshape(-1)
        counts = torch.zeros_like(left)
        place = torch.arange(len(left), device=u.device)
        n = 0
        while len(place):
            rate, dispersion, excess = (None if value is None else value[place] for value in flat)
            assert rate is not None
            p = Counts(rate, dispersion, excess).log_prob(torch.full_like(rate, n)).exp()
            cumulative = cumulative + p
            counts[place] = n
            goes_on = (left >= cumulative) & ((p > _NEGLIGIBLE) | (n <= rate))
            place, left, cumulative = place[goes_on], left[goes_on], cumulative[goes_on]
            n += 1
        return counts.view(u.shape)
