"""R2U-Net on voxels: recurrent residual U-Net, Alom et al. 2018 (arXiv:1802.06955).

Its two phases are those of `galdist.models.voxels`.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field as Constraint
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from galdist.models import ModelConfig
from galdist.models.layers import RecurrentResidualBlock
from galdist.models.voxels import (
    ClassifierConfig,
    RegressorConfig,
    VoxelClassifier,
    VoxelConfig,
    VoxelNetwork,
    VoxelRegressor,
)


class R2UNet(VoxelNetwork):
    """Recurrent residual U-Net in 3-D: a block a level going down and another going up, skips between them.

    Parameters
    ----------
    n_in, n_out
        channels of the mesh that comes in, and of the one that goes out.
    channels
        channels of each level; each level has half the cells a side of the one before.
    recurrence
        t of the recurrent convolutions.
    features
        numbers that each sample is conditioned on; 0 for none.
    """

    def __init__(
        self, n_in: int, n_out: int, channels: Sequence[int], recurrence: int, features: int = 0
    ) -> None:
        super().__init__()
        pairs = list(pairwise(channels))
        self.down = nn.ModuleList(
            RecurrentResidualBlock(before, after, recurrence, features)
            for before, after in zip((n_in, *channels[:-1]), channels, strict=True)
        )
        self.expand = nn.ModuleList(nn.ConvTranspose3d(coarse, fine, 2, stride=2) for fine, coarse in pairs)
        self.up = nn.ModuleList(
            RecurrentResidualBlock(2 * fine, fine, recurrence, features) for fine, _ in pairs
        )
        self.head = nn.Linear(channels[0], n_out)
        self.alignment = 2 ** len(pairs)

    @property
    def reach(self) -> int:
        """Cells from an output to the furthest input that it depends on."""
        levels = [block.reach() for block in self.down if isinstance(block, RecurrentResidualBlock)]
        reach = levels[-1]
        for level in reversed(levels[:-1]):
            # A coarse cell is two fine ones, and the output may lie in either.
            reach = 2 * level + 2 * reach + 1
        return reach

    def body(self, x: Tensor, periodic: bool, features: Tensor | None) -> Tensor:
        skips: list[Tensor] = []
        for level, block in enumerate(self.down):
            x = self.run(block, x if level == 0 else F.max_pool3d(x, 2), periodic, features)
            skips.append(x)
        x = skips.pop()
        for expand, block in zip(reversed(self.expand), reversed(self.up), strict=True):
            x = self.run(block, torch.cat([expand(x), skips.pop()], 1), periodic, features)
        return x


class R2UNetConfig(VoxelConfig):
    """The network's size. Defaults are the papers'."""

    channels: Annotated[tuple[PositiveInt, ...], Constraint(min_length=1)] = (32, 64, 128, 256)
    recurrence: NonNegativeInt = 2

    def network(self, n_in: int, n_out: int, features: int) -> VoxelNetwork:
        return R2UNet(n_in, n_out, self.channels, self.recurrence, features)


class R2UNetClassifierConfig(R2UNetConfig, ClassifierConfig):
    """Phase 1: which voxels hold a galaxy."""

    name: Literal["r2unet-classifier"] = "r2unet-classifier"


class R2UNetRegressorConfig(R2UNetConfig, RegressorConfig):
    """Phase 2: how many galaxies the kept voxels hold."""

    name: Literal["r2unet-regressor"] = "r2unet-regressor"


class R2UNetClassifier(VoxelClassifier):
    """Phase 1 by an `R2UNet`."""

    Config: ClassVar[type[ModelConfig]] = R2UNetClassifierConfig


class R2UNetRegressor(VoxelRegressor):
    """Phase 2 by an `R2UNet`, on any classifier."""

    Config: ClassVar[type[ModelConfig]] = R2UNetRegressorConfig
