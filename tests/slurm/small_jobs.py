"""What the jobs of the tests run, and how the tests follow them."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpc import durable, launch, progress, rank, slurm
from hpc.launch import Outcome
from hpc.resources import Resources
from hpc.site import Site

HERE = __name__
SITE = Site(launcher="slurm", partition="cpu", interface="lo", mpi="pmi2", grace=10, time=600, heartbeat=20)
MEMORY = 200 * 2**20


# Functions


def see(out: str) -> None:
    """Write what this rank sees."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "HPC_WORLD_SIZE")
    names += ("OMP_NUM_THREADS", "SLURM_CPUS_ON_NODE", "SLURMD_NODENAME")
    seen = {name: os.environ.get(name) for name in names}
    rank_ = os.environ.get("RANK", "0")
    durable.write_json(Path(out) / f"seen-{rank_}.json", seen | {"site": os.environ["HPC_SITE"]})


def reduce(out: str) -> None:
    """Add a number of each DDP rank."""
    import torch

    from hpc import ddp

    with ddp.group() as group:
        total = group.sum({"x": torch.tensor(float(group.rank + 1))})["x"].item()
        place = [group.rank, group.local_rank, os.environ["SLURMD_NODENAME"]]
        places = group.gather(place)
        if group.is_main:
            durable.write_json(Path(out) / "reduced.json", [total, places])


def mpi_world(out: str) -> None:
    """Add a number of each MPI rank."""
    from hpc import mpi

    world = mpi.world()
    total = world.allreduce(world.rank + 1)
    nodes = world.allgather(os.environ["SLURMD_NODENAME"])
    if world.rank == 0:
        durable.write_json(Path(out) / "world.json", [world.size, total, nodes])
    world.barrier()


def mpi_world_killed_once(out: str) -> None:
    """`mpi_world`, but the first time its ranks wait, together, until they are killed."""
    if os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        from hpc import mpi

        mpi.world().barrier()
        (Path(out) / "ready").touch()
        time.sleep(600)
    mpi_world(out)


def count(out: str, n: int, seconds: float = 0.1, linger: float = 0.0, report: bool = True) -> None:
    """Count to ``n``, keeping each number on rank 0; asked to stop, it is kept and ends ``linger`` s later.

    Every start is a line of ``starts.txt``.
    """
    stop: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: stop.append(number))
    folder, rank_ = Path(out), int(os.environ.get("RANK", "0"))
    state = folder / "count.txt"
    done = int(state.read_text()) if state.exists() else 0
    with open(folder / f"starts.{rank_}.txt", "a", encoding="utf-8") as stream:
        restart = os.environ.get("SLURM_RESTART_COUNT", "0")
        stream.write(json.dumps([os.getpid(), done, restart, os.environ.get("SLURM_STEP_NUM_NODES")]) + "\n")
    while done < n:
        if stop:
            time.sleep(linger)
            print(f"rank {rank_} saved {done}", flush=True)
            sys.exit(128 + stop[0])
        time.sleep(seconds)
        done += 1
        if rank_ == 0:
            durable.write_text(state, str(done))
            if report:
                progress.report(done, n, "counting")


def fail(on: int) -> None:
    """Raise on one rank, while the others wait."""
    if int(os.environ.get("RANK", "0")) == on:
        time.sleep(0.3)
        raise ValueError("snapshot.hdf5: PartType1/Coordinates is missing")
    time.sleep(60)


def lose_peer() -> None:
    """What a rank says when another one is gone."""
    raise ConnectionError("rank 1 has left")


def tidy(out: str) -> None:
    """Hold something that is to be given back."""
    try:
        (Path(out) / "held").touch()
        time.sleep(300)
    finally:
        (Path(out) / "held").rename(Path(out) / "given-back")


def dask_sum(out: str, hold: bool = False) -> None:
    """Add numbers on Dask workers, and stay there."""
    from hpc import cluster

    with cluster.client(memory=2**28) as client:
        total = client.submit(sum, range(10)).result()
        with open(Path(out) / "sums.txt", "a", encoding="utf-8") as stream:
            stream.write(f"{total}\n")
        if hold and not (Path(out) / "go").exists():
            time.sleep(300)


def crash_when_told(out: str) -> None:
    """Do not survive being asked to save."""
    signal.signal(signal.SIGTERM, lambda number, frame: os.kill(os.getpid(), signal.SIGKILL))
    with open(Path(out) / "starts.0.txt", "a", encoding="utf-8") as stream:
        stream.write(json.dumps([os.getpid(), 0, os.environ.get("SLURM_RESTART_COUNT", "0"), "1"]) + "\n")
    time.sleep(300)


def ignore() -> None:
    """Do not listen."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(300)


def in_allocation(folder: str) -> None:
    """A batch process that runs steps on the nodes of its job, one of which stops when it is told to."""
    site, room = SITE.in_allocation(), Path(folder)
    outcomes = [wait(launch.submit(task("see", room / "all", "ddp", ranks=4, nodes=2), site))]
    outcomes.append(wait(launch.submit(task("see", room / "one", cpus=2), site)))
    job = launch.submit(task("count", room / "long", "ddp", more={"n": 10**6}, ranks=2, nodes=2), site)
    until(lambda: counted(room / "long") > 2)
    job.cancel()
    outcomes.append(wait(job))
    durable.write_json(room / "outcomes.json", [outcome.as_json() for outcome in outcomes])


def in_allocation_again(folder: str) -> None:
    """A batch process that is requeued after the first of the crashes of its step."""
    room = Path(folder)
    log = room / "step" / "log.txt"
    job = launch.submit(task("lose_peer", room / "step", retries=2), SITE.in_allocation())
    if os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        until(lambda: job.poll() is None and "attempt 2 of 3 starts" in log.read_text())
        slurm.requeue(str(slurm.own_job()))
        time.sleep(60)
    durable.write_json(room / "outcome.json", wait(job).as_json())


# Helpers


def task(
    function: str, folder: Path, runtime: launch.Runtime = "serial", *, more: Any = None, **resources: Any
) -> launch.Task:
    """A small job of one of the functions above, which get their ``out`` if they take one."""
    arguments = {} if function in ("fail", "lose_peer", "ignore") else {"out": str(folder.absolute())}
    arguments |= more or {}
    asked = Resources(**({"memory": MEMORY} | resources))
    return launch.Task(f"{HERE}:{function}", arguments, folder, runtime, asked, f"test-{function}")


def wait(job: launch.Job, timeout: float = 90) -> Outcome:
    """How a job ends."""
    until(lambda: job.poll() is not None, timeout, job)
    outcome = job.poll()
    assert outcome is not None
    return outcome


def until(condition: Callable[[], Any], timeout: float = 60, job: launch.Job | None = None) -> None:
    """Wait for something that must come; while it is waited for, the job is followed."""
    deadline = time.monotonic() + timeout
    while not condition():
        about = "" if job is None else f"; the job: {job.about()}, {job.poll()}"
        assert time.monotonic() < deadline, f"it does not come{about}"
        time.sleep(0.05)


def starts(folder: Path, number: int = 0) -> list[list[Any]]:
    """The starts of a rank that counts: pid, where it began, restarts of the Slurm job, nodes."""
    path = folder / f"starts.{number}.txt"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def counted(folder: Path) -> int:
    """How far it has counted."""
    path = folder / "count.txt"
    return int(path.read_text()) if path.exists() else 0


def report(folder: Path, number: int = 0) -> dict[str, Any]:
    """What a rank has told."""
    return dict(durable.read_json(rank.report_path(folder, number)))


def job_id(folder: Path) -> str:
    """The job in Slurm's queue."""
    return str(durable.read_json(folder / ".slurm" / "job.json")["id"])


def batch_process(folder: Path) -> int:
    """Pid of the batch process of the job in a folder."""
    return int(durable.read_json(folder / ".job" / "spec.json")["orchestrator"]["pid"])


def state(folder: Path) -> slurm.JobState:
    """What Slurm says of the job in a folder."""
    id = job_id(folder)
    return slurm.states([id])[id]
