"""Small simulations as files of CAMELS and IllustrisTNG, with the truth that was put into them."""

from dataclasses import dataclass
from pathlib import Path

import h5py
import hdf5plugin
import numpy as np

FIDUCIAL = {"Omega0": 0.3, "OmegaLambda": 0.7, "OmegaBaryon": 0.049, "HubbleParam": 0.6711}
REDSHIFTS = 1 / np.linspace(0.05, 1, 50) - 1  # of the snapshots of merger trees
UNITS = {"UnitLength_in_cm": 3.085678e21, "UnitMass_in_g": 1.989e43, "UnitVelocity_in_cm_per_s": 1e5}


@dataclass
class Truth:
    """What a simulation holds, in Mpc/h, km/s and Msun/h."""

    box_size: float
    position: np.ndarray
    velocity: np.ndarray
    mass: np.ndarray
    halo_position: np.ndarray
    halo_mass: np.ndarray
    galaxy_position: np.ndarray
    stellar_mass: np.ndarray
    galaxy_halo: np.ndarray
    is_central: np.ndarray


def make_truth(
    seed: int, n_particles: int, box_size: float = 25.0, n_halos: int = 40, dtype: str = "f4"
) -> Truth:
    """Clustered particles (not sorted in space), halos among them, none to four galaxies a halo."""
    rng = np.random.default_rng(seed)
    halo_position = rng.uniform(0, box_size, (n_halos, 3)).astype("f4")
    halo_mass = np.sort(10 ** rng.uniform(11, 14, n_halos))[::-1]
    near = halo_position[rng.integers(0, n_halos, n_particles // 2)] + rng.normal(
        0, 0.5, (n_particles // 2, 3)
    )
    far = rng.uniform(0, box_size, (n_particles - len(near), 3))
    position = rng.permutation(np.concatenate([near, far]) % box_size).astype(dtype)
    position[position >= box_size] = 0
    n_galaxies = rng.integers(0, 5, n_halos)
    galaxy_halo = np.repeat(np.arange(n_halos), n_galaxies)
    is_central = np.concatenate([np.arange(n) == 0 for n in n_galaxies]).astype(bool)
    galaxy_position = (halo_position[galaxy_halo] + rng.normal(0, 0.2, (len(galaxy_halo), 3))) % box_size
    return Truth(
        box_size,
        position,
        rng.normal(0, 300, position.shape).astype("f4"),
        np.full(n_particles, 6.5e9),
        halo_position,
        halo_mass,
        galaxy_position.astype("f4"),
        10 ** rng.uniform(8, 11.5, len(galaxy_halo)),
        galaxy_halo,
        is_central,
    )


def _chunk_files(folder: Path, stem: str, number: int, n_chunks: int, place: str) -> list[Path]:
    if n_chunks == 1:
        files = [folder / f"{stem}_{number:03d}.hdf5"]
    else:
        files = [folder / f"{place}_{number:03d}" / f"{stem}_{number:03d}.{i}.hdf5" for i in range(n_chunks)]
    files[0].parent.mkdir(parents=True, exist_ok=True)
    return files


def write_snapshot(
    folder: Path,
    truth: Truth,
    n_chunks: int = 1,
    stem: str = "snapshot",
    number: int = 90,
    compressed: bool = False,
    masses: str = "table",
    redshift: float = 0.0,
) -> list[Path]:
    """Chunks of a snapshot of dark matter; ``masses`` are in the header's ``table`` or in a ``field``."""
    files = _chunk_files(folder, stem, number, n_chunks, "snapdir")
    scale_factor = 1 / (1 + redshift)
    # Uneven chunks, the last of them empty where there are many: as real ones are.
    bounds = np.linspace(0, 1, n_chunks + 1) ** 1.5 * len(truth.position)
    bounds = np.round(bounds).astype(int)
    if n_chunks > 3:
        bounds[-2] = bounds[-1]
    kinds = np.zeros(6, "u4")
    for i, file in enumerate(files):
        rows = slice(bounds[i], bounds[i + 1])
        here, total, table = kinds.copy(), kinds.copy(), np.zeros(6)
        here[1], total[1] = rows.stop - rows.start, len(truth.position)
        if masses == "table":
            table[1] = truth.mass[0] / 1e10
        filters = hdf5plugin.Blosc(cname="zstd", clevel=3) if compressed else {}
        with h5py.File(file, "w") as out:
            header = out.create_group("Header")
            values = {
                "BoxSize": truth.box_size * 1e3,
                "MassTable": table,
                "NumPart_ThisFile": here,
                "NumPart_Total": total,
                "NumPart_Total_HighWord": kinds,
                "NumFilesPerSnapshot": n_chunks,
                "Redshift": redshift,
                "Time": scale_factor,
                **FIDUCIAL,
                **UNITS,
            }
            for key, value in values.items():
                header.attrs[key] = value
            if here[1] == 0:
                continue
            position = truth.position[rows].astype("f8") * 1e3
            fields = {
                "Coordinates": position.astype(truth.position.dtype),
                "Velocities": truth.velocity[rows] / np.sqrt(scale_factor).astype("f4"),
                "ParticleIDs": np.arange(rows.start, rows.stop, dtype="u8"),
            }
            if masses == "field":
                fields["Masses"] = (truth.mass[rows] / 1e10).astype("f4")
            for name, data in fields.items():
                out.create_dataset(f"PartType1/{name}", data=data, **filters)
    return files


def write_groups(
    folder: Path,
    truth: Truth,
    n_chunks: int = 1,
    stem: str = "groups",
    number: int = 90,
    galaxies: bool = True,
) -> list[Path]:
    """Chunks of a group catalogue with SUBFIND's names; a chunk's subhalos are those of its groups."""
    files = _chunk_files(folder, stem, number, n_chunks, "groups")
    n_halos = len(truth.halo_mass)
    n_subhalos = np.bincount(truth.galaxy_halo, minlength=n_halos) if galaxies else np.zeros(n_halos, int)
    first = np.cumsum(n_subhalos) - n_subhalos
    bounds = np.linspace(0, n_halos, n_chunks + 1).astype(int)
    for i, file in enumerate(files):
        rows = slice(bounds[i], bounds[i + 1])
        n_here = rows.stop - rows.start
        inside = (truth.galaxy_halo >= rows.start) & (truth.galaxy_halo < rows.stop) & galaxies
        with h5py.File(file, "w") as out:
            values = {
                "BoxSize": truth.box_size * 1e3,
                "Ngroups_ThisFile": n_here,
                "Ngroups_Total": n_halos,
                "Nsubgroups_ThisFile": int(inside.sum()),
                "Nsubgroups_Total": int(n_subhalos.sum()),
                "NumFiles": n_chunks,
                "Redshift": 0.0,
                "Time": 1.0,
                **FIDUCIAL,
            }
            header = out.create_group("Header")
            for key, value in values.items():
                header.attrs[key] = value
            mass = truth.halo_mass[rows] / 1e10
            radius = 160 * (mass / 100) ** (1 / 3)  # ckpc/h
            group = {
                "GroupPos": truth.halo_position[rows] * 1e3,
                "GroupVel": np.full((n_here, 3), 100.0),
                "GroupMass": mass,
                "GroupLen": (truth.halo_mass[rows] / truth.mass[0]).astype("i4"),
                "Group_M_Crit200": 0.8 * mass,
                "Group_R_Crit200": radius,
                "Group_M_TopHat200": 0.9 * mass,
                "Group_R_TopHat200": 1.3 * radius,
                "GroupNsubs": n_subhalos[rows].astype("i4"),
                # As unsigned numbers, which make -1 into 4294967295.
                "GroupFirstSub": np.where(n_subhalos[rows] > 0, first[rows], -1).astype("i4").view("u4"),
            }
            for name, data in group.items():
                out.create_dataset(f"Group/{name}", data=data.astype("f4") if data.dtype == "f8" else data)
            if not inside.any():
                continue
            n_subs = int(inside.sum())
            mass_type = np.zeros((n_subs, 6))
            mass_type[:, 1], mass_type[:, 4] = 100, truth.stellar_mass[inside] / 1e10
            photometry = np.tile([-20.0, -20.2, -21, -23, -20.5, -21.1, -21.4, -21.6], (n_subs, 1))
            # Of the halo's sphere of 200 times the critical density: 1.3 V, and 0.05 sqrt(2) R V as spin.
            host = truth.galaxy_halo[inside] - rows.start
            virial = np.sqrt(43009.1727 * 0.8 * mass[host] / radius[host])
            spin = np.sqrt(2) * 0.05 * radius[host] * virial
            subhalo = {
                "SubhaloVmax": 1.3 * virial,
                "SubhaloSpin": spin[:, None] * np.array([0.6, 0, 0.8]),
                "SubhaloPos": truth.galaxy_position[inside] * 1e3,
                "SubhaloVel": np.full((n_subs, 3), 50.0),
                "SubhaloMassType": mass_type,
                "SubhaloSFR": np.linspace(0, 5, n_subs),
                "SubhaloStellarPhotometrics": photometry,
                "SubhaloHalfmassRadType": np.full((n_subs, 6), 3.0),
                "SubhaloGrNr": truth.galaxy_halo[inside].astype("i4"),
            }
            for name, data in subhalo.items():
                out.create_dataset(f"Subhalo/{name}", data=data.astype("f4") if data.dtype == "f8" else data)
    return files


def write_camels(
    root: Path,
    n_simulations: int = 2,
    n_particles: int = 4096,
    n_chunks: int = 1,
    suite: str = "MockA",
    set: str = "CV",
    volume: str = "L25n16",
    old_names: bool = False,
    seed: int = 0,
    **snapshot: object,
) -> dict[str, Truth]:
    """A CAMELS tree: N-body snapshots, both group catalogues, parameters. ``old_names`` as before 2022."""
    truths = {}
    stem, groups, number = ("snap", "fof_subhalo_tab", 33) if old_names else ("snapshot", "groups", 90)
    lines = ["#Name Omega_m sigma_8 A_SN1 A_AGN1 A_SN2 A_AGN2 seed"]
    for i in range(n_simulations):
        name = f"{set}_{i}"
        truth = make_truth(1000 * seed + i, n_particles)
        place = Path(name) if old_names else Path(volume) / set / name
        write_snapshot(root / "Sims" / f"{suite}_DM" / place, truth, n_chunks, stem, number, **snapshot)
        catalogs = root / ("Sims" if old_names else "FOF_Subfind")
        write_groups(catalogs / suite / place, truth, 1, groups, number)
        write_groups(catalogs / f"{suite}_DM" / place, truth, 1, groups, number, galaxies=False)
        lines.append(f"{name} 0.3 0.8 1.{i} 2.{i} 3.{i} 4.{i} {5000 + i}")
        truths[f"{suite}_{name}"] = truth
    if old_names:
        parameters = root / "Parameters" / f"CosmoAstroSeed_params_{suite}.txt"
    else:
        parameters = root / "Parameters" / suite / volume / f"CosmoAstroSeed_{suite}_{volume}_{set}.txt"
    parameters.parent.mkdir(parents=True, exist_ok=True)
    parameters.write_text("\n".join(lines) + "\n")
    return truths


def write_tng(
    root: Path, name: str = "TNG10-1", n_particles: int = 4096, n_chunks: int = 5, **snapshot: object
) -> Truth:
    """A tree of IllustrisTNG: float64 positions in several chunks; no offsets."""
    truth = make_truth(7, n_particles, dtype="f8")
    output = root / name / "output"
    write_snapshot(output, truth, n_chunks, "snap", 99, **snapshot)
    write_groups(output, truth, 3, "fof_subhalo_tab", 99)
    return truth


def write_trees(folder: Path, histories: list[dict[int, float]], n_files: int = 2) -> list[Path]:
    """A tree for each history (snapshot -> mass): its main branch, then a branch that merged into it."""
    folder.mkdir(exist_ok=True)
    files = []
    for number in range(n_files):
        rows: list[tuple[int, int, int, int, float]] = []
        for halo in range(number, len(histories), n_files):
            history = sorted(histories[halo].items(), reverse=True)
            base = (halo + 1) * 10**16
            leaf = base + len(history) - 1
            rows += [(base + i, leaf, snap, halo, mass) for i, (snap, mass) in enumerate(history)]
            # The other branch ends a snapshot before the root; its subhalos have other numbers.
            other = [(snap, mass) for snap, mass in history if snap < history[0][0]]
            rows += [
                (leaf + 1 + i, leaf + len(other), snap, 10**6 + halo, 9e9)
                for i, (snap, _) in enumerate(other)
            ]
        columns = np.array(rows, dtype=np.float64).reshape(-1, 5)
        ids = np.array([row[:2] for row in rows], dtype=np.int64).reshape(-1, 2)
        files.append(folder / f"tree_extended.{number}.hdf5")
        with h5py.File(files[-1], "w") as out:
            out["SubhaloID"], out["MainLeafProgenitorID"] = ids[:, 0], ids[:, 1]
            out["SnapNum"] = columns[:, 2].astype("i2")
            out["SubfindID"] = columns[:, 3].astype("i4")
            out["SubhaloMass"] = columns[:, 4].astype("f4")
    return files
