"""Rows of halos with their central galaxies, from `centrals` tables, for models of tables.

All rows are in memory, as one float32 matrix. The order of the training rows is a permutation that ``(seed,
epoch)`` decides, and a row's place in it decides its step: any number of ranks trains on the same batches,
and a resumed run sees what it would have seen.

A model may look at a halo's neighbors (`galdist.models.tables.TableObjective.neighborhood`): these are halos
of the same simulation, of all splits, for they are inputs only. Who they are is found once.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from galdist.catalogs.centrals import Centrals, read_centrals
from galdist.catalogs.neighbors import Halos, Neighborhood, Neighbors
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
        return TableData(steps, objective.inputs, objective.targets, objective.neighborhood)


class Surroundings:
    """Neighbors of n halos as batches have them (`galdist.models.tables.TableObjective`).

    Parameters
    ----------
    halos
        (m, d) inputs of all halos that are somebody's neighbor.
    neighbors
        of the n halos; ``row`` is a place in ``halos``.
    """

    def __init__(self, halos: Tensor, neighbors: Neighbors, device: torch.device) -> None:
        self._halos = halos.to(device)
        self._count, self._row, self._distance = (
            torch.from_numpy(values).to(device)
            for values in (neighbors.count, neighbors.row, neighbors.distance)
        )
        self._first = self._count.cumsum(0) - self._count

    def of(self, rows: Tensor) -> dict[str, Tensor]:
        """Neighbors of the halos ``rows`` (b,), places from 0 to n - 1, for a batch of these."""
        count = self._count[rows]
        receiver = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), count)
        # The edges of a halo lie beside each other: the k-th of the batch is the (k - those before it)-th.
        offset = self._first[rows] - (count.cumsum(0) - count)
        edges = torch.arange(len(receiver), device=rows.device) + offset[receiver]
        return {
            "neighbors": self._halos[self._row[edges]],
            "distance": self._distance[edges],
            "receiver": receiver,
        }


class RowBatches:
    """This rank's training batches (`galdist.data.Batches`); see `TableData.batches`."""

    def __init__(self, rows: "_Rows", group: ddp.Group, batch_size: int, parts: int, seed: int) -> None:
        # Beside each other: a row is one place in memory.
        self._rows = torch.cat([rows.inputs, rows.targets], 1).to(group.device)
        self._n_inputs = rows.inputs.shape[1]
        self._surroundings = rows.surroundings(group.device)
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
            chosen = self._order[start : start + self._size]
            rows = self._rows.index_select(0, chosen)
            batch: Batch = {"inputs": rows[:, : self._n_inputs], "targets": rows[:, self._n_inputs :]}
            if self._surroundings is not None:
                batch |= self._surroundings.of(chosen)
            batches.append(batch)
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
    neighborhood
        of each halo that the model looks at; then the tables have positions.

    Raises
    ------
    ValueError
        where a split has no rows, a column is missing, a number is not finite, or the linking length does
        not fit into a box.
    """

    def __init__(
        self,
        steps: Sequence[Path],
        inputs: Sequence[str],
        targets: Sequence[str],
        neighborhood: Neighborhood | None = None,
    ) -> None:
        self._inputs, self._targets = list(inputs), list(targets)
        around = None if neighborhood is None else _Around(steps, inputs, neighborhood)
        self._training, self._validation = (
            _read(steps, inputs, targets, split, around) for split in ("train", "validation")
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
        surroundings = rows.surroundings(torch.device("cpu"))
        starts = range(0, len(rows.inputs), _VALIDATION_ROWS)
        for first in range(done, len(starts), group.world_size):
            number = first + group.rank
            if number >= len(starts):
                yield None
                continue
            part = slice(starts[number], starts[number] + _VALIDATION_ROWS)
            batch: Batch = {"inputs": rows.inputs[part], "targets": rows.targets[part]}
            if surroundings is not None:
                batch |= surroundings.of(torch.arange(len(rows.inputs))[part])
            yield batch

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
    around: tuple[Tensor, Neighbors] | None
    """What `Surroundings` are made of, for a model that looks at them."""

    def surroundings(self, device: torch.device) -> Surroundings | None:
        """Neighbors of the rows."""
        return None if self.around is None else Surroundings(*self.around, device)


class _Around:
    """All halos of the tables, and which of them are neighbors of one."""

    def __init__(self, steps: Sequence[Path], inputs: Sequence[str], neighborhood: Neighborhood) -> None:
        self._neighborhood = neighborhood
        centrals = read_centrals(steps, (*inputs, "position"), None)
        _require_finite(centrals, (*inputs, "position"), steps, "")
        self._inputs = _matrix(centrals, inputs)
        sizes = np.bincount(centrals.simulation, minlength=len(centrals.simulations))
        self._first = np.cumsum(sizes) - sizes
        self._boxes = [
            Halos(self._inputs[here], centrals.columns["position"][here], attrs.box_size)
            for here, attrs in zip(
                map(slice, self._first, self._first + sizes), centrals.simulations, strict=True
            )
        ]

    def of(self, rows: Centrals) -> tuple[Tensor, Neighbors]:
        """What `Surroundings` of these rows are made of."""
        parts = [
            halos.neighbors(rows.row[rows.simulation == number], self._neighborhood)
            for number, halos in enumerate(self._boxes)
        ]
        return torch.from_numpy(self._inputs), Neighbors(
            np.concatenate([part.count for part in parts]),
            np.concatenate([part.row + first for part, first in zip(parts, self._first, strict=True)]),
            np.concatenate([part.distance for part in parts]),
        )


def _read(
    steps: Sequence[Path],
    inputs: Sequence[str],
    targets: Sequence[str],
    split: Split,
    around: _Around | None,
) -> _Rows:
    centrals = read_centrals(steps, (*inputs, *targets), split)
    if len(centrals) == 0:
        raise ValueError(
            f"{_where(steps)}: no row of `centrals` has the split {split!r}; give it a share in the step "
            "that made the table"
        )
    _require_finite(centrals, (*inputs, *targets), steps, f" of the split {split!r}")
    ends = np.cumsum(np.bincount(centrals.simulation, minlength=len(centrals.simulations)))
    return _Rows(
        torch.from_numpy(_matrix(centrals, inputs)),
        torch.from_numpy(_matrix(centrals, targets)),
        ends,
        None if around is None else around.of(centrals),
    )


def _where(steps: Sequence[Path]) -> str:
    return ", ".join(str(step / "catalog.zarr") for step in steps)


def _require_finite(centrals: Centrals, columns: Sequence[str], steps: Sequence[Path], which: str) -> None:
    n = len(centrals)
    for column in columns:
        values = centrals.columns[column]
        wrong = np.flatnonzero(~np.isfinite(values.reshape(n, -1)).all(1))
        if wrong.size:
            first = wrong[0]
            name = centrals.simulations[centrals.simulation[first]].name
            raise ValueError(
                f"{_where(steps)}: column {column!r} is {values[first]} in {wrong.size} of {n} rows{which}, "
                f"first in row {centrals.row[first]} of {name}: leave such halos out of the table, or this "
                "column out of the model"
            )


def _matrix(centrals: Centrals, names: Sequence[str]) -> NDArray[np.float32]:
    return np.stack([centrals.columns[name] for name in names], axis=1).astype(np.float32)
