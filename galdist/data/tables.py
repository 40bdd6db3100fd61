"""Rows of halos with their central galaxies, from `centrals` tables, for models of tables.

All rows are in memory, as one float32 matrix. The order of the training rows is a permutation that ``(seed,
epoch)`` decides, and a row's place in it decides its step: any number of ranks trains on the same batches,
and a resumed run sees what it would have seen.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from galdist.catalogs.centrals import read_centrals
from galdist.config import StrictModel
from galdist.data import Batch, share, steps_to_read
from galdist.grids.store import Split
from galdist.models import Objective
from galdist.models.tables import TableObjective
from hpc import ddp

_VALIDATION_ROWS = 1 << 13  # in a batch


class RowsConfig(StrictModel):
    """All rows of the training split, in another order every epoch."""

    kind: Literal["rows"] = "rows"

    def open(self, objective: Objective, inputs: Mapping[str, list[Path]], scratch: Path) -> "TableData":
        """The rows of the steps under the role ``catalogs`` for a model of tables; ``scratch`` is not needed.

        Raises
        ------
        ValueError
            where model and tables do not fit each other.
        """
        del scratch
        assert isinstance(objective, TableObjective)
        steps = steps_to_read("catalogs", inputs, objective.config.name)
        return TableData(steps, objective.inputs, objective.targets)


class RowBatches:
    """This rank's training batches (`galdist.data.Batches`); see `TableData.batches`."""

    def __init__(self, rows: "_Rows", group: ddp.Group, batch_size: int, parts: int, seed: int) -> None:
        # Beside each other: a row is one place in memory.
        self._rows = torch.cat([rows.inputs, rows.targets], 1).to(group.device)
        self._n_inputs = rows.inputs.shape[1]
        self._size = share(batch_size, parts, group.world_size)
        self._group, self._batch_size, self._parts, self._seed = group, batch_size, parts, seed
        self._order = torch.arange(0)
        self._step = 0
        self.steps = len(self._rows) // batch_size

    def start_at(self, epoch: int, step: int) -> None:
        """Go on with the batches of an epoch, from a step on."""
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._rows))
        self._order, self._step = torch.from_numpy(order).to(self._group.device), step

    def wait(self, seconds: float) -> bool:
        """Whether the batches of the next step are there: always."""
        del seconds
        return True

    def take(self) -> list[Batch]:
        """The batches of the next step, one for each of its parts."""
        batches: list[Batch] = []
        for part in range(self._parts):
            place = part * self._group.world_size + self._group.rank
            start = self._step * self._batch_size + place * self._size
            rows = self._rows.index_select(0, self._order[start : start + self._size])
            batches.append({"inputs": rows[:, : self._n_inputs], "targets": rows[:, self._n_inputs :]})
        self._step += 1
        return batches


class TableData:
    """The training and validation rows of `centrals` tables (`galdist.data.TrainingData`).

    Parameters
    ----------
    steps
        step folders that hold a `catalog.zarr` with the table ``centrals``.
    inputs, targets
        columns that the model reads, and those that it learns.

    Raises
    ------
    ValueError
        where a split has no rows, a column is missing, or a number is not finite.
    """

    def __init__(self, steps: Sequence[Path], inputs: Sequence[str], targets: Sequence[str]) -> None:
        self._inputs, self._targets = list(inputs), list(targets)
        self._training, self._validation = (
            _read(steps, inputs, targets, split) for split in ("train", "validation")
        )

    def batches(self, group: ddp.Group, batch_size: int, parts: int, seed: int) -> RowBatches:
        """Batches of the training rows; rows that do not fill one are left out of the epoch.

        Parameters
        ----------
        batch_size
            rows of a step, over all ranks.
        parts
            parts of a step on each rank (gradient accumulation).

        Raises
        ------
        ValueError
            where ``batch_size`` cannot be shared by ``parts`` on every rank, or exceeds the training rows.
        """
        batches = RowBatches(self._training, group, batch_size, parts, seed)
        if batches.steps == 0:
            raise ValueError(
                f"there are {len(self._training.inputs)} training rows, fewer than the batch_size of "
                f"{batch_size}: lower it"
            )
        return batches

    def training_fields(self, field: str) -> Iterator[NDArray[np.float32]]:
        """``field`` of the training rows of every simulation, one at a time."""
        rows = self._training
        if field in self._inputs:
            values = rows.inputs[:, self._inputs.index(field)]
        else:
            values = rows.targets[:, self._targets.index(field)]
        yield from np.split(values.numpy(), rows.ends[:-1])

    def validation_batches(self, group: ddp.Group, done: int = 0) -> Iterator[Batch | None]:
        """The validation rows in rounds: a batch for each rank, None for those that the last round leaves
        out.

        The first ``done`` batches (of all ranks) are left out.
        """
        rows = self._validation
        starts = range(0, len(rows.inputs), _VALIDATION_ROWS)
        for first in range(done, len(starts), group.world_size):
            number = first + group.rank
            if number >= len(starts):
                yield None
                continue
            part = slice(starts[number], starts[number] + _VALIDATION_ROWS)
            yield {"inputs": rows.inputs[part], "targets": rows.targets[part]}

    def close(self) -> None:
        """Nothing was kept on the disk."""


@dataclass(frozen=True)
class _Rows:
    """Rows of a split, those of a simulation beside each other."""

    inputs: Tensor
    """(n, d) float32."""
    targets: Tensor
    """(n, t) float32."""
    ends: NDArray[Any]
    """Where each simulation's rows end."""


def _read(steps: Sequence[Path], inputs: Sequence[str], targets: Sequence[str], split: Split) -> _Rows:
    centrals = read_centrals(steps, (*inputs, *targets), split)
    where = ", ".join(str(step / "catalog.zarr") for step in steps)
    n = len(centrals)
    if n == 0:
        raise ValueError(
            f"{where}: no row of `centrals` has the split {split!r}; give it a share in the step that made "
            "the table"
        )
    for column in (*inputs, *targets):
        wrong = np.flatnonzero(~np.isfinite(centrals.columns[column]))
        if wrong.size:
            first = wrong[0]
            name = centrals.simulations[centrals.simulation[first]].name
            raise ValueError(
                f"{where}: column {column!r} is {centrals.columns[column][first]} in {wrong.size} of {n} "
                f"rows of the split {split!r}, first in row {centrals.row[first]} of {name}: leave such "
                "halos out of the table, or this column out of the model"
            )
    ends = np.cumsum(np.bincount(centrals.simulation, minlength=len(centrals.simulations)))

    def matrix(names: Sequence[str]) -> Tensor:
        values = np.stack([centrals.columns[name] for name in names], axis=1)
        return torch.from_numpy(values.astype(np.float32))

    return _Rows(matrix(inputs), matrix(targets), ends)
