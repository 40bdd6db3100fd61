"""What the jobs of `hpc.check` do on the nodes. Each writes what it found to ``found.json`` in its folder."""

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from hpc import durable, mpi, ranks
from hpc.rank import JOB_VARIABLE

_MEET = 15.0  # seconds that two ranks wait for each other
_WORKERS = 60.0  # seconds until all Dask workers, the first of which is there, are
_SEEN = 10.0  # seconds until a file written on one machine must be seen on another (what NFS caches)
_TICK = 0.2
_PACKAGES = ("torch", "distributed", "mpi4py", "zarr")


def look(folder: str, scratch: str | None) -> None:
    """On a node: see what is there."""
    place = Path(folder)
    told = place.parent / "told.txt"
    found = {
        "node": _node(),
        "executable": sys.executable,
        "versions": versions(),
        "told": told.read_text() if told.exists() else None,
        "lock": _lock(place.parent / "lock"),
        "addresses": _addresses(),
        "scratch": _write_in(scratch),
    }
    durable.write_json(place / "found.json", found)


def meet(folder: str, interface: str | None) -> None:
    """On two ranks: reach each other through plain sockets, then as a process group."""
    place, rank = Path(folder), int(os.environ["RANK"])
    # Of this attempt: the job may have been started again, and who left an address then is gone.
    own_file, other = (place / f"address.{os.environ[JOB_VARIABLE]}.{n}.json" for n in (rank, 1 - rank))
    master = os.environ["MASTER_ADDR"]
    own = master if rank == 0 or master.startswith("127.") else ranks.address_of(interface)
    with socket.create_server((own, 0)) as server:
        server.settimeout(_MEET)
        mine = (_node(), *server.getsockname())
        durable.write_json(own_file, mine)
        theirs = appears(other, _MEET)
        if theirs is None:
            raise ConnectionError(f"rank {1 - rank} did not come within {_MEET:.0f} s")
        node, host, port = theirs
        try:
            with socket.create_connection((host, port), timeout=_MEET), server.accept()[0]:
                if rank == 0:
                    both = [f"{name} ({address})" for name, address, _ in (mine, theirs)]
                    durable.write_json(place / "ports.json", both)
        except OSError as error:
            raise ConnectionError(
                f"{mine[0]} ({mine[1]}) does not reach {node} at {host}:{port}: {error}"
            ) from None
    import torch

    from hpc import ddp

    with ddp.group() as group:
        total = group.sum({"one": torch.ones(1)})["one"].item()
        if total != group.world_size:
            raise ArithmeticError(f"the sum of a 1 of each of {group.world_size} ranks is {total}")
        kinds = torch.cuda.get_device_name(group.device) if group.device.type == "cuda" else "cpu"
        found = {"size": group.world_size, "nodes": group.gather(_node()), "devices": group.gather(kinds)}
        if group.is_main:
            durable.write_json(place / "found.json", found)


def count(folder: str) -> None:
    """On every MPI rank: see how many there are."""
    world = mpi.world()
    nodes = world.allgather(_node())
    if world.rank == 0:
        durable.write_json(Path(folder) / "found.json", {"size": world.size, "nodes": nodes})


def compute(folder: str) -> None:
    """In the process with the scheduler: let workers do something."""
    from hpc import cluster

    asked = int(os.environ[mpi.VARIABLE])
    with cluster.client() as client:
        client.wait_for_workers(asked, timeout=_WORKERS)
        nodes = client.gather(client.map(_on_worker, range(8)))
        workers = len(client.scheduler_info(n_workers=-1)["workers"])
        durable.write_json(Path(folder) / "found.json", {"size": workers, "nodes": nodes, "client": _node()})


def _on_worker(number: int) -> str:
    return _node()


def _node() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _addresses() -> dict[str, str]:
    """Interface -> its IPv4 address, of those that have one."""
    return {
        name: entry.address
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET
    }


def versions() -> dict[str, str | None]:
    """Of Python and of packages, and a fingerprint of the code that this module comes with."""
    installed = importlib.metadata.packages_distributions()
    ours = installed.get("hpc", [])
    code = hashlib.sha256()
    for package in sorted({"hpc", *(name for name, homes in installed.items() if set(homes) & set(ours))}):
        spec = importlib.util.find_spec(package)
        for root in spec.submodule_search_locations or () if spec else ():
            for path in sorted(Path(root).rglob("*.py")):
                code.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    versions = {
        name: importlib.metadata.version(installed[name][0]) if name in installed else None
        for name in _PACKAGES
    }
    return {"python": platform.python_version(), **versions, "code": code.hexdigest()[:8]}


def _lock(path: Path) -> str:
    """``held`` where somebody else has the lock of the file; else what is wrong."""
    try:
        with open(path, "r+", encoding="utf-8") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "held"
    except OSError as error:
        return str(error)
    return "free"


def _write_in(folder: str | None) -> str:
    """What is wrong with writing in a folder, which is made by who needs it; empty where it works."""
    if folder is None:
        return ""
    place = Path(os.path.expandvars(folder))
    if "$" in str(place):
        return f"{folder} names a variable that is not set on {_node()}"
    there = next(parent for parent in (place, *place.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            return ""
    except OSError as error:
        return f"cannot write in {there} on {_node()}: {error.strerror}"


def appears(path: Path, seconds: float = _SEEN) -> Any:
    """Content of a JSON file that another machine writes; None where it does not come."""
    until = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > until:
            return None
        time.sleep(_TICK)
        os.listdir(path.parent)  # NFS looks again
    return durable.read_json(path)
