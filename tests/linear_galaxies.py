"""A universe whose galaxies are linear in their halos but for Gaussian noise, and the family that learns it
exactly: what every number should be is known. Importing this registers the family."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from galdist.catalogs.catalog import CatalogWriter
from galdist.catalogs.centrals import SPLITS, TABLE
from galdist.catalogs.columns import QUANTITIES
from galdist.grids.store import SimulationAttrs
from galdist.models import MODELS, Batch, ModelConfig, TrainingFields, build
from galdist.models.tables import TableConfig, TableObjective
from galdist.training.checkpoint import save_model, table_facts

INPUTS = ("log_halo_mass", "spin")
TARGETS = ("log_stellar_mass", "color_gi")
SLOPES = np.array([[0.9, -2.0], [0.3, 4.0]])  # (target, input)
ORIGIN = np.array([-0.5, -3.0])
COVARIANCE = np.array([[0.04, 0.03], [0.03, 0.09]])
SOURCE = {
    "log_halo_mass": {"column": "Mvir", "log10": True},
    "spin": {"column": "S_h"},
    "log_stellar_mass": {"column": "smass", "scale": 1e10, "log10": True},
    "color_gi": {"column": "color"},
}
"""Columns of the table that the model learned from: masses in linear units."""


class LinearConfig(TableConfig):
    name: Literal["linear"] = "linear"  # type: ignore[assignment]
    quantiles: bool = True


class Linear(TableObjective):
    """A Gaussian around the linear least-squares prediction; the point is its mean and median."""

    Config: ClassVar[type[ModelConfig]] = LinearConfig

    def __init__(self, config: LinearConfig, parts: Sequence[Any] = ()) -> None:
        super().__init__(config, parts)
        t, d = len(self.targets), len(self.inputs)
        self.register_buffer("slopes", torch.zeros(t, d + 1, dtype=torch.float64))
        self.register_buffer("factor", torch.zeros(t, t, dtype=torch.float64))

    def prepare(self, training: TrainingFields) -> None:
        super().prepare(training)
        x, y = (
            np.stack([np.concatenate([part.astype("f8") for part in training(name)]) for name in names], 1)
            for names in (self.inputs, self.targets)
        )
        x = np.column_stack([x, np.ones(len(x))])
        slopes = np.linalg.lstsq(x, y, rcond=None)[0].T
        self.slopes.copy_(torch.from_numpy(slopes))
        rest = y - x @ slopes.T
        self.factor.copy_(torch.from_numpy(np.linalg.cholesky(np.cov(rest.T).reshape(len(slopes), -1))))

    def point(self, batch: Batch) -> Tensor:
        x = batch["inputs"].double()
        return (x @ self.slopes[:, :-1].T + self.slopes[:, -1]).float()

    def sample(self, batch: Batch, n: int, generator: torch.Generator) -> Tensor:
        mean = self.point(batch)
        noise = torch.randn((len(mean), n, len(self.targets)), generator=generator, device=mean.device)
        return mean[:, None] + noise @ self.factor.float().T

    def quantiles(self, batch: Batch, levels: Tensor) -> Tensor | None:
        if not self.config.quantiles:  # type: ignore[attr-defined]
            return None
        sigma = self.factor.square().sum(1).sqrt().float()
        return self.point(batch)[:, None] + torch.special.ndtri(levels)[None, :, None] * sigma

    def validation_loss(self, batch: Batch) -> Tensor:
        return (self.point(batch) - batch["targets"]).square().sum(1)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": self.validation_loss(batch).mean()}


MODELS["linear"] = f"{__name__}:Linear"


def halos(n: int, seed: int) -> dict[str, NDArray[np.float64]]:
    """Inputs of ``n`` halos, in standard units."""
    random = np.random.default_rng(seed)
    return {"log_halo_mass": 11 + 0.4 * random.gamma(2, size=n), "spin": random.uniform(0.01, 0.1, n)}


def truth(inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
    """Mean of the targets (n, 2)."""
    return np.stack([inputs[name] for name in INPUTS], 1) @ SLOPES.T + ORIGIN


def make_centrals(
    step: Path,
    sizes: Mapping[str, int],
    seed: int = 0,
    galaxies: bool = True,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """A step folder with a `catalog.zarr` whose `centrals` have 60% training rows."""
    writer = CatalogWriter(step / "catalog.zarr")
    for number, (name, n) in enumerate(sizes.items()):
        random = np.random.default_rng([seed, number])
        columns: dict[str, Any] = halos(n, seed + 100 * number)
        if galaxies:
            noise = random.multivariate_normal([0, 0], COVARIANCE, n)
            columns |= dict(zip(TARGETS, (truth(columns) + noise).T, strict=True))
        columns["split"] = random.choice(3, n, p=[0.6, 0.2, 0.2]).astype(np.int8)
        attrs = SimulationAttrs(
            name=name, box_size=50.0, redshift=0.0, suite="linear", cosmology={"Omega_m": 0.3}
        )
        units = {column: quantity.units for column, quantity in QUANTITIES.items()}
        about = {"columns": SOURCE} if facts is None else facts
        writer.add(attrs, {TABLE: columns}, units, {TABLE: about})
    writer.finish(list(sizes))
    return step


def make_model(
    step: Path,
    catalogs: Path,
    targets: Sequence[str] = TARGETS,
    inputs: Sequence[str] = INPUTS,
    quantiles: bool = True,
) -> Path:
    """A step folder with the model that was fitted to the training rows of ``catalogs``."""
    from galdist.catalogs.centrals import read_centrals

    config = LinearConfig(inputs=tuple(inputs), targets=tuple(targets), quantiles=quantiles)
    model = build(config)
    rows = read_centrals([catalogs], [*inputs, *targets], SPLITS[0])
    model.prepare(lambda name: iter([rows.columns[name]]))
    save_model(step / "model", model, model.state_dict(), {"epoch": 0, **table_facts(model, [catalogs])})
    return step
