"""A trained model on a user's own halo table: in memory (`load_model`) or from file to file (`predict_file`).

A table has the model's inputs under the names and in the units of the table that the model learned from, or
under the standard names in standard units (`galdist.catalogs.columns`); other names are told. What comes back
is a long table: a row for each halo and sample.

For a model that looks at the neighbors of halos the table is one periodic box. It has positions, as the table
that was learned from has them or as ``x``, ``y``, ``z`` (or ``position`` (n, 3)) in Mpc/h, ``box_size`` is
told as a number [Mpc/h], and all halos are in memory.
"""

import contextlib
import json
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import galdist
from galdist.catalogs.columns import QUANTITIES, ColumnSource, PositionSource, csv_columns
from galdist.catalogs.neighbors import Halos
from galdist.catalogs.samples import rows_per_chunk
from galdist.simulations.simulation import SimulationError
from galdist.training.checkpoint import CheckpointError as CheckpointError
from galdist.training.sample import Drawer, Union, extrapolated
from hpc import durable
from hpc.strict import Problem, SettingsError, did_you_mean

if TYPE_CHECKING:
    import pandas

Table = Mapping[str, NDArray[Any]]

_READ = 1 << 16  # rows of a file that are read together
_SHOWN = 5  # rows that an error names
_WIDTHS = 10  # of the training range, beyond which numbers are taken for another quantity
_RESERVED = ("halo", "sample", "quantile", "extrapolated")
_AXES = ("x", "y", "z")


@dataclass(frozen=True)
class Wanted:
    """What is asked of a model: ``samples`` draws of each halo, or ``quantiles``, or neither: the point."""

    samples: int = 0
    seed: int = 0
    quantiles: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name, number in (("samples", self.samples), ("seed", self.seed)):
            if not isinstance(number, Integral) or number < 0:
                raise ValueError(f"{name} is a whole number from 0 on, got {number!r}")
        if self.samples and self.quantiles:
            raise ValueError("samples or quantiles are asked for, not both")
        if not all(0 < level < 1 for level in self.quantiles):
            raise ValueError(f"levels of quantiles lie between 0 and 1, got {self.quantiles}")

    @property
    def rows_per_halo(self) -> int:
        """Rows of the long table that a halo gets."""
        return self.samples or len(self.quantiles) or 1


@dataclass
class Done:
    """What became of a table."""

    halos: int = 0
    rows: int = 0
    extrapolated: int = 0
    """Halos of which some input lies outside the training range."""
    beyond: dict[str, tuple[int, int]] | None = None
    """Input -> how many halos are below and above its training range."""
    seconds: float = 0.0

    def __str__(self) -> str:
        rate = self.halos / self.seconds if self.seconds else 0.0
        text = f"{self.halos} halos, {self.rows} rows, {self.seconds:.1f} s ({rate:.0f} halos/s)"
        if self.extrapolated:
            parts = [
                f"{name} {word} in {n}"
                for name, counts in (self.beyond or {}).items()
                for word, n in zip(("below", "above"), counts, strict=True)
                if n
            ]
            text += (
                f"\n{self.extrapolated} of {self.halos} halos lie outside the model's training range "
                f"({', '.join(parts)}): they are marked in the column extrapolated"
            )
        return text


class Model:
    """Trained models of tables, used as one; `load_model` makes it.

    Methods take a table: a `pandas.DataFrame`, or a mapping of names to arrays (n,). Results have the column
    ``halo`` (row of the table, from 0), the properties under the names and in the units that they have in the
    table that the model was trained on, and ``extrapolated``: whether an input of the halo lies outside the
    training range. ``columns`` says which column is what where names differ; see `resolve`.

    They raise `hpc.strict.SettingsError` for missing columns, numbers that are not finite, and columns that
    cannot be what they should be.
    """

    def __init__(self, union: Union) -> None:
        self._union = union
        self.inputs, self.targets = union.inputs, union.targets
        self.columns = union.columns
        """Input or target -> what is known of it: ``units``, ``range`` of the training rows, ``source``."""
        self.needs_neighbors = union.needs_neighbors
        """Whether tables need positions and ``box_size``."""
        self._names = {
            name: ColumnSource.user_name(name, union.columns.get(name, {}).get("source"))
            for name in union.targets
        }
        taken = [*_RESERVED, *self._names.values()]
        for name, source in self._names.items():
            if taken.count(source) > 1:  # it would be two columns of one name
                self._names[name] = name

    @property
    def properties(self) -> tuple[str, ...]:
        """Names of the result's columns, in the order of `targets`."""
        return tuple(self._names.values())

    @property
    def units(self) -> tuple[str, ...]:
        """Of `properties`; of a column in other units than ours, what brings it to ours."""
        found = []
        for target, name in self._names.items():
            about = self.columns.get(target, {})
            units = str(about.get("units", ""))
            if name != target and (
                made := {k: v for k, v in about["source"].items() if k in ("scale", "log10")}
            ):
                units = f"{units} = {made} of it"
            found.append(units)
        return tuple(found)

    @property
    def checkpoints(self) -> tuple[str, ...]:
        """sha256 of each model's weights."""
        return tuple(self._union.checkpoints)

    @property
    def low(self) -> NDArray[np.float32]:
        """Least value of each input over the training rows."""
        return self._union.low

    @property
    def high(self) -> NDArray[np.float32]:
        """Greatest value of each input over the training rows."""
        return self._union.high

    def predict(self, table: Any, columns: Mapping[str, str] | None = None) -> "pandas.DataFrame":
        """The best single value of each property: a row a halo."""
        return self._frame(table, Wanted(), columns)

    def sample(
        self, table: Any, n: int = 1, seed: int = 0, columns: Mapping[str, str] | None = None
    ) -> "pandas.DataFrame":
        """``n`` joint draws of the properties for each halo: ``n`` rows, with their number in ``sample``.

        The same table and seed give the same draws.
        """
        if n < 1:
            raise ValueError(f"n is the number of samples of a halo, 1 or more; got {n}")
        return self._frame(table, Wanted(samples=n, seed=seed), columns)

    def quantiles(
        self, table: Any, levels: Sequence[float], columns: Mapping[str, str] | None = None
    ) -> "pandas.DataFrame":
        """Quantiles of each property by itself: a row for each halo and level, which is in ``quantile``.

        Raises
        ------
        ValueError
            for a model that has no quantiles of its own.
        """
        if len(levels) == 0:
            raise ValueError("no level of a quantile was given, such as [0.16, 0.5, 0.84]")
        return self._frame(table, Wanted(quantiles=tuple(float(level) for level in levels)), columns)

    def _frame(self, table: Any, wanted: Wanted, columns: Mapping[str, str] | None) -> "pandas.DataFrame":
        import pandas

        names = [str(name) for name in table]
        sources = resolve(self, names, columns or {}, "the table")
        used = list(dict.fromkeys(name for source in sources.values() for name in source.reads))
        arrays = {name: np.asarray(table[name]) for name in used}
        lengths = {name: values.shape[0] if values.ndim else 0 for name, values in arrays.items()}
        if len(set(lengths.values())) != 1:
            raise SettingsError("the table", [Problem((), f"columns differ in length: {lengths}")])
        made = list(
            self.long_table(_pieces(arrays, self.chunk(wanted)), sources, wanted, "the table", Done())
        )
        if not made:
            raise SettingsError("the table", [Problem((), "has no rows")])
        return pandas.DataFrame({name: np.concatenate([part[name] for part in made]) for name in made[0]})

    def require(self, wanted: Wanted) -> None:
        """Raise `hpc.strict.SettingsError` where the model cannot give what is ``wanted``."""
        if wanted.quantiles:
            try:
                self._union.require(wanted.quantiles)
            except ValueError as error:
                raise SettingsError("--quantiles", [Problem((), str(error))]) from error

    def chunk(self, wanted: Wanted) -> int:
        """Halos that are drawn together."""
        return rows_per_chunk(wanted.rows_per_halo, len(self.targets))

    def long_table(
        self,
        pieces: Iterator[Table],
        sources: Mapping[str, "Source"],
        wanted: Wanted,
        where: str,
        done: Done,
    ) -> Iterator[dict[str, NDArray[Any]]]:
        """The result, piece by piece; ``done`` counts.

        Parameters
        ----------
        pieces
            of the table, `chunk` rows each, the last may be shorter.
        sources
            from `resolve`.
        where
            the table, for messages.
        """
        beyond: Counter[tuple[str, int]] = Counter()
        began = time.perf_counter()
        for number, (inputs, drawer) in enumerate(self._drawers(pieces, sources, wanted, where)):
            outside = drawer.outside(inputs)
            odd = extrapolated(outside)
            n, m = len(inputs), wanted.rows_per_halo
            halo = np.repeat(np.arange(done.halos, done.halos + n), m)
            long: dict[str, NDArray[Any]] = {"halo": halo}
            if wanted.samples:
                values = drawer.sample(inputs, wanted.samples, wanted.seed, number)
                long["sample"] = np.tile(np.arange(m, dtype=np.int32), n)
            elif wanted.quantiles:
                values = drawer.quantiles(inputs, wanted.quantiles)
                long["quantile"] = np.tile(np.asarray(wanted.quantiles), n)
            else:
                values = drawer.point(inputs)[:, None]
            for i, target in enumerate(drawer.targets):
                long[self._names[target]] = self._restored(target, values[..., i].ravel())
            long["extrapolated"] = np.repeat(odd, m)
            for name, sides in outside.items():
                beyond.update({(name, side): int((sides == side).sum()) for side in (-1, 1)})
            done.halos, done.rows = done.halos + n, done.rows + n * m
            done.extrapolated += int(odd.sum())
            done.beyond = {name: (beyond[name, -1], beyond[name, 1]) for name in outside}
            done.seconds = time.perf_counter() - began
            yield long

    def _drawers(
        self, pieces: Iterator[Table], sources: Mapping[str, "Source"], wanted: Wanted, where: str
    ) -> Iterator[tuple[NDArray[np.float32], Drawer]]:
        """Inputs of `chunk` halos after another, and what draws for them."""
        first = 0
        read: list[tuple[NDArray[np.float32], NDArray[Any]]] = []
        for piece in pieces:
            inputs = _inputs(self, piece, sources, where, first)
            first += len(inputs)
            if self.needs_neighbors:
                read.append((inputs, _positions(piece, sources, where)))
            else:
                yield inputs, self._union
        if read:
            inputs, position = (np.concatenate(each) for each in zip(*read, strict=True))
            halos = Halos(inputs, position, sources["box_size"].constant)
            for start in range(0, len(halos), self.chunk(wanted)):
                rows = np.arange(start, min(start + self.chunk(wanted), len(halos)))
                try:
                    drawer = self._union.among(halos, rows)
                except ValueError as error:
                    raise SettingsError(where, [Problem((), str(error))]) from error
                yield inputs[rows], drawer

    def _restored(self, target: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """A property in the units of the column whose name it gets."""
        about = self.columns.get(target, {})
        if self._names[target] == target or "source" not in about:
            return values
        return ColumnSource.model_validate(about["source"]).restore(values).astype(np.float32)


@dataclass(frozen=True)
class Source:
    """Where an input, or a coordinate, is in a table: a column, or one number for all halos."""

    column: ColumnSource | None
    constant: float = 0.0

    @property
    def reads(self) -> list[str]:
        """Names of the columns that it takes."""
        return self.column.reads if self.column else []


def load_model(*paths: str | Path) -> Model:
    """A trained model, from a train step's folder or the `model` folder in it.

    With several paths, models of different properties are used side by side as one; between them draws are
    independent given the halo.

    Raises
    ------
    galdist.training.checkpoint.CheckpointError
        where there is no model of tables, it is damaged, or two predict the same property.
    """
    return Model(Union([Path(path) for path in paths]))


def parse_wanted(samples: int | None, point: bool, quantiles: str | None, seed: int) -> Wanted:
    """What the command line asks for: one of the three, one sample by default.

    Raises
    ------
    hpc.strict.SettingsError
        where more than one is asked for, or levels are not numbers between 0 and 1.
    """
    asked = [
        name
        for name, given in (("--samples", samples), ("--point", point), ("--quantiles", quantiles))
        if given
    ]
    if len(asked) > 1:
        text = "one of them at a time: they make tables with different rows"
        raise SettingsError(", ".join(asked), [Problem((), text)])
    if quantiles is not None:
        try:
            return Wanted(quantiles=tuple(float(level) for level in quantiles.split(",")))
        except ValueError as error:
            text = f"expected numbers between 0 and 1 with commas, such as .05,.5,.95; got {quantiles!r}"
            raise SettingsError("--quantiles", [Problem((), text)]) from error
    return Wanted(samples=0 if point else samples or 1, seed=seed)


def parse_columns(given: Sequence[str]) -> dict[str, str]:
    """``NAME=COLUMN`` of the command line, as `resolve` wants it.

    Raises
    ------
    hpc.strict.SettingsError
        for what has another form, and names given twice.
    """
    columns: dict[str, str] = {}
    problems = []
    for text in given:
        name, _, column = text.partition("=")
        if not name or not column:
            problems.append(Problem((), f"expected NAME=COLUMN, such as log_halo_mass=M200, got {text!r}"))
        elif name in columns:
            problems.append(Problem((), f"{name} is given twice: {columns[name]} and {column}"))
        columns[name] = column
    if problems:
        raise SettingsError("--columns", problems)
    return columns


def resolve(model: Model, names: Sequence[str], columns: Mapping[str, str], where: str) -> dict[str, Source]:
    """Where each input of a model is in a table that has columns ``names``.

    Parameters
    ----------
    columns
        what differs: name -> column, ``log10(column)``, or a number that all halos share. The name is either
        standard (``log_halo_mass``: the column is in standard units), or that of the table that the model was
        trained on (``Mvir``: the column is in the units that it had there). ``box_size`` is a number.
    where
        the table, for messages.

    Raises
    ------
    hpc.strict.SettingsError
        with every column that is missing and the nearest that are there.
    """
    problems: list[Problem] = []
    sources: dict[str, Source] = {}
    needed = (*model.inputs, *(_AXES if model.needs_neighbors else ()))
    learned = {
        name: ColumnSource.model_validate(about["source"])
        for name, about in model.columns.items()
        if name in needed and "source" in about
    }
    known = [*needed, *(name for source in learned.values() for name in source.reads)]
    known += ["box_size"] if model.needs_neighbors else []
    problems += [
        Problem((), f"the model has no input {name!r}{did_you_mean(name, known)}")
        for name in columns
        if name not in known
    ]

    def here(name: str, source: ColumnSource) -> Source:
        """A column of the table that was learned from, in this one: it means what it meant there."""
        text = columns.get(source.column, source.column)
        given = _parse(text, names) if source.column in columns else Source(ColumnSource(column=text))
        if given.column is None and source.per is None:
            alone = {source.column: np.array([given.constant])}
            value = source.model_copy(update={"component": None}).read(alone, where)
            return Source(None, float(value[0]))
        taken = given.column or ColumnSource(column=text)
        if not taken.log10:
            per = source.per and columns.get(source.per, source.per)
            return Source(source.model_copy(update={"column": taken.column, "per": per}))
        if source.model_dump(exclude_defaults=True, exclude={"units"}) != {"column": source.column}:
            text = (
                f"{source.column}={text}: {source.column} is no logarithm, the model makes {name} of it by "
                f"itself: give {source.column}={taken.column}, or {name}=log10({taken.column})"
            )
            problems.append(Problem((), text))
        return given

    free = [name for name in names if name not in known]  # what a missing column may be called
    for name in needed:
        wanted: list[Source] = []
        if name in columns:
            wanted.append(_parse(columns[name], names))
        elif name in learned:
            wanted.append(here(name, learned[name]))
        if wanted and wanted[0].column is None and name in model.inputs:
            called = name if name in columns else learned[name].column
            if text := _wrong(model, name, np.array([wanted[0].constant])):
                problems.append(Problem((), f"{called}={columns[called]} is {text}"))
        if name not in columns:
            wanted.append(Source(ColumnSource(column=name)))
            if name not in model.inputs:
                wanted.append(Source(ColumnSource(column="position", component=_AXES.index(name))))
        found = next((source for source in wanted if all(read in names for read in source.reads)), None)
        if found is not None:
            sources[name] = found
            continue
        missing = next(read for read in wanted[0].reads if read not in names)
        units = model.columns.get(name, {}).get("units", "")
        what = f"{name} [{units}]" if units else name
        also = f" (or {name})" if missing != name and name not in columns else ""
        hint = did_you_mean(missing, free)
        hint = did_you_mean(name, free) if hint == "." else hint
        role = "is an input of the model" if name in model.inputs else "places halos among their neighbors"
        text = f"column {missing!r}{also} is missing: {what} {role}{hint}"
        problems.append(Problem((), text))
    if model.needs_neighbors:
        sources["box_size"] = _parse(columns.get("box_size", "0"), ())
        if not 0 < sources["box_size"].constant < np.inf:
            text = (
                "the model looks at neighbors, through the faces of a periodic box too: tell its side in "
                f"Mpc/h as a number, such as box_size=205; got {columns.get('box_size', 'none')}"
            )
            problems.append(Problem((), text))
    if not problems and not any(source.reads for source in sources.values()):
        problems.append(Problem((), "all inputs are numbers: name the column of one at least"))
    if problems:
        there = Problem((), f"its columns: {', '.join(names)}; say which is what by NAME=COLUMN (--columns)")
        raise SettingsError(where, [*problems, there])
    return sources


def _parse(text: str, names: Sequence[str]) -> Source:
    if text in names:
        return Source(ColumnSource(column=text))
    if match := re.fullmatch(r"log10\((.+)\)", text):
        return Source(ColumnSource(column=match[1], log10=True))
    with contextlib.suppress(ValueError):
        return Source(None, float(text))
    return Source(ColumnSource(column=text))


def _inputs(
    model: Model, table: Table, sources: Mapping[str, Source], where: str, first: int
) -> NDArray[np.float32]:
    """The inputs (n, d) of a piece of a table that begins at row ``first``, checked."""
    n = len(next(iter(table.values())))
    inputs = np.empty((n, len(model.inputs)), np.float32)
    problems = []
    for i, name in enumerate(model.inputs):
        source = sources[name]
        if source.column is None:
            inputs[:, i] = source.constant
            continue
        try:
            inputs[:, i] = source.column.read(table, where)
        except SimulationError as error:
            raise SettingsError(where, [Problem((), str(error).removeprefix(f"{where}: "))]) from error
        called = source.column.column if source.column.column == name else f"{source.column.column} ({name})"
        values = inputs[:, i]
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            rows = ", ".join(str(row) for row in first + bad[:_SHOWN]) + ", ..." * (len(bad) > _SHOWN)
            text = (
                f"column {called} is not a finite number in {len(bad)} of the rows {first} to "
                f"{first + n - 1}: row {rows} (counted from 0). Leave those halos out"
            )
            problems.append(Problem((), text))
        elif text := _wrong(model, name, values, source.column.column):
            like = f"holds values like {np.median(values):.4g}, which are"
            problems.append(Problem((), f"column {called} {like} {text}"))
    if problems:
        raise SettingsError(where, problems)
    return inputs


def _positions(table: Table, sources: Mapping[str, Source], where: str) -> NDArray[Any]:
    """Positions (n, 3) [Mpc/h] of a piece of a table, in the box."""
    n = len(next(iter(table.values())))
    try:
        parts = {
            axis: np.full(n, source.constant) if source.column is None else source.column.read(table, where)
            for axis, source in ((axis, sources[axis]) for axis in _AXES)
        }
        return PositionSource(columns=_AXES).read(parts, sources["box_size"].constant, where)
    except SimulationError as error:
        raise SettingsError(where, [Problem((), str(error).removeprefix(f"{where}: "))]) from error


def _wrong(model: Model, name: str, values: NDArray[Any], column: str = "") -> str:
    """What these are not, where most of them lie where no number that is the input ``name`` does.

    ``column`` is where they are in the table; by default the user gave a number.
    """
    if not np.isfinite(values).all():
        return "no finite number"
    about = model.columns.get(name, {})
    i = model.inputs.index(name)
    low, high = (float(end[i]) for end in (model.low, model.high))
    units = str(about.get("units", ""))
    if name in QUANTITIES:
        least, most = QUANTITIES[name].low, QUANTITIES[name].high
        what, units = QUANTITIES[name].what, QUANTITIES[name].units
    elif low < high:
        least, most, what = low - _WIDTHS * (high - low), high + _WIDTHS * (high - low), name
    else:
        return ""
    if np.count_nonzero((values < least) | (values > most)) * 2 <= len(values):
        return ""
    middle = float(np.median(values))
    text = (
        f"no {what}{f' in {units}' if units else ''}: expected {least:g} to {most:g} "
        f"(training: {low:.4g} to {high:.4g})"
    )
    if middle > most and np.log10(middle) < most and units.startswith("log10"):
        mend = f"--columns '{name}=log10({column})', or take " if column else ""
        text += f". It is not a logarithm: give {mend}its log10"
    return text


def predict_file(
    model: Model,
    catalog: Path,
    out: Path,
    wanted: Wanted,
    columns: Mapping[str, str] | None = None,
    tell: Callable[[Done, int | None], None] | None = None,
) -> Done:
    """Galaxies for a table of halos in a file, as a Parquet file: streamed, whole or absent.

    In memory are some ten thousand halos at a time. The draws are those of `Model.sample` for the same table.

    Parameters
    ----------
    catalog
        Parquet, CSV or HDF5 (each data set is a column, called by its path in the file or by the end
        of that, where no other path has it).
    out
        a name that ends in .parquet; what was there is replaced once all is written.
    tell
        is called after every piece, with the total number of halos where it is known.

    Raises
    ------
    hpc.strict.SettingsError
        for a table that cannot be read, and as `Model` does.
    hpc.durable.NotEnoughSpace
        where the disk is full; nothing is left there.
    """
    import pyarrow
    import pyarrow.parquet

    where = str(catalog)
    model.require(wanted)
    if out.is_dir():
        raise SettingsError(str(out), [Problem((), "is a folder: name the file that is to be written")])
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        text = f"nothing can be written to {out.parent} ({error.strerror}): name a file elsewhere"
        raise SettingsError(str(out), [Problem((), text)]) from error
    if out.suffix != ".parquet":
        raise SettingsError(
            str(out), [Problem((), "the result is a Parquet file: its name ends in .parquet")]
        )
    if out.exists() and catalog.exists() and out.samefile(catalog):
        raise SettingsError(
            str(out), [Problem((), "the result would replace the table that it is made from")]
        )
    with _opened(catalog) as (names, total, read):
        sources = resolve(model, names, columns or {}, where)
        used = list(dict.fromkeys(name for source in sources.values() for name in source.reads))
        if total is not None:
            size = 4 * len(model.targets) * total * wanted.rows_per_halo
            durable.require_space(out.parent, size, f"{out.name} ({total} halos)")
        done = Done()
        facts = {
            "galdist": galdist.__version__,
            "checkpoints": model.checkpoints,
            "samples": wanted.samples,
            "quantiles": wanted.quantiles,
            "seed": wanted.seed,
            "catalog": where,
            "units": dict(zip(model.properties, model.units, strict=True)),
        }
        pieces = _rechunked(read(used), model.chunk(wanted))
        with (
            durable.room_for(out.name, out.parent),
            durable.atomic_path(out) as temporary,
            open(temporary, "wb") as stream,
        ):
            writer = None
            try:
                for long in model.long_table(pieces, sources, wanted, where, done):
                    batch = pyarrow.table(long)
                    if writer is None:
                        schema = batch.schema.with_metadata({"galdist": json.dumps(facts)})
                        writer = pyarrow.parquet.ParquetWriter(stream, schema, compression="zstd")
                    writer.write_table(batch.cast(schema))
                    if tell is not None:
                        tell(done, total)
                if writer is None:
                    raise SettingsError(where, [Problem((), "the table has no rows")])
                writer.close()
            except BaseException:
                if writer is not None:
                    writer.is_open = False  # or it would write the end of a file that is given up
                raise
    return done


def _pieces(table: Table, n: int) -> Iterator[Table]:
    length = len(next(iter(table.values())))
    for start in range(0, length, n):
        yield {name: values[start : start + n] for name, values in table.items()}


def _rechunked(pieces: Iterator[Table], n: int) -> Iterator[Table]:
    """The same rows, ``n`` at a time but for the last."""
    held: dict[str, NDArray[Any]] = {}
    for piece in pieces:
        held = {name: np.concatenate([held[name], new]) if held else new for name, new in piece.items()}
        whole = len(next(iter(held.values()))) // n * n
        if whole:
            yield from _pieces({name: values[:whole] for name, values in held.items()}, n)
            held = {name: values[whole:] for name, values in held.items()}
    if held and len(next(iter(held.values()))):
        yield held


_Opened = tuple[list[str], int | None, Callable[[Sequence[str]], Iterator[Table]]]


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[_Opened]:
    """A table's columns, its rows where that is known, and what reads columns of it piece by piece."""
    formats = {".parquet": _parquet, ".csv": _csv, ".hdf5": _hdf5, ".h5": _hdf5}
    if not file.is_file():
        raise SettingsError(str(file), [Problem((), "no such file")])
    if file.suffix not in formats:
        text = f"expected a table that ends in {', '.join(formats)}"
        raise SettingsError(str(file), [Problem((), text)])
    with contextlib.ExitStack() as stack:
        with _readable(file):
            names, total, read = stack.enter_context(formats[file.suffix](file))

        def read_all(wanted: Sequence[str]) -> Iterator[Table]:
            with _readable(file):  # a file can be damaged far behind its header
                yield from read(wanted)

        yield names, total, read_all


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    """What reading a damaged table raises, as an error of the user."""
    import pyarrow

    try:
        yield
    except SettingsError:
        raise
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        text = f"cannot be read as {file.suffix[1:]}: {error}"
        raise SettingsError(str(file), [Problem((), text)]) from error


@contextlib.contextmanager
def _parquet(file: Path) -> Iterator[_Opened]:
    import pyarrow.parquet

    # What is read ahead would be held until the file's end.
    with pyarrow.parquet.ParquetFile(file, pre_buffer=False) as table:

        def read(names: Sequence[str]) -> Iterator[Table]:
            for batch in table.iter_batches(_READ, columns=list(names)):
                yield {name: batch.column(name).to_numpy(zero_copy_only=False) for name in names}

        yield list(table.schema_arrow.names), table.metadata.num_rows, read


@contextlib.contextmanager
def _csv(file: Path) -> Iterator[_Opened]:
    import pandas

    def read(names: Sequence[str]) -> Iterator[Table]:
        with pandas.read_csv(file, usecols=list(names), chunksize=_READ) as frames:
            for frame in frames:
                yield {name: frame[name].to_numpy() for name in names}

    yield csv_columns(file), None, read


@contextlib.contextmanager
def _hdf5(file: Path) -> Iterator[_Opened]:
    import h5py

    with h5py.File(file, "r") as hdf5:
        held: list[str] = []
        hdf5.visititems(lambda name, item: held.append(name) if isinstance(item, h5py.Dataset) else None)
        known = _path_ends(held)

        def read(names: Sequence[str]) -> Iterator[Table]:
            data = {name: hdf5[known[name]] for name in names}
            lengths = {name: values.shape[0] if values.ndim else 0 for name, values in data.items()}
            if len(set(lengths.values())) > 1:
                raise SettingsError(str(file), [Problem((), f"columns differ in length: {lengths}")])
            for start in range(0, lengths[names[0]], _READ):
                yield {name: values[start : start + _READ] for name, values in data.items()}

        yield list(known), None, read


def _path_ends(paths: Sequence[str]) -> dict[str, str]:
    """The paths in a file, and what they end in where no other one does (`Mvir` of `Halos/Mvir`) -> path."""
    parts = [path.split("/") for path in paths]
    ends = [
        ("/".join(each[i:]), path)
        for each, path in zip(parts, paths, strict=True)
        for i in range(1, len(each))
    ]
    count = Counter(end for end, _ in ends)
    return {end: path for end, path in ends if count[end] == 1} | {path: path for path in paths}
