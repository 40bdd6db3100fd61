"""Power spectrum of a 256^3 field.

From the field in memory to the power in bins of one fundamental mode; imports and a first call are not
timed, the best of three others is. Ours (`field_mesh` and `power`: nbodykit, float64, window corrected)
runs on MPI ranks that read their part of the field from a file in the page cache. Pylians has an
environment of its own (`tests/benchmarks/peers.py`) and works in float32. The floor is what scipy's FFT
and one `bincount` with known bin numbers take in float32. The last column is the time as a multiple of ours
on one rank.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
import peers

BOX = 25.0
REPEATS = 3

_PYLIANS = """
import time, Pk_library
field, threads = arguments["field"], int(arguments["threads"])
seconds = []
for _ in range(int(arguments["repeats"]) + 1):
    start = time.perf_counter()
    delta = field / field.mean(dtype="f8").astype("f4")
    delta -= 1
    found = Pk_library.Pk(delta, float(arguments["box"]), 0, "CIC", threads, False)
    seconds.append(time.perf_counter() - start)
results.update(seconds=min(seconds[1:]), power=found.Pk[:, 0])
"""


def best_of(function: Callable[[], Any]) -> float:
    """Shortest of some calls, after one that is not counted."""
    function()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def floor(field: np.ndarray, workers: int) -> float:
    """scipy.fft and one bincount."""
    from scipy import fft

    n = len(field)
    k = np.fft.fftfreq(n, 1 / n)
    radius = np.sqrt(k[:, None, None] ** 2 + k[:, None] ** 2 + k[: n // 2 + 1] ** 2)
    bins = np.rint(radius).astype(np.int32).ravel()
    weight = np.full(n // 2 + 1, 2.0)
    weight[[0, -1]] = 1.0

    def measure() -> None:
        modes = fft.rfftn(field, workers=workers)
        squared = (modes.real**2 + modes.imag**2) * weight
        np.bincount(bins, squared.ravel())

    return best_of(measure)


def ours(path: Path, ranks: int) -> float:
    """The stage's own functions on ``ranks`` MPI ranks; each reads its part of the field."""
    mpirun = Path(sys.executable).with_name("mpirun")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HPC_WORLD_SIZE": str(ranks)}
    root = str(Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    command = [mpirun, "-n", str(ranks), sys.executable, __file__, "--rank", path]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    seconds: float = json.loads(done.stdout.splitlines()[-1])
    return seconds


def on_rank(path: Path) -> None:
    """What each rank of `ours` does; the first prints the time of the slowest."""
    from galdist.statistics.spectra import field_mesh, power
    from hpc import mpi

    comm = mpi.world()
    field = np.load(path, mmap_mode="r")

    def measure() -> None:
        comm.barrier()
        power(field_mesh(field.__getitem__, len(field), BOX, "cic"))

    slowest = max(comm.allgather(best_of(measure)))
    if comm.rank == 0:
        print(json.dumps(slowest), flush=True)


def run(n_mesh: int = 256) -> list[dict[str, Any]]:
    """Rows of the table; none for Pylians where it is not installed."""
    field = np.random.default_rng(0).gamma(0.5, 2.0, (n_mesh,) * 3).astype(np.float32)
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "field.npy"
        np.save(path, field)
        for ranks in (1, 2):
            seconds[f"galdist, {ranks} MPI rank{'s' * (ranks > 1)}"] = ours(path, ranks)
    for threads in (1, 2):
        try:
            found = peers.PYLIANS.run(_PYLIANS, field=field, box=BOX, threads=threads, repeats=REPEATS)
        except peers.PeerMissing as missing:
            print(missing, file=sys.stderr)
        else:
            seconds[f"Pylians 0.12, {threads} thread{'s' * (threads > 1)}"] = float(found["seconds"])
    for workers in (1, 2):
        name = f"floor (scipy.fft, bincount), {workers} thread{'s' * (workers > 1)}"
        seconds[name] = floor(field, workers)
    reference = next(iter(seconds.values()))
    return [{"": name, "seconds": value, "ratio": value / reference} for name, value in seconds.items()]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        on_rank(Path(sys.argv[2]))
    else:
        for row in run():
            print(*row.values(), sep="\t")
