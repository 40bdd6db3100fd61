"""Particles of a fast simulation, moved to where a better one of the same initial conditions has them.

NECOLA: Kaushal et al. 2021 (arXiv:2111.02441). A network sees the displacements of COLA on the lattice that
the particles started from, and gives what is missing to those of N-body. Here it is an R2U-Net and sees how
the displacements of neighboring particles differ: to move all particles alike changes nothing in what it
sees, so that they are corrected alike wherever they are.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field as Constraint
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from galdist.data.transforms import Scale
from galdist.grids.store import Field
from galdist.models import Batch, GridObjective, ModelConfig, Objective, TrainingFields
from galdist.models.layers import trim
from galdist.models.r2unet import R2UNet


class DisplacementsConfig(ModelConfig):
    """Settings of the correction."""

    name: Literal["necola"] = "necola"
    input: str = "displacement"
    """Displacements to correct."""
    target: str = "true_displacement"
    """Those that they are corrected to."""
    channels: Annotated[tuple[PositiveInt, ...], Constraint(min_length=1)] = (32, 64, 128)
    recurrence: NonNegativeInt = 1

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.input, self.target)


class Displacements(GridObjective):
    """Adds what a network makes of the differences between neighbors to the displacements.

    The loss is the squared error over that of the displacements as they came, on average over the training
    simulations: 1 is COLA, 0 is N-body. An untrained network changes nothing.
    """

    config: DisplacementsConfig
    Config: ClassVar[type[ModelConfig]] = DisplacementsConfig

    def __init__(self, config: DisplacementsConfig, parts: Sequence[Objective] = ()) -> None:
        super().__init__()
        self.config = config
        self.inputs = (config.input,)
        self.fields = config.reads
        self.outputs = (Field(name=config.input, units="Mpc/h", components=3),)
        self.strain, self.missing = Scale(), Scale()
        self.network = R2UNet(9, 3, config.channels, config.recurrence)
        torch.nn.init.zeros_(self.network.head.weight)
        torch.nn.init.zeros_(self.network.head.bias)
        self.alignment = self.network.alignment
        self.reach = self.network.reach + 1

    def prepare(self, training: TrainingFields) -> None:
        strain, missing = [], []
        for given, wanted in zip(training(self.config.input), training(self.config.target), strict=True):
            if given.ndim != 4 or given.shape[0] != 3 or given.shape != wanted.shape:
                raise ValueError(
                    f"fields {self.config.input!r} and {self.config.target!r} must be vectors, they are "
                    f"{given.shape} and {wanted.shape}"
                )
            error = wanted.astype(np.float64) - given
            mean, rms = np.abs(error.mean(axis=(1, 2, 3))).max(), np.sqrt(np.square(error).mean())
            if not rms > 0:
                raise ValueError(f"fields {self.config.input!r} and {self.config.target!r} are the same")
            if mean > 0.5 * rms:
                raise ValueError(
                    f"particles of {self.config.target!r} are all {mean:.3g} Mpc/h beside those of "
                    f"{self.config.input!r} (differences are {rms:.3g} rms): the two did not start from one "
                    "lattice"
                )
            missing.append(rms)
            strain.append(float(differences(torch.from_numpy(given)[None], True).square().mean().sqrt()))
        self.strain.fit(0, float(np.sqrt(np.mean(np.square(strain)))))
        self.missing.fit(0, float(np.sqrt(np.mean(np.square(missing)))))

    def _corrected(self, batch: Batch) -> Tensor:
        given = batch[self.config.input]
        seen = self.strain(differences(given, batch["periodic"]))
        return trim(given + self.missing.inverse(self.network(seen, batch["periodic"])), batch["halo"])

    def _truth(self, batch: Batch) -> Tensor:
        return trim(batch[self.config.target], batch["halo"])

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": self.missing(self._corrected(batch) - self._truth(batch)).square().mean()}

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        return {self.config.input: self._corrected(batch)}

    def evaluate(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        corrected, truth = self._corrected(batch), self._truth(batch)
        given = trim(batch[self.config.input], batch["halo"])
        sums = {
            "components": torch.tensor(truth.numel()),
            "after": (corrected - truth).double().square().sum(),
            "before": (given - truth).double().square().sum(),
        }
        return sums, {self.config.input: corrected}

    def summarize(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        after, before = ((sums[name] / sums["components"]).item() for name in ("after", "before"))
        return {
            "loss": after / self.missing.rms.item() ** 2,
            "displacement_error": after**0.5,
            "uncorrected_error": before**0.5,
        }


def differences(displacement: Tensor, periodic: bool) -> Tensor:
    """What a vector field (b, 3, z, y, x) has more in the next site along each axis, (b, 9, z, y, x). Beyond
    its faces the mesh continues with itself where it is ``periodic``; else there is no difference there."""
    parts = []
    for axis in (2, 3, 4):
        if periodic:
            parts.append(torch.roll(displacement, -1, axis) - displacement)
        else:
            pads = [0] * 6
            pads[2 * (4 - axis) + 1] = 1
            parts.append(F.pad(displacement.diff(dim=axis), pads))
    return torch.cat(parts, 1)
