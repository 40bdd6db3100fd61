"""Simulation files: snapshots and group catalogs in the layouts of CAMELS and IllustrisTNG (HDF5).

Names, units and types are those of the public files (Nelson et al. 2019, arXiv:1812.05609;
Villaescusa-Navarro et al. 2022, arXiv:2201.01300): lengths ckpc/h, masses 1e10 Msun/h, snapshot velocities
km/s sqrt(a). Particles come in the order of their groups, the largest first, then those outside groups.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from galdist.simulations.cola import Cosmology
from galdist.simulations.formation import Galaxies
from galdist.simulations.halos import Halos, route
from galdist.simulations.snapshots import Layout, snapshot_at
from hpc import durable

LENGTH = 1e3  # ckpc/h in a Mpc/h
MASS = 1e-10  # file units in a Msun/h
_DARK, _STARS, _TYPES = 1, 4, 6


@dataclass(frozen=True)
class SimulationFiles:
    """Where the files of one simulation at one redshift are.

    ``out`` is the root of the tree, ``volume`` a name like ``L25n64``, ``set`` one like ``CV``; ``n_files``
    chunks.
    """

    out: Path
    layout: Layout
    suite: str
    volume: str
    set: str
    index: int
    n_files: int
    redshift: float = 0.0

    @property
    def scale_factor(self) -> float:
        """Of the snapshot at this redshift."""
        return snapshot_at(self.layout, self.redshift)[1]

    @property
    def name(self) -> str:
        """Name within the suite, as in its parameter file."""
        return f"{self.set}_{self.index}"

    def snapshot(self, chunk: int) -> Path:
        """One chunk of the snapshot."""
        if self.layout == "tng":
            return self._tng / "output" / f"snapdir_{self._number}" / f"snap_{self._number}.{chunk}.hdf5"
        folder = self._camels("Sims", f"{self.suite}_DM")
        if self.n_files == 1:
            return folder / f"snapshot_{self._number}.hdf5"
        return folder / f"snapdir_{self._number}" / f"snapshot_{self._number}.{chunk}.hdf5"

    def groups(self, chunk: int = 0, nbody: bool = False) -> Path:
        """Group catalog: one file in the CAMELS layout, ``n_files`` chunks in that of TNG."""
        if self.layout == "tng":
            folder = self._tng / "output" / f"groups_{self._number}"
            return folder / f"fof_subhalo_tab_{self._number}.{chunk}.hdf5"
        folder = self._camels("FOF_Subfind", f"{self.suite}_DM" if nbody else self.suite)
        return folder / f"groups_{self._number}.hdf5"

    @property
    def offsets(self) -> Path:
        """TNG layout: where the particles of each group are."""
        return self._tng / "postprocessing" / "offsets" / f"offsets_{self._number}.hdf5"

    @property
    def last(self) -> Path:
        """The file that is written last: where it exists, all of them are complete."""
        return self.offsets if self.layout == "tng" else self.groups()

    @property
    def _number(self) -> str:
        return f"{snapshot_at(self.layout, self.redshift)[0]:03d}"

    @property
    def _tng(self) -> Path:
        return self.out / f"{self.suite}_{self.volume}_{self.name}"

    def _camels(self, kind: str, suite: str) -> Path:
        return self.out / kind / suite / self.volume / self.set / self.name


@dataclass(frozen=True)
class Header:
    """What the headers of all files of a simulation say. ``box_size`` Mpc/h, ``particle_mass`` Msun/h."""

    cosmology: Cosmology
    box_size: float
    n_total: int
    particle_mass: float
    scale_factor: float = 1.0

    def attributes(self) -> dict[str, Any]:
        """Header attributes that snapshots and catalogs share."""
        return {
            "BoxSize": self.box_size * LENGTH,
            "HubbleParam": self.cosmology.h,
            "Omega0": self.cosmology.Omega_m,
            "OmegaLambda": 1.0 - self.cosmology.Omega_m,
            "OmegaBaryon": self.cosmology.Omega_b,
            "Redshift": 1.0 / self.scale_factor - 1.0,
            "Time": self.scale_factor,
            "UnitLength_in_cm": 3.085678e21,
            "UnitMass_in_g": 1.989e43,
            "UnitVelocity_in_cm_per_s": 1e5,
        }


def write_snapshot(
    comm: Any,
    files: SimulationFiles,
    header: Header,
    index: np.ndarray,
    ids: np.ndarray,
    position: np.ndarray,
    velocity: np.ndarray,
) -> None:
    """Write the snapshot's chunks; each rank writes those that are its own.

    Parameters
    ----------
    index
        (n,) int64: place in the snapshot of each particle that this rank brings; over all ranks a permutation
        of 0 to ``header.n_total`` - 1.
    ids, position, velocity
        (n,), (n, 3) Mpc/h, (n, 3) peculiar km/s.
    """
    bounds = chunk_bounds(header.n_total, files.n_files)
    writer = np.arange(files.n_files) * comm.size // files.n_files
    chunk = np.searchsorted(bounds, index, side="right") - 1
    index, ids, position, velocity = route(comm, writer[chunk], index, ids, position, velocity)
    order = np.argsort(index)
    index, ids, position, velocity = index[order], ids[order], position[order], velocity[order]
    for number in np.flatnonzero(writer == comm.rank):
        rows = slice(*np.searchsorted(index, bounds[number : number + 2]))
        path = files.snapshot(int(number))
        with durable.atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
            _snapshot_header(file, files, header, rows.stop - rows.start)
            group = file.create_group(f"PartType{_DARK}")
            group["Coordinates"] = file_positions(position[rows], header.box_size, files.layout)
            group["Velocities"] = (velocity[rows] / np.sqrt(header.scale_factor)).astype("f4")
            group["ParticleIDs"] = ids[rows].astype("u8") + 1  # 0 stands for no particle in these files
    comm.Barrier()


def write_groups(
    files: SimulationFiles, header: Header, halos: Halos, galaxies: Galaxies | None, starts: np.ndarray
) -> None:
    """Write a group catalog, on one rank.

    Parameters
    ----------
    halos
        all of them, in their order.
    galaxies
        all of them by halo, the central first: the subhalos of the hydrodynamic catalog. None writes the
        N-body catalog: one subhalo a group, without stars.
    starts
        (n_halos,) int64: place of each group's first particle in the snapshot (TNG layout: its offsets).
    """
    nbody = galaxies is None
    group_table, subhalo_table = (
        _group_columns(header, halos, galaxies),
        _subhalo_columns(header, halos, galaxies),
    )
    n_files = files.n_files if files.layout == "tng" else 1
    group_bounds = chunk_bounds(len(halos), n_files)
    first_subhalo = np.append(np.concatenate(([0], np.cumsum(group_table["GroupNsubs"])))[:-1], 0)
    first_subhalo[-1] = len(subhalo_table["SubhaloGrNr"])
    subhalo_bounds = first_subhalo[group_bounds]
    for chunk in range(n_files):
        groups = slice(*group_bounds[chunk : chunk + 2])
        subhalos = slice(*subhalo_bounds[chunk : chunk + 2])
        with (
            durable.atomic_path(files.groups(chunk, nbody=nbody)) as temporary,
            h5py.File(temporary, "w") as file,
        ):
            attributes = file.create_group("Header").attrs
            attributes.update(header.attributes())
            attributes["FlagDoubleprecision"] = np.int32(0)
            attributes["NumFiles"] = np.int32(n_files)
            for name, rows, total in (
                ("groups", groups, len(halos)),
                ("subgroups", subhalos, len(subhalo_table["SubhaloGrNr"])),
                ("ids", slice(0, 0), 0),
            ):
                attributes[f"N{name}_ThisFile"] = np.int32(rows.stop - rows.start)
                attributes[f"N{name}_Total"] = np.int32(total)
            for folder, table, rows in (("Group", group_table, groups), ("Subhalo", subhalo_table, subhalos)):
                group = file.create_group(folder)
                if rows.stop > rows.start:  # like the public files, a chunk without objects has no columns
                    for name, column in table.items():
                        group[name] = column[rows]
            file.create_group("IDs")
    if files.layout == "tng":
        _write_offsets(files, header, group_bounds, subhalo_bounds, starts, group_table)


def write_parameters(path: Path, rows: list[tuple[str, dict[str, float], int]]) -> None:
    """Write ``CosmoAstroSeed_*.txt``: a row of (name, parameters, seed) for each simulation.

    The file has CAMELS' column order: Name Omega_m sigma_8 A_SN1 A_AGN1 A_SN2 A_AGN2 seed.
    """
    names = ("Omega_m", "sigma_8", "A_SN1", "A_AGN1", "A_SN2", "A_AGN2")
    lines = ["#Name " + " ".join(names) + " seed"]
    lines += [
        f"{name} " + " ".join(f"{values[k]:.5f}" for k in names) + f" {seed}" for name, values, seed in rows
    ]
    durable.write_text(path, "\n".join(lines) + "\n")


def parameters_path(out: Path, suite: str, volume: str, set_name: str) -> Path:
    """Where CAMELS keeps the parameters of the simulations of a set."""
    return out / "Parameters" / suite / volume / f"CosmoAstroSeed_{suite}_{volume}_{set_name}.txt"


def chunk_bounds(total: int, n_files: int) -> np.ndarray:
    """First row of each chunk, and ``total``: (n_files + 1,) int64."""
    return np.arange(n_files + 1, dtype="i8") * total // n_files


def file_positions(position: np.ndarray, box_size: float, layout: Layout = "camels") -> np.ndarray:
    """Mpc/h to ckpc/h in the file's precision (double in TNG's), inside [0, BoxSize) after rounding."""
    result = (position * LENGTH).astype("f8" if layout == "tng" else "f4")
    result[result >= result.dtype.type(box_size * LENGTH)] = 0.0
    return result


def _snapshot_header(file: h5py.File, files: SimulationFiles, header: Header, n_here: int) -> None:
    def by_type(value: float, dtype: str) -> np.ndarray:
        result = np.zeros(_TYPES, dtype)
        result[_DARK] = value
        return result

    attributes = file.create_group("Header").attrs
    attributes.update(header.attributes())
    attributes["MassTable"] = by_type(_dark_mass(files.layout, header) * MASS, "f8")
    attributes["NumFilesPerSnapshot"] = np.int32(files.n_files)
    attributes["NumPart_ThisFile"] = by_type(n_here, "i4")
    attributes["NumPart_Total"] = by_type(header.n_total & 0xFFFFFFFF, "u4")
    attributes["NumPart_Total_HighWord"] = by_type(header.n_total >> 32, "u4")
    for flag in ("Cooling", "Feedback", "Metals", "Sfr", "StellarAge", "DoublePrecision"):
        attributes[f"Flag_{flag}"] = np.int32(flag == "DoublePrecision" and files.layout == "tng")
    # readers that know Gadget and Arepo look here for the cosmology
    parameters = file.create_group("Parameters").attrs
    parameters.update(header.attributes())
    parameters["ComovingIntegrationOn"] = np.int32(1)
    file.create_group("Config")


def _dark_mass(layout: Layout, header: Header) -> float:
    """Mass of a dark-matter particle: all matter in an N-body run, no baryons in a hydrodynamic one."""
    return header.particle_mass * (_dark_fraction(header) if layout == "tng" else 1.0)


def _dark_fraction(header: Header) -> float:
    return 1.0 - header.cosmology.Omega_b / header.cosmology.Omega_m


def _by_type(columns: dict[int, np.ndarray], n: int, dtype: str) -> np.ndarray:
    result = np.zeros((n, _TYPES), dtype)
    for kind, column in columns.items():
        result[:, kind] = column
    return result


def _masses(header: Header, mass: np.ndarray, stars: np.ndarray | None) -> np.ndarray:
    """(n, 6) masses by type of objects of total ``mass``: baryons that are not stars are gas."""
    if stars is None:
        return _by_type({_DARK: mass * MASS}, len(mass), "f4")
    dark = _dark_fraction(header) * mass
    return _by_type(
        {0: (mass - dark - stars).clip(0.0) * MASS, _DARK: dark * MASS, _STARS: stars * MASS}, len(mass), "f4"
    )


def _group_columns(header: Header, halos: Halos, galaxies: Galaxies | None) -> dict[str, np.ndarray]:
    n = len(halos)
    stars = None if galaxies is None else np.bincount(galaxies.halo, galaxies.stellar_mass, minlength=n)
    counts = np.ones(n, "i4") if galaxies is None else np.bincount(galaxies.halo, minlength=n).astype("i4")
    first = np.concatenate(([0], np.cumsum(counts)))[:-1]
    by_type = _masses(header, halos.mass, stars)
    columns = {
        "GroupCM": file_positions(halos.mean_position, header.box_size),
        "GroupFirstSub": np.where(counts > 0, first, -1).astype("i4"),
        "GroupLen": halos.length.astype("i4"),
        "GroupLenType": _by_type({_DARK: halos.length}, n, "i4"),
        "GroupMass": by_type.sum(axis=1),
        "GroupMassType": by_type,
        "GroupNsubs": counts,
        "GroupPos": file_positions(halos.position, header.box_size),
        "GroupVel": (halos.mean_velocity * header.scale_factor).astype("f4"),  # km/s / a is peculiar
    }
    for name, key in (
        ("Crit200", "200c"),
        ("Crit500", "500c"),
        ("Mean200", "200m"),
        ("TopHat200", "top_hat"),
    ):
        columns[f"Group_M_{name}"] = (getattr(halos, f"mass_{key}") * MASS).astype("f4")
        columns[f"Group_R_{name}"] = (getattr(halos, f"radius_{key}") * LENGTH).astype("f4")
    if galaxies is not None:
        rate = np.bincount(galaxies.halo, galaxies.star_formation_rate, minlength=n)
        columns["GroupSFR"] = rate.astype("f4")
    else:
        columns["GroupSFR"] = np.zeros(n, "f4")
    return columns


def _subhalo_columns(header: Header, halos: Halos, galaxies: Galaxies | None) -> dict[str, np.ndarray]:
    if galaxies is None:
        n = len(halos)
        host, central = np.arange(n), np.ones(n, bool)
        position, velocity, v_max, v_disp = (
            halos.position,
            halos.velocity,
            halos.v_max,
            halos.velocity_dispersion,
        )
        stars = radius = rate = np.zeros(n)
        magnitudes = np.full((n, 8), np.finfo("f4").max)  # as SUBFIND has subhalos without stars
    else:
        n, host, central = len(galaxies), galaxies.halo, galaxies.is_central
        position, velocity, v_max, v_disp = (
            galaxies.position,
            galaxies.velocity,
            galaxies.v_max,
            galaxies.velocity_dispersion,
        )
        stars, radius, rate = galaxies.stellar_mass, galaxies.half_mass_radius, galaxies.star_formation_rate
        magnitudes = galaxies.magnitudes
    # All particles of a group are its central subhalo's: a satellite has no dark matter of its own.
    length = np.where(central, halos.length[host], 0)
    if galaxies is None:
        by_type = _masses(header, halos.mass, None)
    else:
        by_type = _masses(header, np.where(central, halos.mass[host], 0.0), stars)
    spin = np.where(central[:, None], halos.angular_momentum[host], 0.0)
    half_mass = np.where(central, halos.half_mass_radius[host], 0.0)
    rank_in_group = np.arange(n) - np.searchsorted(host, host)
    return {
        "SubhaloGrNr": host.astype("i4"),
        "SubhaloHalfmassRad": (half_mass * LENGTH).astype("f4"),
        "SubhaloHalfmassRadType": _by_type({_DARK: half_mass * LENGTH, _STARS: radius * LENGTH}, n, "f4"),
        "SubhaloLen": length.astype("i4"),
        "SubhaloLenType": _by_type({_DARK: length}, n, "i4"),
        "SubhaloMass": by_type.sum(axis=1),
        "SubhaloMassType": by_type,
        "SubhaloPos": file_positions(position, header.box_size),
        "SubhaloRankInGr": rank_in_group.astype("i4"),
        "SubhaloSFR": rate.astype("f4"),
        "SubhaloSpin": (spin * LENGTH).astype("f4"),
        "SubhaloStellarPhotometrics": magnitudes.astype("f4"),
        "SubhaloVel": velocity.astype("f4"),
        "SubhaloVelDisp": v_disp.astype("f4"),
        "SubhaloVmax": v_max.astype("f4"),
    }


def _write_offsets(
    files: SimulationFiles,
    header: Header,
    group_bounds: np.ndarray,
    subhalo_bounds: np.ndarray,
    starts: np.ndarray,
    group_table: dict[str, np.ndarray],
) -> None:
    """TNG's ``offsets_<number>.hdf5``: first object of each file, and first particle of each object."""
    host = np.repeat(np.arange(len(starts)), group_table["GroupNsubs"])
    central = np.zeros(len(host), bool)
    central[group_table["GroupFirstSub"][group_table["GroupNsubs"] > 0]] = True
    ends = starts + group_table["GroupLen"]
    snapshot_bounds = chunk_bounds(header.n_total, files.n_files)
    with durable.atomic_path(files.offsets) as temporary, h5py.File(temporary, "w") as file:
        file["FileOffsets/Group"] = group_bounds[:-1]
        file["FileOffsets/Subhalo"] = subhalo_bounds[:-1]
        file["FileOffsets/SnapByType"] = _by_type({_DARK: snapshot_bounds[:-1]}, files.n_files, "i8")
        file["Group/SnapByType"] = _by_type({_DARK: starts}, len(starts), "i8")
        # satellites, without particles, come after those of the central
        subhalo_starts = np.where(central, starts[host], ends[host])
        file["Subhalo/SnapByType"] = _by_type({_DARK: subhalo_starts}, len(host), "i8")
