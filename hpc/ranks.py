"""The ranks of one job, started and followed: as processes of this machine, or on the nodes of an allocation.

However they start, every rank runs under `hpc.rank`, which tells in ``.job/rank.N.json`` what becomes of it.
What a job is, is said in ``.job/spec.json``: who holds another token than it says is of an earlier job, whose
end nobody waited for, and ends by itself.
"""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from hpc import cluster, durable, mpi, rank, slurm
from hpc.job import Again, Failure, JobInfo, Outcome, Task
from hpc.site import Site, own_paths
from hpc.strict import Problem, SettingsError

TIMEOUT_VARIABLE = "HPC_TIMEOUT"  # seconds that a collective may take

_LOOPBACK_INTERFACE = "lo" if sys.platform == "linux" else "lo0"
_LISTEN = 0.5  # seconds given to the other ranks, after the first failure, to tell theirs
_PAUSE = 10.0  # seconds without a look of ours after which a rank's silence tells nothing
_END = 15.0  # seconds given to srun to end its ranks
_CRASHES = {signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE}
_OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class _Shape:
    """How many ranks, where."""

    ranks: int
    size: int
    """What the function is told: the ranks, of Dask the workers it shall start."""
    threads: int
    nodes: int = 1


class RankJob:
    """The processes of a task, from their start to their end.

    With a site whose launcher is ``local`` they are this machine's; else this process is inside a Slurm job,
    and they are a step of it on all its nodes.

    Raises
    ------
    hpc.strict.SettingsError
        where the allocation, or its network, is not what the task and the site ask for.
    FileNotFoundError
        where there is no ``mpirun``, ``srun`` or ``apptainer``.
    """

    def __init__(self, task: Task, site: Site) -> None:
        self.folder, self.site = task.folder, site
        self._local = site.launcher == "local"
        shape = _local_shape(task, site) if self._local else _allocation_shape(task, site)
        self.ranks = shape.ranks
        self.token = uuid.uuid4().hex
        self.processes: list[subprocess.Popen[bytes]] = []
        self._outcome: Outcome | None = None
        self._told = False
        self._trouble: float | None = None  # when the first rank failed, or was told to stop
        self._known: dict[int, tuple[tuple[int, int], dict[str, Any], float]] = {}  # file, content, when seen
        self._looked = time.monotonic()
        clear(self.folder)
        self._log = rank.log_path(self.folder, 0)
        self._log_start = self._log.stat().st_size if self._log.exists() else 0
        self._spec = self.folder / ".job" / "spec.json"
        self._program = _program(task, site, shape)
        self._write_spec(task)
        self._start_all(task, site, shape)

    def _write_spec(self, task: Task) -> None:
        self._content = {
            "token": self.token,
            "function": task.function,
            "arguments": dict(task.arguments),
            "runtime": task.runtime,
            "ranks": self.ranks,
            "orchestrator": rank.identity(),
            "listen": _LISTEN if self._program else 0.0,
            "stop": False,
        }
        durable.write_json(self._spec, self._content)

    def _start_all(self, task: Task, site: Site, shape: _Shape) -> None:
        command = site.command(["-P", "-u", "-m", "hpc.rank", str(self._spec.absolute())])
        environment = _environment(task, site, shape) | {rank.JOB_VARIABLE: self.token}
        if self._program == "srun":
            self._start([*_srun(task, site, shape), *command], environment)
        elif self._program == "mpirun":
            # In an allocation it learns from Slurm how many there shall be on each node.
            self._start([str(site.find_mpirun()), "-n", str(self.ranks), *command], environment)
        elif task.runtime == "ddp":
            for number in range(self.ranks):
                mine = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(self.ranks)}
                self._start(command, environment | mine | {"LOCAL_WORLD_SIZE": str(self.ranks)})
        else:
            self._start(command, environment)

    def _start(self, command: list[str], environment: dict[str, str]) -> None:
        with open(self._log, "ab") as log:
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

    def about(self) -> JobInfo:
        """Where the job is."""
        nodes = tuple(dict.fromkeys(report["node"] for report in self._reports()))
        return JobInfo(f"pid {self.processes[0].pid}", "running" if self._outcome is None else "ended", nodes)

    def poll(self) -> Outcome | None:
        """How the job ended; None while it runs. Never waits."""
        if self._outcome is not None:
            return self._outcome
        codes = [process.poll() for process in self.processes]
        reports = self._reports()
        silent = {} if self._local else self._silent(reports)
        failed = bool(silent) or any(codes) or any(_failed(report) for report in reports)
        if None in codes:
            if not failed and not any(map(_stopped, reports)):
                return None
            self._trouble = self._trouble or time.monotonic()
            if time.monotonic() - self._trouble < (_LISTEN if failed else self.site.grace):
                return None
        return self._conclude(silent if failed or None not in codes else self._unended())

    def cancel(self, grace: float = 10.0) -> None:
        """Ask the ranks to end, kill what is left after ``grace`` seconds."""
        if self._outcome is not None:
            return
        self._told = True
        reports = self._reports()
        if self._local:
            if len(reports) < self.ranks:
                grace = 0.0  # before all have started there is nothing to save
            for report in reports:  # not to mpirun, which would kill the ranks instead of asking them
                if "ended" not in report and rank.is_alive(report):
                    os.kill(report["pid"], signal.SIGTERM)
        else:
            durable.write_json(self._spec, self._content | {"stop": True})
        deadline = time.monotonic() + grace
        while time.monotonic() < deadline and any(process.poll() is None for process in self.processes):
            time.sleep(0.05)
        self._conclude(self._unended())

    def _conclude(self, known: dict[int, Failure]) -> Outcome:
        """End what is left, and say how it went; of some ranks that is ``known`` already."""
        codes = [process.poll() for process in self.processes]
        reports = self._reports(fresh=True)
        well = [report for report in reports if report.get("exit_code") == 0]
        failures = () if len(well) == self.ranks else self._failures(reports, codes, known)
        self._end()
        # A launcher that misses a rank may ask the others to stop: that rank is the cause, not who was asked.
        lost = [report for report in reports if "ended" not in report and report["rank"] not in known]
        told = self._told or (any(map(_stopped, reports)) and not lost)
        stopped = bool(failures) and told and not any(map(_failed, reports))
        reports = self._reports(fresh=True)
        elapsed = [report["ended"] - report["started"] for report in reports if "ended" in report]
        self._outcome = Outcome(
            failures,
            {label: peak for report in reports for label, peak in report.get("peak_memory", {}).items()},
            tuple(report["node"] for report in reports),
            {
                "elapsed": max(elapsed, default=0.0),
                "cpu_seconds": sum(report.get("cpu_seconds", 0.0) for report in reports),
            },
            stopped=stopped,
        )
        return self._outcome

    def _end(self) -> None:
        if not self._local:
            for process in self.processes:
                process.terminate()  # srun and mpirun kill their ranks on all nodes
            deadline = time.monotonic() + _END
            while time.monotonic() < deadline and any(process.poll() is None for process in self.processes):
                time.sleep(0.02)
        rank.kill_job(self.token)
        for process in self.processes:
            process.wait()

    def _reports(self, fresh: bool = False) -> list[dict[str, Any]]:
        """What the ranks have said so far. Read again where it changed; ``fresh``: in any case, for file
        servers that tell of a change only to who opens a file."""
        for number in range(self.ranks):
            before, report, _ = self._known.get(number, ((0, 0), {}, 0.0))
            if "ended" in report:
                continue
            path = rank.report_path(self.folder, number)
            try:
                found = path.stat()
                mark = (found.st_ino, found.st_mtime_ns)
                if fresh or mark != before:
                    self._known[number] = (mark, durable.read_json(path), time.monotonic())
            except (FileNotFoundError, json.JSONDecodeError):
                continue  # it is not flushed to the disk: a node that goes down may leave it empty
        return [self._known[number][1] for number in sorted(self._known)]

    def _silent(self, reports: list[dict[str, Any]]) -> dict[int, Failure]:
        """Ranks that have not touched their report for too long."""
        now, found = time.monotonic(), {}
        pause, self._looked = now - self._looked, now
        for report in reports:
            number = report["rank"]
            mark, content, changed = self._known[number]
            if pause > _PAUSE:  # we were held up ourselves, as the rank may have been
                self._known[number] = (mark, content, now)
            elif "ended" not in report and now - changed > self.site.heartbeat:
                reason = f"on {report['node']} was silent for {now - changed:.0f} s: is its node up?"
                found[number] = self._failure(number, reason, time.time() - (now - changed), "elsewhere")
        return found

    def _unended(self) -> dict[int, Failure]:
        """Ranks that were asked to end and did not."""
        reason = "was told to stop, did not end in the time it was given, and was killed"
        ended = {report["rank"] for report in self._reports(fresh=True) if "ended" in report}
        return {n: self._failure(n, reason, time.time()) for n in range(self.ranks) if n not in ended}

    def _failures(
        self, reports: list[dict[str, Any]], codes: list[int | None], known: dict[int, Failure]
    ) -> tuple[Failure, ...]:
        """Every rank that did not end well, the one that pulled the others down first."""
        found = [(0, failure) for failure in known.values()]
        for report in reports:
            if report.get("exit_code", 0) != 0:
                crashed = (report["signal"] or report["lost"]) and not report["out_of_memory"]
                again: Again = "here" if crashed else ""
                failure = self._failure(report["rank"], _reason(report), report["ended"], again)
                found.append((_order(report), failure))
        told = {*known, *(report["rank"] for report in reports if "ended" in report)}
        if self._program is None:  # each rank is our own child: we know how it ended
            for number, code in enumerate(codes):
                if code is not None and number not in told:
                    how = {"exit_code": code, "signal": -code if code < 0 else None}
                    found.append((_order(how), self._failure(number, _reason(how), time.time())))
        else:
            over = None not in codes
            gone = [r["rank"] for r in reports if r["rank"] not in told and (over or not rank.is_alive(r))]
            words = self._words_of_the_launcher() if over else ""
            # srun tells which rank it missed first, and killed the others for.
            missed = re.search(r"^srun: error: \S+: tasks? (\d+)[\d,-]*: (?!Exited)", words, re.MULTILINE)
            first = int(missed[1]) if missed else None
            found += [
                (0 if number == first else 1, self._failure(number, "was killed", time.time(), "here"))
                for number in gone
            ]
            if unreached := re.search(r"Task launch for \S+ failed on node (\S+): (.*)", words):
                reason = f"could not start ranks on {unreached[1]}: {unreached[2]}"
                found.append((-1, Failure("srun", reason, self._log, time.time(), "elsewhere")))
            if not found and codes[0] is not None:
                reason = f"ended with exit code {codes[0]} before it started the ranks"
                when: Again = "later" if slurm.is_silence(words) else "here"
                found = [(1, Failure(self._program, reason, self._log, time.time(), when))]
        return tuple(failure for _, failure in sorted(found, key=lambda pair: (pair[0], pair[1].time)))

    def _words_of_the_launcher(self) -> str:
        with open(self._log, "rb") as stream:
            stream.seek(self._log_start)
            return stream.read().decode(errors="replace")

    def _failure(self, number: int, reason: str, when: float, again: Again = "") -> Failure:
        who = f"rank {number}" if self.ranks > 1 else ""
        return Failure(who, reason, rank.log_path(self.folder, number), when, again)


def clear(folder: Path) -> None:
    """Make a folder ready for a job: end what an earlier one left on this host, and remove its files."""
    folder.mkdir(parents=True, exist_ok=True)
    end_leftovers(folder)
    durable.sweep(folder)
    shutil.rmtree(folder / ".job", ignore_errors=True)
    (folder / "progress.json").unlink(missing_ok=True)


def end_leftovers(folder: Path) -> None:
    """End what still runs on this host of an earlier job in ``folder`` whose orchestrator was killed."""
    if (token := token_of(folder)) is not None:
        rank.kill_job(token)


def token_of(folder: Path) -> str | None:
    """What marks the processes of the last job in ``folder``; None where there is none."""
    spec = folder / ".job" / "spec.json"
    return str(durable.read_json(spec)["token"]) if spec.exists() else None


def _local_shape(task: Task, site: Site) -> _Shape:
    size = task.resources.ranks or 1
    # Dask's workers start below the only rank.
    ranks = size if task.runtime in ("ddp", "mpi") else 1
    return _Shape(ranks, size, task.resources.cpus or max(1, site.cores // size))


def _allocation_shape(task: Task, site: Site) -> _Shape:
    layout = task.resources.layout(task.runtime, 1)
    if task.runtime == "dask":  # the only rank is the client; on its own node it also has the workers
        return _Shape(1, layout.ranks, layout.cpus)
    have = int(os.environ["SLURM_JOB_NUM_NODES"])
    # Fewer nodes only as they divide those that were asked for: what is shared evenly over those (the samples
    # of a batch) is then shared evenly over these.
    nodes = next((n for n in range(min(layout.nodes, have), 0, -1) if layout.nodes % n == 0), 0)
    if nodes < layout.min_nodes:
        text = f"{layout.min_nodes} nodes are asked for, but this Slurm job has {have}"
        raise SettingsError("resources", [Problem(("nodes",), text)])
    ranks = nodes * layout.ranks_per_node
    return _Shape(ranks, ranks, layout.cpus, nodes)


def _program(task: Task, site: Site, shape: _Shape) -> str | None:
    """What starts the ranks; None where each is a process of its own."""
    if site.launcher == "local":
        return "mpirun" if task.runtime == "mpi" and shape.ranks > 1 else None
    return "mpirun" if task.runtime == "mpi" and site.mpi == "mpirun" else "srun"


def _srun(task: Task, site: Site, shape: _Shape) -> list[str]:
    # A Dask client that shares its node with its workers has all cores of the job there.
    whole = task.runtime == "dask" and site.launcher == "allocation"
    cpus = os.environ["SLURM_CPUS_ON_NODE"] if whole else shape.threads
    return [
        *("srun", f"--nodes={shape.nodes}", f"--ntasks={shape.ranks}"),
        *(f"--ntasks-per-node={shape.ranks // shape.nodes}", f"--cpus-per-task={cpus}"),
        # The step before this one may not be over yet in Slurm's books, and would keep the nodes: --overlap.
        *("--kill-on-bad-exit=1", "--wait=0", "--export=ALL", "--overlap"),
        f"--mpi={site.mpi if task.runtime == 'mpi' else 'none'}",
        *site.srun,
    ]


def _environment(task: Task, site: Site, shape: _Shape) -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if key not in _OF_A_RANK}
    given = {
        **dict.fromkeys(cluster.THREAD_VARIABLES, str(shape.threads)),
        "PYTHONPATH": os.pathsep.join(own_paths()),
        mpi.VARIABLE: str(shape.size),
        TIMEOUT_VARIABLE: str(site.timeout),
        cluster.SITE_VARIABLE: site.model_dump_json(),
        cluster.FOLDER_VARIABLE: str(task.folder.absolute()),
    }
    if task.runtime == "dask":
        asked = {cluster.NODES_VARIABLE: task.resources.nodes, cluster.TIME_VARIABLE: task.resources.time}
        given |= {name: str(value) for name, value in asked.items() if value is not None}
    if task.resources.memory is not None:
        given[cluster.MEMORY_VARIABLE] = str(task.resources.memory)
    if task.runtime == "ddp":
        address = "127.0.0.1" if site.launcher == "local" else address_of(site.interface)
        given |= {"MASTER_ADDR": address, "MASTER_PORT": str(free_port(address))}
    return {**inherited, **given, **_network(site), **site.environment}


def _network(site: Site) -> dict[str, str]:
    """Through which interface the libraries shall talk."""
    if site.launcher == "local":  # MPICH's ranks must not be reached from outside, nor start on others
        interface = _LOOPBACK_INTERFACE
        return {"HYDRA_LAUNCHER": "fork", "HYDRA_IFACE": interface, "UCX_NET_DEVICES": interface}
    if site.interface is None:
        return {}
    names = dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "HYDRA_IFACE"), site.interface)
    if site.interface == _LOOPBACK_INTERFACE:
        # Elsewhere MPI finds faster ways than an interface.
        names |= {"UCX_NET_DEVICES": site.interface, "FI_PROVIDER": "tcp", "FI_TCP_IFACE": site.interface}
    return names


def address_of(interface: str | None) -> str:
    """This host's IPv4 address on a network interface; its name where no interface is given.

    Raises
    ------
    hpc.strict.SettingsError
        where this host has no such interface, or that has no address; where its name has none.
    """
    if interface is None:
        name = socket.gethostname()
        try:
            socket.getaddrinfo(name, None, socket.AF_INET)
        except socket.gaierror as error:
            text = f"{name} does not know the address of its own name ({error.strerror}): say which to use"
            raise SettingsError("site", [Problem(("interface",), text)]) from None
        return name
    found = psutil.net_if_addrs()
    for entry in found.get(interface, ()):
        if entry.family == socket.AF_INET:
            return str(entry.address)
    text = (
        f"{interface} is no interface with an IPv4 address on {socket.gethostname()}, "
        f"which has {', '.join(found)}"
    )
    raise SettingsError("site", [Problem(("interface",), text)])


def free_port(address: str = "127.0.0.1") -> int:
    """A TCP port that nobody listens on, below the range from which the system gives ports to connections."""
    for port in random.SystemRandom().sample(range(20000, 32000), 200):
        with socket.socket() as probe:
            try:
                probe.bind((address, port))
            except OSError:
                continue
            return port
    raise OSError(f"no free TCP port between 20000 and 32000 on {address}")


def _stopped(report: Mapping[str, Any]) -> bool:
    return "told_to_stop" in report


def _failed(report: Mapping[str, Any]) -> bool:
    return report.get("exit_code", 0) != 0 and not _stopped(report)


def _order(report: Mapping[str, Any]) -> int:
    """Likely causes first: a crash pulls the others down within moments, and some are only told to stop."""
    if "told_to_stop" in report or report.get("lost"):
        return 2
    return 0 if report["signal"] in _CRASHES else 1


def _reason(report: Mapping[str, Any]) -> str:
    if "told_to_stop" in report:
        return f"was told to stop ({signal.Signals(report['told_to_stop']).name})"
    if report.get("error"):
        return str(report["error"])
    if report.get("out_of_memory"):
        return (
            "was killed by the system when the job's memory ran out; "
            "ask for more (resources.memory) or use less"
        )
    if report["signal"]:
        number = report["signal"]
        name = signal.Signals(number).name if number in set(signal.Signals) else "unknown"
        hint = ", by hand or by the system when memory ran out" if number == signal.SIGKILL else ""
        return f"killed by signal {number} ({name}{hint})"
    return f"ended with exit code {report['exit_code']}"
