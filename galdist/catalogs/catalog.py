"""The catalogue store, and the stage ``catalog`` that fills one: halos and galaxies as tables with units.

Zarr v3: ``<simulation>/<table>/<column>``, rows first. Tables are ``halos`` (of the run with galaxies),
``nbody_halos`` (of its N-body twin), ``galaxies``, and ``centrals`` (`galdist.catalogs.centrals`); positions
are periodic in [0, box_size). What is known of a simulation is in its group's attributes, as in the grid
store; how a table was made is in the table's.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import zarr
from numpy.typing import NDArray
from pydantic import Field as Constraint
from zarr.codecs import ZstdCodec
from zarr.errors import GroupNotFoundError

from galdist.grids.store import (
    SimulationAttrs,
    Source,
    Split,
    StoreError,
    consolidate,
    open_root,
    unknown_name,
    use_zarrs,
)
from galdist.simulations.simulation import SelectionConfig, Simulation, SimulationError
from hpc import durable, progress

log = logging.getLogger(__name__)

FORMAT = "galdist-catalog"
VERSION = 1
UNITS = {
    "position": "Mpc/h",
    "velocity": "km/s",
    "mass": "Msun/h",
    "mass_200c": "Msun/h",
    "radius_200c": "Mpc/h",
    "mass_vir": "Msun/h",
    "radius_vir": "Mpc/h",
    "stellar_mass": "Msun/h",
    "star_formation_rate": "Msun/yr",
    "color_gi": "mag",
    "half_mass_radius": "Mpc/h",
    "v_max": "km/s",
    "angular_momentum": "Mpc/h km/s",
}
"""Of the columns that have units; numbers and rows have none."""

Table = Mapping[str, NDArray[Any]]
_ROWS = 1 << 20  # in a chunk


class CatalogConfig(SelectionConfig):
    """Which simulations become tables."""

    min_stellar_mass: Annotated[float, Constraint(ge=0)] = 1.3e8
    """Least mass in stars of a subhalo that counts as a galaxy [Msun/h]."""


class CatalogStore:
    """Tables of halos and galaxies of some simulations."""

    def __init__(self, path: str | Path, root: zarr.Group) -> None:
        self.path = Path(path)
        self._root = root

    def _names(self) -> list[str]:
        names = self._root.attrs["simulations"]
        assert isinstance(names, list)
        return [str(name) for name in names]

    def names(self, split: Split | None = None) -> list[str]:
        """Names of the simulations, of all splits or of one, in the order in which they were added."""
        return [name for name in self._names() if split is None or self.attrs(name).split == split]

    def __len__(self) -> int:
        return len(self._names())

    def _group(self, name: str) -> zarr.Group:
        if name not in self._names():
            raise StoreError(unknown_name(f"{self.path}: simulation", name, self._names()))
        return cast(zarr.Group, self._root[name])

    def attrs(self, simulation: str) -> SimulationAttrs:
        """What is known of a simulation."""
        return SimulationAttrs.model_validate(self._group(simulation).attrs.asdict())

    def tables(self, simulation: str) -> list[str]:
        """Names of a simulation's tables."""
        return sorted(self._group(simulation).group_keys())

    def table(
        self, simulation: str, table: str, columns: Sequence[str] | None = None, rows: slice = slice(None)
    ) -> dict[str, NDArray[Any]]:
        """Columns of a table, all of them and all rows by default, in memory: (n,) or (n, 3), in the units of
        `UNITS`.

        Raises
        ------
        StoreError
            for a simulation, table or column that is not there; the message names those that are.
        """
        group = self._table(simulation, table)
        held = sorted(group.array_keys())
        for column in columns or ():
            if column not in held:
                raise StoreError(unknown_name(f"{self.path}/{simulation}/{table}: column", column, held))
        if columns is None:
            columns = held
        return {name: np.asarray(cast("zarr.Array[Any]", group[name])[rows]) for name in columns}

    def columns(self, simulation: str, table: str) -> dict[str, str]:
        """Names of a table's columns and their units (``""`` for numbers)."""
        group = self._table(simulation, table)
        return {name: str(array.attrs.get("units", "")) for name, array in sorted(group.arrays())}

    def facts(self, simulation: str, table: str) -> dict[str, Any]:
        """How a table was made: what `CatalogWriter.add` was told; empty where it was told nothing."""
        return self._table(simulation, table).attrs.asdict()

    def _table(self, simulation: str, table: str) -> zarr.Group:
        if table not in self.tables(simulation):
            raise StoreError(unknown_name(f"{self.path}/{simulation}: table", table, self.tables(simulation)))
        return cast(zarr.Group, self._group(simulation)[table])


class CatalogWriter:
    """Fills a catalogue store simulation by simulation; `finish` makes it one that opens."""

    def __init__(self, path: str | Path) -> None:
        """Continue the unfinished store at ``path``; begin one where there is none."""
        use_zarrs()
        self.path = Path(path)
        try:
            self._root = zarr.open_group(path, mode="r+", zarr_format=3)
        except (FileNotFoundError, GroupNotFoundError):
            self._root = zarr.create_group(path, zarr_format=3)

    def __contains__(self, simulation: str) -> bool:
        """Whether all tables of the simulation are written."""
        return simulation in self._root and "name" in self._root[simulation].attrs

    def add(
        self,
        attrs: SimulationAttrs,
        tables: Mapping[str, Table],
        units: Mapping[str, str] = UNITS,
        facts: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Write the tables of one simulation.

        Parameters
        ----------
        tables
            table -> column -> (n,) or (n, 3) values.
        units
            column -> its units.
        facts
            table -> how it was made, in what JSON can carry.

        Raises
        ------
        StoreError
            where columns of a table differ in length.
        """
        for name, columns in tables.items():
            lengths = {column: len(values) for column, values in columns.items()}
            if len(set(lengths.values())) > 1:
                raise StoreError(f"{self.path}/{attrs.name}/{name}: columns differ in length: {lengths}")
        group = self._root.create_group(attrs.name, overwrite=True)
        for name, columns in tables.items():
            table = group.create_group(name, attributes=dict((facts or {}).get(name, {})))
            for column, values in columns.items():
                array = table.create_array(
                    column,
                    shape=values.shape,
                    dtype=values.dtype,
                    chunks=(max(1, min(len(values), _ROWS)), *values.shape[1:]),
                    compressors=ZstdCodec(level=1),
                    dimension_names=("row", "axis")[: values.ndim],
                    attributes={"units": units.get(column, "")},
                )
                if len(values):
                    array[...] = values
        group.update_attributes(attrs.model_dump(mode="json"))

    def finish(self, simulations: Sequence[str]) -> CatalogStore:
        """Close the store: ``simulations`` are what it holds, in this order."""
        self._root.update_attributes({"format": FORMAT, "version": VERSION, "simulations": list(simulations)})
        consolidate(self._root)
        return open_catalog(self.path)


def open_catalog(path: str | Path) -> CatalogStore:
    """Open the catalogue store at ``path``.

    Raises
    ------
    StoreError
        where there is none, it is unfinished, or of another format or version.
    """
    where = "the stages `catalog`, `centrals` and `smogn` leave one, catalog.zarr"
    return CatalogStore(path, open_root(path, "catalogue store", FORMAT, VERSION, where))


def catalog(config: CatalogConfig, inputs: Mapping[str, list[Path]], out: Path) -> None:
    """Make ``out / "catalog.zarr"`` from group catalogues.

    A simulation has those of the three tables whose group catalogues it has. ``halos`` has a column
    ``n_galaxies``: the galaxies of a halo with at least ``min_stellar_mass``.

    Raises
    ------
    galdist.simulations.simulation.SimulationError
        for files that are absent, damaged, incomplete or not what they should be.
    """
    simulations = config.open(inputs)
    for simulation, _ in simulations:
        if not simulation.group_files and not simulation.nbody_group_files:
            raise SimulationError(f"{simulation.name}: there is no group catalogue")
    path = out / "catalog.zarr"
    begun = CatalogWriter(path) if path.exists() else ()
    sources = {simulation.name: _sources(simulation) for simulation, _ in simulations}
    # Tables are a part of what group files hold.
    n_bytes = sum(source.size for name, held in sources.items() if name not in begun for source in held)
    durable.require_space(out, n_bytes, f"catalogs of {len(simulations)} simulations")
    writer = CatalogWriter(path)
    for done, (simulation, split) in enumerate(simulations):
        progress.report(done, len(simulations), simulation.name)
        if simulation.name not in writer:
            attrs = SimulationAttrs.of(simulation, cast(Split, split), sources[simulation.name])
            writer.add(attrs, _tables(simulation, config.min_stellar_mass))
    writer.finish([simulation.name for simulation, _ in simulations])
    progress.report(len(simulations), len(simulations))


def _sources(simulation: Simulation) -> list[Source]:
    files = (*simulation.group_files, *simulation.nbody_group_files)
    return [Source(file=str(file), size=file.stat().st_size) for file in files]


def _tables(simulation: Simulation, min_stellar_mass: float) -> dict[str, Table]:
    tables: dict[str, Table] = {}
    if simulation.group_files:
        halos, galaxies = simulation.halos(), simulation.galaxies(min_stellar_mass)
        n_galaxies = np.bincount(galaxies["halo"], minlength=len(halos["mass"]))
        tables["halos"] = {**halos, "n_galaxies": n_galaxies}
        tables["galaxies"] = galaxies
    if simulation.nbody_group_files:
        tables["nbody_halos"] = simulation.halos(nbody=True)
    sizes = ", ".join(f"{len(table['position'])} {name}" for name, table in tables.items())
    log.info("%s: %s", simulation.name, sizes)
    return tables
