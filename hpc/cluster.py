"""The door to Dask: a client of a cluster that lives as long as the ``with`` block.

`client` is all that callers see; which machines stand behind it is decided here. So far these are processes
of this machine. A scheduler's cluster (`dask_jobqueue.SLURMCluster`) is another `_Cluster` that
`client` chooses.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from hpc import mpi, progress

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
MEMORY_VARIABLE = "HPC_MEMORY"  # bytes that the launcher gives to all workers of this node
THREAD_VARIABLES = tuple(f"{library}_NUM_THREADS" for library in ("OMP", "OPENBLAS", "MKL", "NUMBA", "RAYON"))
"""Tell libraries how many threads of their own to start."""


class _Cluster(Protocol):
    """What `client` needs of a cluster of `distributed`."""

    dashboard_link: str


@contextmanager
def client(
    n_workers: int | None = None, memory: int | None = None, scratch: Path | None = None
) -> Iterator[Any]:
    """A `distributed.Client` whose workers are there; the address of its dashboard is published.

    Workers have one thread each. A worker that dies is replaced, and its tasks run again elsewhere: tasks
    must leave the same files when they run twice. One worker runs inside this process, where it can be
    debugged. Every server listens on the loopback interface alone.

    Parameters
    ----------
    n_workers
        by default the number that the launcher asked for (``HPC_WORLD_SIZE``), else 1.
    memory
        bytes that one worker may use before it is paused and then replaced; by default its share of what the
        launcher gave (``HPC_MEMORY``), else of the machine's.
    scratch
        folder for the workers' own files; by default the system's folder for temporary files.

    Raises
    ------
    ValueError
        for fewer than one worker.
    TimeoutError
        where the workers do not come up.
    """
    from distributed import Client

    number = int(os.environ.get(mpi.VARIABLE, "1")) if n_workers is None else n_workers
    if number < 1:
        raise ValueError(f"a cluster needs at least one worker, got {number}")
    if memory is None and MEMORY_VARIABLE in os.environ:
        memory = int(os.environ[MEMORY_VARIABLE]) // number
    with _local_cluster(number, memory, scratch) as cluster, Client(cluster) as connected:
        connected.wait_for_workers(number, timeout=120)
        log.info("%d Dask worker%s; dashboard: %s", number, "s" * (number > 1), cluster.dashboard_link)
        progress.link("dashboard", cluster.dashboard_link)
        yield connected


@contextmanager
def _local_cluster(n_workers: int, memory: int | None, scratch: Path | None) -> Iterator[_Cluster]:
    """Workers on this machine."""
    import dask
    from distributed import LocalCluster

    one_thread = dict.fromkeys(THREAD_VARIABLES, "1")
    settings = {
        "distributed.nanny.pre-spawn-environ": {
            **dask.config.get("distributed.nanny.pre-spawn-environ"),
            **one_thread,
        },
        "distributed.dashboard.link": f"http://{LOOPBACK}:{{port}}/status",
    }
    with (
        dask.config.set(settings),
        LocalCluster(
            n_workers=n_workers,
            threads_per_worker=1,
            processes=n_workers > 1,
            memory_limit="auto" if memory is None else memory,
            host=LOOPBACK if n_workers > 1 else None,  # one worker needs no address
            dashboard_address=f"{LOOPBACK}:0",
            worker_dashboard_address=f"{LOOPBACK}:0",
            local_directory=None if scratch is None else str(scratch),
        ) as cluster,
    ):
        yield cluster
