"""Mass assignment and ingest of 16.8 million particles on a 256^3 mesh.

Clustered particles (a lattice displaced by 2 Mpc/h along each axis in a box of 25 Mpc/h), float32.
"lattice" has them in the order of the lattice, "shuffled" in a random order. galdist sums in float64;
Pylians 0.12 (MASL, C) in float32; NumPy is `bincount` of cell numbers for each of the 8 corners. Kernels
are timed on one core, in seconds of the processor, the best of some calls.

The store is made from a snapshot of 64 chunks (HDF5, positions, velocities and IDs, 0.54 GB) as a run makes
it, by the stage in processes of its own, start of Dask, checksums and report included. "start" is what the
same takes for 4096 particles. Peak memory is that of each process; the limit, for the worker with most, is
what a worker without work has, plus twice (a chunk of the snapshot + the chunks of the store that one task
writes). The scripts read the same chunks with h5py, assign to one mesh and save it with `numpy.save`: no
chunks, no checksums, no restart.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peers
from bench_crops import rate
from clustered import clustered_particles
from universe import make_truth, write_snapshot

from galdist.grids.mass_assignment import assign
from galdist.grids.store import Chunking, Field, SimulationAttrs, create_store, open_store
from hpc import launch
from hpc.resources import Resources

N_MESH, BOX, N_CHUNKS = 256, 25.0, 64
REPEATS = 3
SLAB = 4 * 64 * N_MESH**2  # bytes of the chunks that one task writes of a field

_PYLIANS_KERNEL = """
import time, MAS_library as MASL
import numpy as np
box, n_mesh = float(arguments["box"]), int(arguments["n_mesh"])
for order in ("lattice", "shuffled"):
    positions = np.load(str(arguments[order]))
    for scheme in ("CIC", "TSC"):
        seconds = []
        for _ in range(int(arguments["repeats"])):
            mesh = np.zeros((n_mesh,) * 3, np.float32)
            start = time.process_time()
            MASL.MA(positions, mesh, box, scheme, verbose=False)
            seconds.append(time.process_time() - start)
        results[order + scheme] = min(seconds)
        results[order + scheme + "total"] = mesh.sum(dtype="f8")
"""

_PYLIANS_SCRIPT = """
import time, h5py, MAS_library as MASL
import numpy as np
start = time.perf_counter()
mesh = np.zeros((int(arguments["n_mesh"]),) * 3, np.float32)
for file in arguments["files"]:
    with h5py.File(str(file), "r") as snapshot:
        if "PartType1" in snapshot:
            positions = snapshot["PartType1/Coordinates"][:] / np.float32(1e3)
            MASL.MA(positions, mesh, float(arguments["box"]), "CIC", verbose=False)
np.save(str(arguments["out"]), mesh)
results["seconds"] = time.perf_counter() - start
results["status"] = open("/proc/self/status").read()
"""


def numpy_cic(positions: np.ndarray, mesh: np.ndarray) -> None:
    """CIC as one writes it with NumPy alone."""
    n = len(mesh)
    x = positions * np.float32(n / BOX) - np.float32(0.5)
    low = np.floor(x).astype(np.int64)
    high_share = x - low
    for corner in range(8):
        cell, share = np.zeros(len(x), np.int64), np.ones(len(x), np.float32)
        for axis in (2, 1, 0):
            upper = corner >> axis & 1
            cell = cell * n + (low[:, axis] + upper) % n
            share *= high_share[:, axis] if upper else 1 - high_share[:, axis]
        mesh += np.bincount(cell, share, n**3).reshape(mesh.shape)


def seconds(
    function: Callable[[], Any], repeats: int = REPEATS, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Shortest of some calls."""
    best = np.inf
    for _ in range(repeats):
        start = clock()
        function()
        best = min(best, clock() - start)
    return best


def kernels(folder: Path) -> list[dict[str, Any]]:
    """Million particles a second of every scheme and code."""
    positions = {"lattice": clustered_particles(N_MESH, BOX)}
    positions["shuffled"] = np.random.default_rng(1).permutation(positions["lattice"])
    for order, values in positions.items():
        np.save(folder / f"{order}.npy", values)
    mesh = np.zeros((N_MESH,) * 3)
    found: dict[tuple[str, str, str], float] = {}
    total: dict[tuple[str, str, str], float] = {}
    for order, values in positions.items():
        for scheme in ("ngp", "cic", "tsc"):
            assign(values[:1000], BOX, N_MESH, scheme, out=mesh)
            found["galdist", scheme, order] = seconds(
                lambda v=values, s=scheme: assign(v, BOX, N_MESH, s, out=mesh), clock=time.process_time
            )
        found["NumPy", "cic", order] = seconds(lambda v=values: numpy_cic(v, mesh), 1, time.process_time)
        total["galdist", "cic", order] = assign(values, BOX, N_MESH).sum()
    try:
        theirs = peers.PYLIANS.run(
            _PYLIANS_KERNEL,
            box=BOX,
            n_mesh=N_MESH,
            repeats=REPEATS,
            **{order: str(folder / f"{order}.npy") for order in positions},
        )
    except peers.PeerMissing as missing:
        print(missing, file=sys.stderr)
        theirs = {}
    for order in positions if theirs else ():
        for scheme in ("cic", "tsc"):
            found["Pylians", scheme, order] = theirs[order + scheme.upper()]
        total["Pylians", "cic", order] = theirs[f"{order}CICtotal"]
    rows = []
    n = N_MESH**3
    for (code, scheme, order), duration in sorted(
        found.items(), key=lambda item: (item[0][2], item[0][1], item[0][0])
    ):
        reference = found.get(("Pylians", scheme, order))
        lost = total.get((code, scheme, order))
        rows.append(
            {
                "order": order,
                "scheme": scheme.upper(),
                "code": code,
                "million particles/s": n / duration / 1e6,
                "times Pylians": None if reference is None else reference / duration,
                "particles lost": None if lost is None else abs(n - lost) / n,
            }
        )
    return rows


def stage(tree: Path, out: Path, workers: int, fields: list[str]) -> tuple[float, dict[str, int]]:
    """Seconds of the stage, and the peak memory of each process."""
    config = {"path": str(tree), "n_mesh": N_MESH, "fields": [{"name": name} for name in fields]}
    arguments = {"function": "galdist.grids.ingest:ingest", "config": config, "inputs": {}, "out": str(out)}
    start = time.perf_counter()
    job = launch.submit("galdist.stages:call", arguments, out, "dask", Resources(ranks=workers))
    while (outcome := job.poll()) is None:
        time.sleep(0.05)
    if outcome.failures:
        raise RuntimeError(outcome.describe())
    return time.perf_counter() - start, outcome.peak_memory


def write_tree(tree: Path, n_particles: int) -> int:
    """A tree of one N-body run with 64 chunks; bytes of the largest."""
    truth = make_truth(0, n_particles, BOX)
    if n_particles == N_MESH**3:
        truth.position = clustered_particles(N_MESH, BOX)
    files = write_snapshot(tree / "Sims" / "Bench_DM" / "CV" / "CV_0", truth, N_CHUNKS)
    return max(file.stat().st_size for file in files)


def stores(folder: Path) -> list[dict[str, Any]]:
    """The store of a box, by the stage and by scripts."""
    largest = write_tree(folder / "box", N_MESH**3)
    write_tree(folder / "idle", 4096)
    rows = []
    every = ["matter_counts", "matter_mass", "matter_momentum"]
    for workers, fields in ((1, every[:1]), (2, every[:1]), (2, every)):
        idle_seconds, idle = stage(folder / "idle", folder / f"idle{workers}{len(fields)}", workers, fields)
        duration, peak = stage(folder / "box", folder / f"out{workers}{len(fields)}", workers, fields)
        slab = SLAB * (5 if len(fields) > 1 else 1)  # momentum has three components
        rows.append(
            {
                "what": f"galdist, {workers} worker{'s' * (workers > 1)}, {', '.join(fields)}",
                "seconds": duration,
                "of it start": idle_seconds,
                "million particles/s": N_MESH**3 / duration / 1e6,
                "peak memory of each process [MB]": ", ".join(
                    f"{value / 1e6:.0f}" for value in peak.values()
                ),
                "limit [MB]": (max(idle.values()) + 2 * (largest + slab)) / 1e6,
            }
        )
    files = sorted((folder / "box").rglob("snapshot_090.*.hdf5"))
    rows.append(scripted("NumPy script", json.loads(in_process(files, folder))))
    try:
        theirs = peers.PYLIANS.run(
            _PYLIANS_SCRIPT,
            files=[str(file) for file in files],
            box=BOX,
            n_mesh=N_MESH,
            out=str(folder / "mesh.npy"),
        )
        rows.append(scripted("Pylians script", theirs))
    except peers.PeerMissing as missing:
        print(missing, file=sys.stderr)
    return rows


def in_process(files: list[Path], folder: Path) -> str:
    """What `numpy_script` prints in a process of its own."""
    command = [sys.executable, __file__, str(folder / "mesh.npy"), *map(str, files)]
    paths = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    return subprocess.run(
        command,
        check=True,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join(paths), "OMP_NUM_THREADS": "1"},
    ).stdout


def numpy_script(out: str, files: list[str]) -> dict[str, Any]:
    """Read, assign, save."""
    import h5py

    start = time.perf_counter()
    mesh = np.zeros((N_MESH,) * 3)
    for file in files:
        with h5py.File(file, "r") as snapshot:
            if "PartType1" in snapshot:
                numpy_cic(snapshot["PartType1/Coordinates"][:] / np.float32(1e3), mesh)
    np.save(out, mesh.astype("f4"))
    return {"seconds": time.perf_counter() - start, "status": Path("/proc/self/status").read_text()}


def scripted(what: str, found: dict[str, Any]) -> dict[str, Any]:
    """Row of a script, whose peak memory is in the ``status`` of its process."""
    peak = int(str(found["status"]).partition("VmHWM:")[2].split()[0]) * 1024
    return {
        "what": f"{what}, 1 process, matter_counts",
        "seconds": float(found["seconds"]),
        "of it start": None,
        "million particles/s": N_MESH**3 / float(found["seconds"]) / 1e6,
        "peak memory of each process [MB]": f"{peak / 1e6:.0f}",
        "limit [MB]": None,
    }


def writing(folder: Path) -> list[dict[str, Any]]:
    """Writing and reading a store with its defaults, in one process."""
    mesh = assign(np.load(folder / "lattice.npy"), BOX, N_MESH).astype("f4")
    galaxies = assign(np.random.default_rng(1).uniform(0, BOX, (20_000, 3)), BOX, N_MESH, "ngp").astype("f4")
    noise = np.random.default_rng(0).standard_normal(mesh.shape, dtype="f4")
    rows = []
    for name, values in {"dark matter": mesh, "galaxies": galaxies, "white noise": noise}.items():
        path = folder / f"{name}.zarr"
        attrs = SimulationAttrs(name="box", box_size=BOX, redshift=0, suite="bench")
        grids = create_store(path, [attrs], [Field(name="f")], N_MESH, Chunking())["box"]
        write = seconds(
            lambda g=grids, v=values: [g.write("f", v[z : z + 64], z) for z in range(0, N_MESH, 64)]
        )
        opened = open_store(path)["box"]
        read = seconds(lambda o=opened: o.read("f"))
        size = sum(file.stat().st_size for file in (path / "box" / "f").rglob("*") if file.is_file())
        rows.append(
            {
                "field": name,
                "GB/s written": values.nbytes / write / 1e9,
                "GB/s read": values.nbytes / read / 1e9,
                "times smaller": values.nbytes / size,
                "32^3 crops/s": round(rate(opened.array("f").__getitem__)),
            }
        )
    return rows


def run() -> dict[str, list[dict[str, Any]]]:
    """Kernels, stores and what a store takes to write."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        return {
            "Mass assignment on one core": kernels(folder),
            "A store from 64 chunks": stores(folder),
            "Writing and reading it": writing(folder),
        }


if __name__ == "__main__":
    print(json.dumps(numpy_script(sys.argv[1], sys.argv[2:])))
