"""One rank of a job: ``python -P -m hpc.rank SPEC``. Started by `hpc.launch`, on any node.

The process splits in two. The child calls the function; the parent watches it: it writes when and how the
child ended (also where it was killed), measures the memory of the child and of everything below it, passes
signals on, and ends all of it as soon as the orchestrator is gone, whatever the child is busy with. On a
node that the orchestrator cannot be seen from, the job's `spec.json` says whether it is still wanted, and
whether it shall stop.
"""

import contextlib
import ctypes
import errno
import faulthandler
import importlib
import json
import logging
import os
import resource
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import psutil

from hpc import durable, mpi, progress

JOB_VARIABLE = "HPC_JOB"  # marks every process of a job, however it was started and whoever its parent is
_MPI_RANKS = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
_FORWARDED = (signal.SIGTERM, signal.SIGINT)
_INTERVAL = 0.25  # seconds between looks at the orchestrator
_SAMPLE = 1.0  # seconds between looks at the memory
_LOOK = 2.0  # seconds between looks at the job's file, which may lie on a busy file server
_STOPPED = {128 + signal.SIGTERM, 128 + signal.SIGINT}  # exit codes of a function that was told to stop
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
    return {"host": socket.gethostname(), "pid": me.pid, "created": _created(me)}


def _created(process: psutil.Process) -> float:
    """When a process started, by a clock that nobody sets: ticks since the system did, where it counts."""
    stat = Path(f"/proc/{process.pid}/stat")
    if stat.exists():
        return float(stat.read_text().rpartition(")")[2].split()[19])
    return process.create_time()


def is_alive(process: dict[str, Any]) -> bool:
    """Whether the process of an `identity` lives on this host; of other hosts it is assumed."""
    if process["host"] != socket.gethostname():
        return True
    try:
        found = psutil.Process(process["pid"])
        return found.status() != psutil.STATUS_ZOMBIE and _created(found) == process["created"]
    except (psutil.NoSuchProcess, ProcessLookupError, FileNotFoundError):
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
    signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)  # until both processes know what to do with them
    for number in (signal.SIGUSR1, signal.SIGUSR2):  # a scheduler's warnings are for the orchestrator
        signal.signal(number, signal.SIG_IGN)
    spec = durable.read_json(spec_path)
    folder = spec_path.parent.parent
    if spec["token"] != os.environ[JOB_VARIABLE] or not is_alive(spec["orchestrator"]):
        text = (
            f"too late: process {spec['orchestrator']['pid']}, which started this job, is not here any more"
        )
        print(f"{text} (or is hidden by an option of the container, --pid or --containall)", file=sys.stderr)
        return 1
    rank = _rank(spec["runtime"], spec["ranks"])
    if spec["runtime"] == "ddp":
        _join_ddp(rank, spec["ranks"])
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
        return _call(spec, rank, writer)
    os.close(writer)
    return _Supervisor(spec_path, spec, rank, child, reader).watch()


def _rank(runtime: str, ranks: int) -> int:
    names = {"ddp": ("RANK", "SLURM_PROCID"), "mpi": _MPI_RANKS}.get(runtime, ()) if ranks > 1 else ()
    found = next((os.environ[name] for name in names if name in os.environ), None)
    if names and found is None:
        raise mpi.WrongWorldSize(
            f"started as one of {ranks} ranks, but none of {', '.join(names)} is set: "
            "the launcher belongs to an unknown kind of MPI"
        )
    return int(found or 0)


def _join_ddp(rank: int, ranks: int) -> None:
    """Give `torch.distributed` its variables where srun, which does not know them, has started the ranks."""
    if "RANK" not in os.environ:
        per_node = ranks // int(os.environ["SLURM_STEP_NUM_NODES"])
        given = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": per_node}
        given["LOCAL_RANK"] = int(os.environ["SLURM_LOCALID"])
        os.environ.update({name: str(value) for name, value in given.items()})


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


def _call(spec: dict[str, Any], rank: int, writer: int) -> int:
    """The child: call the function, and tell the parent what it needed and what went wrong."""
    faulthandler.enable()
    if spec["runtime"] in ("serial", "dask"):
        signal.signal(signal.SIGTERM, _leave)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
    who = f" [rank {rank}]" if spec["ranks"] > 1 else ""
    logging.basicConfig(
        level=logging.INFO, format=f"%(asctime)s{who} %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    logging.captureWarnings(True)
    ending: dict[str, Any] = {}
    failure: BaseException | None = None
    try:
        load(spec["function"])(**spec["arguments"])
    except BaseException as error:  # noqa: BLE001 - whatever it is, the parent must hear of it
        failure = error
        ending["error"] = f"{type(error).__name__}: {error}"[:4000]
        ending["lost"] = isinstance(error, ConnectionError | TimeoutError)
    ending |= {"peak": _peak(os.getpid()), "time": time.time()}
    os.write(writer, json.dumps(ending).encode())
    os.close(writer)
    if failure is None:
        return 0
    code = 1
    if isinstance(failure, SystemExit) and failure.code in _STOPPED:
        code = int(failure.code)
    try:
        if code == 1:
            below = failure.__traceback__ and failure.__traceback__.tb_next  # without this function
            traceback.print_exception(failure.with_traceback(below))
        sys.stdout.flush()
        sys.stderr.flush()
    finally:  # the disk may be full
        # At once: an ordinary exit waits in MPI_Finalize, or for threads, and holds up the others.
        os._exit(code)


def _leave(number: int, frame: object) -> None:
    """End by an exception, so that what is open is closed (a cluster's worker jobs, say)."""
    signal.signal(number, signal.SIG_IGN)  # a scheduler tells every process, and so does the supervisor
    raise SystemExit(128 + number)


class _Supervisor:
    """The parent of one rank."""

    def __init__(self, spec_path: Path, spec: dict[str, Any], rank: int, child: int, reader: int) -> None:
        self.spec_path, self.spec, self.rank, self.child, self.reader = spec_path, spec, rank, child, reader
        self.report = report_path(spec_path.parent.parent, rank)
        self.peaks: dict[int, int] = {}
        self.told = b""
        self.out_of_memory = _out_of_memory_kills()
        node = os.environ.get("SLURMD_NODENAME", socket.gethostname())  # as the scheduler calls it
        self.entry: dict[str, Any] = {**identity(), "node": node, "rank": rank, "child": child}
        self.entry["started"] = time.time()
        durable.write_json(self.report, self.entry, sync=False)

    def watch(self) -> int:
        """Wait for the child's end and write it down; returns the exit status for the launcher."""
        self._forward_signals()
        sampled = looked = time.monotonic()
        said_so = False
        while True:
            self._sleep()
            pid, status = os.waitpid(self.child, os.WNOHANG)
            if pid:
                break
            if not is_alive(self.spec["orchestrator"]):
                self._give_up()
            if time.monotonic() - looked > _LOOK:
                self._look()
                looked = time.monotonic()
            if "told_to_stop" in self.entry and not said_so:
                said_so = True
                self._write()
            if time.monotonic() - sampled > _SAMPLE:
                sampled = time.monotonic()
                self._sample()
        code = os.waitstatus_to_exitcode(status)
        ended = time.time()
        ending = self._ending()
        if "peak" in ending:
            self.peaks[self.child] = ending["peak"]
        if code in _STOPPED:  # another rank was told, and they agreed
            self.entry.setdefault("told_to_stop", code - 128)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.entry |= {
            "ended": min(ended, ending.get("time", ended)) if code else ended,
            "exit_code": code if code >= 0 else None,
            "signal": -code if code < 0 else None,
            "error": ending.get("error"),
            "lost": ending.get("lost", False),
            "out_of_memory": code == -signal.SIGKILL and _out_of_memory_kills() > self.out_of_memory,
            "cpu_seconds": used.ru_utime + used.ru_stime,
            "peak_memory": self._labelled(),
        }
        self._write()
        if "told_to_stop" in self.entry:
            os._exit(0)  # srun and mpirun would take another status for a failure: some ranks may still save
        if code:
            time.sleep(self.spec["listen"])  # for the same reason: let the others tell what became of them
        os._exit(code if code >= 0 else 128 - code)

    def _write(self) -> None:
        try:
            durable.write_json(self.report, self.entry, sync=False)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            if self.entry.get("error"):
                self.entry["error"] = self.entry["error"][:1000]
            with open(self.report, "r+", encoding="utf-8") as stream:  # what is there has room of its own
                json.dump(self.entry, stream)
                stream.truncate()

    def _look(self) -> None:
        """Show that this rank lives; see whether its job is still wanted, and whether it shall stop."""
        try:
            spec = durable.read_json(self.spec_path)
        except FileNotFoundError:
            self._give_up()
        except OSError:
            return  # the file server is away for a moment
        if spec["token"] != self.spec["token"]:
            self._give_up()
        with contextlib.suppress(FileNotFoundError):
            os.utime(self.report)
        if spec["stop"] and "told_to_stop" not in self.entry:
            self._tell(signal.SIGTERM)

    def _give_up(self) -> NoReturn:
        os.kill(self.child, signal.SIGKILL)
        kill_job(self.spec["token"])
        os._exit(1)

    def _tell(self, number: int) -> None:
        self.entry.setdefault("told_to_stop", number)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.child, number)

    def _forward_signals(self) -> None:
        for number in _FORWARDED:
            signal.signal(number, lambda number, frame: self._tell(number))
        self.wakeup, end = os.pipe()
        os.set_blocking(end, False)
        signal.set_wakeup_fd(end, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)  # for the wake-up alone
        self.waiting = [self.wakeup, self.reader]
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)

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


def _out_of_memory_kills() -> int:
    """Processes of this control group that the system killed for want of memory; 0 where nobody counts."""
    groups = Path("/proc/self/cgroup")
    for line in groups.read_text().splitlines() if groups.exists() else []:
        _, controllers, name = line.split(":", 2)
        counter = Path("/sys/fs/cgroup", name.strip("/"), "memory.events")
        if "memory" in controllers.split(","):  # version 1
            counter = Path("/sys/fs/cgroup/memory", name.strip("/"), "memory.oom_control")
        if counter.exists():
            counts = dict(entry.split() for entry in counter.read_text().splitlines())
            return int(counts.get("oom_kill", 0))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
