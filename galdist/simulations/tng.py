"""IllustrisTNG on disk, as its data release lays it out (Nelson et al. 2019, arXiv:1812.05609).

``<path>/<simulation>/output/snapdir_099/snap_099.<n>.hdf5`` and
``.../groups_099/fof_subhalo_tab_099.<n>.hdf5``; ``<path>`` may be the simulation's folder itself. Offset
files are not needed: catalogues are read whole.
"""

from pathlib import Path

from galdist.simulations.simulation import (
    Matter,
    Simulation,
    SimulationError,
    find_chunks,
    nearest,
    read_header,
)

SIGMA_8, N_S = 0.8159, 0.9667  # of IllustrisTNG (Planck 2015), whose headers have neither


def open_simulations(
    path: Path,
    suite: str | None = None,
    set: str | None = None,
    snapshot: int | tuple[int, ...] = 99,
    matter: Matter = "hydro",
) -> list[Simulation]:
    """The simulations under ``path``.

    Parameters
    ----------
    path
        folder of simulations, or of one.
    suite
        name of one of them, such as ``TNG300-1``; all that are no ``-Dark`` twins by default.
    set
        not a thing of TNG: only None is accepted.
    snapshot
        number of the snapshot, which may stand in a tuple; 99 (z = 0) by default.
    matter
        ``hydro``: the dark matter of the run with galaxies. ``nbody``: that of its twin ``<name>-Dark``.

    Raises
    ------
    SimulationError
        for an unknown name, a snapshot that is not there and a missing chunk.
    """
    if set is not None:
        raise SimulationError(f"set: IllustrisTNG has no sets, got {set!r}; leave it out")
    (number,) = (snapshot,) if isinstance(snapshot, int) else snapshot
    root = path.parent if _output(path) is not None and (path / "output").is_dir() else path
    available = sorted(
        folder.name for folder in root.iterdir() if folder.is_dir() and _output(folder) is not None
    )
    if root != path:
        suite = suite or path.name
    names = [suite] if suite is not None else [name for name in available if not name.endswith("-Dark")]
    if not names:
        raise SimulationError(f"{path}: no simulation here: expected <name>/output/snapdir_{number:03d}")
    return [_open_simulation(root, name, available, number, matter) for name in names]


def _open_simulation(root: Path, name: str, available: list[str], number: int, matter: Matter) -> Simulation:
    twin = f"{name}-Dark"
    needed = [name, twin] if matter == "nbody" else [name]
    for each in needed:
        if each not in available:
            raise nearest(f"simulation in {root}:", each, available)
    particles = _chunks(root / needed[-1], number, ("snap", "snapshot"), "snapdir", "NumFilesPerSnapshot")
    if not particles:
        raise SimulationError(
            f"{root / needed[-1]}: there is no snapshot {number:03d} in output/snapdir_{number:03d}"
        )
    attributes = read_header(particles[0]).attributes
    is_planck = abs(float(attributes.get("Omega0", 0)) - 0.3089) < 1e-6
    is_tng = is_planck and name.startswith("TNG")
    return Simulation(
        name=name,
        suite=name,
        set="",
        particle_files=particles,
        group_files=_chunks(root / name, number, ("fof_subhalo_tab", "groups"), "groups", "NumFiles"),
        nbody_group_files=_chunks(root / twin, number, ("fof_subhalo_tab", "groups"), "groups", "NumFiles"),
        sigma_8=SIGMA_8 if is_tng else None,
        n_s=N_S if is_tng else None,
    )


def _output(folder: Path) -> Path | None:
    for place in (folder / "output", folder):
        if any(place.glob("snapdir_*")) or any(place.glob("groups_*")):
            return place
    return None


def _chunks(folder: Path, number: int, stems: tuple[str, ...], place: str, counter: str) -> tuple[Path, ...]:
    output = _output(folder)
    return () if output is None else find_chunks(output, stems, number, (place,), counter)
