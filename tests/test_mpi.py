"""The door to MPI in a process that no launcher started."""

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpc import mpi

LISTENERS = """
import psutil
from hpc import mpi
comm = mpi.world()
print(comm.size, *{c.laddr.ip for c in psutil.Process().net_connections() if c.status == "LISTEN"})
"""


def _run(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("UCX_", "HPC_"))}
    return subprocess.run(
        [sys.executable, "-c", script],
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_alone_it_is_a_world_of_one_that_the_network_cannot_reach() -> None:
    done = _run(LISTENERS)
    assert done.returncode == 0, done.stderr
    size, *addresses = done.stdout.split()
    assert size == "1"
    assert set(addresses) <= {"127.0.0.1", "::1"}


def test_a_rank_that_is_alone_but_should_not_be_says_so() -> None:
    done = _run("from hpc import mpi; mpi.world()", **{mpi.VARIABLE: "2"})
    assert done.returncode != 0
    assert "2 MPI ranks were started but this one sees 1" in done.stderr


@pytest.mark.parametrize("library", ["mpi4py", "nbodykit"])
def test_importing_the_door_loads_no_mpi(library: str) -> None:
    assert _run(f"import sys; import hpc.mpi; sys.exit({library!r} in sys.modules)").returncode == 0


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm on this system")
def test_shared_memory_of_killed_worlds_is_removed() -> None:
    """And that of living ones stays."""
    stale, living = (Path(f"/dev/shm/mpich_shm_{os.getpid():x}{digit}_0") for digit in "ab")
    try:
        for file in (stale, living):
            file.write_bytes(bytes(mmap.PAGESIZE))
            os.utime(file, (0, 0))
        with open(living, "r+b") as stream, mmap.mmap(stream.fileno(), 0):
            done = _run("from hpc import mpi; mpi.world()")
            assert done.returncode == 0, done.stderr
            assert not stale.exists()
            assert living.exists()
    finally:
        for file in (stale, living):
            file.unlink(missing_ok=True)
