"""What a job is to those who submit and follow it, whoever runs it: `hpc.launch` has its door."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from hpc.resources import Resources

Runtime = Literal["serial", "dask", "ddp", "mpi"]
Again = Literal["", "here", "elsewhere", "later"]


@dataclass(frozen=True)
class Task:
    """A call that shall run as a job."""

    function: str
    """``"module:function"``."""
    arguments: Mapping[str, Any]
    """Its keyword arguments: what JSON can write."""
    folder: Path
    """Gets the job's files: ``log.txt`` (``log.1.txt`` and so on for the other ranks), ``progress.json``,
    ``.job/``, and ``.slurm/`` where Slurm runs it."""
    runtime: Runtime = "serial"
    """``serial`` and ``dask``: one process. ``ddp`` and ``mpi``: the function is called on every rank. All
    see the number of ranks (Dask: workers to start) in ``HPC_WORLD_SIZE``."""
    resources: Resources = field(default_factory=Resources)
    name: str = ""
    """What people see in the queue; by default the folder's name."""


@dataclass(frozen=True)
class Failure:
    """How one rank, or the whole job, ended that should not have."""

    who: str
    """``rank 1``, ``mpirun``, ``job 12``; empty for the only rank."""
    reason: str
    log: Path
    time: float
    again: Again = ""
    """Where another attempt may go better: ``here`` after a crash, ``elsewhere`` when a node is lost,
    ``later`` when it did not start because Slurm does not answer. Nowhere for a function that raised: it
    would raise again."""

    def __str__(self) -> str:
        return f"{self.who}: {self.reason}" if self.who else self.reason


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    failures: tuple[Failure, ...] = ()
    """The one that caused the others first; empty for a job that did its work."""
    peak_memory: dict[str, int] = field(default_factory=dict)
    """Largest resident memory [bytes]: ``rank 0``, ``rank 0 process 1`` (a Dask worker, say), ``rank 1``."""
    hosts: tuple[str, ...] = ()
    usage: dict[str, Any] = field(default_factory=dict)
    """What was used: ``elapsed`` and ``cpu_seconds`` [s] of all ranks and what they started; from Slurm also
    the other fields of `hpc.slurm.Usage`."""
    earlier: tuple[str, ...] = ()
    """Why each attempt before the last one failed."""
    restarts: int = 0
    """Times that Slurm started it again: after preemption, time limits, lost nodes."""
    stopped: bool = False
    """It was told to stop from outside and did; ``failures`` tells who was told."""

    @property
    def attempts(self) -> int:
        """Times the job was started, counting crashes only."""
        return len(self.earlier) + 1

    def as_json(self) -> dict[str, Any]:
        """What `from_json` reads, for files."""
        return json.loads(json.dumps(asdict(self), default=str))

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Outcome":
        """The outcome that `as_json` wrote."""
        failures = tuple(Failure(**{**each, "log": Path(each["log"])}) for each in content["failures"])
        tuples = {key: tuple(content[key]) for key in ("hosts", "earlier")}
        return cls(**{**content, **tuples, "failures": failures})

    def describe(self, n_lines: int = 15) -> str:
        """What went wrong, the first failure with the last lines of its log."""
        if not self.failures:
            return "done"
        first, others = self.failures[0], self.failures[1:]
        lines = [str(first)]
        if others:
            lines.append(f"after that: {'; '.join(str(failure).splitlines()[0] for failure in others[:4])}")
        if self.earlier:
            lines.append(f"this was attempt {self.attempts}; before it:")
            lines += [f"  {number}. {why.splitlines()[0]}" for number, why in enumerate(self.earlier, 1)]
        if tail := last_lines(first.log, n_lines):
            lines += [f"last lines of {first.log}:", *(f"  | {line}" for line in tail)]
        return "\n".join(lines)


@dataclass(frozen=True)
class JobInfo:
    """Where a job is."""

    id: str
    """``12`` or ``12_3`` in Slurm's queue, ``pid 4711`` on this machine."""
    state: str
    """``pending``, ``running``, or how it ended: ``completed``, ``failed``, or Slurm's word."""
    nodes: tuple[str, ...] = ()
    reason: str = ""
    """Why it waits, or that Slurm does not answer."""
    restarts: int = 0
    """Times it was requeued."""


class Job(Protocol):
    """A function that runs."""

    def poll(self) -> Outcome | None:
        """How the job ended; None while it runs. Never waits."""

    def cancel(self, grace: float = 10.0) -> None:
        """Ask the processes to end (SIGTERM), kill what is left after ``grace`` seconds."""

    def about(self) -> JobInfo:
        """Where the job is."""


def last_lines(log: Path, n: int) -> list[str]:
    """The last ``n`` lines of a log, fewer where it has fewer."""
    if not log.exists():
        return []
    with open(log, "rb") as stream:
        stream.seek(max(0, log.stat().st_size - 32768))
        text = stream.read().decode(errors="replace")
    return [line for line in text.splitlines() if line.strip()][-n:]
