"""Try a site: what runs need of a cluster, in the order in which they need it, on the path that they take.

First Slurm is asked what it knows. Then four small jobs of `hpc.launch` (see `hpc.probe`), which wait in the
queue together, look at a node, let two ranks on two nodes meet, start an MPI world, and start Dask workers.
"""

import fcntl
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from hpc import durable, launch, probe, progress, resources, slurm
from hpc.resources import Resources
from hpc.site import Site
from hpc.strict import SettingsError, nearest

_COMMANDS = ("sbatch", "srun", "squeue", "sacct", "scancel", "scontrol", "sinfo")
_LIMIT = 90.0  # seconds that one of the jobs may take once it runs
_TICK = 0.2
_MEND_QUEUE = "the queue is long, or no node fits the site file: see `sinfo`, and `squeue --start`"
_MEND_LOCKS = (
    "runs lock their folder so that two do not work in it: use a file system whose locks all machines see "
    "(Lustre: mounted with `flock`, not `localflock`)"
)


@dataclass(frozen=True)
class Line:
    """What one test found."""

    name: str
    ok: bool
    detail: str
    """What was tried and what came of it; may have several lines."""
    mend: str = ""
    """What to do about it; empty where all is well."""


def check(site: Site, folder: Path, patience: float = 60.0) -> Iterator[Line]:
    """Test a site, line by line; what needs something that failed is not tried. Leaves nothing behind.

    Parameters
    ----------
    folder:
        Where runs go; the nodes must see it.
    patience:
        Seconds that the jobs may wait in the queue.
    """
    if site.launcher == "debug":
        yield Line("launcher", True, "debug runs one rank in the calling process: there is nothing to test")
        return
    if site.launcher == "slurm":
        known = []
        for line in _ask_slurm(site):
            yield line
            known.append(line.ok)
        if not all(known):
            return
    try:
        room = Path(tempfile.mkdtemp(prefix=".site-check-", dir=folder)).absolute()
    except OSError as error:
        yield Line("folder", False, f"cannot write in {folder}: {error.strerror}", "name where runs shall go")
        return
    try:
        yield from _try_jobs(site, room, patience)
    finally:
        shutil.rmtree(room)


# What Slurm knows.


def _ask_slurm(site: Site) -> Iterator[Line]:
    if missing := [command for command in _COMMANDS if shutil.which(command) is None]:
        mend = "load the module that brings Slurm's commands, or call this on a login node"
        yield Line("commands", False, f"not on PATH: {', '.join(missing)}", mend)
        return
    yield Line("commands", True, f"{slurm.run(['sinfo', '--version']).strip()}: {', '.join(_COMMANDS)}")
    try:
        partitions = _partitions()
    except slurm.SlurmError as error:
        yield Line("controller", False, str(error), "see `scontrol ping`, and wait until it is up")
        return
    yield Line("controller", True, f"answers; partitions: {', '.join(partitions)}")
    default = next((name for name, found in partitions.items() if found.is_default), None)
    for prefix, queue in (("", site), *([("gpu.", site.for_gpus())] if site.gpu else [])):
        if (name := queue.partition or default) is not None:
            yield from _compare(queue, prefix, name, partitions)
        yield from _permissions(queue, prefix)
    try:
        slurm.run(["sacct", "--noheader", "--allocations", "--starttime=now"])
    except slurm.SlurmError as error:
        mend = "ask for Slurm's accounting (slurmdbd): without it nobody learns how jobs ended"
        yield Line("accounting", False, str(error), mend)
    else:
        yield Line("accounting", True, "sacct answers")


@dataclass
class _Partition:
    is_default: bool
    is_up: bool
    max_time: float | None
    """Seconds; None without a limit."""
    max_nodes: int
    features: set[str]


def _partitions() -> dict[str, _Partition]:
    found: dict[str, _Partition] = {}
    for line in slurm.run(["sinfo", "--noheader", "--all", "--format=%P|%a|%l|%s|%D|%f"]).splitlines():
        name, available, limit, size, nodes, features = line.split("|")
        max_time = None if limit == "infinite" else resources.seconds(limit)
        entry = found.setdefault(
            name.rstrip("*"), _Partition(name.endswith("*"), available == "up", max_time, 0, set())
        )
        entry.max_nodes += int(nodes)
        if (largest := size.rpartition("-")[2]).isdigit():
            entry.max_nodes = min(entry.max_nodes, int(largest))
        entry.features |= set(features.split(",")) - {"(null)"}
    return found


def _compare(site: Site, prefix: str, name: str, partitions: Mapping[str, _Partition]) -> Iterator[Line]:
    """What the site file says of a partition, and what is so."""
    key = f"{prefix}partition"
    if name not in partitions:
        detail = f"there is no partition {name!r}{nearest(name, partitions)}"
        yield Line(key, False, detail, f"correct `{key}` in the site file")
        return
    found = partitions[name]
    if not found.is_up:
        yield Line(key, False, f"{name} is down", f"wait, or name another one in `{key}` of the site file")
        return
    limit = "no time limit" if found.max_time is None else f"{_hours(found.max_time)} at most"
    default = "" if site.partition else " (the default)"
    yield Line(key, True, f"{name}{default}: up, {found.max_nodes} nodes, {limit}")
    for setting, asked, given, text in (
        ("time", site.time, found.max_time, _hours),
        ("max_time", site.max_time, found.max_time, _hours),
        ("max_nodes", site.max_nodes, found.max_nodes, str),
    ):
        if asked is not None and given is not None and asked > given:
            detail = f"{setting} is {text(asked)}, but {name} gives {text(given)}"
            yield Line("limits", False, detail, f"lower `{setting}` in the site file")
    wanted = set(re.findall(r"[\w.-]*[A-Za-z_][\w.-]*", site.constraint or ""))
    if unknown := wanted - found.features:
        known = ", ".join(sorted(found.features)) or "none"
        detail = f"no node of {name} has the feature {', '.join(sorted(unknown))}; there are {known}"
        yield Line(f"{prefix}constraint", False, detail, f"correct `{prefix}constraint` in the site file")
    elif wanted:
        yield Line(f"{prefix}constraint", True, f"{name} has nodes with {', '.join(sorted(wanted))}")


def _permissions(site: Site, prefix: str) -> Iterator[Line]:
    """Account and quality of service, where we may see which ones there are; sbatch has the last word."""
    user = psutil.Process().username()
    command = ["sacctmgr", "--noheader", "--parsable2", "show", "associations", f"user={user}"]
    try:
        rows = [line.split("|") for line in slurm.run([*command, "format=account,qos"]).splitlines()]
    except slurm.SlurmError:
        rows = []
    allowed = {
        "account": {account for account, _ in rows},
        "qos": {name for _, names in rows for name in names.split(",") if name},
    }
    for key, names in allowed.items():
        asked = getattr(site, key)
        if asked is None:
            continue
        key = f"{prefix}{key}"
        if not names:
            yield Line(key, True, f"{asked}: sacctmgr does not say what {user} may use; sbatch will")
        elif asked in names:
            yield Line(key, True, f"{user} may use {asked}")
        else:
            detail = f"{user} may not use {asked!r}{nearest(asked, names)}"
            yield Line(key, False, detail, f"correct `{key}` in the site file")


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.4g} h" if seconds >= 3600 else f"{seconds / 60:.4g} min"


# What jobs find.


class _Failed(RuntimeError):
    """A job came to nothing; ``str()`` has the reason and the last lines of its logs."""

    def __init__(self, message: str, mend: str = "") -> None:
        self.mend = mend
        super().__init__(message)


class _Trial:
    """A job that looks at something and writes what it found.

    Raises `hpc.slurm.SlurmError` where Slurm does not take it.
    """

    def __init__(self, task: launch.Task, site: Site, patience: float) -> None:
        self.folder, self.patience = task.folder, patience
        self.submitted = time.monotonic()
        self.started: float | None = None
        self.job: launch.Job | None = None
        self.refusal = ""
        try:
            self.job = launch.submit(task, site)
        except (FileNotFoundError, SettingsError) as error:
            self.refusal = str(error)

    def found(self) -> dict[str, Any]:
        """What the job wrote. Raises `_Failed`."""
        if self.job is None:
            raise _Failed(self.refusal)
        while (outcome := self.job.poll()) is None:
            now, info = time.monotonic(), self.job.about()
            if info.state != "pending":
                self.started = self.started or now
                if now > self.started + _LIMIT:
                    raise self._failed(f"job {info.id} has not ended after {_LIMIT:.0f} s")
            elif now > self.submitted + self.patience:
                why = info.reason or "no reason given"
                reason = f"job {info.id} has not started after {now - self.submitted:.0f} s ({why})"
                raise _Failed(reason, _MEND_QUEUE)
            time.sleep(_TICK)
        self.started = self.started or time.monotonic()
        if outcome.failures:
            raise self._failed(str(outcome.failures[0]), outcome.failures[0].log)
        result = probe.appears(self.folder / "found.json")
        if result is None:
            raise self._failed("the job ended well, but what it wrote is not seen here")
        return dict(result)

    def start(self) -> str:
        """How it started, in words."""
        assert self.job is not None
        assert self.started is not None
        return f"job {self.job.about().id} started {self.started - self.submitted:.0f} s after it was queued"

    def end(self) -> None:
        """Leave nothing of the job behind."""
        if self.job is not None and self.job.poll() is None:
            self.job.cancel(0)

    def _failed(self, reason: str, log: Path | None = None) -> _Failed:
        logs = [*sorted((self.folder / ".slurm").glob("*.out")), log or self.folder / "log.txt"]
        words = dict.fromkeys(line for path in logs for line in launch.last_lines(path, 5))
        return _Failed("\n".join([reason, *(f"  | {line}" for line in words if line not in reason)]))


def _try_jobs(site: Site, room: Path, patience: float) -> Iterator[Line]:
    durable.write_text(room / "told.txt", room.name)
    trials: dict[str, _Trial] = {}
    with open(room / "lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            yield Line("locks", False, f"flock in {room.parent}: {error.strerror}", _MEND_LOCKS)
            return
        try:
            for task in _tasks(site, room):
                trials[task.runtime] = _Trial(task, site, patience)
            yield from _judge(site, trials, room)
        except slurm.SlurmError as error:
            yield Line("queue", False, str(error), "correct in the site file what Slurm names")
        finally:
            for trial in trials.values():
                trial.end()


def _tasks(site: Site, room: Path) -> Iterator[launch.Task]:
    nodes = min(2, site.max_nodes or 2) if site.launcher == "slurm" else 1
    seconds = max(300, 2 * site.grace)
    gpus = 2 // nodes if site.gpu else None
    jobs: list[tuple[launch.Runtime, str, dict[str, Any], dict[str, int | None]]] = [
        ("serial", "look", {"scratch": site.scratch and str(site.scratch)}, {}),
        ("ddp", "meet", {"interface": site.interface}, {"nodes": nodes, "ranks": 2, "gpus": gpus}),
        ("mpi", "count", {}, {"nodes": nodes, "ranks": 2 * nodes}),
        ("dask", "compute", {}, {"nodes": 1, "ranks": 2}),
    ]
    for runtime, function, more, asked in jobs:
        arguments = {"folder": str(room / runtime), **more}
        yield launch.Task(
            f"hpc.probe:{function}",
            arguments,
            room / runtime,
            runtime,
            Resources(time=seconds, retries=0, **asked),
            f"check-{runtime}",
        )


def _judge(site: Site, trials: Mapping[str, _Trial], room: Path) -> Iterator[Line]:
    first = trials["serial"]
    try:
        facts = first.found()
    except _Failed as error:
        yield _no_start(site, first, room, error)
        return
    yield Line("start", True, f"{first.start()}, on {facts['node']}")
    if site.setup:
        yield Line("setup", True, "; ".join(site.setup))
    lines = list(_judge_node(site, facts, room))
    yield from lines
    if all(line.ok for line in lines):
        yield from _judge_ddp(site, trials["ddp"])
        yield _judge_mpi(site, trials["mpi"])
        yield from _judge_dask(trials["dask"])


def _no_start(site: Site, trial: _Trial, room: Path, error: _Failed) -> Line:
    """Why the first job came to nothing."""
    said = str(error)
    if error.mend:
        return Line("start", False, said, error.mend)
    if failed := re.search("this line of the site's setup failed: (.*)", said):
        mend = "try it in a shell on a node, and correct `setup` in the site file"
        return Line("setup", False, f"{failed[1]}\n{said}", mend)
    if not list((trial.folder / ".slurm").glob("*.out")):
        detail = f"a job was started, but nothing that it wrote in {room.parent} is seen here: {said}"
        return Line("folder", False, detail, "name a folder that this machine and the nodes share")
    program = site.command([])[0]
    if re.search(rf"{re.escape(program)}.*(no such file|not found)", said, re.IGNORECASE):
        key = "`container`, or load apptainer in `setup`," if site.container else "`python`"
        return Line("python", False, f"the node has no {program}: {said}", f"correct {key} in the site file")
    if "No module named" in said:
        return Line("python", False, said, f"install galdist's packages for {program} of the nodes")
    return Line("start", False, said, "the job's last words say why")


def _judge_node(site: Site, facts: Mapping[str, Any], room: Path) -> Iterator[Line]:
    node, here, there = facts["node"], probe.versions(), facts["versions"]
    python = f"{facts['executable']} {there['python']} on {node}"
    if different := [name for name in here if there.get(name) != here[name]]:
        pairs = ", ".join(f"{name} is {there.get(name)} there and {here[name]} here" for name in different)
        yield Line(
            "python", False, f"{python}: {pairs}", "install the same there (a container: build it again)"
        )
    else:
        yield Line("python", True, f"{python}: the same code and packages as here")
    if facts["told"] == room.name:
        yield Line(
            "folder", True, f"{node} sees what is written here in {room.parent}, and the other way round"
        )
    else:
        detail = f"{node} does not see what is written here in {room.parent}"
        yield Line("folder", False, detail, "name a folder that this machine and the nodes share")
    if facts["lock"] == "held":
        yield Line("locks", True, f"{node} sees that a file is locked here")
    else:
        detail = f"a file is locked here, but flock on {node} finds it {facts['lock']}"
        yield Line("locks", False, detail, _MEND_LOCKS)
    if site.interface is None:
        yield Line("interface", True, "none is named: nodes are reached by their names")
    elif address := facts["addresses"].get(site.interface):
        yield Line("interface", True, f"{site.interface} of {node} is {address}")
    else:
        known = ", ".join(f"{name} ({address})" for name, address in facts["addresses"].items())
        detail = f"{node} has no {site.interface!r} with an address; it has {known}"
        yield Line("interface", False, detail, "correct `interface` in the site file")
    if site.scratch is not None:
        problem, mend = (
            facts["scratch"],
            "correct `scratch` in the site file: a folder on the node's own disk",
        )
        good = f"{site.scratch} on {node} takes files"
        yield Line("scratch", False, problem, mend) if problem else Line("scratch", True, good)


def _judge_ddp(site: Site, trial: _Trial) -> Iterator[Line]:
    ports, failed = trial.folder / "ports.json", None
    try:
        found = trial.found()
    except _Failed as error:
        failed = error
    if ports.exists():
        yield Line("ports", True, f"{' and '.join(durable.read_json(ports))} reach each other")
        mend = "NCCL_DEBUG: INFO in `environment` of the site file tells more"
    else:
        mend = "let nodes reach each other on all TCP ports, or name in `interface` the network they share"
    if failed is not None:
        yield Line("ddp" if ports.exists() else "ports", False, str(failed), failed.mend or mend)
        return
    detail = f"{found['size']} ranks on {_few(found['nodes'])} sum numbers, on {_few(found['devices'])}"
    if site.gpu and "cpu" in found["devices"]:
        mend = "see `nvidia-smi` on a node, and whether this torch is a build for CUDA"
        yield Line("ddp", False, f"{detail}, although they asked for GPUs", mend)
    else:
        yield Line("ddp", True, detail)


def _judge_mpi(site: Site, trial: _Trial) -> Line:
    try:
        found = trial.found()
    except _Failed as error:
        mend = (
            f"`mpi: {site.mpi}` in the site file has to fit the MPI library of mpi4py: try another "
            "(`srun --mpi=list` shows Slurm's), or `mpi: mpirun` with that library's own `mpirun: /path`"
        )
        return Line("mpi", False, str(error), error.mend or mend)
    return Line("mpi", True, f"a world of {found['size']} ranks on {_few(found['nodes'])}")


def _judge_dask(trial: _Trial) -> Iterator[Line]:
    try:
        found = trial.found()
    except _Failed as error:
        mend = (
            "workers reach the scheduler on `interface`; options that sbatch rejects go to `skip_directives`"
        )
        yield Line("dask", False, str(error), error.mend or mend)
        return
    yield Line("dask", True, f"{found['size']} workers on {_few(found['nodes'])} compute")
    followed = progress.read(trial.folder / "progress.json")
    link = followed.links.get("dashboard") if followed else None
    hint = "runs print the ssh command that brings it to your screen"
    yield Line("dashboard", True, f"served on {found['client']} at {link}; {hint}")


def _few(names: list[str]) -> str:
    return ", ".join(dict.fromkeys(names))
