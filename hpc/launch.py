"""Run a function as a job: `submit` starts it with the processes its runtime wants, a `Job` follows it.

A function is named ``"module:function"`` and takes JSON-able keyword arguments, so a job can be started on
any machine that has the same packages. Every rank runs under `hpc.rank`, which writes what became of it; a
job with a dead rank ends at once and tells which one died first.

The site's launcher decides what a job is: processes of this machine, a call in this process, a step of the
Slurm job that this process is in, or a Slurm job of its own.
"""

import contextlib
import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc import durable, mpi, progress, queued, rank, ranks
from hpc.allocation import AllocationJob, count_limit
from hpc.job import Failure, Job, JobInfo, Outcome, Runtime, Task, last_lines
from hpc.site import Site

__all__ = [
    "Failure",
    "Job",
    "JobInfo",
    "Outcome",
    "Runtime",
    "Task",
    "attach",
    "count_limit",
    "describe",
    "end_leftovers",
    "last_lines",
    "submit",
    "submit_array",
]


def submit(task: Task, site: Site | None = None) -> Job:
    """Start a task as a job.

    What an earlier job in the task's folder left behind is ended first, and its half-written files removed.

    Raises
    ------
    hpc.strict.SettingsError
        where the machine is not what the task and the site ask for.
    FileNotFoundError
        where a launcher is missing.
    hpc.slurm.SlurmError
        where Slurm does not take the job.
    """
    site = site or Site()
    if site.launcher == "slurm":
        return submit_array([task], site)[0]
    queued.end(task.folder)
    if site.launcher == "debug":
        ranks.clear(task.folder)
        return _run_here(task, site)
    return ranks.RankJob(task, site) if site.launcher == "local" else AllocationJob(task, site)


def submit_array(tasks: Sequence[Task], site: Site, at_once: int | None = None) -> list[Job]:
    """Queue tasks that ask for the same as one Slurm job array, ``at_once`` of which may run at a time.

    Raises
    ------
    ValueError
        where they do not ask for the same.
    hpc.slurm.SlurmError
        where Slurm does not take them.
    """
    for task in tasks:
        end_leftovers(task.folder)
    return list(queued.submit(tasks, site, at_once))


def attach(folder: Path, site: Site) -> Job | None:
    """The job that an earlier process queued in ``folder`` and that waits, runs or has done its work since.

    None where there is none, where it failed (to start it again is to try again), and on sites without Slurm.

    Raises
    ------
    hpc.slurm.Unreachable
        where Slurm does not answer, so that nobody knows.
    """
    return queued.attach(folder, site) if site.launcher == "slurm" else None


def describe(folders: Iterable[Path]) -> dict[Path, JobInfo]:
    """Where the last job of each folder is, seen from any process; folders without one are left out.

    Slurm is asked once for all, and not more often than every few seconds.
    """
    folders = list(folders)
    found = queued.describe(folders)
    for folder in folders:
        spec = folder / ".job" / "spec.json"
        if folder not in found and spec.exists():
            process = durable.read_json(spec)["orchestrator"]
            state = "running" if rank.is_alive(process) else "ended"
            found[folder] = JobInfo(f"pid {process['pid']}", state, (process["host"],))
    return found


def end_leftovers(folder: Path) -> None:
    """End what still runs of an earlier job in ``folder`` whose orchestrator was killed; in Slurm's queue
    too."""
    queued.end(folder)
    ranks.end_leftovers(folder)


@dataclass
class _Finished:
    """A job that ended inside `submit`."""

    outcome: Outcome

    def poll(self) -> Outcome | None:
        return self.outcome

    def cancel(self, grace: float = 10.0) -> None:
        """Nothing runs."""

    def about(self) -> JobInfo:
        return JobInfo(f"pid {os.getpid()}", "completed", self.outcome.hosts)


def _run_here(task: Task, site: Site) -> Job:
    """Call the function in this process, as one rank; errors go through, so that a debugger stops at them."""
    with _environment({**site.environment, mpi.VARIABLE: "1"}):
        progress.start(task.folder / "progress.json")
        rank.load(task.function)(**task.arguments)
    return _Finished(Outcome(hosts=(socket.gethostname(),)))


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
