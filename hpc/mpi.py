"""The door to MPI: the communicator of this job.

Importing it costs nothing; MPI starts at the first `world()`.
"""

import contextlib
import fcntl
import importlib.metadata
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

VARIABLE = "HPC_WORLD_SIZE"  # the number of ranks the launcher asked for
_SHARED = Path("/dev/shm")
_SEGMENTS = re.compile(r"/dev/shm/(mpich_(?:shm|vci)_[0-9a-f]+_\d+)$", re.MULTILINE)


class WrongWorldSize(RuntimeError):
    """The MPI that runs is not the MPI that started the job."""


def world() -> Any:
    """The communicator of all ranks of this job (`mpi4py.MPI.Comm`); of size 1 outside ``mpirun``.

    Raises
    ------
    WrongWorldSize
        where the launcher started more ranks than this process sees. That happens when ``mpirun`` belongs to
        another MPI than the library mpi4py loads: every rank then believes it is alone and does all the work.
    """
    if "mpi4py.MPI" not in sys.modules:  # or MPI runs already
        if not any(name.startswith(("PMI", "OMPI_")) for name in os.environ):
            # Alone, outside mpirun: no peer can ever call, so UCX need not listen on the network.
            os.environ.setdefault("UCX_NET_DEVICES", "lo")
        if {"PMI_FD", "SLURM_STEP_ID"} <= os.environ.keys() and _is_installed("mpich"):
            # Slurm reads a request of PMI-1 once, 1024 bytes of it. UCX's addresses are sent in larger ones,
            # as the buffer around them happens to be filled; those of OFI take 20 bytes.
            os.environ.setdefault("MPIR_CVAR_CH4_NETMOD", "ofi")
        _remove_leftovers()
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    expected = int(os.environ.get(VARIABLE, comm.size))
    if comm.size != expected:
        raise WrongWorldSize(
            f"{expected} MPI ranks were started but this one sees {comm.size}. The mpirun, or srun --mpi, in "
            "use is not that of the MPI library in use "
            f"({MPI.Get_library_version().splitlines()[0]}); run `make setup` again, or name the right "
            "launcher in the site file (mpirun, or mpi: pmi2, pmix)"
        )
    return comm


def _is_installed(distribution: str) -> bool:
    """Whether it came with galdist: a cluster's own MPI may not have the same parts."""
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _remove_leftovers() -> None:
    """Remove the shared memory of MPICH's worlds on this machine that were killed.

    MPICH names it after the world, and names come again: that of a step when Slurm requeues its job, that
    of a process with its pid. Ranks that find such memory take it for that of their own world: they fail
    ("Out of memory"), wait forever, or read the addresses of the dead. Nobody else removes it.
    """
    found = {}
    for file in _SHARED.glob("mpich_*_*_*"):
        with contextlib.suppress(FileNotFoundError):  # it went meanwhile
            if time.time() - file.stat().st_mtime > 1.0:
                found[file.name] = file
    if not found:
        return
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            for name in _SEGMENTS.findall((process / "maps").read_text()):
                found.pop(name, None)
    for file in found.values():
        _remove_segment(file)


def _remove_segment(file: Path) -> None:
    """Remove a segment, but not the one that a peer that did the same has made in its place."""
    with contextlib.suppress(FileNotFoundError, PermissionError), open(file, "rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        if os.path.samestat(os.fstat(stream.fileno()), file.stat()):
            file.unlink()
