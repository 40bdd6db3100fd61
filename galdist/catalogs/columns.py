"""Columns of halos and their galaxies: what they are called, their units, where a table of somebody has them.

A table comes as Parquet, CSV or HDF5 under any names and in any units; `TableSource` says which column is
what. What arrives is checked: every number finite and plausible for what it is said to be.
"""

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field as Constraint
from pydantic import PositiveFloat, field_validator, model_validator

from galdist.catalogs.environment import OverdensityConfig, overdensity
from galdist.config import ExternalPath, StrictModel
from galdist.grids.store import Name, SimulationAttrs, Source, unknown_name
from galdist.simulations.simulation import SimulationError

Columns = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Quantity:
    """What a column with a standard name holds: its units, and the range that such numbers lie in."""

    what: str
    units: str
    low: float
    high: float


QUANTITIES = {
    "log_halo_mass": Quantity("halo mass", "log10 Msun/h", 7, 17),
    "log_concentration": Quantity("concentration", "log10", -1, 4),
    "spin": Quantity("spin parameter", "", 0, 20),
    "formation_redshift": Quantity("redshift at which half of the mass was assembled", "", -0.01, 50),
    "overdensity": Quantity("density within 3 Mpc/h over the mean", "", 0, 1e5),
    "log_stellar_mass": Quantity("stellar mass", "log10 Msun/h", 4, 14),
    "color_gi": Quantity("g-i color", "mag", -3, 5),
    "log_ssfr": Quantity("specific star formation rate", "log10 h/yr", -25, -5),
    "log_radius": Quantity("half-mass radius of the stars", "log10 kpc/h", -3, 4),
}
"""Standard names of columns. Others are free: they are checked to be finite numbers only."""

RESERVED = {"position", "split", "halo"}
_COSMOLOGY = ("Omega_m", "Omega_b", "h", "n_s", "sigma_8")
_MANY = 100  # rows that are all over a box
_SHOWN = 5  # rows that an error names


def may_be_parameter(name: str) -> bool:
    """Whether simulations may have a parameter of this name: which they have only files tell."""
    return name in _COSMOLOGY or name.startswith("A_")


ColumnName = Annotated[str, Constraint(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]


class ColumnSource(StrictModel):
    """Where a quantity is in a table. The name alone is the short form of ``{column: name}``."""

    column: str
    component: Annotated[int, Constraint(ge=0)] | None = None
    """Of a column that is a vector (HDF5), such as 4 (stars) of SubhaloMassType."""
    per: str | None = None
    """Column to divide by: the star formation rate per stellar mass is specific."""
    scale: float = 1.0
    """Factor that brings the column (before the logarithm) to the units wanted."""
    log10: bool = False
    """Take the logarithm: for tables in linear units."""
    units: str | None = None
    """Of the result; for names that are not standard ones."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"column": value} if isinstance(value, str) else value

    @field_validator("scale")
    @classmethod
    def _not_zero(cls, scale: float) -> float:
        if scale == 0 or not np.isfinite(scale):
            raise ValueError(f"expected a number that is not 0, got {scale}")
        return scale

    @property
    def reads(self) -> list[str]:
        """Names of the table's columns that it takes."""
        return [self.column] if self.per is None else [self.column, self.per]

    def read(self, table: Mapping[str, NDArray[Any]], where: str) -> NDArray[Any]:
        """The quantity (n,) from a table's columns, in their precision: float32 stays float32.

        The logarithm of 0 is -inf; what may not be infinite is checked by `check_columns`.

        Raises
        ------
        SimulationError
            for a vector without ``component``, a component that is not there, and what is no number.
        """
        values = table[self.column]
        if values.ndim == 2:
            if self.component is None or self.component >= values.shape[1]:
                raise SimulationError(
                    f"{where}: column {self.column} has {values.shape[1]} components: name one as "
                    f"{{column: {self.column}, component: 0}} to {values.shape[1] - 1}"
                )
            values = values[:, self.component]
        elif self.component is not None:
            raise SimulationError(f"{where}: column {self.column} is no vector: leave `component` out")
        kept = np.float32 if values.dtype == np.float32 else np.float64
        try:
            result = values.astype(np.float64) * self.scale
            if self.per is not None:
                result = result / table[self.per].astype(np.float64)
        except (TypeError, ValueError) as error:
            raise SimulationError(f"{where}: column {self.column} does not hold numbers: {error}") from error
        if self.log10:
            if (negative := np.flatnonzero(result < 0)).size:
                raise SimulationError(
                    f"{where}: column {self.column}: {negative.size} of {result.size} values are negative "
                    f"({_rows(negative, result)}): they have no logarithm; is it one already? Then leave "
                    "`log10` out"
                )
            with np.errstate(divide="ignore"):
                result = np.log10(result)
        return result.astype(kept)

    @property
    def is_invertible(self) -> bool:
        """Whether the table's column follows from the quantity alone, so that `restore` can write it."""
        return self.per is None and self.component is None

    def restore(self, values: NDArray[Any]) -> NDArray[Any]:
        """What the table's column would hold: the inverse of `read`."""
        return np.asarray((10.0**values if self.log10 else values) / self.scale)

    @staticmethod
    def user_name(name: str, source: Mapping[str, Any] | None) -> str:
        """What a quantity is called in the table that it came from, where one column there holds it alone.

        ``source``: what is known of where it was, as `model_dump` has it; None where nothing is.
        """
        if source is None:
            return name
        known = ColumnSource.model_validate(source)
        return known.column if known.is_invertible else name


class PositionSource(StrictModel):
    """Where positions are: three columns, or one that is a vector (HDF5). A list is the short form."""

    columns: tuple[str, ...]
    scale: PositiveFloat = 1.0
    """Factor that brings them to Mpc/h: 1e-3 for kpc/h."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"columns": [value]}
        return {"columns": value} if isinstance(value, list | tuple) else value

    @field_validator("columns")
    @classmethod
    def _three(cls, columns: tuple[str, ...]) -> tuple[str, ...]:
        if len(columns) not in (1, 3):
            raise ValueError(f"expected three columns (or one that is a vector), got {len(columns)}")
        return columns

    @property
    def axes(self) -> tuple[ColumnSource, ...]:
        """Where x, y and z are."""
        if len(self.columns) == 3:
            return tuple(ColumnSource(column=name, scale=self.scale) for name in self.columns)
        return tuple(ColumnSource(column=self.columns[0], component=i, scale=self.scale) for i in range(3))

    def read(self, table: Mapping[str, NDArray[Any]], box_size: float, where: str) -> NDArray[Any]:
        """Positions (n, 3) [Mpc/h] in [0, box_size), in the precision of the columns.

        Raises
        ------
        SimulationError
            for positions outside the box, or all of them in a part of it; those on its upper face are those
            on the lower.
        """
        parts = [table[name] for name in self.columns]
        values = np.stack(parts, axis=1) if len(parts) == 3 else parts[0]
        if values.ndim != 2 or values.shape[1] != 3 or values.dtype.kind not in "fiu":
            raise SimulationError(
                f"{where}: position {', '.join(self.columns)}: expected numbers of shape (n, 3), got "
                f"{values.dtype} of shape {values.shape}"
            )
        kept = np.float32 if values.dtype == np.float32 else np.float64
        position = values.astype(np.float64) * self.scale
        outside = np.flatnonzero(~((position >= 0) & (position <= box_size * (1 + 1e-6))).all(axis=1))
        if outside.size:
            raise SimulationError(
                f"{where}: position: {outside.size} of {len(position)} rows are outside the box [0, "
                f"{box_size:g}] Mpc/h ({_rows(outside, position)}): check box_size and the scale of position"
            )
        position = position.astype(kept)
        extent = np.ptp(position, axis=0).min() if len(position) >= _MANY else box_size
        if extent < box_size / 2:
            raise SimulationError(
                f"{where}: position: along one axis all {len(position)} rows lie within {extent:.3g} Mpc/h, "
                f"in a box of {box_size:g} Mpc/h: check box_size and the scale of position"
            )
        position[position >= kept(box_size)] = 0
        return position


class ParameterSource(StrictModel):
    """A CSV file with the parameters of each simulation of a table."""

    file: ExternalPath
    column: str
    """Of the file: it holds what the table's ``simulation_column`` holds."""
    astrophysics: tuple[str, ...] | None = None
    """Columns that are astrophysical parameters; by default those whose names begin with A_."""

    def read(self) -> dict[Any, tuple[dict[str, float], dict[str, float]]]:
        """(cosmology, astrophysics) by the value of ``column``.

        Raises
        ------
        SimulationError
            for a file or column that is not there, and simulations that are there twice.
        """
        import pandas

        names = _frame(self.file, csv_columns)
        frame = _frame(self.file, pandas.read_csv)
        for name in (self.column, *(self.astrophysics or ())):
            if name not in names:
                raise SimulationError(unknown_name(f"{self.file}: column", name, names))
        chosen = self.astrophysics or tuple(name for name in names if name.startswith("A_"))
        rows: dict[Any, tuple[dict[str, float], dict[str, float]]] = {}
        for _, row in frame.iterrows():
            key = row[self.column]
            if key in rows:
                raise SimulationError(f"{self.file}: {self.column} = {key} is there twice")
            rows[key] = (
                {name: float(row[name]) for name in _COSMOLOGY if name in names},
                {name: float(row[name]) for name in chosen},
            )
        return rows


class TableSource(StrictModel):
    """A table of halos with their galaxies, one row a halo, of one simulation or of several."""

    simulation: Name
    """Its name; where the table holds several, what their names begin with, before ``_<value>``."""
    simulation_column: str | None = None
    """Column that says which of several simulations a row is of."""
    file: ExternalPath
    """Ends in .parquet, .csv, .hdf5 or .h5."""
    key: str = "/"
    """Group of an HDF5 file that holds the columns."""
    box_size: PositiveFloat
    """Side of the periodic box [Mpc/h]."""
    redshift: float = 0.0
    citation: str | None = None
    """What to cite where the table is used; models that learn from it carry this."""
    suite: str | None = None
    """By default the simulation's name."""
    set: str = ""
    cosmology: dict[str, float] = Constraint(default_factory=dict)
    astrophysics: dict[str, float] = Constraint(default_factory=dict)
    parameters: ParameterSource | None = None
    """Of each of several simulations; they complete ``cosmology`` and ``astrophysics``."""
    filter: dict[str, bool | int | float | str] = Constraint(default_factory=dict)
    """Only rows where a column of the table has this value, such as {is_central: 1}."""
    position: PositionSource | None = None
    columns: dict[ColumnName, ColumnSource]
    """Name here -> column of the table. Standard names have units and plausible ranges."""
    overdensity: OverdensityConfig | None = None
    """Compute the column ``overdensity`` from the positions of all rows of a simulation, before ``filter``.
    Its ``weight`` is a column of the table."""

    @model_validator(mode="after")
    def _consistent(self) -> "TableSource":
        if not self.columns:
            raise ValueError("columns: name at least one")
        for name, column in self.columns.items():
            if name in RESERVED:
                raise ValueError(f"columns.{name}: this name is taken; choose another one")
            known = QUANTITIES.get(name)
            if known is not None and column.units not in (None, known.units):
                raise ValueError(
                    f"columns.{name}: {name} is in {known.units or 'no units'}, not {column.units}: bring it "
                    "there by scale and log10"
                )
        if self.overdensity is not None:
            if "overdensity" in self.columns:
                raise ValueError("overdensity: give it either as a column or to be computed")
            if self.position is None:
                raise ValueError("overdensity: computing it needs position")
        if self.parameters is not None and self.simulation_column is None:
            raise ValueError(
                "parameters: they are of several simulations: give simulation_column, or cosmology and "
                "astrophysics of this one"
            )
        return self

    @property
    def names(self) -> list[str]:
        """Of the columns that models may learn from, and of the parameters that are told here."""
        computed = [] if self.overdensity is None else ["overdensity"]
        told = (self.parameters and self.parameters.astrophysics) or ()
        return [*self.columns, *computed, *self.cosmology, *self.astrophysics, *told]

    @property
    def units(self) -> dict[str, str]:
        """Of every column that it makes."""
        units = {
            name: QUANTITIES[name].units if name in QUANTITIES else column.units or ""
            for name, column in self.columns.items()
        }
        return units | {"position": "Mpc/h"}


@dataclass(frozen=True)
class Rows:
    """The rows of one simulation, as read."""

    attrs: SimulationAttrs
    columns: Columns
    units: dict[str, str]
    facts: dict[str, Any]
    """Where they come from; see `galdist.catalogs.centrals`."""
    numbers: NDArray[np.int64]
    """(n,): row of each in the file, or its galaxy in the table ``galaxies``."""


def read_table(source: TableSource) -> Iterator[Rows]:
    """The simulations of a table, in the order of their numbers or names.

    Raises
    ------
    SimulationError
        for a file, column or simulation that is not there (the nearest is named), positions outside the box,
        and a filter that leaves no rows.
    """
    where = str(source.file)
    names = [name for column in source.columns.values() for name in column.reads]
    names += [*source.filter, *(source.position.columns if source.position else ())]
    names += [
        name for name in (source.simulation_column, source.overdensity and source.overdensity.weight) if name
    ]
    table = load_columns(source.file, names, source.key)
    n_rows = len(next(iter(table.values())))
    file = Source(file=where, size=source.file.stat().st_size)
    groups: list[tuple[str, Any, NDArray[Any] | slice]] = [(source.simulation, None, slice(None))]
    if source.simulation_column is not None:
        values, member = np.unique(table[source.simulation_column], return_inverse=True)
        order = np.argsort(member, kind="stable")
        parts = np.split(order, np.cumsum(np.bincount(member, minlength=len(values)))[:-1])
        groups = [
            (f"{source.simulation}_{value}", value.item() if isinstance(value, np.generic) else value, rows)
            for value, rows in zip(values, parts, strict=True)
        ]
    parameters = None if source.parameters is None else source.parameters.read()
    if n_rows == 0:
        raise SimulationError(f"{where}: the table has no rows")
    # Before the rows are parted, so that errors name those of the file.
    quantities = {key: column.read(table, where) for key, column in source.columns.items()}
    if source.position is not None:
        quantities["position"] = source.position.read(table, source.box_size, where)
    for name, value, rows in groups:
        cosmology, astrophysics = dict(source.cosmology), dict(source.astrophysics)
        if parameters is not None and source.parameters is not None:
            if value not in parameters:
                raise SimulationError(
                    f"{source.parameters.file}: there is no row with {source.parameters.column} = {value}, "
                    f"which {where} has in {source.simulation_column}"
                )
            cosmology |= parameters[value][0]
            astrophysics |= parameters[value][1]
        columns, kept = _of_one(source, table, quantities, rows)
        if not kept.any():
            given = ", ".join(f"{key}: {wanted}" for key, wanted in source.filter.items())
            raise SimulationError(f"{where}: filter {{{given}}} leaves no row of {name}")
        yield Rows(
            SimulationAttrs(
                name=name,
                box_size=source.box_size,
                redshift=source.redshift,
                suite=source.suite or source.simulation,
                set=source.set,
                cosmology=cosmology,
                astrophysics=astrophysics,
                sources=(file,),
            ),
            {key: values[kept] for key, values in columns.items()},
            source.units,
            {
                "source": where,
                "rows_read": len(kept),
                "filter": dict(source.filter),
                **({} if source.citation is None else {"citation": source.citation}),
                "columns": {
                    key: column.model_dump(exclude_defaults=True) for key, column in source.columns.items()
                },
                **({} if source.position is None else {"position": source.position.model_dump()}),
            },
            np.arange(n_rows)[rows][kept],
        )


def _of_one(
    source: TableSource, table: Columns, quantities: Columns, rows: NDArray[np.int64] | slice
) -> tuple[Columns, NDArray[np.bool_]]:
    """All rows of one simulation, and which of them pass the filter."""
    columns = {name: values[rows] for name, values in quantities.items()}
    kept = np.ones(len(next(iter(columns.values()))), bool)
    for name, value in source.filter.items():
        kept &= table[name][rows] == value
    if source.overdensity is not None:
        weight = source.overdensity.weight
        columns["overdensity"] = overdensity(
            columns["position"],
            source.box_size,
            source.overdensity.radius,
            None if weight is None else table[weight][rows],
        )
    return columns, kept


def load_columns(file: Path, names: Sequence[str], key: str = "/") -> Columns:
    """Columns ``names`` of a Parquet, CSV or HDF5 file, as they are there.

    Raises
    ------
    SimulationError
        where the file cannot be read, or lacks a column; the message names the nearest that it has.
    """
    if not file.is_file():
        raise SimulationError(f"{file}: no such file")
    wanted = list(dict.fromkeys(names))
    if file.suffix in (".hdf5", ".h5"):
        return _load_hdf5(file, wanted, key)
    import pandas

    if file.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            held = pyarrow.parquet.read_schema(file).names
        except (OSError, pyarrow.ArrowException) as error:
            raise SimulationError(f"{file}: cannot be read as Parquet: {error}") from error
        _all_there(file, wanted, held)
        frame = _frame(file, pandas.read_parquet, columns=wanted)
    elif file.suffix == ".csv":
        _all_there(file, wanted, _frame(file, csv_columns))
        frame = _frame(file, pandas.read_csv, usecols=wanted)
    else:
        raise SimulationError(f"{file}: expected a table that ends in .parquet, .csv, .hdf5 or .h5")
    return {name: frame[name].to_numpy() for name in wanted}


def csv_columns(file: Path) -> list[str]:
    """Names of a CSV table's columns. Reads the whole file: each line must have as many fields as the first,
    or what pandas makes of it is another table (cut off in the last line, or moved by a column).

    Raises
    ------
    ValueError
        for a line that has more or less; the message has its number, from 1.
    """
    import pandas

    names = [str(name) for name in pandas.read_csv(file, nrows=0).columns]
    with open(file, newline="", encoding="utf-8", errors="replace") as stream:
        lines = csv.reader(stream)
        try:
            for fields in lines:
                if len(fields) != len(names) and ",".join(fields).strip():  # else the line is empty
                    raise ValueError(
                        f"line {lines.line_num} has {len(fields)} fields, the header has {len(names)}: the "
                        "file was cut off there (get it again), or they do not belong together"
                    )
        except csv.Error as error:
            raise ValueError(f"line {lines.line_num}: {error}") from error
    return names


def _load_hdf5(file: Path, names: Sequence[str], key: str) -> Columns:
    import h5py

    try:
        with h5py.File(file, "r") as hdf5:
            group = hdf5.get(key)
            if not isinstance(group, h5py.Group):
                held = [name for name in hdf5 if isinstance(hdf5[name], h5py.Group)]
                raise SimulationError(unknown_name(f"{file}: group", key, held))
            held = [name for name in group if isinstance(group[name], h5py.Dataset)]
            if not held:
                inside = ", ".join(group) or "nothing"
                raise SimulationError(f"{file}: group {key} holds no columns, but {inside}: name it in `key`")
            _all_there(file, names, held)
            columns = {name: np.asarray(group[name][()]) for name in names}
    except OSError as error:
        raise SimulationError(f"{file}: cannot be read as HDF5: {error}") from error
    lengths = {name: values.shape[0] if values.ndim else 0 for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise SimulationError(f"{file}: columns differ in length: {lengths}")
    return columns


def _frame(file: Path, read: Any, **options: Any) -> Any:
    try:
        return read(file, **options)
    except (OSError, ValueError) as error:
        raise SimulationError(f"{file}: cannot be read as a table: {error}") from error


def _all_there(file: Path, names: Sequence[str], held: Sequence[str]) -> None:
    missing = [name for name in names if name not in held]
    if missing:
        others = f" (and {', '.join(missing[1:])})" if len(missing) > 1 else ""
        raise SimulationError(unknown_name(f"{file}: column", missing[0], held) + others)


def check_columns(columns: Mapping[str, NDArray[Any]], where: str, numbers: NDArray[np.int64]) -> None:
    """Refuse numbers that are not finite, or not plausible for a standard name; ``numbers``: of the rows.

    Raises
    ------
    SimulationError
        with how many rows are wrong, and which; masses and sizes that are no logarithms are said to be so.
    """
    for name, values in columns.items():
        if values.dtype.kind not in "fiub":
            raise SimulationError(f"{where}: column {name} does not hold numbers, but {values.dtype}")
        flat = values.reshape(len(values), -1)
        if (bad := np.flatnonzero(~np.isfinite(flat).all(axis=1))).size:
            raise SimulationError(
                f"{where}: column {name}: {bad.size} of {len(values)} values are not finite "
                f"({_rows(bad, values, numbers)}): leave those rows out; a "
                "`minimum` of this column does it for NaN and -inf"
            )
        known = QUANTITIES.get(name)
        if known is None:
            continue
        if (bad := np.flatnonzero((values < known.low) | (values > known.high))).size:
            hint = ""
            if known.units.startswith("log10") and values[bad].max() > known.high:
                hint = ": these are no logarithms; give log10 of the column, or `log10: true`"
            raise SimulationError(
                f"{where}: column {name}: {bad.size} of {len(values)} values are not between {known.low:g} "
                f"and {known.high:g}{f' {known.units}' if known.units else ''}, as a {known.what} is "
                f"({_rows(bad, values, numbers)}){hint}"
            )


def _rows(rows: NDArray[np.int64], values: NDArray[Any], numbers: NDArray[np.int64] | None = None) -> str:
    named = rows if numbers is None else numbers[rows]
    shown = "; ".join(
        f"row {number}: {np.array2string(np.asarray(values[row]), precision=6)}"
        for number, row in zip(named[:_SHOWN], rows[:_SHOWN], strict=True)
    )
    return shown + ("; ..." if rows.size > _SHOWN else "")
