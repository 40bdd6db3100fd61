"""Gaussian fields with a smoothed, noisy observation: what follows from one about the other is known exactly.

x has the power P(k) in each mode, y = W x + n with white noise of power N. The posterior of x given y has in
each mode the mean P W y / (P W^2 + N), Wiener's filter, and the variance P N / (P W^2 + N).
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from galdist.models.noise import signal_and_noise


@dataclass(frozen=True)
class GaussianFields:
    """Fields of unit variance, zero mean and a red spectrum on a periodic mesh."""

    n_mesh: int
    spatial: int
    noise: float = 0.3
    """Power of the observation's noise; that of x is 1 on average."""
    smoothing: float = 1.0
    """Of the observation, Gaussian [cells]."""
    scale: int = 1
    """How many smaller boxes fit along a side of this one; it has their spectrum, at more wave numbers."""

    @cached_property
    def small(self) -> "GaussianFields":
        """The smaller box."""
        return replace(self, n_mesh=self.n_mesh // self.scale, scale=1)

    @cached_property
    def k(self) -> Tensor:
        """Of every mode, in units of the fundamental."""
        k = torch.fft.fftfreq(self.n_mesh, dtype=torch.float64) * self.n_mesh
        return torch.stack(torch.meshgrid(*[k] * self.spatial, indexing="ij")).norm(dim=0)

    @cached_property
    def power(self) -> Tensor:
        return (2 + self.k / self.scale) ** -2 / ((2 + self.small.k) ** -2).mean()

    @cached_property
    def window(self) -> Tensor:
        return torch.exp(-0.5 * (2 * np.pi * self.k / self.n_mesh * self.smoothing) ** 2)

    @cached_property
    def posterior_variance(self) -> Tensor:
        return self.power * self.noise / (self.power * self.window**2 + self.noise)

    def modes(self, field: Tensor) -> Tensor:
        """Real, orthonormal modes (Hartley's); the same function gives the field back."""
        modes = torch.fft.fftn(field, dim=tuple(range(-self.spatial, 0)), norm="ortho")
        return modes.real - modes.imag

    def filter(self, field: Tensor, transfer: Tensor) -> Tensor:
        """``field`` with every mode multiplied by ``transfer``."""
        return self.modes(transfer.to(field) * self.modes(field))

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """x and y, (n, 1, *mesh) each."""
        shape = (n, 1, *(self.n_mesh,) * self.spatial)
        x = self.filter(torch.randn(shape, generator=generator), self.power.sqrt())
        noise = self.noise**0.5 * torch.randn(shape, generator=generator)
        return x, self.filter(x, self.window) + noise

    def posterior_mean(self, y: Tensor) -> Tensor:
        return self.filter(y, self.posterior_variance * self.window / self.noise)

    def denoised_modes(self, z: Tensor, gamma: Tensor, mean: Tensor) -> Tensor:
        """Modes of E[x | z, y] from those of z = alpha x + sigma e and those of the posterior's ``mean``.

        White noise is white in any orthonormal basis: what samples fields samples their modes.
        """
        alpha, sigma = (a.to(z).view(-1, *(1,) * (z.ndim - 1)) for a in signal_and_noise(gamma))
        variance = self.posterior_variance.to(z)
        return mean + alpha * variance / (alpha**2 * variance + sigma**2) * (z - alpha * mean)

    def binned(self, values: Tensor) -> NDArray[np.float64]:
        """Means of ``values`` of the modes over bins k = 1, 2, ... below half of Nyquist's."""
        edges = range(1, (self.n_mesh // 2 + 1) // 2)
        return np.array([values[self.k.round() == k].mean().item() for k in edges])

    def compare(self, samples: Tensor, y: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """What the posterior's samples have of the true mean (a regression), and of the true variance.

        Parameters
        ----------
        samples
            (m, n, *mesh): n samples for each of m observations ``y`` (m, 1, *mesh).

        Returns
        -------
        two arrays (k,), in bins of k: both are 1 where samples and posterior agree.
        """
        mean, modes = self.modes(self.posterior_mean(y)), self.modes(samples)
        cross = (modes.mean(1, keepdim=True) * mean).mean((0, 1))
        transfer = self.binned(cross) / self.binned(mean.square().mean((0, 1)))
        return transfer, self.binned(modes.var(1).mean(0)) / self.binned(self.posterior_variance)
