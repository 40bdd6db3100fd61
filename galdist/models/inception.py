"""Inception network on voxels: kernels of several sizes side by side, Zhang et al. 2019 (arXiv:1902.05965).

After Szegedy et al. 2015 (arXiv:1409.4842). Its two phases are those of `galdist.models.voxels`.
"""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from galdist.models import ModelConfig
from galdist.models.conditioning import Modulation
from galdist.models.layers import convolve, wrap
from galdist.models.voxels import (
    ClassifierConfig,
    RegressorConfig,
    VoxelClassifier,
    VoxelConfig,
    VoxelNetwork,
    VoxelRegressor,
)

_KERNELS = (1, 3, 5)  # of the branches but the last, a 1^3 convolution of means over 3^3 cells


class _Branches(nn.Module):
    """Convolutions of 1^3, 3^3 and 5^3 cells and of means over 3^3 cells, side by side, then a ReLU."""

    def __init__(self, n_in: int, branches: tuple[int, int, int, int], features: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv3d(n_in, n_out, side) for side, n_out in zip((*_KERNELS, 1), branches, strict=True)
        )
        self.modulation = Modulation(features, sum(branches)) if features else None

    def forward(self, x: Tensor, periodic: bool, features: Tensor | None) -> Tensor:
        means = F.avg_pool3d(wrap(x, 1) if periodic else x, 3, 1, 0 if periodic else 1)
        parts = [
            _apply(layer, source, periodic)
            for layer, source in zip(self.convolutions, (x, x, x, means), strict=True)
        ]
        # Channels last is faster on CPUs; a mesh of one channel does not say which order it has.
        y = torch.cat(parts, 1).contiguous(memory_format=torch.channels_last_3d)
        return _relu(y, self.modulation, features)


class _Convolution(nn.Module):
    """A convolution of 3^3 cells, then a ReLU."""

    def __init__(self, n_in: int, n_out: int, features: int) -> None:
        super().__init__()
        self.convolution = nn.Conv3d(n_in, n_out, 3)
        self.modulation = Modulation(features, n_out) if features else None

    def forward(self, x: Tensor, periodic: bool, features: Tensor | None) -> Tensor:
        return _relu(_apply(self.convolution, x, periodic), self.modulation, features)


def _apply(layer: nn.Module, x: Tensor, periodic: bool) -> Tensor:
    assert isinstance(layer, nn.Conv3d)
    assert layer.bias is not None
    return convolve(x, layer.weight, layer.bias, periodic)


def _relu(x: Tensor, modulation: Modulation | None, features: Tensor | None) -> Tensor:
    if modulation is not None:
        assert features is not None
        x = modulation(x, features)
    return F.relu(x)


class Inception(VoxelNetwork):
    """One layer of parallel branches, two convolutions of 3^3 cells, the second to half the channels, and a
    linear head.

    The published network has no biases and a ReLU after the last layer, too; here that is linear, for it
    gives log-odds.

    Parameters
    ----------
    n_in, n_out
        channels of the mesh that comes in, and of the one that goes out.
    branches
        channels of the branches 1^3, 3^3, 5^3 and mean.
    features
        numbers that each sample is conditioned on; 0 for none.
    """

    def __init__(self, n_in: int, n_out: int, branches: tuple[int, int, int, int], features: int = 0) -> None:
        super().__init__()
        width = sum(branches)
        self.layers = nn.ModuleList(
            [
                _Branches(n_in, branches, features),
                _Convolution(width, width, features),
                _Convolution(width, max(width // 2, 1), features),
            ]
        )
        self.head = nn.Linear(max(width // 2, 1), n_out)
        self.alignment = 1
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                # Keeps the variance through the ReLU: He et al. 2015 (arXiv:1502.01852).
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    @property
    def reach(self) -> int:
        """Cells from an output to the furthest input that it depends on."""
        return max(_KERNELS) // 2 + 1 + 1

    def body(self, x: Tensor, periodic: bool, features: Tensor | None) -> Tensor:
        for layer in self.layers:
            x = self.run(layer, x, periodic, features)
        return x


class InceptionConfig(VoxelConfig):
    """The network's size. Defaults are the paper's."""

    branches: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = (6, 8, 10, 3)
    """Channels of the kernels 1^3, 3^3 and 5^3 and of the mean over 3^3 cells."""

    def network(self, n_in: int, n_out: int, features: int) -> VoxelNetwork:
        return Inception(n_in, n_out, self.branches, features)


class InceptionClassifierConfig(InceptionConfig, ClassifierConfig):
    """Phase 1: which voxels hold a galaxy."""

    name: Literal["inception-classifier"] = "inception-classifier"


class InceptionRegressorConfig(InceptionConfig, RegressorConfig):
    """Phase 2: how many galaxies the kept voxels hold."""

    name: Literal["inception-regressor"] = "inception-regressor"


class InceptionClassifier(VoxelClassifier):
    """Phase 1 by an `Inception` network."""

    Config: ClassVar[type[ModelConfig]] = InceptionClassifierConfig


class InceptionRegressor(VoxelRegressor):
    """Phase 2 by an `Inception` network, on any classifier."""

    Config: ClassVar[type[ModelConfig]] = InceptionRegressorConfig
