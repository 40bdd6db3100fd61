"""Models of tables: the distribution of a galaxy's properties given its halo's, row by row.

A family subclasses `TableObjective`; what a row is, and where columns come from, is said in
`galdist.data.tables`. Numbers inside a network are standardized with the training rows' mean and standard
deviation, which travel with the weights; what goes in and comes out has the columns' own units.
"""

import abc
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field as Constraint
from pydantic import PositiveInt, model_validator
from torch import Tensor

from galdist.catalogs.neighbors import Neighborhood
from galdist.models import Batch, ModelConfig, Objective, TrainingFields
from hpc.strict import repeated

Columns = Annotated[tuple[str, ...], Constraint(min_length=1)]
Widths = Annotated[tuple[PositiveInt, ...], Constraint(min_length=1)]
"""Of hidden layers."""


class TableConfig(ModelConfig):
    """What all families of tables have in common."""

    learns_from: ClassVar[Literal["crops", "rows"]] = "rows"

    inputs: Columns = ("log_halo_mass", "log_concentration", "formation_redshift", "spin", "overdensity")
    """Columns of the halo. One that the table lacks but the simulation's parameters have (`Omega_m`) is taken
    from these, the same for all of its rows."""
    targets: Columns = ("log_stellar_mass", "color_gi", "log_ssfr", "log_radius")
    """Columns of the galaxy whose distribution is learned, in any number and order."""

    @property
    def reads(self) -> tuple[str, ...]:
        return (*self.inputs, *self.targets)

    @model_validator(mode="after")
    def _once(self) -> "TableConfig":
        names = (*self.inputs, *self.targets)
        if twice := repeated(names):
            raise ValueError(
                f"{', '.join(twice)}: given twice; a column is one of `inputs` or of `targets`, once"
            )
        return self


class TableObjective(Objective):
    """p(galaxy properties | halo), row by row.

    A batch holds ``inputs`` (b, d) and, but for predictions, ``targets`` (b, t): float32, in the columns' own
    units, columns in the order of `inputs` and `targets`. That of a model with a `neighborhood` also has, of
    the e neighbors of all its halos together, ``neighbors`` (e, d): their inputs, ``distance`` (e,) [Mpc/h],
    and ``receiver`` (e,): whose neighbor each is, a row of the batch, not falling. All tensors below are on
    the batch's device. The loss of `forward` is the mean over rows.
    """

    LEVELS: ClassVar[tuple[float, ...]] = ()
    """At which `quantiles` are known, for a family that has no others."""

    config: TableConfig
    targets: tuple[str, ...]
    """Columns whose distribution is learned."""
    neighborhood: Neighborhood | None = None
    """Which halos around one it looks at."""
    input_mean: Tensor
    input_std: Tensor
    input_low: Tensor
    input_high: Tensor
    target_mean: Tensor
    target_std: Tensor
    target_low: Tensor
    target_high: Tensor

    def __init__(self, config: TableConfig, parts: Sequence[Objective] = ()) -> None:
        super().__init__()
        self.config = config
        self.inputs, self.targets = config.inputs, config.targets
        self.fields = config.reads
        for side, columns in (("input", self.inputs), ("target", self.targets)):
            for what in ("mean", "std", "low", "high"):
                start = torch.ones if what == "std" else torch.zeros
                self.register_buffer(f"{side}_{what}", start(len(columns)))

    def prepare(self, training: TrainingFields) -> None:
        """Take mean, standard deviation and range of each column over the training rows.

        Raises
        ------
        ValueError
            for a target that is the same in all rows. Such an input is allowed: it is a parameter of the only
            simulation, and becomes 0.
        """
        for side, columns in (("input", self.inputs), ("target", self.targets)):
            for i, column in enumerate(columns):
                values = np.concatenate([part.astype(np.float64) for part in training(column)])
                low, high = values.min(), values.max()
                if side == "target" and low == high:
                    raise ValueError(
                        f"model.targets: {column!r} is {low:.6g} in all {values.size} training rows: there "
                        "is nothing to learn of it"
                    )
                std = values.std() if low < high else 1.0
                for what, value in (("mean", values.mean()), ("std", std), ("low", low), ("high", high)):
                    self.get_buffer(f"{side}_{what}")[i] = float(value)

    def scaled_training_targets(self, training: TrainingFields) -> NDArray[np.float64]:
        """The targets (n, t) of all training rows, standardized; for families that fit more to them."""
        columns = [np.concatenate(list(training(target))).astype(np.float64) for target in self.targets]
        mean, std = self.target_mean.double().numpy(), self.target_std.double().numpy()
        scaled: NDArray[np.float64] = (np.stack(columns, -1) - mean) / std
        return scaled

    def scaled_inputs(self, batch: Batch) -> Tensor:
        """The inputs (b, d) with the training rows' mean 0 and standard deviation 1."""
        scaled: Tensor = (batch["inputs"] - self.input_mean) / self.input_std
        return scaled

    def scaled_targets(self, batch: Batch) -> Tensor:
        """The targets (b, t) with the training rows' mean 0 and standard deviation 1."""
        scaled: Tensor = (batch["targets"] - self.target_mean) / self.target_std
        return scaled

    def unscaled(self, y: Tensor) -> Tensor:
        """Standardized targets (..., t) in the columns' own units."""
        return y * self.target_std + self.target_mean

    @abc.abstractmethod
    def validation_loss(self, batch: Batch) -> Tensor:
        """What chooses the best epoch, (b,), lower is better; the same numbers for the same rows."""

    @abc.abstractmethod
    def point(self, batch: Batch) -> Tensor:
        """The best single value (b, t), own units; whether it is a mean or a median, the family says."""

    @abc.abstractmethod
    def sample(self, batch: Batch, n: int, generator: torch.Generator) -> Tensor:
        """``n`` joint draws of the targets for each row, (b, n, t), own units.

        ``generator`` is on the batch's device; all randomness comes from it.
        """

    def quantiles(self, batch: Batch, levels: Tensor) -> Tensor | None:
        """Marginal quantiles (b, q, t) at ``levels`` (q,), own units; None for a family that has none of its
        own."""
        del batch, levels
        return None

    def evaluate(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        error = self.point(batch).double() - batch["targets"].double()
        sums = {
            "loss": self.validation_loss(batch).double().sum(),
            "rows": torch.tensor(len(error)),
            "squares": error.square().sum(0),
        }
        return sums, {}

    def summarize(self, sums: Mapping[str, Any]) -> dict[str, float]:
        rows = sums["rows"].item()
        rmse = (sums["squares"] / rows).sqrt().tolist()
        return {
            "loss": sums["loss"].item() / rows,
            **{f"rmse_{target}": value for target, value in zip(self.targets, rmse, strict=True)},
        }
