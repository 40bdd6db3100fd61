"""A simulation as its files: snapshots and SUBFIND group catalogues of AREPO and GADGET, as HDF5.

IllustrisTNG and CAMELS share what is inside the files
(https://www.tng-project.org/data/docs/specifications, https://camels.readthedocs.io); their modules only
know where the files lie. Here are the units, the particle masses of the header, catalogues in many chunks
and the checks. Everything leaves in the units of galdist: Mpc/h (comoving), km/s (peculiar), Msun/h,
Msun/yr.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from galdist.config import ExternalPath, StrictModel
from galdist.simulations import READERS
from galdist.simulations.snapshots import ALIKE, possible_numbers, snapshot_at
from hpc import rank
from hpc.strict import did_you_mean

GAS, DARK_MATTER, STARS, BLACK_HOLES = 0, 1, 4, 5  # types of particles
ALL_MATTER = (GAS, DARK_MATTER, STARS, BLACK_HOLES)
NO_SUBHALO = 4294967295  # -1 of a group without subhalos, where the field is unsigned
Columns = dict[str, NDArray[Any]]
Matter = Literal["nbody", "hydro"]

_MPC_IN_CM = 3.085678e24
_SOLAR_MASS_IN_G = 1.989e33  # with these, AREPO's unit length is 1 kpc and its unit mass 1e10 Msun, exactly
_BANDS = ("U", "B", "V", "K", "g", "r", "i", "z")  # columns of SubhaloStellarPhotometrics


class SimulationError(ValueError):
    """A simulation's files are absent, damaged or not what they should be."""


@dataclass(frozen=True)
class Simulation:
    """One simulation at one redshift. Opening it reads headers only; it is cheap to send elsewhere."""

    name: str
    suite: str
    set: str
    particle_files: tuple[Path, ...]
    """Chunks of the snapshot that holds the matter, in the order of their numbers."""
    group_files: tuple[Path, ...]
    """Chunks of the group catalogue with galaxies; empty where there is none."""
    nbody_group_files: tuple[Path, ...] = ()
    """Chunks of the group catalogue of the N-body run; empty where there is none."""
    sigma_8: float | None = None
    n_s: float | None = None
    astrophysics: dict[str, float] = field(default_factory=dict)
    seed: int | None = None
    matter_twin: "Simulation | None" = None
    """Another run of the same initial conditions, whose matter takes the place of this one's."""

    @property
    def matter(self) -> "Simulation":
        """Whose particles are the matter."""
        return self.matter_twin or self

    @cached_property
    def _snapshot(self) -> "Header":
        return read_header(self.particle_files[0])

    @property
    def box_size(self) -> float:
        """Side of the periodic box [Mpc/h]."""
        return self._snapshot.box_size

    @property
    def redshift(self) -> float:
        """Redshift of the snapshot."""
        return self._snapshot.redshift

    @property
    def cosmology(self) -> dict[str, float]:
        """Omega_m, Omega_b, h, n_s and sigma_8: those that the files say."""
        attributes = self._snapshot.attributes
        known = {
            "Omega_m": attributes.get("Omega0"),
            "Omega_b": attributes.get("OmegaBaryon"),
            "h": attributes.get("HubbleParam"),
            "n_s": self.n_s,
            "sigma_8": self.sigma_8,
        }
        return {key: float(value) for key, value in known.items() if value is not None}

    def n_particles(self, kind: int = DARK_MATTER) -> int:
        """Particles of a type in all chunks of the snapshot, as the headers say."""
        return self._snapshot.n_total(kind)

    def n_particles_in(self, file: Path, kind: int = DARK_MATTER) -> int:
        """Particles of a type in one chunk of the snapshot."""
        return read_header(file).n_here(kind)

    def particles(
        self,
        file: Path,
        columns: Sequence[str] = ("position", "velocity", "mass"),
        start: int = 0,
        stop: int | None = None,
        kind: int = DARK_MATTER,
    ) -> Columns:
        """Particles ``start:stop`` of a type in one chunk of the snapshot.

        Parameters
        ----------
        file
            one of ``particle_files``.
        columns
            ``position`` (n, 3) [Mpc/h] in [0, box_size), ``velocity`` (n, 3) [km/s], ``mass`` (n,) [Msun/h]
            and ``id`` (n,); only what is asked for is read. Positions and velocities have the file's type
            (float32 or float64), IDs are unsigned integers.
        start, stop
            rows, so that a chunk can be read in parts.
        kind
            type of the particles: 0 gas, 1 dark matter, 4 stars and gas in winds, 5 black holes.

        Raises
        ------
        SimulationError
            for a field that is missing, a file that cannot be read and positions outside the box.
        """
        group = f"PartType{kind}"
        out: Columns = {}
        with _open(file) as hdf5:
            header = _header_of(hdf5, file)
            n_rows = header.n_here(kind)
            rows = slice(start, n_rows if stop is None else min(stop, n_rows))
            for column in columns:
                if n_rows == 0:  # such a chunk has no fields
                    empty = np.empty((0, 3), np.float32)
                    out[column] = empty if column in ("position", "velocity") else empty[:, 0]
                elif column == "position":
                    values = _read(hdf5, f"{group}/Coordinates", rows)
                    out[column] = _positions(values, header, file, f"{group}/Coordinates")
                elif column == "velocity":
                    values = _read(hdf5, f"{group}/Velocities", rows)
                    out[column] = values * values.dtype.type(header.velocity * np.sqrt(header.scale_factor))
                elif column == "mass":
                    out[column] = self._masses(hdf5, header, rows, kind)
                elif column == "id":
                    out[column] = _read(hdf5, f"{group}/ParticleIDs", rows)
                else:
                    known = "position, velocity, mass, id"
                    raise SimulationError(f"{file}: no column {column!r}: {known} are known")
        return out

    def _masses(self, hdf5: Any, header: "Header", rows: slice, kind: int) -> NDArray[Any]:
        table = header.attributes.get("MassTable")
        mass = 0.0 if table is None else float(np.atleast_1d(table)[kind])
        if mass > 0:
            return np.full(rows.stop - rows.start, mass * header.mass)
        field = f"PartType{kind}/Masses"
        if field not in hdf5:
            raise SimulationError(
                f"{header.file}: no particle masses: Header/MassTable[{kind}] is {mass:g} "
                f"and there is no {field}"
            )
        return _read(hdf5, field, rows).astype(np.float64) * header.mass

    def halos(self, nbody: bool = False) -> Columns:
        """Friends-of-friends halos: of the run with galaxies, or of its N-body twin; see `read_halos`."""
        return read_halos(self._groups(nbody))

    def galaxies(self, min_stellar_mass: float) -> Columns:
        """Subhalos with at least ``min_stellar_mass`` [Msun/h] of stars; see `read_galaxies`."""
        return read_galaxies(self._groups(nbody=False), min_stellar_mass)

    def _groups(self, nbody: bool) -> tuple[Path, ...]:
        files = self.nbody_group_files if nbody else self.group_files
        if not files:
            kind = "N-body group catalogue" if nbody else "group catalogue with galaxies"
            raise SimulationError(f"{self.name}: there is no {kind} beside {self.particle_files[0].parent}")
        return files


Members = tuple[int | str, ...] | Annotated[float, Field(ge=0, le=1)]
Range = tuple[float | None, float | None]


class SplitConfig(StrictModel):
    """Simulations kept out of training: by name (``CV_6`` or ``IllustrisTNG_CV_6``), by place among those
    selected, or a fraction of them: the first ones for the validation, the last ones for the test."""

    validation: Members = ()
    test: Members = ()


class SelectionConfig(StrictModel):
    """Which simulations a stage reads, and what they are for."""

    format: Literal["camels", "tng"] = "camels"
    path: ExternalPath | None = None
    """Where the files are; by default they are those of the step named under ``simulations``."""
    suite: str | None = None
    """Such as IllustrisTNG (CAMELS) or TNG300-1 (TNG); may be left out where there is one."""
    set: str | None = None
    """Such as CV or LH; may be left out where there is one."""
    volume: str | None = None
    """Such as L25n256; may be left out where there is one. CAMELS only."""
    snapshot: Annotated[int, Field(ge=0)] | None = None
    """Number of the snapshot; that of z = 0 by default."""
    redshift: Annotated[float, Field(ge=0)] | None = None
    """Redshift of the snapshot, instead of its number; see `galdist.simulations.snapshots`."""
    matter: Matter | Literal["total"] | None = None
    """``nbody``: dark matter of the N-body twins (default of CAMELS). ``hydro``: of the runs with galaxies
    (default of TNG). ``total``: of the runs with galaxies; masses and momenta are those of dark matter, gas,
    stars and black holes, counts those of dark matter still."""
    where: dict[str, Range] = Field(default_factory=dict)
    """Only simulations whose parameters are in these ranges, such as ``A_SN1: [2, null]``: at least the first
    number, below the second; null for no bound. Parameters are those of cosmology and astrophysics."""
    split: SplitConfig = SplitConfig()

    @model_validator(mode="after")
    def _only_what_the_format_has(self) -> "SelectionConfig":
        if self.format == "tng" and (self.volume or self.set):
            raise ValueError("volume and set: IllustrisTNG has neither; leave them out")
        if self.snapshot is not None and self.redshift is not None:
            raise ValueError(
                f"snapshot ({self.snapshot}) and redshift ({self.redshift:g}) both say which snapshot is "
                "read: leave one out"
            )
        if self.redshift is not None:
            snapshot_at(self.format, self.redshift)
        return self

    def open(self, inputs: Mapping[str, Sequence[Path]]) -> list[tuple[Simulation, str]]:
        """The simulations, each with its split: ``train``, ``validation`` or ``test``.

        Raises
        ------
        SimulationError
            where there is neither a path nor a step to read from, or both; for files of another redshift than
            that which is asked for, or 0 where nothing is said of the snapshot; for names in the split that
            are not there or are there twice; for parameters that are unknown and ranges that hold no
            simulation; and whatever the reader raises.
        """
        given = [*inputs.get("simulations", ()), *([self.path] if self.path else [])]
        if len(given) != 1:
            raise SimulationError(
                "simulations: give either `path` in the config or a step under `inputs: simulations`, "
                f"got {'both' if given else 'neither'}"
            )
        where = {"volume": self.volume} if self.format == "camels" else {}
        if self.matter is not None:
            where["matter"] = "hydro" if self.matter == "total" else self.matter
        opener: Callable[..., list[Simulation]] = rank.load(READERS[self.format])
        wanted = self.redshift or 0.0
        numbers = possible_numbers(self.format, wanted) if self.snapshot is None else (self.snapshot,)
        found = opener(given[0], suite=self.suite, set=self.set, snapshot=numbers, **where)
        for one in found if self.snapshot is None else ():
            if abs(1 / (1 + one.redshift) - snapshot_at(self.format, wanted)[1]) > 2 * ALIKE:
                why = "is the default" if self.redshift is None else "was asked for"
                raise SimulationError(
                    f"{one.particle_files[0]} is at redshift {one.redshift:.2f}, {wanted:g} {why}: its "
                    "snapshots have other numbers; say which by `snapshot`, or another time by `redshift`"
                )
        simulations = [
            simulation
            for simulation in found
            if all(_within(simulation, name, limits) for name, limits in self.where.items())
        ]
        if not simulations:
            raise SimulationError(f"{given[0]}: where: no simulation has parameters in {self.where}")
        splits = dict.fromkeys((simulation.name for simulation in simulations), "train")
        # Those that are named first: a fraction is of what they leave.
        for split in sorted(("validation", "test"), key=lambda s: isinstance(getattr(self.split, s), float)):
            for name in _members(getattr(self.split, split), simulations, splits, f"split.{split}"):
                if splits[name] != "train":
                    raise SimulationError(f"split.{split}: {name} is already in {splits[name]}")
                splits[name] = split
        return [(simulation, splits[simulation.name]) for simulation in simulations]


def _within(simulation: Simulation, name: str, limits: Range) -> bool:
    known = simulation.cosmology | simulation.astrophysics
    if name not in known:
        raise nearest(f"parameter (where) of {simulation.name}", name, list(known))
    low, high = limits
    return (low is None or known[name] >= low) and (high is None or known[name] < high)


def _members(
    wanted: Members, simulations: Sequence[Simulation], splits: Mapping[str, str], where: str
) -> list[str]:
    """Names of the simulations of a split."""
    if isinstance(wanted, tuple):
        return [_member(member, simulations, where) for member in wanted]
    free = [simulation.name for simulation in simulations if splits[simulation.name] == "train"]
    number = min(round(wanted * len(simulations)), len(free))
    return free[:number] if where.endswith("validation") else free[len(free) - number :]


def _member(member: int | str, simulations: Sequence[Simulation], where: str) -> str:
    if isinstance(member, int):
        if not 0 <= member < len(simulations):
            raise SimulationError(
                f"{where}: {member} is not one of the {len(simulations)} simulations (from 0)"
            )
        return simulations[member].name
    for simulation in simulations:
        if member in (simulation.name, simulation.name.removeprefix(f"{simulation.suite}_")):
            return simulation.name
    raise nearest(f"simulation ({where})", member, [simulation.name for simulation in simulations])


def read_halos(files: Sequence[Path], complete: bool = True) -> Columns:
    """Friends-of-friends halos of a group catalogue.

    Parameters
    ----------
    files
        its chunks, in the order of their numbers.
    complete
        False to accept some of the chunks only; by default a missing one is an error.

    Returns
    -------
    dict
        ``position`` (n, 3) [Mpc/h], ``velocity`` (n, 3) [km/s], ``mass`` [Msun/h] of all linked particles,
        ``mass_200c`` [Msun/h] and ``radius_200c`` [Mpc/h] of the sphere with 200 times the critical density,
        ``n_particles``. Where the files have it, ``mass_vir`` and ``radius_vir`` of the sphere with the
        virial density of Bryan & Norman (1998), and ``v_max`` [km/s], the largest circular velocity of the
        first subhalo (of a complete catalogue only; 0 in halos without one).
    """
    fields = ("GroupPos", "GroupVel", "GroupMass", "Group_M_Crit200", "Group_R_Crit200", "GroupLen")
    virial = _held(files, "Group", ("Group_M_TopHat200", "Group_R_TopHat200"))
    first = _held(files, "Group", ("GroupFirstSub",)) if complete else ()
    catalog, header, _ = _read_catalog(files, "Group", (*fields, *virial, *first), complete)
    halos = {
        "position": catalog["GroupPos"],
        # The files have GroupVel in km/s/a: the peculiar velocity is GroupVel / a.
        "velocity": catalog["GroupVel"] * np.float32(header.velocity / header.scale_factor),
        "mass": catalog["GroupMass"].astype(np.float64) * header.mass,
        "mass_200c": catalog["Group_M_Crit200"].astype(np.float64) * header.mass,
        "radius_200c": catalog["Group_R_Crit200"].astype(np.float64) * header.length,
        "n_particles": catalog["GroupLen"].astype(np.int64),
    }
    if len(virial) == 2:
        halos["mass_vir"] = catalog["Group_M_TopHat200"].astype(np.float64) * header.mass
        halos["radius_vir"] = catalog["Group_R_TopHat200"].astype(np.float64) * header.length
    if first and _held(files, "Subhalo", ("SubhaloVmax",)):
        subhalos, _, _ = _read_catalog(files, "Subhalo", ("SubhaloVmax",), complete)
        v_max = np.append(subhalos["SubhaloVmax"] * np.float32(header.velocity), np.float32(0))
        row = catalog["GroupFirstSub"].astype(np.int64)
        halos["v_max"] = v_max[np.where(row == NO_SUBHALO, -1, row)]  # the last one is that of none
    return halos


def read_galaxies(files: Sequence[Path], min_stellar_mass: float, complete: bool = True) -> Columns:
    """Galaxies of a group catalogue: subhalos with at least ``min_stellar_mass`` [Msun/h] of bound stars.

    Subhalos that the catalogue flags as not of cosmological origin (``SubhaloFlag`` of IllustrisTNG) are
    left out.

    Returns
    -------
    dict
        ``position`` (n, 3) [Mpc/h], ``velocity`` (n, 3) [km/s], ``stellar_mass`` [Msun/h],
        ``star_formation_rate`` [Msun/yr], ``color_gi`` (g - i) [mag], ``half_mass_radius`` of the stars
        [Mpc/h], ``halo`` (row of the galaxy's halo in `read_halos` of the same files, -1 where the files
        lack it), ``is_central``, ``subhalo`` (row of the files). Where the files have them, of the whole
        subhalo: ``v_max``, the largest circular velocity [km/s], and ``angular_momentum`` (n, 3), specific
        [physical Mpc/h km/s].
    """
    fields = (
        "SubhaloPos",
        "SubhaloVel",
        "SubhaloMassType",
        "SubhaloSFR",
        "SubhaloStellarPhotometrics",
        "SubhaloHalfmassRadType",
        "SubhaloGrNr",
    )

    def is_galaxy(hdf5: Any, header: Header) -> NDArray[np.bool_]:
        massive = (
            _read(hdf5, "Subhalo/SubhaloMassType")[:, STARS].astype(np.float64) * header.mass
            >= min_stellar_mass
        )
        return (
            massive & hdf5["Subhalo/SubhaloFlag"][:].astype(bool)
            if "Subhalo/SubhaloFlag" in hdf5
            else massive
        )

    structure = _held(files, "Subhalo", ("SubhaloVmax", "SubhaloSpin"))
    catalog, header, n_subhalos = _read_catalog(files, "Subhalo", (*fields, *structure), complete, is_galaxy)
    halo, is_central = _membership(files, catalog, n_subhalos, complete)
    photometry = catalog["SubhaloStellarPhotometrics"]
    radius = catalog["SubhaloHalfmassRadType"][:, STARS].astype(np.float64)
    galaxies = {
        "position": catalog["SubhaloPos"],
        "velocity": catalog["SubhaloVel"] * np.float32(header.velocity),
        "stellar_mass": catalog["SubhaloMassType"][:, STARS].astype(np.float64) * header.mass,
        "star_formation_rate": catalog["SubhaloSFR"],
        "color_gi": photometry[:, _BANDS.index("g")] - photometry[:, _BANDS.index("i")],
        "half_mass_radius": radius * header.length,
        "halo": halo,
        "is_central": is_central,
        "subhalo": catalog["row"].astype(np.int64),
    }
    if "SubhaloVmax" in structure:
        galaxies["v_max"] = catalog["SubhaloVmax"] * np.float32(header.velocity)
    if "SubhaloSpin" in structure:
        galaxies["angular_momentum"] = catalog["SubhaloSpin"] * np.float32(header.length * header.velocity)
    return galaxies


def _membership(
    files: Sequence[Path], catalog: Columns, n_subhalos: int, complete: bool
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Row of every subhalo's halo, and whether the subhalo is the first (central) one of it.

    ``SubhaloGrNr`` and ``GroupFirstSub`` count over the whole catalogue. Some chunks of it begin at rows that
    the chunks do not say; they follow from the first group that has subhalos, for a group's subhalos lie
    together.
    """
    groups, _, _ = _read_catalog(files, "Group", ("GroupFirstSub", "GroupNsubs"), complete)
    first, n_subs = groups["GroupFirstSub"].astype(np.int64), groups["GroupNsubs"].astype(np.int64)
    first[first == NO_SUBHALO] = -1
    populated = np.flatnonzero((first >= 0) & (n_subs > 0))
    group_offset = subhalo_offset = 0
    if not complete and populated.size and n_subhalos:
        if n_subs.sum() != n_subhalos:
            raise SimulationError(
                f"{files[0]}: Group/GroupNsubs counts {n_subs.sum()} subhalos, not {n_subhalos}: they do "
                "not belong together; read all chunks"
            )
        holder = next(file for file in files if read_header(file).n_rows("Subhalo")[0])
        with _open(holder) as hdf5:
            group_offset = int(_read(hdf5, "Subhalo/SubhaloGrNr", slice(0, 1))[0]) - int(populated[0])
        subhalo_offset = int(first[populated[0]])
    halo = catalog["SubhaloGrNr"].astype(np.int64) - group_offset
    inside = (halo >= 0) & (halo < first.size)
    if complete and not inside.all():
        raise SimulationError(
            f"{files[0]}: Subhalo/SubhaloGrNr names group {int(halo[~inside][0])} "
            f"of a catalogue with {first.size}"
        )
    halo[~inside] = -1
    is_central = np.zeros(halo.size, bool)
    is_central[inside] = first[halo[inside]] == catalog["row"][inside] + subhalo_offset
    return halo, is_central


@dataclass(frozen=True)
class Header:
    """Attributes of a file's ``Header`` (and ``Parameters``), with its units."""

    file: Path
    attributes: Mapping[str, Any]

    def number(self, *names: str) -> float:
        """The first of the attributes ``names`` that is there."""
        for name in names:
            if name in self.attributes:
                return float(np.atleast_1d(self.attributes[name])[0])
        raise SimulationError(f"{self.file}: attribute Header/{names[0]} is missing")

    @property
    def length(self) -> float:
        """Unit of length [Mpc/h]."""
        return float(self.attributes.get("UnitLength_in_cm", 3.085678e21)) / _MPC_IN_CM

    @property
    def mass(self) -> float:
        """Unit of mass [Msun/h]."""
        return float(self.attributes.get("UnitMass_in_g", 1.989e43)) / _SOLAR_MASS_IN_G

    @property
    def velocity(self) -> float:
        """Unit of velocity [km/s]."""
        return float(self.attributes.get("UnitVelocity_in_cm_per_s", 1e5)) / 1e5

    @property
    def box_size(self) -> float:
        return round(self.number("BoxSize") * self.length, 9)

    @property
    def scale_factor(self) -> float:
        return self.number("Time")

    @property
    def redshift(self) -> float:
        redshift = self.number("Redshift")
        return redshift if abs(redshift) > 1e-10 else 0.0  # snapshots at z = 0 carry rounding such as 2e-16

    def _counts(self, name: str) -> NDArray[np.int64]:
        if name not in self.attributes:
            raise SimulationError(f"{self.file}: attribute Header/{name} is missing")
        return np.asarray(self.attributes[name]).astype(np.int64)

    def n_here(self, kind: int) -> int:
        """Particles of a type in this file."""
        return int(self._counts("NumPart_ThisFile")[kind])

    def n_rows(self, group: str) -> tuple[int, int]:
        """Rows of ``Group`` or ``Subhalo`` in this file and in all of the catalogue."""
        name = {"Group": "Ngroups", "Subhalo": "Nsubgroups"}[group]
        other = f"N{group.lower()}s"  # in GADGET-4
        return (
            int(self.number(f"{name}_ThisFile", f"{other}_ThisFile")),
            int(self.number(f"{name}_Total", f"{other}_Total")),
        )

    def n_total(self, kind: int) -> int:
        """Particles of a type in the whole snapshot."""
        total = int(self._counts("NumPart_Total")[kind])
        if "NumPart_Total_HighWord" in self.attributes:
            total += int(self._counts("NumPart_Total_HighWord")[kind]) << 32
        return total


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    """The HDF5 file, with errors of damaged data that name it."""
    import h5py
    import hdf5plugin  # noqa: F401  (registers the compression filters that some N-body files use)

    if not file.is_file():
        raise SimulationError(f"{file}: no such file")
    try:
        with h5py.File(file, "r") as hdf5:
            yield hdf5
    except OSError as error:
        raise SimulationError(
            f"{file}: cannot be read as HDF5; it may be cut short: download it again ({error})"
        ) from error


def read_header(file: Path) -> Header:
    """Header of a snapshot's or group catalogue's file."""
    with _open(file) as hdf5:
        return _header_of(hdf5, file)


def _header_of(hdf5: Any, file: Path) -> Header:
    if "Header" not in hdf5:
        raise SimulationError(f"{file}: group Header is missing: it holds {', '.join(hdf5) or 'nothing'}")
    attributes: dict[str, Any] = {}
    for group in ("Parameters", "Header"):
        if group in hdf5:
            attributes.update(hdf5[group].attrs)
    return Header(file, attributes)


def _read(hdf5: Any, name: str, rows: slice = slice(None)) -> NDArray[Any]:
    group = name.rpartition("/")[0]
    if name not in hdf5:
        held = sorted(hdf5[group]) if group in hdf5 else sorted(hdf5)
        near = get_close_matches(name.rpartition("/")[2], held, n=1)
        raise SimulationError(
            f"{hdf5.filename}: field {name} is missing{f'; did you mean {near[0]}?' if near else ''} "
            f"{group if group in hdf5 else 'The file'} holds {', '.join(held) or 'nothing'}"
        )
    dataset = hdf5[name]
    if rows.stop is not None and rows.stop > dataset.shape[0]:
        raise SimulationError(
            f"{hdf5.filename}: field {name} has {dataset.shape[0]} rows, the header says at least {rows.stop}"
        )
    try:
        return np.asarray(dataset[rows])
    except OSError as error:
        raise SimulationError(
            f"{hdf5.filename}: field {name} cannot be read; the file is damaged ({error})"
        ) from error


def read_datasets(file: Path, names: Sequence[str]) -> Columns:
    """Datasets of an HDF5 file, whole.

    Raises
    ------
    SimulationError
        for a file that is damaged or lacks one; the message names the nearest that it has.
    """
    with _open(file) as hdf5:
        return {name: _read(hdf5, name) for name in names}


def _positions(values: NDArray[Any], header: Header, file: Path, field: str) -> NDArray[Any]:
    """Positions in Mpc/h, in [0, box_size).

    A position on the upper face, where rounding may put one, is the one on the lower face.
    """
    box = header.box_size
    positions = values * values.dtype.type(header.length)
    if positions.size:
        low, high = float(positions.min()), float(positions.max())
        if not (low >= -1e-6 * box and high <= box * (1 + 1e-6)):  # also where they are not numbers
            raise SimulationError(
                f"{file}: field {field} has positions from {low / header.length:g} to "
                f"{high / header.length:g}, outside the box [0, {box / header.length:g}] (Header/BoxSize)"
            )
        limit = values.dtype.type(box)
        if low < 0:
            positions = np.where(positions < 0, positions + limit, positions)
        if low < 0 or high >= limit:
            positions = np.where(positions >= limit, values.dtype.type(0), positions)
    return positions


def _read_catalog(
    files: Sequence[Path],
    group: Literal["Group", "Subhalo"],
    fields: Sequence[str],
    complete: bool,
    keep: Callable[[Any, "Header"], NDArray[np.bool_]] | None = None,
) -> tuple[Columns, Header, int]:
    """Fields of all chunks of a group catalogue, one after the other, and the number of rows in the files.

    Positions are in Mpc/h already. ``keep`` chooses rows of a chunk; ``row`` is their place in the files.
    """
    parts: dict[str, list[NDArray[Any]]] = {name: [] for name in (*fields, "row")}
    n_rows = 0
    for file in files:
        header = read_header(file)
        n_here, n_total = header.n_rows(group)
        if n_here:  # SUBFIND writes no fields where a chunk has no rows
            with _open(file) as hdf5:
                rows = slice(None) if keep is None else np.flatnonzero(keep(hdf5, header))
                for name in fields:
                    values = _read(hdf5, f"{group}/{name}")
                    if len(values) != n_here:
                        raise SimulationError(
                            f"{file}: field {group}/{name} has {len(values)} rows, the header says {n_here}"
                        )
                    if name.endswith("Pos"):
                        values = _positions(values, header, file, f"{group}/{name}")
                    parts[name].append(values[rows])
                parts["row"].append(np.arange(n_rows, n_rows + n_here)[rows])
        n_rows += n_here
    if complete and n_rows != n_total:
        raise SimulationError(
            f"{files[0]} and {len(files) - 1} more: {n_rows} rows of {group}, "
            f"the header says {n_total}: a chunk is missing"
        )
    catalog = {
        name: np.concatenate(arrays) if arrays else np.empty((0, *_WIDTHS.get(name, ())), np.float32)
        for name, arrays in parts.items()
    }
    return catalog, header, n_rows


def _held(
    files: Sequence[Path], group: Literal["Group", "Subhalo"], fields: tuple[str, ...]
) -> tuple[str, ...]:
    """Those of ``fields`` that a catalogue has: its first chunk with rows shows it."""
    for file in files:
        if read_header(file).n_rows(group)[0]:
            with _open(file) as hdf5:
                return tuple(name for name in fields if f"{group}/{name}" in hdf5)
    return fields


_WIDTHS = {
    "SubhaloSpin": (3,),
    "GroupPos": (3,),
    "GroupVel": (3,),
    "SubhaloPos": (3,),
    "SubhaloVel": (3,),
    "SubhaloMassType": (6,),
    "SubhaloHalfmassRadType": (6,),
    "SubhaloStellarPhotometrics": (8,),
}


def find_chunks(
    folder: Path, stems: Iterable[str], number: int, folders: Iterable[str], counter: str
) -> tuple[Path, ...]:
    """Files of snapshot ``number`` in ``folder``: ``<stem>_<number>.hdf5``, or chunks
    ``<stem>_<number>.<n>.hdf5``.

    Parameters
    ----------
    folder
        a simulation's folder.
    stems
        names without the number, such as ``snapshot`` and ``snap``.
    number
        of the snapshot; three digits in the names.
    folders
        subfolders that hold chunks, without the number, such as ``snapdir``.
    counter
        attribute of the header with the number of chunks.

    Returns
    -------
    tuple of Path
        in the order of their numbers; empty where there is none.

    Raises
    ------
    SimulationError
        where a chunk is missing; the message names it.
    """
    for stem in stems:
        single = folder / f"{stem}_{number:03d}.hdf5"
        if single.is_file():
            return _all_chunks({0: single}, counter)
        for place in (folder, *(folder / f"{name}_{number:03d}" for name in folders)):
            pattern = re.compile(rf"{re.escape(stem)}_{number:03d}\.(\d+)\.hdf5")
            chunks = {
                int(match[1]): file
                for file in (place.iterdir() if place.is_dir() else ())
                if (match := pattern.fullmatch(file.name))
            }
            if chunks:
                return _all_chunks(chunks, counter)
    return ()


def _all_chunks(chunks: Mapping[int, Path], counter: str) -> tuple[Path, ...]:
    first = chunks[min(chunks)]
    expected = int(read_header(first).number(counter, "NumFiles", "NumFilesPerSnapshot"))
    missing = sorted(set(range(expected)) - set(chunks))
    if missing:
        name = re.sub(r"\.\d+\.hdf5$", f".{missing[0]}.hdf5", str(first))
        raise SimulationError(
            f"{name}: chunk {missing[0]} is missing: {first} says Header/{counter} = {expected}, "
            f"but {len(chunks)} {'is' if len(chunks) == 1 else 'are'} there"
        )
    return tuple(chunks[index] for index in range(expected))


def nearest(what: str, given: str, available: Sequence[str]) -> SimulationError:
    """The error for a name that is not among those available."""
    hint = did_you_mean(given, available)
    return SimulationError(f"no {what} {given!r}{hint} Available: {', '.join(available) or 'none'}")
