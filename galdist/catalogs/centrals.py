"""The stage ``centrals``: halos with their central galaxies, one row each, ready to learn from.

It reads tables (Parquet, CSV, HDF5) or the group catalogues of a step ``catalog``, and leaves a catalogue
store whose table ``centrals`` has the columns of `galdist.catalogs.columns.QUANTITIES` that there are, others
that were asked for, ``position`` and ``split``.
"""

import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field as Constraint
from pydantic import NonNegativeFloat, model_validator

from galdist.catalogs.catalog import CatalogStore, CatalogWriter, open_catalog
from galdist.catalogs.columns import (
    QUANTITIES,
    ColumnName,
    Columns,
    ColumnSource,
    Rows,
    TableSource,
    check_columns,
    may_be_parameter,
    read_table,
)
from galdist.catalogs.structure import HalosConfig, read_catalog
from galdist.config import StrictModel
from galdist.grids.store import SimulationAttrs, Split, StoreError, unknown_name
from galdist.simulations.simulation import SimulationError
from galdist.statistics.tracers import tracer
from hpc import progress
from hpc.strict import repeated

log = logging.getLogger(__name__)

TABLE = "centrals"
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
"""The column ``split`` holds places in this."""

Fraction = Annotated[float, Constraint(ge=0, lt=1)]


class RowsSplit(StrictModel):
    """Rows of each simulation kept out of training, drawn at random."""

    kind: Literal["tracers", "rows"] = "tracers"
    """``tracers``: the same fractions of each of the seven tracers and of the galaxies of none. ``rows``: of
    all rows alike."""
    validation: Fraction = 0.15
    test: Fraction = 0.15

    @model_validator(mode="after")
    def _leave_some(self) -> "RowsSplit":
        if self.validation + self.test >= 1:
            raise ValueError(
                f"validation and test ({self.validation:g} + {self.test:g}) leave no rows to train on"
            )
        return self


class SimulationsSplit(StrictModel):
    """Whole simulations kept out of training: by name, or a fraction of them drawn at random."""

    kind: Literal["simulations"]
    validation: Fraction | tuple[str, ...] = 0.15
    test: Fraction | tuple[str, ...] = 0.15


class CatalogsSplit(StrictModel):
    """Whole simulations, as the step under ``catalogs`` has them."""

    kind: Literal["catalogs"]


class NullConfig(StrictModel):
    """What stands for a specific star formation rate of zero: numbers drawn from N(mean, sigma).

    Galaxies whose star formation the simulation does not resolve have none; their logarithm is not a number.
    The defaults are those of de Santi et al. (2022) and Rodrigues et al. (2023).
    """

    mean: float = -13.5
    """log10 h/yr."""
    sigma: NonNegativeFloat = 0.5
    values: tuple[float, ...] = ()
    """Numbers that stand for none besides NaN and -inf, such as -99: as they are in ``log_ssfr``, after the
    ``scale`` and ``log10`` of a table's column."""


class CentralsConfig(StrictModel):
    """Where halos and their central galaxies come from, and what they are for."""

    tables: tuple[TableSource, ...] = ()
    """By default the simulations of the step named under ``catalogs``."""
    halos: HalosConfig = HalosConfig()
    """What is taken from a step under ``catalogs``."""
    minimum: dict[ColumnName, float] = Constraint(default_factory=dict)
    """Least value of columns, such as {log_halo_mass: 10.5}: other rows are left out, those with NaN too;
    ``minimum_nan`` in the facts of the table tells how many have it."""
    null_ssfr: NullConfig = NullConfig()
    split: RowsSplit | SimulationsSplit | CatalogsSplit = Constraint(
        default=RowsSplit(), discriminator="kind"
    )
    seed: int = 0
    """Of the split and of the null rates."""

    def require(self, columns: Sequence[str], step: str) -> None:
        """See `galdist.config.Leaves`. What it is not told, the files may tell: parameters by their names."""
        halos = [name for name in QUANTITIES if self.halos.trees or name != "formation_redshift"]
        for known in [source.names for source in self.tables] or [halos]:
            for column in columns:
                if column not in known and not may_be_parameter(column):
                    raise ValueError(unknown_name(f"step {step}: column", column, known))


@dataclass(frozen=True)
class Centrals:
    """Rows of the table ``centrals`` of one or more simulations, one after the other."""

    simulations: tuple[SimulationAttrs, ...]
    simulation: NDArray[np.int64]
    """(n,): place in ``simulations`` of each row's."""
    row: NDArray[np.int64]
    """(n,): place in the table of its simulation."""
    columns: dict[str, NDArray[Any]]
    """(n,), ``position`` (n, 3)."""
    units: dict[str, str]
    source_columns: dict[str, str]
    """Column -> its name in the table that it came from; where tables differ, its own."""

    def __len__(self) -> int:
        return len(self.row)


def centrals(config: CentralsConfig, inputs: Mapping[str, list[Path]], out: Path) -> None:
    """Make ``out / "catalog.zarr"`` with the table ``centrals``: a row for each halo with a central galaxy.

    Rows below a ``minimum`` are left out, null rates are filled, and what remains must be finite numbers
    that are plausible for what they are called. `CatalogStore.facts` tells how many rows each of
    this concerned, with the seed.

    Raises
    ------
    galdist.simulations.simulation.SimulationError
        for what is missing, not finite, not plausible, or there twice; the message names rows and columns.
    """
    given = inputs.get("catalogs")
    if bool(config.tables) == bool(given):
        raise SimulationError(
            "centrals: give either `tables` in the config or a step under `inputs: catalogs`, got "
            f"{'both' if config.tables else 'neither'}"
        )
    if config.tables and isinstance(config.split, CatalogsSplit):
        raise SimulationError("split: tables say nothing of splits; choose kind tracers, rows or simulations")
    simulations = list(chain.from_iterable(read_table(source) for source in config.tables))
    for step in given or ():
        store = open_catalog(step / "catalog.zarr")
        simulations += [read_catalog(store, name, config.halos) for name in store.names()]
    names = [rows.attrs.name for rows in simulations]
    if twice := repeated(names):
        raise SimulationError(f"{twice[0]}: two simulations have this name; give each table another one")
    whole: dict[str, Split] = {
        rows.attrs.name: "train" if isinstance(config.split, RowsSplit) else rows.attrs.split
        for rows in simulations
    }
    if isinstance(config.split, SimulationsSplit):
        whole = split_simulations(names, config.split, config.seed)
    writer = CatalogWriter(out / "catalog.zarr")
    for done, rows in enumerate(simulations):
        name = rows.attrs.name
        progress.report(done, len(simulations), name)
        columns, facts = _prepare(rows, config)
        n_rows = len(next(iter(columns.values())))
        if isinstance(config.split, RowsSplit):
            columns["split"] = _split_rows(
                columns, config.split, _generator(config.seed, name, "split"), name
            )
        else:
            columns["split"] = np.full(n_rows, SPLITS.index(whole[name]), np.int8)
        facts["split"] = {**config.split.model_dump(mode="json"), "seed": config.seed}
        attrs = rows.attrs.model_copy(update={"split": whole[name]})
        writer.add(attrs, {TABLE: columns}, rows.units, {TABLE: facts})
        parts = np.bincount(columns["split"], minlength=len(SPLITS))
        log.info("%s: %s", name, ", ".join(f"{n} {split}" for n, split in zip(parts, SPLITS, strict=True)))
    writer.finish(names)
    progress.report(len(simulations), len(simulations))


def _generator(seed: int, simulation: str, purpose: str) -> np.random.Generator:
    """Random numbers of one simulation for one purpose: other simulations do not change them."""
    return np.random.default_rng([seed, zlib.crc32(f"{simulation}/{purpose}".encode())])


def _prepare(rows: Rows, config: CentralsConfig) -> tuple[Columns, dict[str, Any]]:
    """Columns without the rows below a minimum, null rates filled, checked; and the facts of it."""
    where = f"{rows.facts['source']}: {rows.attrs.name}"
    columns = dict(rows.columns)
    kept = np.ones(len(next(iter(columns.values()))), bool)
    absent: dict[str, int] = {}
    for name, least in config.minimum.items():
        if name not in columns:
            raise SimulationError(unknown_name(f"{where}: column (minimum)", name, sorted(columns)))
        absent[name] = int(np.isnan(columns[name]).sum())
        kept &= columns[name] >= least  # NaN is not
    if not kept.any():
        given = ", ".join(f"{name}: {value:g}" for name, value in config.minimum.items())
        raise SimulationError(
            f"{where}: minimum {{{given}}} leaves none of {kept.size} rows; check the units"
        )
    columns = {name: values[kept] for name, values in columns.items()}
    numbers = rows.numbers[kept]
    facts = {
        **rows.facts,
        "rows_of_simulation": int(kept.size),
        "minimum": dict(config.minimum),
        "minimum_nan": absent,
    }
    if "log_ssfr" in columns:
        generator = _generator(config.seed, rows.attrs.name, "null_ssfr")
        columns["log_ssfr"], filled = fill_null_ssfr(columns["log_ssfr"], config.null_ssfr, generator)
        facts["null_ssfr"] = {
            **config.null_ssfr.model_dump(mode="json"), "filled": filled, "seed": config.seed
        }  # fmt: skip
    check_columns(columns, where, numbers)
    _refuse_twins(columns, where, numbers)
    return columns, facts


def fill_null_ssfr(
    log_ssfr: NDArray[Any], config: NullConfig, generator: np.random.Generator
) -> tuple[NDArray[Any], int]:
    """Draw the specific star formation rates that are none; returns the column and how many were drawn.

    None are NaN, -inf and ``config.values``, which are compared in the precision of the column.
    """
    values = np.asarray(config.values, log_ssfr.dtype)
    absent = np.isnan(log_ssfr) | np.isneginf(log_ssfr) | np.isin(log_ssfr, values)
    filled = log_ssfr.copy()
    filled[absent] = generator.normal(config.mean, config.sigma, int(absent.sum()))
    return filled, int(absent.sum())


def _refuse_twins(columns: Columns, where: str, numbers: NDArray[np.int64]) -> None:
    """A halo that is there twice can be in two splits at once. It is known by its place and mass, or else by
    all columns."""
    import pandas

    place: list[str] = [
        name for name in ("position", "log_halo_mass") if "position" in columns and name in columns
    ]
    compared = place or [name for name in columns if name != "log_ssfr"]  # which is drawn where it is none
    flat = {
        f"{name}_{i}": part
        for name in compared
        for i, part in enumerate(columns[name].reshape(len(numbers), -1).T)
    }
    twins = np.flatnonzero(pandas.DataFrame(flat).duplicated(keep=False).to_numpy())
    if twins.size:
        raise SimulationError(
            f"{where}: {twins.size} rows are equal to another one in "
            f"{' and '.join(place) or 'all columns'}, such as row {numbers[twins[0]]}: a halo must be there "
            "once"
        )


def _split_rows(
    columns: Columns, config: RowsSplit, generator: np.random.Generator, simulation: str
) -> NDArray[np.int8]:
    n_rows = len(next(iter(columns.values())))
    strata = np.zeros(n_rows, np.int8)
    if config.kind == "tracers":
        missing = [name for name in ("log_stellar_mass", "color_gi") if name not in columns]
        if missing:
            raise SimulationError(
                f"{simulation}: split: tracers are known by log_stellar_mass and color_gi, and {missing[0]} "
                "is not there: choose `split: {kind: rows}` or `{kind: simulations}`"
            )
        strata = tracer(columns["log_stellar_mass"], columns["color_gi"])
    return split_rows(strata, config.validation, config.test, generator)


def split_rows(
    strata: NDArray[np.integer[Any]], validation: float, test: float, generator: np.random.Generator
) -> NDArray[np.int8]:
    """A random split with the same fractions in each stratum, to within one row.

    Which way a fraction of a row is rounded is random, so that on average over strata (and simulations) the
    fractions are exact even where strata are small.

    Parameters
    ----------
    strata
        (n,) number of each row's stratum.

    Returns
    -------
    array
        (n,) int8: places in `SPLITS`.
    """
    split = np.zeros(len(strata), np.int8)
    for stratum in np.unique(strata):
        rows = generator.permutation(np.flatnonzero(strata == stratum))
        edges = np.floor(rows.size * np.array([test, test + validation]) + generator.random()).astype(int)
        split[rows[: edges[0]]] = SPLITS.index("test")
        split[rows[edges[0] : edges[1]]] = SPLITS.index("validation")
    return split


def split_simulations(names: Sequence[str], config: SimulationsSplit, seed: int) -> dict[str, Split]:
    """The split of each simulation.

    Raises
    ------
    SimulationError
        for names that are not there or in two splits, and where none is left to train on.
    """
    splits: dict[str, Split] = dict.fromkeys(names, "train")
    for split in ("test", "validation"):
        for name in _members(getattr(config, split), names, splits, split, seed):
            if splits[name] != "train":
                raise SimulationError(f"split.{split}: {name} is already in {splits[name]}")
            splits[name] = split
    if "train" not in splits.values():
        raise SimulationError(f"split: none of {len(names)} simulations is left to train on")
    return splits


def _members(
    wanted: float | tuple[str, ...],
    names: Sequence[str],
    splits: Mapping[str, Split],
    split: Split,
    seed: int,
) -> list[str]:
    if not isinstance(wanted, float | int):
        for name in wanted:
            if name not in splits:
                raise SimulationError(unknown_name(f"split.{split}: simulation", name, names))
        return list(wanted)
    order = _generator(seed, "", "split").permutation(len(names))
    free = [names[i] for i in order if splits[names[i]] == "train"]
    return free[: round(wanted * len(names))]


def read_centrals(steps: Sequence[Path], columns: Sequence[str], split: Split | None) -> Centrals:
    """Columns of the table ``centrals`` of all simulations of some steps.

    Parameters
    ----------
    steps
        folders of steps, each with a ``catalog.zarr``.
    columns
        ``position`` among them where it is wanted. What a simulation's table lacks and its parameters
        (cosmology, astrophysics) have is taken from there: a constant.
    split
        only its rows; None: all.

    Raises
    ------
    StoreError
        for a store without the table, a column that a simulation has neither way, and a simulation that two
        stores have.
    """
    simulations: list[SimulationAttrs] = []
    parts: list[tuple[NDArray[np.int64], Columns]] = []
    units: dict[str, str] = {}
    sources: dict[str, str] = {}
    for step in steps:
        store = open_catalog(step / "catalog.zarr")
        for name in store.names():
            attrs = store.attrs(name)
            if any(other.name == name for other in simulations):
                raise StoreError(
                    f"{store.path}: simulation {name} is in another store too; name each step once"
                )
            values = simulation_columns(store, name, columns)
            rows = np.arange(len(values["split"]))
            if split is not None:
                rows = np.flatnonzero(values["split"] == SPLITS.index(split))
            held = store.columns(name, TABLE)
            source = store.facts(name, TABLE).get("columns", {})
            for column in columns:
                units[column] = held.get(column, "")
                given = ColumnSource.user_name(column, source.get(column))
                sources[column] = given if sources.get(column, given) == given else column
            simulations.append(attrs)
            parts.append((rows, {column: values[column][rows] for column in columns}))
    if not simulations:
        raise StoreError("no catalogue of centrals given")
    lengths = [len(rows) for rows, _ in parts]
    return Centrals(
        tuple(simulations),
        np.repeat(np.arange(len(simulations)), lengths),
        np.concatenate([rows for rows, _ in parts]),
        {column: np.concatenate([values[column] for _, values in parts]) for column in columns},
        units,
        sources,
    )


def simulation_columns(
    store: CatalogStore, simulation: str, columns: Sequence[str], rows: slice = slice(None)
) -> Columns:
    """``columns`` of the table ``centrals`` of one simulation, and ``split``.

    What the table lacks and the simulation's parameters have is taken from there, the same for all ``rows``.

    Raises
    ------
    StoreError
        for a column that is in neither; the message names the nearest.
    """
    held = store.columns(simulation, TABLE)
    attrs = store.attrs(simulation)
    parameters = attrs.cosmology | attrs.astrophysics
    for column in columns:
        if column not in held and column not in parameters:
            known = sorted([*held, *parameters])
            raise StoreError(unknown_name(f"{store.path}/{simulation}/{TABLE}: column", column, known))
    own = dict.fromkeys([*(column for column in columns if column in held), "split"])
    table = store.table(simulation, TABLE, list(own), rows)
    constants = (column for column in columns if column not in held)
    return table | {column: np.full(len(table["split"]), parameters[column]) for column in constants}
