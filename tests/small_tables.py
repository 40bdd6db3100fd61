"""Small tables of halos and central galaxies, and a family that learns them; importing this registers it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from galdist.catalogs.catalog import CatalogWriter
from galdist.grids.store import SimulationAttrs
from galdist.models import MODELS, Batch, ModelConfig, Objective
from galdist.models.tables import TableConfig, TableObjective

INPUTS = ("log_halo_mass", "spin", "Omega_m")
TARGETS = ("log_stellar_mass", "color_gi")
SIGMA = 0.2
"""Standard deviation of the targets given the inputs."""


def make_rows(n: int, seed: int) -> dict[str, NDArray[Any]]:
    """Columns of ``n`` halos whose targets are normal about lines in the mass; 60% train, 20% each other."""
    random = np.random.default_rng(seed)
    mass, spin = random.uniform(11, 14, n), random.normal(-1.5, 0.3, n)
    return {
        "log_halo_mass": mass.astype(np.float32),
        "spin": spin,
        "log_stellar_mass": (0.8 * mass + 0.2 * spin + SIGMA * random.normal(size=n)).astype(np.float32),
        "color_gi": (0.3 * mass - 3 + SIGMA * random.normal(size=n)).astype(np.float32),
        "position": random.uniform(0, 25, (n, 3)).astype(np.float32),
        "split": random.choice(3, n, p=[0.6, 0.2, 0.2]).astype(np.int8),
    }


def make_tables(
    step: Path, sizes: Sequence[int] = (700, 500), box_size: float = 25.0, **changed: NDArray[Any]
) -> Path:
    """A step folder with a catalogue of central galaxies, a simulation a size; columns may be ``changed``."""
    writer = CatalogWriter(step / "catalog.zarr")
    names = [f"box_{number}" for number in range(len(sizes))]
    for number, (name, n) in enumerate(zip(names, sizes, strict=True)):
        attrs = SimulationAttrs(
            name=name,
            box_size=box_size,
            redshift=0.0,
            suite="lines",
            cosmology={"Omega_m": 0.2 + 0.1 * number},
            split="train",
        )
        writer.add(attrs, {"centrals": make_rows(n, number) | changed})
    writer.finish(names)
    return step


class GaussianConfig(TableConfig):
    name: Literal["gaussian"] = "gaussian"
    inputs: tuple[str, ...] = INPUTS
    targets: tuple[str, ...] = TARGETS
    hidden: tuple[int, ...] = (16,)
    noise: float = 0.0
    """Standard deviation of what is added to the inputs in training."""


class Gaussian(TableObjective):
    """Independent normal targets: their means from a network, one standard deviation each."""

    Config: ClassVar[type[ModelConfig]] = GaussianConfig
    config: GaussianConfig

    def __init__(self, config: GaussianConfig, parts: Sequence[Objective] = ()) -> None:
        super().__init__(config, parts)
        layers: list[nn.Module] = []
        width = len(self.inputs)
        for after in config.hidden:
            layers += [nn.Linear(width, after), nn.ReLU()]
            width = after
        self.network = nn.Sequential(*layers, nn.Linear(width, len(self.targets)))
        self.log_sigma = nn.Parameter(torch.zeros(len(self.targets)))

    def _loss(self, batch: Batch, noise: float) -> Tensor:
        x = self.scaled_inputs(batch)
        mean = self.network(x + noise * torch.randn_like(x) if noise else x)
        deviation = (self.scaled_targets(batch) - mean) * torch.exp(-self.log_sigma)
        return (0.5 * deviation.square() + self.log_sigma).sum(1)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": self._loss(batch, self.config.noise).mean()}

    def validation_loss(self, batch: Batch) -> Tensor:
        return self._loss(batch, 0.0)

    def point(self, batch: Batch) -> Tensor:
        return self.unscaled(self.network(self.scaled_inputs(batch)))

    def sample(self, batch: Batch, n: int, generator: torch.Generator) -> Tensor:
        mean = self.network(self.scaled_inputs(batch))
        noise = torch.randn((len(mean), n, mean.shape[1]), generator=generator, device=mean.device)
        return self.unscaled(mean[:, None] + noise * self.log_sigma.exp())


MODELS["gaussian"] = f"{__name__}:Gaussian"
