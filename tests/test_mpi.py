"""The door to MPI in a process that no launcher started."""

import mmap
import os
import socket
import subprocess
import sys
import threading
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


class SlurmsManager:
    """What Slurm's ``--mpi=pmi2`` answers to MPICH, on two nodes with two ranks each: its PMI-1 reads each
    request once, 1024 bytes of it, so that a longer one is cut."""

    def __init__(self) -> None:
        self.values = {"PMI_process_mapping": "(vector,(0,2,2))"}
        self.longest = 0
        self.all_there = threading.Barrier(4)

    def serve(self, connection: socket.socket) -> None:
        while request := connection.recv(4096).decode():
            self.longest = max(self.longest, len(request))
            if len(request) > 1024:
                self.all_there.abort()
                connection.close()
                return
            given = dict(word.split("=", 1) for word in request.split())
            connection.sendall(f"cmd={self.answer(given)}\n".encode())

    def answer(self, given: dict[str, str]) -> str:
        match given["cmd"]:
            case "init":
                return "response_to_init pmi_version=1 pmi_subversion=1 rc=0"
            case "get_maxes":
                return "maxes rc=0 kvsname_max=256 keylen_max=64 vallen_max=1024"
            case "get_appnum":
                return "appnum rc=0 appnum=0"
            case "get_my_kvsname":
                return "my_kvsname rc=0 kvsname=18.0"
            case "put":
                self.values[given["key"]] = given["value"]
                return "put_result rc=0 msg=success"
            case "get" if given["key"] in self.values:
                return f"get_result rc=0 value={self.values[given['key']]}"
            case "get":
                return "get_result rc=-1 msg=unknown value=unknown"
            case "barrier_in":
                self.all_there.wait(60)
                return "barrier_out rc=0"
            case "finalize":
                return "finalize_ack rc=0"
            case unknown:
                raise AssertionError(unknown)


def test_requests_to_slurm_are_short() -> None:
    """Whatever was in memory before: with these transports and this, UCX's addresses take 1077 bytes."""
    pytest.importorskip("mpi4py")
    manager, ranks = SlurmsManager(), []
    memory = {"UCX_TLS": "posix,tcp,self", "UCX_NET_DEVICES": "lo", "MALLOC_PERTURB_": "37"}
    interface = {"FI_PROVIDER": "tcp", "FI_TCP_IFACE": "lo"}
    for rank in range(4):
        here, there = socket.socketpair()
        threading.Thread(target=manager.serve, args=(here,), daemon=True).start()
        place = {"PMI_FD": str(there.fileno()), "PMI_RANK": str(rank), "PMI_SIZE": "4", "SLURM_STEP_ID": "0"}
        script = "from hpc import mpi; print(mpi.world().allreduce(1))"
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-c", script],
                env=os.environ | memory | interface | place,
                pass_fds=[there.fileno()],
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        there.close()
    try:
        assert [process.communicate(timeout=60)[0] for process in ranks] == ["4\n"] * 4
    finally:
        for process in ranks:
            process.kill()
    assert manager.longest < 200


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
