"""CAMELS on disk (Villaescusa-Navarro et al. 2021, 2023; https://camels.readthedocs.io).

``Sims/<suite>/<volume>/<set>/<set>_<i>/`` holds snapshots, ``FOF_Subfind/`` the group catalogues in the
same tree, ``Parameters/`` the table of cosmological and astrophysical parameters of a set. The N-body twins
of a suite are the suite ``<suite>_DM``. Older releases have no folders for volume or set, catalogues beside
the snapshots and the names ``snap_033``, ``fof_subhalo_tab_033`` where newer ones have ``snapshot_090``,
``groups_090``.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from galdist.simulations.simulation import Matter, Simulation, SimulationError, find_chunks, nearest
from galdist.simulations.snapshots import possible_numbers

log = logging.getLogger(__name__)

N_S = 0.9624  # of all CAMELS simulations but those of the set SB28
PARAMETERS = ("Omega_m", "sigma_8", "A_SN1", "A_AGN1", "A_SN2", "A_AGN2")
_AT_REDSHIFT_0 = possible_numbers("camels", 0.0)
_SNAPSHOT = (("snapshot", "snap"), ("snapdir",), "NumFilesPerSnapshot")
_GROUPS = (("groups", "fof_subhalo_tab"), ("groups",), "NumFiles")
_DM = "_DM"


def open_simulations(
    path: Path,
    suite: str | None = None,
    set: str | None = None,
    volume: str | None = None,
    snapshot: int | tuple[int, ...] = _AT_REDSHIFT_0,
    matter: Matter = "nbody",
) -> list[Simulation]:
    """The simulations of one set of one suite.

    Parameters
    ----------
    path
        folder with ``Sims``, ``FOF_Subfind`` and ``Parameters``.
    suite
        such as ``IllustrisTNG``; may be left out where there is one.
    set
        such as ``CV`` or ``LH``; may be left out where there is one.
    volume
        such as ``L25n256``; may be left out where there is one.
    snapshot
        number of the snapshot, or several of which the first that is there counts; those that it may have at
        z = 0 (90, or 33 in old releases) by default.
    matter
        ``nbody``: the dark matter of the suite's N-body twins. ``hydro``: that of the runs with galaxies.

    Raises
    ------
    SimulationError
        for a name that is not there (with those that are), a missing snapshot or chunk, and parameters that
        contradict the snapshot.
    """
    if not (path / "Sims").is_dir():
        raise SimulationError(f"{path}: there is no folder Sims: expected the root of a CAMELS tree")
    suites = sorted({p.name.removesuffix(_DM) for p in (path / "Sims").iterdir() if p.is_dir()})
    suite = _choose("suite", suite, suites, path)
    runs = suite + _DM if matter == "nbody" else suite
    if not (path / "Sims" / runs).is_dir():
        raise SimulationError(
            f"{path / 'Sims' / runs}: no such folder, so there is no {matter} matter of suite {suite!r}; "
            f"set matter to {'hydro' if matter == 'nbody' else 'nbody'} or get it"
        )
    folders = dict(_simulations(path / "Sims" / runs))
    volume = _choose("volume", volume, sorted({key[0] for key in folders}), path / "Sims" / runs)
    sets = sorted({key[1] for key in folders if key[0] == volume})
    set = _choose("set", set, sets, path / "Sims" / runs)
    names = sorted((key[2] for key in folders if key[:2] == (volume, set)), key=_natural)
    table = _parameters(path, suite, volume, set)
    twins = dict(_simulations(path / "Sims" / suite)), dict(_simulations(path / "Sims" / (suite + _DM)))
    catalogs = (
        dict(_simulations(path / "FOF_Subfind" / suite)),
        dict(_simulations(path / "FOF_Subfind" / (suite + _DM))),
    )

    def groups(nbody: bool, name: str, number: int) -> tuple[Path, ...]:
        for tree in (catalogs[nbody], twins[nbody]):
            folder = tree.get((volume, set, name))
            if folder is not None and (files := find_chunks(folder, _GROUPS[0], number, *_GROUPS[1:])):
                return files
        return ()

    simulations = []
    for name in names:
        folder = folders[volume, set, name]
        number, particles = _snapshot_files(folder, snapshot)
        row = _row(table, name, path)
        simulation = Simulation(
            name=f"{suite}_{name}",
            suite=suite,
            set=set,
            particle_files=particles,
            group_files=groups(False, name, number),
            nbody_group_files=groups(True, name, number),
            sigma_8=row.get("sigma_8"),
            n_s=None if set == "SB28" else N_S,
            astrophysics={key: value for key, value in row.items() if key.startswith("A_")},
            seed=int(row["seed"]) if "seed" in row else None,
        )
        _check_cosmology(simulation, row)
        simulations.append(simulation)
    return simulations


def _choose(what: str, given: str | None, available: list[str], path: Path) -> str:
    if given is not None:
        if given not in available:
            raise nearest(f"{what} in {path}:", given, available)
        return given
    if len(available) != 1:
        raise SimulationError(
            f"{what}: name one of those in {path}: {', '.join(available) or 'there is none'}"
        )
    return available[0]


def _simulations(root: Path) -> Iterator[tuple[tuple[str, str, str], Path]]:
    """(volume, set, name) and folder of every simulation under ``root``; volume "" where no folder has it."""
    if not root.is_dir():
        return
    for entry in _folders(root):
        if _is_volume(entry.name):
            inside = [(entry.name, folder) for folder in _folders(entry)]
        else:
            inside = [("", entry)]
        for volume, folder in inside:
            prefix = folder.name + "_"
            members = [member for member in _folders(folder) if member.name.startswith(prefix)]
            if members:
                yield from (((volume, folder.name, member.name), member) for member in members)
            elif "_" in folder.name:
                yield (volume, folder.name.split("_")[0], folder.name), folder


def _folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir())


def _is_volume(name: str) -> bool:
    return re.fullmatch(r"L\d+(\.\d+)?n\d+", name) is not None


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _snapshot_files(folder: Path, snapshot: int | tuple[int, ...]) -> tuple[int, tuple[Path, ...]]:
    numbers = (snapshot,) if isinstance(snapshot, int) else snapshot
    for number in numbers:
        if files := find_chunks(folder, _SNAPSHOT[0], number, *_SNAPSHOT[1:]):
            return number, files
    expected = " or ".join(
        f"{stem}_{number:03d}" for stem, number in zip(_SNAPSHOT[0], numbers, strict=False)
    )
    found = sorted(p.name for p in folder.iterdir())
    raise SimulationError(
        f"{folder}: there is no snapshot {expected} (.hdf5); it holds {', '.join(found) or 'nothing'}"
    )


def _parameters(path: Path, suite: str, volume: str, set: str) -> Mapping[str, Mapping[str, float]] | None:
    """Rows of ``CosmoAstroSeed_*.txt`` by simulation name; None where there is no such file."""
    names = [
        f"CosmoAstroSeed_{suite}_{volume}_{set}.txt",
        f"CosmoAstroSeed_{suite}_{volume}.txt",
        f"CosmoAstroSeed_{suite}_{set}.txt",
        f"CosmoAstroSeed_{suite}.txt",
        f"CosmoAstroSeed_params_{suite}.txt",
    ]
    places = [
        path / "Parameters" / suite / volume,
        path / "Parameters" / suite,
        path / "Parameters",
        path / "Sims" / suite,
    ]
    for place in places:
        for name in names:
            if (place / name).is_file():
                return read_parameters(place / name)
    log.warning(
        "no parameter file %s under %s: astrophysical parameters stay unknown", names[0], path / "Parameters"
    )
    return None


def read_parameters(file: Path) -> dict[str, dict[str, float]]:
    """Rows of a ``CosmoAstroSeed_*.txt`` file by simulation name.

    The columns are those of the header line (``#Name Omega_m sigma_8 A_SN1 A_AGN1 A_SN2 A_AGN2 seed``), or
    these where there is none.

    Raises
    ------
    SimulationError
        for a row with another number of columns or with something that is no number.
    """
    columns = ["Name", *PARAMETERS, "seed"]
    rows: dict[str, dict[str, float]] = {}
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        if words[0].startswith("#"):
            header = line.lstrip("# ").split()
            if header and header[0].lower() == "name":
                columns = ["Name", *header[1:]]
            continue
        if len(words) != len(columns):
            raise SimulationError(
                f"{file}, line {number}: {len(words)} columns, expected {len(columns)}: {' '.join(columns)}"
            )
        try:
            rows[words[0]] = {key: float(word) for key, word in zip(columns[1:], words[1:], strict=True)}
        except ValueError as error:
            raise SimulationError(f"{file}, line {number}: {error}") from error
    return rows


def _row(table: Mapping[str, Mapping[str, float]] | None, name: str, path: Path) -> Mapping[str, float]:
    if table is None:
        return {}
    if name not in table:
        raise nearest(f"simulation in the parameter file under {path / 'Parameters'}:", name, list(table))
    return table[name]


def _check_cosmology(simulation: Simulation, row: Mapping[str, float]) -> None:
    said, held = row.get("Omega_m"), simulation.cosmology.get("Omega_m")
    if said is not None and held is not None and abs(said - held) > 1e-3:
        raise SimulationError(
            f"{simulation.particle_files[0]}: Header/Omega0 is {held:g}, but the parameter file says "
            f"Omega_m = {said:g} for {simulation.name}"
        )
