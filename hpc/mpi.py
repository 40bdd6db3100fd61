"""The door to MPI: the communicator of this job.

Importing it costs nothing; MPI starts at the first `world()`.
"""

import os
from typing import Any

VARIABLE = "HPC_WORLD_SIZE"  # the number of ranks the launcher asked for


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
    if not any(name.startswith(("PMI", "OMPI_")) for name in os.environ):
        # Alone, outside mpirun: no peer can ever call, so UCX need not listen on the network.
        os.environ.setdefault("UCX_NET_DEVICES", "lo")
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
