"""One rank of a job: ``python -P -m hpc.rank SPEC``. Started by `hpc.launch`, on any node.

The process splits in two. The child calls the function; the parent watches it: it writes when and how the
child ended (also where it was killed), measures the memory of the child and of everything below it, passes
signals on, and ends all of it as soon as the orchestrator is gone, whatever the child is busy with.
"""

import contextlib
import ctypes
import faulthandler
import importlib
import json
import logging
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from hpc import durable, mpi, progress

JOB_VARIABLE = "HPC_JOB"  # marks every process of a job, however it was started and whoever its parent is
_MPI_RANKS = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
_FORWARDED = (signal.SIGTERM, signal.SIGINT)
_INTERVAL = 0.25  # seconds between looks at the orchestrator
_SAMPLE = 1.0  # seconds between looks at the memory
_PR_SET_PDEATHSIG = 1


def load(function: str) -> Callable[..., Any]:
    """The function that ``"module:function"`` names."""
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)


def log_path(folder: Path, rank: int) -> Path:
    """Where rank ``rank`` of a job in ``folder`` writes: ``log.txt``, ``log.1.txt``, ..."""
    return folder / ("log.txt" if rank == 0 else f"log.{rank}.txt")


def report_path(folder: Path, rank: int) -> Path:
    """Where the rank's beginning and end are told."""
    return folder / ".job" / f"rank.{rank}.json"


def identity() -> dict[str, Any]:
    """This process: host, pid and the time it started, which together no other process has."""
    me = psutil.Process()
    return {"host": socket.gethostname(), "pid": me.pid, "created": me.create_time()}


def is_alive(process: dict[str, Any]) -> bool:
    """Whether the process of an `identity` lives on this host; of other hosts it is assumed."""
    if process["host"] != socket.gethostname():
        return True
    try:
        found = psutil.Process(process["pid"])
        return found.status() != psutil.STATUS_ZOMBIE and abs(found.create_time() - process["created"]) < 2
    except psutil.NoSuchProcess:
        return False


def kill_job(token: str, timeout: float = 10.0) -> None:
    """Kill (SIGKILL) every process of the job on this host but this one, and wait until they are gone."""
    deadline = time.monotonic() + timeout
    quiet = 0
    while quiet < 2:  # twice: a process may have been starting another one during the first look
        living = [p for p in psutil.process_iter() if p.pid != os.getpid() and _belongs(p, token)]
        quiet = 0 if living else quiet + 1
        for process in living:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if living and time.monotonic() > deadline:
            raise TimeoutError(f"processes that do not end: {[p.pid for p in living]}")
        if living:
            time.sleep(0.05)


def _belongs(process: psutil.Process, token: str) -> bool:
    try:
        return process.environ().get(JOB_VARIABLE) == token and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, OSError):  # gone meanwhile, or another user's
        return False


def main(spec_path: Path) -> int:
    """Run one rank; returns the exit status."""
    spec = durable.read_json(spec_path)
    folder = spec_path.parent.parent
    if spec["token"] != os.environ[JOB_VARIABLE] or not is_alive(spec["orchestrator"]):
        return 1  # a late starter of a job that is already over
    rank = _rank(spec["runtime"], spec["ranks"])
    _redirect(log_path(folder, rank))
    if rank == 0:
        progress.start(folder / "progress.json")
    else:
        os.environ.pop(progress.VARIABLE, None)
    reader, writer = os.pipe()
    supervisor = os.getpid()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _die_with(supervisor)
        return _call(spec["function"], spec["arguments"], rank, spec["ranks"], writer)
    os.close(writer)
    return _Supervisor(spec, report_path(folder, rank), rank, child, reader).watch()


def _rank(runtime: str, ranks: int) -> int:
    names = {"ddp": ("RANK",), "mpi": _MPI_RANKS}.get(runtime, ()) if ranks > 1 else ()
    found = next((os.environ[name] for name in names if name in os.environ), None)
    if names and found is None:
        raise mpi.WrongWorldSize(
            f"started as one of {ranks} ranks, but none of {', '.join(names)} is set: "
            "the launcher belongs to an unknown kind of MPI"
        )
    return int(found or 0)


def _redirect(log: Path) -> None:
    """Send everything this process writes, C libraries' output too, to the end of its log."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _die_with(parent: int) -> None:
    """Let the kernel kill this process when its parent ends (Linux; elsewhere the parent's children stay)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _call(function: str, arguments: dict[str, Any], rank: int, ranks: int, writer: int) -> int:
    """The child: call the function, and tell the parent what it needed and what went wrong."""
    faulthandler.enable()
    who = f" [rank {rank}]" if ranks > 1 else ""
    logging.basicConfig(
        level=logging.INFO, format=f"%(asctime)s{who} %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    logging.captureWarnings(True)
    ending: dict[str, Any] = {}
    try:
        load(function)(**arguments)
    except BaseException as error:  # noqa: BLE001 - whatever it is, the parent must hear of it
        traceback.print_exception(error.with_traceback(error.__traceback__ and error.__traceback__.tb_next))
        ending = {"error": f"{type(error).__name__}: {error}"[:4000]}
    ending |= {"peak": _peak(os.getpid()), "time": time.time()}
    os.write(writer, json.dumps(ending).encode())
    os.close(writer)
    if "error" in ending:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(
            1
        )  # at once: an ordinary exit waits in MPI_Finalize, or for threads, and holds up the others
    return 0


class _Supervisor:
    """The parent of one rank."""

    def __init__(self, spec: dict[str, Any], report: Path, rank: int, child: int, reader: int) -> None:
        self.spec, self.report, self.rank, self.child, self.reader = spec, report, rank, child, reader
        self.peaks: dict[int, int] = {}
        self.told = b""
        self.entry: dict[str, Any] = {**identity(), "rank": rank, "child": child, "started": time.time()}
        durable.write_json(report, self.entry, sync=False)

    def watch(self) -> int:
        """Wait for the child's end and write it down; returns the exit status for the launcher."""
        self._forward_signals()
        sampled = 0.0
        while True:
            self._sleep()
            pid, status = os.waitpid(self.child, os.WNOHANG)
            if pid:
                break
            if not is_alive(self.spec["orchestrator"]):
                os.kill(self.child, signal.SIGKILL)
                kill_job(self.spec["token"])
                os._exit(1)
            if time.monotonic() - sampled > _SAMPLE:
                sampled = time.monotonic()
                self._sample()
        code = os.waitstatus_to_exitcode(status)
        ended = time.time()
        ending = self._ending()
        if "peak" in ending:
            self.peaks[self.child] = ending["peak"]
        self.entry |= {
            "ended": min(ended, ending.get("time", ended)) if code else ended,
            "exit_code": code if code >= 0 else None,
            "signal": -code if code < 0 else None,
            "error": ending.get("error"),
            "peak_memory": self._labelled(),
        }
        durable.write_json(self.report, self.entry, sync=False)
        os._exit(code if code >= 0 else 128 - code)

    def _forward_signals(self) -> None:
        def forward(number: int, frame: object) -> None:
            self.entry.setdefault("told_to_stop", number)
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.child, number)

        for number in _FORWARDED:
            signal.signal(number, forward)
        self.wakeup, end = os.pipe()
        os.set_blocking(end, False)
        signal.set_wakeup_fd(end, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)  # for the wake-up alone
        self.waiting = [self.wakeup, self.reader]

    def _sleep(self) -> None:
        """Until something happens, `_INTERVAL` at most."""
        ready, _, _ = select.select(self.waiting, [], [], _INTERVAL)
        if self.wakeup in ready:
            os.read(self.wakeup, 4096)
        if self.reader in ready:
            data = os.read(self.reader, 65536)
            self.told += data
            if not data:
                self.waiting.remove(self.reader)

    def _ending(self) -> dict[str, Any]:
        os.set_blocking(self.reader, False)
        with contextlib.suppress(BlockingIOError):  # a process of the child's may keep the other end open
            while data := os.read(self.reader, 65536):
                self.told += data
        return json.loads(self.told) if self.told else {}

    def _sample(self) -> None:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error, OSError):
                if process.pid in self.peaks or "resource_tracker" not in " ".join(process.cmdline()):
                    self.peaks[process.pid] = _peak(process.pid)

    def _labelled(self) -> dict[str, int]:
        main = f"rank {self.rank}"
        below = [peak for pid, peak in self.peaks.items() if pid != self.child]
        return {main: self.peaks.get(self.child, 0)} | {
            f"{main} process {number}": peak for number, peak in enumerate(below, start=1)
        }


def _peak(pid: int) -> int:
    """Largest resident memory [bytes] a process had; what it has now where the system keeps no record."""
    status = Path(f"/proc/{pid}/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return int(psutil.Process(pid).memory_info().rss)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
