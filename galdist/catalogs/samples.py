"""The samples store: galaxy properties that a model gave the halos of `centrals` tables.

Zarr v3, one group a simulation, rows first: ``row`` (n,) the rows of the simulation's table, ``point`` (n, t)
one best value of each of the t properties, ``samples`` (n, S, t) draws that are joint over the properties,
``quantiles`` (n, q, t) where there are any, and ``extrapolated`` (n,): whether an input of the halo lies
outside the range that the model was trained on. Values are in the units of the table's columns.

All arrays of a simulation are cut at the same rows. Who creates a store makes every array of it at once;
writers then fill whole chunks that they alone own. What was never written reads as an error, not as zeros.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import ZstdCodec

from galdist.catalogs.centrals import Centrals
from galdist.grids.store import SimulationAttrs, StoreError, consolidate, open_root, unknown_name, use_zarrs
from hpc.strict import repeated

FORMAT = "galdist-samples"
VERSION = 1
_VALUES = 1 << 19  # float32 numbers in a chunk of samples: 2 MB, for ranks share chunks
_ROWS = 1 << 17  # in a chunk at most


@dataclass(frozen=True)
class Samples:
    """Rows of a samples store, in memory."""

    simulation: NDArray[np.int64]
    """(n,) position of each row's simulation in `SamplesStore.names`."""
    row: NDArray[np.int64]
    """(n,) row in the `centrals` table of that simulation."""
    point: NDArray[np.float32]
    """(n, t) best single values."""
    samples: NDArray[np.float32]
    """(n, S, t) draws."""
    extrapolated: NDArray[np.bool_]
    """(n,) whether an input lies outside the training range."""
    quantiles: NDArray[np.float32] | None = None
    """(n, q, t) marginal quantiles at `SamplesStore.levels`; None where the store has none."""

    def __len__(self) -> int:
        return len(self.row)


class SamplesStore:
    """What a model, or several side by side, gave the halos of some simulations."""

    def __init__(self, path: str | Path, root: zarr.Group) -> None:
        self.path = Path(path)
        self._root = root
        self.targets: tuple[str, ...] = tuple(_strings(root.attrs["targets"]))
        """Properties, in the order of the last axis."""
        self.levels: tuple[float, ...] = tuple(cast("list[float]", root.attrs["levels"]))
        """Levels of the quantiles; none where there are none."""
        self.n_samples = int(cast(int, root.attrs["n_samples"]))
        self.label = str(root.attrs["label"])
        """What people call the model; seeds of one model share it."""
        self.model = str(root.attrs["model"])
        """Its family."""
        self.checkpoints: tuple[str, ...] = tuple(_strings(root.attrs["checkpoints"]))
        """sha256 of the weights of each model that took part."""
        self.source_columns = {
            str(name): str(source)
            for name, source in cast("dict[str, Any]", root.attrs["source_columns"]).items()
        }
        """Property -> its name in the table that the model learned from."""
        self.chunk = int(cast(int, root.attrs["chunk"]))
        """Rows that are written together."""

    def names(self) -> list[str]:
        """Names of the simulations."""
        return _strings(self._root.attrs["simulations"])

    def _group(self, simulation: str) -> zarr.Group:
        if simulation not in self.names():
            raise StoreError(unknown_name(f"{self.path}: simulation", simulation, self.names()))
        return cast(zarr.Group, self._root[simulation])

    def _array(self, simulation: str, name: str) -> "zarr.Array[Any]":
        return cast("zarr.Array[Any]", self._group(simulation)[name])

    def attrs(self, simulation: str) -> SimulationAttrs:
        """What is known of a simulation."""
        return SimulationAttrs.model_validate(self._group(simulation).attrs.asdict())

    def n_rows(self, simulation: str) -> int:
        """Rows of a simulation."""
        return int(self._array(simulation, "row").shape[0])

    def starts(self, simulation: str) -> range:
        """First rows of its chunks."""
        return range(0, self.n_rows(simulation), self.chunk)

    def write(
        self,
        simulation: str,
        start: int,
        row: NDArray[np.integer[Any]],
        point: NDArray[Any],
        samples: NDArray[Any],
        extrapolated: NDArray[np.bool_],
        quantiles: NDArray[Any] | None = None,
    ) -> None:
        """Write one whole chunk, which nobody else writes.

        Parameters
        ----------
        simulation
            one of `names`.
        start
            first row of the chunk, one of `starts`.
        row, point, samples, extrapolated, quantiles
            as in `Samples`, for the rows of the chunk.

        Raises
        ------
        StoreError
            for what is no whole chunk, has another shape than the store, or is not a finite number.
        """
        where = f"{self.path}/{simulation}"
        n = min(self.chunk, self.n_rows(simulation) - start)
        if start not in self.starts(simulation):
            raise StoreError(f"{where}: row {start} is not the first of a chunk of {self.chunk} rows")
        arrays: dict[str, NDArray[Any]] = {"point": point, "samples": samples, "extrapolated": extrapolated}
        if quantiles is not None:
            arrays["quantiles"] = quantiles
        elif self.levels:
            raise StoreError(f"{where}: quantiles at levels {self.levels} are missing")
        arrays["row"] = row  # last: rows that can be read have all of the rest
        for name, values in arrays.items():
            if name not in self._group(simulation):
                raise StoreError(f"{where}: the store was created without {name}")
            expected = (n, *self._array(simulation, name).shape[1:])
            if values.shape != expected:
                raise StoreError(
                    f"{where}: {name} of the rows from {start} has shape {values.shape}, not {expected}: "
                    "a writer writes whole chunks"
                )
            if not np.isfinite(values).all():
                bad = int((~np.isfinite(values.reshape(n, -1))).any(1).sum())
                raise StoreError(
                    f"{where}: {name} is not a finite number for {bad} of the {n} rows from {start}: the "
                    "model that gave it is broken, or was trained on such values"
                )
        for name, values in arrays.items():
            self._array(simulation, name)[start : start + n] = values

    def read(self, simulation: str | None = None, rows: slice = slice(None)) -> Samples:
        """Rows of a simulation; of all simulations, one after the other, where none is named.

        Parameters
        ----------
        simulation
            one of `names`.
        rows
            which of each simulation's rows.

        Raises
        ------
        StoreError
            for a simulation that is not there, and for rows that were never written or cannot be read.
        """
        parts = [self._read(name, rows) for name in (self.names() if simulation is None else [simulation])]
        if len(parts) == 1:
            return parts[0]

        def together(name: str) -> NDArray[Any]:
            return np.concatenate([getattr(part, name) for part in parts])

        return Samples(
            simulation=together("simulation"),
            row=together("row"),
            point=together("point"),
            samples=together("samples"),
            extrapolated=together("extrapolated"),
            quantiles=together("quantiles") if self.levels else None,
        )

    def chunks(self, simulation: str) -> Iterator[Samples]:
        """A simulation's rows, chunk by chunk: in bounded memory, however many there are."""
        for start in self.starts(simulation):
            yield self._read(simulation, slice(start, start + self.chunk))

    def _read(self, simulation: str, rows: slice) -> Samples:
        group = self._group(simulation)
        names = ("row", "point", "samples", "extrapolated", *(["quantiles"] if self.levels else []))
        try:
            found = {name: np.asarray(cast("zarr.Array[Any]", group[name])[rows]) for name in names}
        except KeyError as error:
            raise StoreError(f"{self.path}/{simulation}: the array {error} is missing") from error
        except (RuntimeError, ValueError) as error:
            raise StoreError(
                f"{self.path}/{simulation}: damaged ({error}): remove the folder of the step that made it, "
                "and run it again"
            ) from error
        missing = found["row"] < 0
        for name in names[1:]:
            if found[name].dtype == np.float32:
                missing |= np.isnan(found[name][:, 0].reshape(len(missing), -1)[:, 0])  # whole chunks are
        if missing.any():
            raise StoreError(
                f"{self.path}/{simulation}: {missing.sum()} of {len(missing)} rows were never written: "
                "the step that fills the store was interrupted; run it again"
            )
        index = np.full(len(found["row"]), self.names().index(simulation))
        return Samples(simulation=index, **found)


def rows_per_chunk(n_samples: int, n_targets: int) -> int:
    """Rows that a store of so many samples and properties writes together, a power of two."""
    rows = max(1, _VALUES // (n_samples * n_targets))
    return min(_ROWS, 1 << (rows.bit_length() - 1))


def create_samples(
    path: str | Path,
    simulations: Sequence[tuple[SimulationAttrs, int]],
    targets: Sequence[str],
    n_samples: int,
    label: str,
    model: str,
    checkpoints: Sequence[str] = (),
    levels: Sequence[float] = (),
    source_columns: Mapping[str, str] | None = None,
    units: Mapping[str, str] | None = None,
) -> SamplesStore:
    """Create a store with every array of it, nothing written yet; whatever was at ``path`` goes.

    Parameters
    ----------
    path
        the store's folder, such as ``out / "samples.zarr"``.
    simulations
        each with its number of rows.
    targets
        the properties, in the order of the last axis.
    n_samples
        draws a row.
    label
        what people call the model; seeds of one model share it.
    model
        its family.
    checkpoints
        sha256 of the weights.
    levels
        of the quantiles; none by default.
    source_columns
        property -> name in the user's table.
    units
        property -> unit, for readers of the store.

    Raises
    ------
    StoreError
        where there are no rows, no targets or no samples, a name is given twice, or levels are not in (0, 1).
    """
    names = [attrs.name for attrs, _ in simulations]
    for what, given in (("simulation", names), ("target", list(targets))):
        if not given:
            raise StoreError(f"{path}: a store needs at least one {what}")
        if twice := repeated(given):
            raise StoreError(f"{path}: {what} {twice[0]!r} is given twice")
    for attrs, n in simulations:
        if n < 1:
            raise StoreError(f"{path}: simulation {attrs.name!r} has {n} rows; leave it out")
    if n_samples < 1:
        raise StoreError(f"{path}: {n_samples} samples a row; at least one was expected")
    if not all(0 < level < 1 for level in levels):
        raise StoreError(f"{path}: levels of quantiles lie in (0, 1), got {tuple(levels)}")
    chunk, t = rows_per_chunk(n_samples, len(targets)), len(targets)
    use_zarrs()
    root = zarr.create_group(path, zarr_format=3, overwrite=True)
    arrays: list[tuple[str, tuple[int, ...], str, tuple[str, ...], float]] = [
        ("row", (), "int64", (), -1),
        ("point", (t,), "float32", ("target",), np.nan),
        ("samples", (n_samples, t), "float32", ("sample", "target"), np.nan),
        ("extrapolated", (), "bool", (), False),
    ]
    if levels:
        arrays.append(("quantiles", (len(levels), t), "float32", ("level", "target"), np.nan))
    for attrs, n in simulations:
        group = root.create_group(attrs.name, attributes=attrs.model_dump(mode="json"))
        for name, shape, dtype, dimensions, fill in arrays:
            group.create_array(
                name,
                shape=(n, *shape),
                chunks=(min(chunk, n), *shape),
                dtype=dtype,
                compressors=ZstdCodec(level=1) if name in ("row", "extrapolated") else None,
                fill_value=fill,
                dimension_names=("row", *dimensions),
            )
    # Last, so that a store whose creation was cut short does not open.
    root.update_attributes(
        {
            "format": FORMAT,
            "version": VERSION,
            "label": label,
            "model": model,
            "checkpoints": list(checkpoints),
            "targets": list(targets),
            "units": {target: (units or {}).get(target, "") for target in targets},
            "n_samples": n_samples,
            "levels": [float(level) for level in levels],
            "source_columns": dict(source_columns or {}),
            "chunk": chunk,
            "simulations": names,
        }
    )
    consolidate(root)
    return open_samples(path, mode="r+")


def open_samples(path: str | Path, mode: Literal["r", "r+"] = "r") -> SamplesStore:
    """Open the store at ``path``; ``r+`` to fill it.

    Raises
    ------
    StoreError
        where there is no store, or it is of another format or version.
    """
    where = "the stages `sample` and `baseline` leave one, samples.zarr"
    return SamplesStore(path, open_root(path, "samples store", FORMAT, VERSION, where, mode))


def aligned(store: SamplesStore, centrals: Centrals, draws: slice = slice(None)) -> Samples:
    """What a model gave the halos of a table: row i is of row i of ``centrals``.

    What the store has of other halos is left out. Takes the memory of what it returns, and of a chunk.

    Parameters
    ----------
    draws
        which of each halo's.

    Raises
    ------
    StoreError
        for halos that the store lacks, and for a simulation in it that the table has not.
    """
    names = [attrs.name for attrs in centrals.simulations]
    if strangers := sorted(set(store.names()) - set(names)):
        raise StoreError(
            f"{store.path} is of simulation {strangers[0]!r}, which the catalogue has not "
            f"({', '.join(names)})"
        )
    n, t = len(centrals), len(store.targets)
    whole = Samples(
        simulation=np.full(n, -1),
        row=centrals.row,
        point=np.empty((n, t), np.float32),
        samples=np.empty((n, len(range(store.n_samples)[draws]), t), np.float32),
        extrapolated=np.empty(n, np.bool_),
        quantiles=np.empty((n, len(store.levels), t), np.float32) if store.levels else None,
    )
    for index in np.unique(centrals.simulation):
        here = np.flatnonzero(centrals.simulation == index)
        here = here[np.argsort(centrals.row[here])]
        row, name = centrals.row[here], names[index]
        for part in store.chunks(name) if name in store.names() else ():
            at = np.minimum(np.searchsorted(row, part.row), len(row) - 1)
            wanted = row[at] == part.row
            to = here[at[wanted]]
            whole.simulation[to] = part.simulation[wanted]
            whole.point[to] = part.point[wanted]
            whole.samples[to] = part.samples[wanted, draws]
            whole.extrapolated[to] = part.extrapolated[wanted]
            if whole.quantiles is not None and part.quantiles is not None:
                whole.quantiles[to] = part.quantiles[wanted]
        if missing := np.count_nonzero(whole.simulation[here] < 0):
            raise StoreError(
                f"{store.path}: {missing} of the {len(here)} halos of {name} were not predicted: predict "
                "them, with the same catalogue and `split`"
            )
    return whole


def _strings(value: Any) -> list[str]:
    return [str(item) for item in value]
