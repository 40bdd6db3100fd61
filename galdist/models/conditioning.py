"""Conditioning of a network on the parameters of a simulation: cosmology, astrophysics, redshift.

One vector a sample scales and shifts the channels of a network (feature-wise linear modulation, Perez et al.
2018, arXiv:1709.07871). It knows nothing of the mesh, so that tiles stay exact, and starts as the identity.
"""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from pydantic import AfterValidator
from torch import Tensor, nn

from galdist.models import TrainingFields
from hpc.strict import repeated


def _each_once(names: tuple[str, ...]) -> tuple[str, ...]:
    if twice := repeated(names):
        raise ValueError(f"parameter {twice[0]!r} is given twice")
    return names


ParameterNames = Annotated[tuple[str, ...], AfterValidator(_each_once)]
"""Of the parameters that a model is conditioned on, as settings have them."""


class StandardizedParameters(nn.Module):
    """Parameters ``(batch, p)`` in units of their own -> mean 0 and standard deviation 1 over the training
    simulations.

    One that is the same in all of these says nothing: it is 0, whatever it is elsewhere.

    Parameters
    ----------
    names
        of the parameters, in the order in which they come.
    """

    mean: Tensor
    factor: Tensor

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.register_buffer("mean", torch.zeros(len(self.names)))
        self.register_buffer("factor", torch.zeros(len(self.names)))

    def fit(self, training: TrainingFields) -> None:
        """Take mean and standard deviation of each over the training simulations."""
        for i, name in enumerate(self.names):
            values = np.concatenate([np.ravel(value) for value in training(name)]).astype(np.float64)
            mean, std = float(values.mean()), float(values.std())
            varies = std > 1e-6 * max(abs(mean), 1.0)  # more than float32 numbers of order one are rounded
            self.mean[i] = mean
            self.factor[i] = 1 / std if varies else 0.0

    def forward(self, parameters: Tensor) -> Tensor:
        standardized: Tensor = (parameters - self.mean) * self.factor
        return standardized


class Embedding(nn.Module):
    """Parameters of a simulation, standardized, as ``width`` features: a perceptron with one hidden layer."""

    def __init__(self, names: Sequence[str], width: int) -> None:
        super().__init__()
        self.standardize = StandardizedParameters(names)
        self.width = width
        self.layers = nn.Sequential(
            nn.Linear(len(names), width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )

    def forward(self, parameters: Tensor) -> Tensor:
        """``(batch, p)`` -> ``(batch, width)``."""
        features: Tensor = self.layers(self.standardize(parameters))
        return features


class Modulation(nn.Module):
    """x -> (1 + a) x + b, with a and b for each channel linear in the ``features`` of a sample, and zero at
    first."""

    def __init__(self, features: int, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, 2 * channels)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        """``x`` ``(batch, channels, ...)`` modulated by ``features`` ``(batch, features)``."""
        shape = (*features.shape[:1], -1, *(1,) * (x.ndim - 2))
        scale, shift = (part.view(shape) for part in self.linear(features).to(x.dtype).chunk(2, 1))
        return torch.addcmul(x + shift, x, scale)
