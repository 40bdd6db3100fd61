"""Galaxies drawn from trained models of tables: `Union`, and the stage `sample` that fills a samples store.

`fill` does so with whatever draws galaxies (`Drawer`): trained models, or a baseline.

Rows are drawn in chunks, and a chunk's draws depend on the seed, its number and its halos alone: whoever
makes it, in whatever order, on however many ranks. In memory are a chunk of samples and the rows that it is
made for.
"""

import copy
import hashlib
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field as Constraint
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from galdist.catalogs.catalog import CatalogStore, open_catalog
from galdist.catalogs.centrals import SPLITS, TABLE, simulation_columns
from galdist.catalogs.columns import ColumnSource
from galdist.catalogs.neighbors import Halos
from galdist.catalogs.samples import SamplesStore, create_samples, open_samples
from galdist.config import StrictModel
from galdist.data.tables import Surroundings
from galdist.grids.store import SimulationAttrs
from galdist.models.tables import TableObjective
from galdist.statistics.metrics import metric_row, save_metrics
from galdist.training.checkpoint import CheckpointError, describe_model, load_model
from hpc import ddp, durable, progress

_DRAWS = 1 << 13  # that a model makes at a time at most: its layers fit into the cache of a processor
_ROWS = 1 << 12  # that a model looks at at a time at most
_LIKE = 1.5  # factor between mean densities of halos that are taken for alike

Level = Annotated[float, Constraint(gt=0, lt=1)]


class SampleConfig(StrictModel):
    """Settings of the stage `sample`."""

    split: Literal["train", "validation", "test", "all"] = "test"
    """Rows to draw for."""
    samples: PositiveInt = 50
    """Draws a row."""
    levels: tuple[Level, ...] = ()
    """Of quantiles to store too; only for models that have quantiles of their own."""
    label: str | None = None
    """What people call the model: seeds of one model share it. By default the names of the families."""
    seed: NonNegativeInt = 0


class Drawer(ABC):
    """What gives halos galaxies.

    Arrays in and out are NumPy's, in the columns' own units; inputs (n, d) in the order of `inputs`, results
    in the order of `targets`.
    """

    name: str
    """Of the family."""
    inputs: tuple[str, ...]
    targets: tuple[str, ...]
    units: Mapping[str, str]
    """Of the targets."""
    source_columns: Mapping[str, str]
    """Target -> its name in the table that was learned from."""
    checkpoints: Sequence[str]
    """sha256 of the weights, where there are any."""
    low: NDArray[np.float32]
    """(d,) least training values of the inputs."""
    high: NDArray[np.float32]
    """(d,) greatest ones."""
    needs_neighbors: bool = False
    """Whether it draws only after it was told of these, by `among`."""

    @abstractmethod
    def point(self, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """Best single values (n, t)."""

    @abstractmethod
    def sample(self, inputs: NDArray[np.float32], n: int, seed: int, chunk: int = 0) -> NDArray[np.float32]:
        """``n`` draws for each row, (rows, n, t): the same for the same rows, ``seed`` and ``chunk``."""

    @abstractmethod
    def quantiles(self, inputs: NDArray[np.float32], levels: Sequence[float]) -> NDArray[np.float32]:
        """Marginal quantiles (n, q, t) at ``levels``.

        Raises
        ------
        ValueError
            where it has none of its own there.
        """

    def require(self, levels: Sequence[float]) -> None:
        """Raise ValueError where there are no `quantiles` at these levels."""
        if levels:
            self.quantiles(self.low[None], levels)

    def among(self, halos: Halos, rows: NDArray[np.int64]) -> "Drawer":
        """The same for the halos ``rows`` among ``halos``: the inputs it gets next are these, in this order.

        Raises
        ------
        ValueError
            where neighbors cannot be had.
        """
        del halos, rows
        return self

    def outside(self, inputs: NDArray[np.float32]) -> dict[str, NDArray[np.int8]]:
        """Input -> (n,): -1 below the range of the training rows, 1 above it, 0 within."""
        above, below = inputs > self.high, inputs < self.low
        return dict(zip(self.inputs, (above.astype(np.int8) - below.astype(np.int8)).T, strict=True))


def extrapolated(outside: Mapping[str, NDArray[np.int8]]) -> NDArray[np.bool_]:
    """Which halos something of is `Drawer.outside` the training range, (n,)."""
    return np.any([values != 0 for values in outside.values()], axis=0)


class Union(Drawer):
    """Trained models of tables with different targets, side by side: as one model of all of these.

    Between two models the draws are independent given the halo. Models that look at neighbors find them by
    `among`, each within its own linking length.

    Parameters
    ----------
    steps
        train steps' folders, or the `model` folders in them.
    device
        where they compute; by default the first GPU, or the CPU where there is none.

    Raises
    ------
    galdist.training.checkpoint.CheckpointError
        where a folder holds no model of tables, or two models have a target in common.
    """

    def __init__(self, steps: Sequence[Path], device: torch.device | None = None) -> None:
        if not steps:
            raise CheckpointError("no model is named")
        self._device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.models: list[TableObjective] = []
        self.checkpoints: list[str] = []
        self.columns: dict[str, dict[str, Any]] = {}
        """What `model.yaml` says of each input and target (`galdist.training.checkpoint.table_facts`)."""
        owner: dict[str, Path] = {}
        densities: list[tuple[float, float]] = []
        for step in steps:
            objective, checksum = load_model(step)
            if not isinstance(objective, TableObjective):
                raise CheckpointError(
                    f"{step}: {objective.config.name} is a model of boxes, which the stage predict uses; a "
                    "model of halo tables was expected"
                )
            for target in objective.targets:
                if target in owner:
                    raise CheckpointError(
                        f"{target} is predicted by both {owner[target]} and {step}: models side by side have "
                        "different targets"
                    )
                owner[target] = step
            self.models.append(objective.to(self._device))
            self.checkpoints.append(checksum)
            description = describe_model(step)
            for name, about in description.get("columns", {}).items():
                self.columns.setdefault(name, about)
            if "halo_density" in description:
                low, high = description["halo_density"]
                densities.append((low / _LIKE, high * _LIKE))
        self.inputs = tuple(dict.fromkeys(name for model in self.models for name in model.inputs))
        self.targets = tuple(owner)
        about = {name: facts for name, facts in self.columns.items() if name in self.targets}
        self.units = {name: str(facts["units"]) for name, facts in about.items()}
        self.source_columns = {
            name: ColumnSource.user_name(name, facts.get("source")) for name, facts in about.items()
        }
        self.name = " + ".join(dict.fromkeys(model.config.name for model in self.models))
        """Names of the families."""
        self._places = [[self.inputs.index(name) for name in model.inputs] for model in self.models]
        self.low, self.high = (self._range(end) for end in ("low", "high"))
        """Range (d,) of each input over the training rows, the narrowest where models differ."""
        self.needs_neighbors = any(model.neighborhood is not None for model in self.models)
        self._densities = densities
        self._density: float | None = None
        self._surroundings: list[Surroundings | None] | None = None

    def _range(self, end: str) -> NDArray[np.float32]:
        found = np.full((len(self.models), len(self.inputs)), np.nan, np.float32)
        for k, (model, places) in enumerate(zip(self.models, self._places, strict=True)):
            found[k, places] = model.get_buffer(f"input_{end}").cpu().numpy()
        return np.asarray(np.nanmax(found, axis=0) if end == "low" else np.nanmin(found, axis=0))

    def among(self, halos: Halos, rows: NDArray[np.int64]) -> "Union":
        if not self.needs_neighbors:
            return self
        bound = copy.copy(self)
        bound._density = halos.density
        bound._surroundings = []
        for model, places in zip(self.models, self._places, strict=True):
            if model.neighborhood is None:
                bound._surroundings.append(None)
                continue
            neighbors = halos.neighbors(rows, model.neighborhood)
            seen, place = np.unique(neighbors.row, return_inverse=True)  # few of all halos
            inputs = torch.from_numpy(halos.inputs[seen][:, places])
            bound._surroundings.append(Surroundings(inputs, replace(neighbors, row=place), self._device))
        return bound

    def outside(self, inputs: NDArray[np.float32]) -> dict[str, NDArray[np.int8]]:
        """As `Drawer.outside`; ``halo_density`` is that of the table, the same for all of its halos.

        It is outside where it differs by more than a factor of 1.5 from those of the training simulations:
        neighbors are then others than those that were learned from.
        """
        found = super().outside(inputs)
        if self._density is not None and self._densities:
            low, high = (np.array(ends) for ends in zip(*self._densities, strict=True))
            side = int((self._density > high).any()) - int((self._density < low).any())
            found["halo_density"] = np.full(len(inputs), side, np.int8)
        return found

    def point(self, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """Best single values (n, t); whether means or medians, the families say."""
        return self._each(inputs, _ROWS, lambda k, model, batch: model.point(batch))

    def sample(self, inputs: NDArray[np.float32], n: int, seed: int, chunk: int = 0) -> NDArray[np.float32]:
        """``n`` joint draws for each row, (rows, n, t): the same for the same rows, ``seed`` and ``chunk``.

        (On the same kind of device: GPUs have other generators than CPUs.)
        """
        # Without the halos, those of two tables would share their random numbers row by row.
        halos = np.frombuffer(hashlib.sha256(inputs.tobytes()).digest(), np.uint32).tolist()
        generators = [
            torch.Generator(self._device).manual_seed(_seed(seed, k, chunk, *halos))
            for k in range(len(self.models))
        ]
        rows = max(1, min(_ROWS, _DRAWS // n))
        return self._each(inputs, rows, lambda k, model, batch: model.sample(batch, n, generators[k]))

    def quantiles(self, inputs: NDArray[np.float32], levels: Sequence[float]) -> NDArray[np.float32]:
        wanted = torch.tensor(levels, dtype=torch.float32, device=self._device)

        def of(k: int, model: TableObjective, batch: dict[str, Tensor]) -> Tensor:
            found = model.quantiles(batch, wanted)
            if found is None:
                only = f", only at {', '.join(map(str, model.LEVELS))}" if model.LEVELS else ""
                given = ", ".join(map(str, levels))
                raise ValueError(
                    f"{model.config.name} has no quantiles of its own at {given}{only}: ask for samples, and "
                    "take theirs"
                )
            return found

        return self._each(inputs, max(1, min(_ROWS, _DRAWS // len(levels))), of)

    def require(self, levels: Sequence[float]) -> None:
        alone = Halos(self.low[None], np.zeros((1, 3)), box_size=1e6)
        if levels:
            self.among(alone, np.zeros(1, np.int64)).quantiles(self.low[None], levels)

    def _each(
        self,
        inputs: NDArray[np.float32],
        rows: int,
        ask: Callable[[int, TableObjective, dict[str, Tensor]], Tensor],
    ) -> NDArray[np.float32]:
        """What ``ask(number, model, batch)`` gives of batches of rows, targets of all models side by side."""
        if self.needs_neighbors and self._surroundings is None:
            raise ValueError(f"{self.name} looks at the neighbors of halos: give them first, by `among`")
        parts = []
        with torch.inference_mode():
            for start in range(0, len(inputs), rows):
                part = torch.from_numpy(inputs[start : start + rows]).to(self._device)
                here = torch.arange(start, start + len(part), device=self._device)
                found = []
                for k, model in enumerate(self.models):
                    batch = {"inputs": part[:, self._places[k]]}
                    surroundings = None if self._surroundings is None else self._surroundings[k]
                    if surroundings is not None:
                        batch |= surroundings.of(here)
                    found.append(ask(k, model, batch))
                parts.append(torch.cat(found, -1).float().cpu().numpy())
        return np.concatenate(parts)


def _seed(*entropy: int) -> int:
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


def sample(config: SampleConfig, inputs: Mapping[str, list[Path]], out: Path) -> None:
    """Draw galaxies for the rows of `centrals` tables; every rank calls it.

    Called again on the same folder it does the chunks that are not yet there.

    Parameters
    ----------
    config
        settings.
    inputs
        `catalogs`: steps with a `catalog.zarr` that holds `centrals` tables; `models`: train steps, whose
        models have no target in common.
    out
        step folder. Gets `samples.zarr` and `metrics.json`: the rate, the fraction of rows outside the
        training range, and the errors of the points where the tables hold the truth.

    Raises
    ------
    ValueError
        where there are no such rows, the tables lack what a model reads, or quantiles are asked of a model
        that has none there. Nothing was written then.
    hpc.ddp.Stopped
        where a signal asked to stop, before the next chunk; chunks that are done stay.
    """
    with ddp.group() as group, ddp.stop_requests() as stop:
        fill(config, Union(inputs["models"], group.device), inputs["catalogs"], out, group, stop)


def fill(
    config: SampleConfig,
    model: Drawer,
    catalogs: Sequence[Path],
    out: Path,
    group: ddp.Group,
    stop: ddp.StopRequest,
) -> None:
    """Fill `out / "samples.zarr"` with what ``model`` draws, and write `metrics.json`; every rank calls it.

    Parameters and errors are those of `sample`.
    """
    model.require(config.levels)
    tables = _tables(catalogs, config.split, model)
    path, parts = out / "samples.zarr", out / "parts"
    if group.is_main:
        _create(path, parts, config, model, tables)
    group.barrier()
    work = _Sampling(config, model, open_samples(path, mode="r+"), parts)
    items = [(table, start) for table in tables for start in work.store.starts(table.name)]
    # As the main rank sees it: a file system may show the others less, and all must share alike.
    missing = group.broadcast([n for n in range(len(items)) if not work.part(n).exists()])
    done = len(items) - len(missing)
    for first in range(0, len(missing), group.world_size):
        if group.any(bool(stop))[0]:
            raise ddp.Stopped(stop.signum)
        mine = missing[first : first + group.world_size][group.rank : group.rank + 1]
        for n in mine:
            work.chunk(n, *items[n])
        done = min(done + group.world_size, len(items))
        if group.is_main:
            progress.report(done, len(items), items[missing[first]][0].name)
    group.barrier()
    if group.is_main:
        work.save_metrics(out, len(items))
    group.barrier()


@dataclass(frozen=True)
class _Table:
    """The rows of a simulation's `centrals` table that are drawn for."""

    store: CatalogStore
    attrs: SimulationAttrs
    rows: NDArray[np.int64]
    inputs: tuple[str, ...]
    truth: bool
    """Whether it holds all targets."""

    @property
    def name(self) -> str:
        return self.attrs.name

    def read(self, columns: Sequence[str], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Columns (n, d) of sorted ``rows``; those that the table lacks are parameters of the simulation."""
        first = int(rows[0])
        found = simulation_columns(self.store, self.name, columns, slice(first, int(rows[-1]) + 1))
        return np.stack([found[name][rows - first] for name in columns], axis=1).astype(np.float32)

    def drawer(self, model: Drawer, rows: NDArray[np.int64]) -> Drawer:
        """``model``, told of the neighbors of ``rows`` where it looks at them."""
        return model.among(self._halos, rows) if model.needs_neighbors else model

    @cached_property
    def _halos(self) -> Halos:
        """All rows, of every split."""
        found = simulation_columns(self.store, self.name, [*self.inputs, "position"])
        matrix = np.stack([found[name] for name in self.inputs], axis=1).astype(np.float32)
        return Halos(matrix, found["position"], self.attrs.box_size)


def _tables(steps: Sequence[Path], split: str, model: Drawer) -> list[_Table]:
    tables: list[_Table] = []
    seen: dict[str, Path] = {}
    where = ", ".join(str(step / "catalog.zarr") for step in steps)
    needed = [*model.inputs, *(["position"] if model.needs_neighbors else [])]
    for step in steps:
        store = open_catalog(step / "catalog.zarr")
        for name in store.names():
            simulation_columns(store, name, needed, slice(0, 0))  # says what is missing
            codes = store.table(name, TABLE, ["split"])["split"]
            wanted = np.full(len(codes), True) if split == "all" else codes == SPLITS.index(split)
            rows = np.flatnonzero(wanted)
            if not len(rows):
                continue
            if name in seen:
                raise ValueError(f"{name!r} is in {seen[name]} and {store.path}: sample them in two steps")
            seen[name] = store.path
            truth = set(model.targets) <= store.columns(name, TABLE).keys()
            tables.append(_Table(store, store.attrs(name), rows, model.inputs, truth))
    if not tables:
        raise ValueError(f"{where}: no row has the split {split!r}; choose another `split`")
    return tables


def _create(path: Path, parts: Path, config: SampleConfig, model: Drawer, tables: Sequence[_Table]) -> None:
    """Create the store, unless it was begun with the same settings, models and rows."""
    made_with = durable.fingerprint(
        [config.model_dump(), model.checkpoints, [(table.name, len(table.rows)) for table in tables]]
    )
    begun = parts / "settings.json"
    if begun.exists() and durable.read_json(begun) == made_with:
        return
    n_rows = sum(len(table.rows) for table in tables)
    n_bytes = n_rows * (4 * len(model.targets) * (1 + config.samples + len(config.levels)) + 9)
    durable.require_space(path.parent, n_bytes, f"{config.samples} samples of {n_rows} halos")
    shutil.rmtree(parts, ignore_errors=True)  # chunks of another store
    create_samples(
        path,
        [(table.attrs, len(table.rows)) for table in tables],
        model.targets,
        config.samples,
        label=config.label or model.name,
        model=model.name,
        checkpoints=model.checkpoints,
        levels=config.levels,
        source_columns=model.source_columns,
        units=model.units,
    )
    durable.write_json(begun, made_with)


@dataclass(frozen=True)
class _Sampling:
    """What every chunk needs to know."""

    config: SampleConfig
    model: Drawer
    store: SamplesStore
    parts: Path

    def part(self, number: int) -> Path:
        """What the metrics of a chunk need; it is there when the chunk is in the store."""
        return self.parts / f"{number:06d}.json"

    def chunk(self, number: int, table: _Table, start: int) -> None:
        """Make a chunk and write it."""
        config, rows = self.config, table.rows[start : start + self.store.chunk]
        inputs = table.read(table.inputs, rows)
        began = time.perf_counter()
        model = table.drawer(self.model, rows)
        point = model.point(inputs)
        samples = model.sample(inputs, config.samples, config.seed, number)
        quantiles = model.quantiles(inputs, config.levels) if config.levels else None
        seconds = time.perf_counter() - began
        beyond = extrapolated(model.outside(inputs))
        squares: list[float] = []
        if table.truth:
            errors = point.astype(np.float64) - table.read(model.targets, rows)
            squares = np.square(errors).sum(0).tolist()
        about = {
            "rows": len(rows),
            "seconds": seconds,
            "extrapolated": int(np.count_nonzero(beyond)),
            "squares": squares,
        }
        with durable.room_for(f"chunk {number} of {table.name}", self.store.path):
            self.store.write(table.name, start, rows, point, samples, beyond, quantiles)
            durable.write_json(self.part(number), about)

    def save_metrics(self, out: Path, n_chunks: int) -> None:
        """Metrics of all rows; sums are added in one order, whoever made them."""
        parts = [durable.read_json(self.part(number)) for number in range(n_chunks)]
        total = {key: sum(part[key] for part in parts) for key in ("rows", "seconds", "extrapolated")}
        split = self.config.split
        rows = [
            metric_row("extrapolated_fraction", split, total["extrapolated"] / total["rows"]),
            metric_row("rows_per_second", split, total["rows"] / total["seconds"], unit="1/s a rank"),
        ]
        if known := [part for part in parts if part["squares"]]:
            squares = np.sum([part["squares"] for part in known], axis=0)
            rmse = np.sqrt(squares / sum(part["rows"] for part in known))
            rows += [
                metric_row(f"rmse_{target}", split, value, unit=self.model.units.get(target, ""))
                for target, value in zip(self.model.targets, rmse, strict=True)
            ]
        save_metrics(out, rows)
