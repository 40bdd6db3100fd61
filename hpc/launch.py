"""Run a function as a job: `submit` starts it with the processes its runtime wants, a `Job` follows it.

A function is named ``"module:function"`` and takes JSON-able keyword arguments, so a job can be started on
any machine that has the same packages. Every rank runs under `hpc.rank`, which writes what became of it; a
job with a dead rank ends at once and tells which one died first.
"""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from hpc import cluster, durable, mpi, progress, rank
from hpc.resources import Resources
from hpc.site import Site

Runtime = Literal["serial", "dask", "ddp", "mpi"]

_LISTEN = 0.5  # seconds given to the other ranks, after the first failure, to tell theirs
_INTERFACE = "lo" if sys.platform == "linux" else "lo0"
_LOOPBACK = {  # MPICH's ranks must not be reached from outside this machine, nor start on others
    "HYDRA_LAUNCHER": "fork",
    "HYDRA_IFACE": _INTERFACE,
    "UCX_NET_DEVICES": _INTERFACE,
}
_CRASHES = {signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE}


@dataclass(frozen=True)
class Failure:
    """How one rank ended that should not have."""

    who: str
    """``rank 1``, ``mpirun``; empty for the only rank."""
    reason: str
    log: Path
    time: float

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

    def describe(self, n_lines: int = 15) -> str:
        """What went wrong, the first failure with the last lines of its log."""
        if not self.failures:
            return "done"
        first, others = self.failures[0], self.failures[1:]
        lines = [str(first)]
        if others:
            lines.append(f"after that: {'; '.join(str(failure).splitlines()[0] for failure in others[:4])}")
        if tail := last_lines(first.log, n_lines):
            lines += [f"last lines of {first.log}:", *(f"  | {line}" for line in tail)]
        return "\n".join(lines)


class Job(Protocol):
    """A function that runs."""

    def poll(self) -> Outcome | None:
        """How the job ended; None while it runs. Never waits."""

    def cancel(self, grace: float = 10.0) -> None:
        """Ask the processes to end (SIGTERM), kill what is left after ``grace`` seconds."""


def submit(
    function: str,
    arguments: Mapping[str, Any],
    folder: Path,
    runtime: Runtime = "serial",
    resources: Resources | None = None,
    site: Site | None = None,
) -> Job:
    """Start ``function(**arguments)`` as a job.

    Parameters
    ----------
    function:
        ``"module:function"``.
    arguments:
        What json can write.
    folder:
        Gets the job's files: ``log.txt`` (``log.1.txt`` and so on for the other ranks), ``progress.json``,
        ``.job/``. Processes that an earlier job in this folder left behind are ended first, and their
        half-written files removed.
    runtime:
        ``serial`` and ``dask``: one process. ``ddp`` and ``mpi``: the function is called on every rank.
        All see the number of ranks (Dask: workers to start) in ``HPC_WORLD_SIZE``.
    """
    resources, site = resources or Resources(), site or Site()
    folder.mkdir(parents=True, exist_ok=True)
    end_leftovers(folder)
    durable.sweep(folder)
    shutil.rmtree(folder / ".job", ignore_errors=True)
    (folder / "progress.json").unlink(missing_ok=True)
    if site.launcher == "debug":
        return _run_here(function, arguments, folder, site)
    return _LocalJob(function, arguments, folder, runtime, resources, site)


def end_leftovers(folder: Path) -> None:
    """End what still runs of an earlier job in ``folder`` whose orchestrator was killed."""
    spec = folder / ".job" / "spec.json"
    if spec.exists():
        rank.kill_job(durable.read_json(spec)["token"])


def is_running(folder: Path) -> bool:
    """Whether the process that submitted the last job in ``folder`` lives, as far as this host can see."""
    spec = folder / ".job" / "spec.json"
    return spec.exists() and rank.is_alive(durable.read_json(spec)["orchestrator"])


def last_lines(log: Path, n: int) -> list[str]:
    """The last ``n`` lines of a log, fewer where it has fewer."""
    if not log.exists():
        return []
    with open(log, "rb") as stream:
        stream.seek(max(0, log.stat().st_size - 32768))
        text = stream.read().decode(errors="replace")
    return [line for line in text.splitlines() if line.strip()][-n:]


@dataclass
class _Finished:
    """A job that ended inside `submit`."""

    outcome: Outcome

    def poll(self) -> Outcome | None:
        return self.outcome

    def cancel(self, grace: float = 10.0) -> None:
        """Nothing runs."""


def _run_here(function: str, arguments: Mapping[str, Any], folder: Path, site: Site) -> Job:
    """Call the function in this process, as one rank; errors go through, so that a debugger stops at them."""
    with _environment({**site.environment, mpi.VARIABLE: "1"}):
        progress.start(folder / "progress.json")
        rank.load(function)(**arguments)
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


class _LocalJob:
    """A job of processes on this machine."""

    def __init__(
        self,
        function: str,
        arguments: Mapping[str, Any],
        folder: Path,
        runtime: Runtime,
        resources: Resources,
        site: Site,
    ) -> None:
        self.folder, self.runtime = folder, runtime
        self.size = resources.ranks or 1
        self.ranks = self.size if runtime in ("ddp", "mpi") else 1  # Dask's workers start below the only rank
        self.token = uuid.uuid4().hex
        self.processes: list[subprocess.Popen[bytes]] = []
        self._outcome: Outcome | None = None
        self._failed_at: float | None = None
        spec = folder / ".job" / "spec.json"
        durable.write_json(
            spec,
            {
                "token": self.token,
                "function": function,
                "arguments": dict(arguments),
                "runtime": runtime,
                "ranks": self.ranks,
                "orchestrator": rank.identity(),
            },
        )
        command = [sys.executable, "-P", "-u", "-m", "hpc.rank", str(spec.absolute())]
        environment = self._environment(resources, site)
        if runtime == "mpi" and self.ranks > 1:
            self._start([str(site.find_mpirun()), "-n", str(self.ranks), *command], environment)
        elif runtime == "ddp":
            port = str(free_port())
            for number in range(self.ranks):
                self._start(
                    command,
                    environment
                    | {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(self.ranks)}
                    | {"LOCAL_WORLD_SIZE": str(self.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
                )
        else:
            self._start(command, environment)

    def _environment(self, resources: Resources, site: Site) -> dict[str, str]:
        threads = str(resources.cpus or max(1, site.cores // self.size))
        memory = {} if resources.memory is None else {cluster.MEMORY_VARIABLE: str(resources.memory)}
        return {
            **os.environ,
            **dict.fromkeys(cluster.THREAD_VARIABLES, threads),
            "PYTHONPATH": os.pathsep.join(_own_paths()),
            **_LOOPBACK,
            **site.environment,
            **memory,
            mpi.VARIABLE: str(self.size),
            rank.JOB_VARIABLE: self.token,
        }

    def _start(self, command: list[str], environment: dict[str, str]) -> None:
        with open(rank.log_path(self.folder, 0), "ab") as log:
            self.processes.append(
                subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C in the terminal reaches the orchestrator alone
                )
            )

    def poll(self) -> Outcome | None:
        if self._outcome is not None:
            return self._outcome
        codes = [process.poll() for process in self.processes]
        reports = self._reports()
        failed = any(codes) or any(report.get("exit_code", 0) != 0 for report in reports)
        if None in codes:
            if not failed:
                return None
            self._failed_at = self._failed_at or time.monotonic()
            if time.monotonic() - self._failed_at < _LISTEN:
                return None
        failures = self._failures(self._reports(), codes) if failed or self._missing(reports) else ()
        self._end()
        reports = self._reports()
        self._outcome = Outcome(
            failures,
            {label: peak for report in reports for label, peak in report.get("peak_memory", {}).items()},
            tuple(report["host"] for report in reports),
        )
        return self._outcome

    def cancel(self, grace: float = 10.0) -> None:
        reports = self._reports()
        if len(reports) < self.ranks:
            grace = 0.0  # before all have started there is nothing to save
        for report in reports:  # not to mpirun, which would kill the ranks instead of asking them
            if "ended" not in report and rank.is_alive(report):
                os.kill(report["pid"], signal.SIGTERM)
        deadline = time.monotonic() + grace
        while time.monotonic() < deadline and any(process.poll() is None for process in self.processes):
            time.sleep(0.05)
        self._end()

    def _end(self) -> None:
        rank.kill_job(self.token)
        for process in self.processes:
            process.wait()

    def _reports(self) -> list[dict[str, Any]]:
        paths = (rank.report_path(self.folder, number) for number in range(self.ranks))
        return [durable.read_json(path) for path in paths if path.exists()]

    def _missing(self, reports: list[dict[str, Any]]) -> bool:
        return len([report for report in reports if "ended" in report]) < self.ranks

    def _failures(self, reports: list[dict[str, Any]], codes: list[int | None]) -> tuple[Failure, ...]:
        """Every rank that did not end well, the one that pulled the others down first."""
        found = [
            (_order(report), self._failure(report["rank"], _reason(report), report["ended"]))
            for report in reports
            if report.get("exit_code", 0) != 0
        ]
        if len(self.processes) == self.ranks:  # each rank is our own child: we know how it ended
            told = {report["rank"] for report in reports if "ended" in report}
            for number, code in enumerate(codes):
                if code is not None and number not in told:
                    how = {"exit_code": code, "signal": -code if code < 0 else None}
                    found.append((_order(how), self._failure(number, _reason(how), time.time())))
        else:
            found += [
                (1, self._failure(report["rank"], "was killed", time.time()))
                for report in reports
                if "ended" not in report and not rank.is_alive(report)
            ]
            if not found and codes[0] is not None:
                reason = f"ended with exit code {codes[0]} before it started the ranks"
                found = [(1, Failure("mpirun", reason, rank.log_path(self.folder, 0), time.time()))]
        return tuple(failure for _, failure in sorted(found, key=lambda pair: (pair[0], pair[1].time)))

    def _failure(self, number: int, reason: str, when: float) -> Failure:
        who = f"rank {number}" if self.ranks > 1 else ""
        return Failure(who, reason, rank.log_path(self.folder, number), when)


def _order(report: Mapping[str, Any]) -> int:
    """Likely causes first: a crash pulls the others down within moments, and some are only told to stop."""
    if "told_to_stop" in report:
        return 2
    return 0 if report["signal"] in _CRASHES else 1


def _reason(report: Mapping[str, Any]) -> str:
    if "told_to_stop" in report:
        return f"was told to stop ({signal.Signals(report['told_to_stop']).name})"
    if report.get("error"):
        return str(report["error"])
    if report["signal"]:
        number = report["signal"]
        name = signal.Signals(number).name if number in set(signal.Signals) else "unknown"
        hint = ", by hand or by the system when memory ran out" if number == signal.SIGKILL else ""
        return f"killed by signal {number} ({name}{hint})"
    return f"ended with exit code {report['exit_code']}"


def free_port() -> int:
    """A TCP port that nobody listens on, below the range from which the system gives ports to connections."""
    for port in random.SystemRandom().sample(range(20000, 32000), 200):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no free TCP port between 20000 and 32000 on 127.0.0.1")


def _own_paths() -> list[str]:
    """Where this process finds modules apart from its Python's own folders: jobs must find the same ones."""
    own = (Path(sys.prefix), Path(sys.base_prefix))
    paths = [Path(entry or os.getcwd()).absolute() for entry in sys.path]
    here = Path(__file__).absolute().parent.parent
    return [
        str(path)
        for path in dict.fromkeys([*paths, here])
        if path.exists() and not any(path.is_relative_to(prefix) for prefix in own)
    ]
