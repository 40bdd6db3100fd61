"""The door to Slurm: nothing else runs its commands or imports submitit.

Jobs are named by their id, an element of an array as ``12_3``. What Slurm answers is read in fixed formats
that all versions since 20.11 know, never from JSON. Every function raises `SlurmError` with the command, the
words of Slurm and what to do; `Unreachable`, a kind of it, where the controller does not answer.
"""

import contextlib
import functools
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc import durable, rank
from hpc.resources import Layout, Resources, n_bytes, seconds
from hpc.site import Site, own_paths

_PATIENCE = 300.0  # seconds for which a job is offered to a controller that does not answer
_A_JOB = 0.01  # more seconds between questions about the queue, for each job
_TIMEOUT = 60.0  # seconds after which a command that hangs counts as no answer
_SILENCE = re.compile(
    r"unable to (contact|connect)|connection (refused|timed out|reset)|timed out on send/recv|connect failure"
    r"|zero bytes were transmitted|controller.* (not responding|in standby)|try again|temporarily unavailable"
    r"|establish (a configuration source|control machine address)|unexpected message received",
    re.IGNORECASE,
)
_DEAF = ("/bin/sh", "-c", "trap '' TERM; exec \"$@\"", "sh")  # what it runs ignores SIGTERM
_ENDED = {signal.SIGTERM, signal.SIGKILL}  # by which Slurm ends all of a job, its own commands in it too
_NOWHERE = (
    "DNS SRV lookup failed"  # the last that Slurm tries where neither SLURM_CONF nor a file names its cluster
)
_FULL = re.compile(r"(Max|Grp)SubmitJobs?\w*Limit")
_PENDING = {
    "PENDING",
    "CONFIGURING",
    "REQUEUED",
    "REQUEUE_FED",
    "REQUEUE_HOLD",
    "RESV_DEL_HOLD",
    "SPECIAL_EXIT",
}
_OVER = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("PREEMPTED", "REVOKED", "TIMEOUT", "GONE"),
}
_SQUEUE = ("squeue", "--noheader", "--all", "--array", "--states=all")
_QUEUE = "JobArrayID:40|,State:20|,Reason:200|,StartTime:30|,RestartCnt:10|,NodeList:2000|"


class SlurmError(RuntimeError):
    """Slurm refused something."""


class Unreachable(SlurmError):
    """Slurm does not answer. Its jobs run on; ask again later."""


class QueueFull(Unreachable):
    """A limit on the number of jobs in the queue is reached; ask again when some have ended."""


@dataclass(frozen=True)
class JobState:
    """What the queue says of a job."""

    id: str
    state: str
    """In Slurm's words: ``PENDING``, ``RUNNING``, ``COMPLETED``, ``OUT_OF_MEMORY``; and ``GONE`` for a job
    that is in no queue and unknown to the accounting, such as an element of an array that was cancelled
    before it started."""
    nodes: tuple[str, ...] = ()
    reason: str = ""
    """Why it waits, or why it ended; empty where Slurm gives none."""
    start: float | None = None
    """When it started, or is expected to [s since the epoch]."""
    restarts: int = 0
    """Times it was requeued."""

    @property
    def is_pending(self) -> bool:
        return self.state in _PENDING

    @property
    def is_over(self) -> bool:
        return self.state in _OVER

    @property
    def is_running(self) -> bool:
        return not self.is_pending and not self.is_over


@dataclass(frozen=True)
class Usage:
    """What jobs asked for and used, all their attempts together."""

    elapsed: float
    """Wall time [s]; of several jobs, the sum."""
    cpu_seconds: float
    max_rss: int
    """Largest resident memory [bytes] of all tasks of a step together; of several jobs, of one of them."""
    cpus: int
    memory_asked: int
    """Bytes on all nodes."""
    time_limit: float | None
    """Seconds; None for no limit."""
    gpus: int
    gpu_utilization: float | None
    """Percent, mean of the step that used them most; None where Slurm does not measure it."""
    state: str
    restarts: int


def own_job() -> str | None:
    """The id of the job that this process is in."""
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def of_own_job(wanted: Resources, runtime: str) -> Resources:
    """What a step gets of the job that this process is in, where it leaves open what it asks for.

    For DDP and MPI that is all nodes (of ranks that it names, as many as these fill evenly) with the ranks
    that sbatch was told (``--ntasks-per-node``); DDP on GPUs has one rank a GPU. Ranks share the cores of
    their node. A single process has those of one node. Dask's workers have one core each.
    """
    if runtime == "dask":
        return wanted
    if runtime == "serial":
        return wanted.model_copy(update={"cpus": wanted.cpus or _fewest("SLURM_JOB_CPUS_PER_NODE")})
    most = int(os.environ["SLURM_JOB_NUM_NODES"])
    nodes = wanted.nodes or next(n for n in range(most, 0, -1) if (wanted.ranks or n) % n == 0)
    gpus = wanted.gpus
    if gpus is None and runtime == "ddp" and wanted.ranks is None:
        gpus = int(os.environ.get("SLURM_GPUS_ON_NODE", "0"))
    on_gpus = gpus if runtime == "ddp" else 0
    ranks = wanted.ranks or nodes * (on_gpus or _fewest("SLURM_TASKS_PER_NODE"))
    cores = _fewest("SLURM_JOB_CPUS_PER_NODE") // -(-ranks // nodes)
    return wanted.model_copy(
        update={"nodes": nodes, "ranks": ranks, "gpus": gpus, "cpus": wanted.cpus or max(1, cores)}
    )


def _fewest(variable: str) -> int:
    """What every node has: of ``4(x2),3`` it is 3."""
    return min(int(re.sub(r"\(.*", "", part)) for part in os.environ[variable].split(","))


def states(ids: Iterable[str]) -> dict[str, JobState]:
    """What became of jobs, by one call of squeue for all and, for those it has forgotten, one of sacct."""
    wanted = set(ids)
    found = _queue(wanted)
    if missing := wanted - set(found):
        with contextlib.suppress(SlurmError):  # there may be no accounting; what runs is always in the queue
            found |= _accounting(missing)
    return {id: JobState(id, "GONE") for id in wanted} | found


def _queue(ids: set[str]) -> dict[str, JobState]:
    if not ids:
        return {}
    jobs = {_base(id) for id in ids}
    # The controller sends what it has of one job or of one user; asked for several jobs, its whole queue.
    which = f"--jobs={jobs.pop()}" if len(jobs) == 1 else f"--user={os.getuid()}"
    try:
        text = run([*_SQUEUE, which, f"--Format={_QUEUE}"])
    except SlurmError as error:
        if "Invalid job id" not in str(error):
            raise
        return {}  # squeue complains where it has forgotten all of them
    found = {}
    for line in text.splitlines():
        id, state, reason, start, restarts, nodes = [field.strip() for field in line.split("|")[:6]]
        if id in ids:
            found[id] = JobState(
                id, state, hosts(nodes), "" if reason == "None" else reason, _time(start), int(restarts or 0)
            )
    return found


def _accounting(ids: set[str]) -> dict[str, JobState]:
    jobs = ",".join(sorted({_base(id) for id in ids}, key=int))
    fields = "JobID,State,Reason,Start,NodeList"
    text = run(
        ["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={jobs}", f"--format={fields}"]
    )
    found = {}
    for line in text.splitlines():
        id, state, reason, start, nodes = line.split("|")
        state = state.split()[0]  # "CANCELLED by 1000"
        for each in _elements(id):
            if each in ids:
                names = () if nodes == "None assigned" else hosts(nodes)
                found[each] = JobState(each, state, names, "" if reason == "None" else reason, _time(start))
    return found


class Watcher:
    """Follows many jobs with one question to Slurm, asked in the background.

    Slurm may take seconds to answer, or not answer at all; nobody waits for it here, and until it answers
    again the last that it said stands. The more jobs, the less often it is asked.
    """

    def __init__(self, interval: float = 5.0) -> None:
        self.interval = interval
        self.silent_since: float | None = None
        """When Slurm stopped answering [s since the epoch]; None while it answers."""
        self.silence = ""
        """What its commands say instead."""
        self._known: dict[str, JobState] = {}
        self._followed: set[str] = set()
        self._asked = float("-inf")
        self._question: threading.Thread | None = None

    def state(self, id: str) -> JobState | None:
        """The last that Slurm said of a job; None where it has said nothing yet. Never waits."""
        if id not in self._known or not self._known[id].is_over:
            self._followed.add(id)
        asking = self._question is not None and self._question.is_alive()
        interval = self.interval + len(self._followed) * _A_JOB
        if self._followed and not asking and time.monotonic() - self._asked >= interval:
            self._asked = time.monotonic()
            self._question = threading.Thread(target=self._ask, args=(self._followed,), daemon=True)
            self._followed = set()  # of those whose state somebody asks for again
            self._question.start()
        return self._known.get(id)

    def _ask(self, ids: set[str]) -> None:
        try:
            self._known |= states(ids)
        except SlurmError as error:
            self.silent_since, self.silence = self.silent_since or time.time(), str(error)
        else:
            self.silent_since, self.silence = None, ""


def find(token: str) -> list[str]:
    """Ids of this user's jobs whose comment is ``token``, elements of an array in order of their index."""
    text = run([*_SQUEUE, f"--user={os.getuid()}", "--Format=JobArrayID:40|,Comment:200|"])
    rows = ([field.strip() for field in line.split("|")] for line in text.splitlines())
    return sorted((row[0] for row in rows if row[1] == token), key=lambda id: [int(n) for n in id.split("_")])


def submit(
    function: str,
    arguments: Sequence[Mapping[str, Any]],
    folder: Path,
    name: str,
    layout: Layout,
    resources: Resources,
    site: Site,
    comment: str,
    at_once: int | None = None,
    patience: float | None = None,
) -> list[str]:
    """Queue ``function(**arguments)``: one job, or one array for several arguments.

    The function is called once on the first node of the job; it starts ranks itself. SIGUSR2 tells it
    ``site.grace`` seconds before the time limit. Works inside a job as well as outside.

    Parameters
    ----------
    function:
        ``"module:function"``.
    arguments:
        What json can write, for each job.
    folder:
        Gets the batch script, the arguments and Slurm's output, ``slurm-ID.out``.
    comment:
        By which `find` finds the jobs; unique.
    at_once:
        Elements of an array that may run at the same time.
    patience:
        Seconds for which the job is offered to a controller that does not answer; by default 5 minutes.

    Returns
    -------
    The id of each job.

    Raises
    ------
    SlurmError
        where sbatch refuses, with its words and the directives it was given.
    Unreachable
        where the controller did not answer for so long.
    QueueFull
        where this user has as many jobs in the queue as may be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # A job that was queued here earlier, and forgotten, must not do what this one is to do.
    calls = (folder / f"calls-{comment}.json").absolute()
    durable.write_json(calls, {"function": function, "arguments": [dict(each) for each in arguments]})
    script = folder / "job.sh"
    text = _script(calls, name, layout, resources, site, comment, len(arguments), at_once)
    durable.write_text(script, text)
    deadline = time.monotonic() + (_PATIENCE if patience is None else patience)
    while True:
        try:
            answer = run(["sbatch", str(script)])
        except Unreachable:
            if time.monotonic() >= deadline:
                raise
            time.sleep(5)
            if taken := _find_or_none(comment):  # before it fell silent
                return taken
        except SlurmError as error:
            if _FULL.search(str(error)) and _others():
                raise QueueFull(f"no more jobs are taken until some have ended: {error}") from None
            given = "\n".join(f"  {line}" for line in text.splitlines() if line.startswith("#SBATCH"))
            raise SlurmError(f"{error}\nits directives ({script}):\n{given}") from None
        else:
            break
    number = re.search(r"job (\d+)", answer)
    if number is None:
        raise SlurmError(f"sbatch said {answer.strip()!r}, where 'Submitted batch job NUMBER' was expected")
    one = number[1]
    return [one] if len(arguments) == 1 else [f"{one}_{index}" for index in range(len(arguments))]


def _others() -> set[str]:
    """Ids of this user's jobs that wait or run, but for that around this process."""
    ids = run(["squeue", "--noheader", "--array", f"--user={os.getuid()}", "--Format=JobArrayID:40"]).split()
    return {*ids} - {own_job()}


def _find_or_none(token: str) -> list[str]:
    try:
        return find(token)
    except Unreachable:
        return []


def _script(
    calls: Path,
    name: str,
    layout: Layout,
    resources: Resources,
    site: Site,
    comment: str,
    n_jobs: int,
    at_once: int | None,
) -> str:
    """The batch script, made by submitit.

    Its pickles are not used: they get their final name after sbatch, so a job whose orchestrator is killed in
    between would never find its own.
    """
    from submitit import SlurmExecutor

    if layout.gpus:
        site = site.for_gpus()
    limit = resources.time or site.time
    array, elastic = n_jobs > 1, layout.min_nodes < layout.nodes
    executor = SlurmExecutor(calls.parent)
    executor.update_parameters(
        job_name=name,
        partition=site.partition,
        account=site.account,
        qos=site.qos,
        constraint=site.constraint,
        comment=comment,
        wckey=None,
        time=None if limit is None else -(-limit // 60),
        nodes=f"{layout.min_nodes}-{layout.nodes}" if elastic else layout.nodes,
        ntasks_per_node=None if elastic else layout.ranks_per_node,
        cpus_per_task=layout.cpus,
        gpus_per_node=layout.gpus or None,
        mem=None if resources.memory is None else f"{-(-resources.memory // 2**20)}M",
        array_parallelism=at_once or n_jobs,
        stderr_to_stdout=True,
        use_srun=False,
        setup=prologue(site),
        additional_parameters={
            "output": calls.parent / ("slurm-%A_%a.out" if array else "slurm-%j.out"),
            "signal": f"B:USR2@{site.grace}",
            "requeue": True,
            # Asked for tasks, Slurm would give as few nodes as the job can do with.
            **({"mincpus": layout.ranks_per_node * layout.cpus} if elastic else {}),
        },
    )
    if array:
        executor.parameters["map_count"] = n_jobs
    python = sys.executable if site.container else site.python or sys.executable
    command = shlex.join([str(python), "-P", "-u", "-m", "hpc.slurm", str(calls)])
    # exec: the signal is for python, not for a shell that waits for it
    lines = executor._make_submission_file_text(f"exec {command}", uid=uuid.uuid4().hex).splitlines()
    kept = [line for line in lines if not any(_is_option(line, option) for option in site.skip_directives)]
    last = max(number for number, line in enumerate(kept) if line.startswith("#SBATCH")) + 1
    more = [f"#SBATCH {directive}" for directive in site.directives]
    return "\n".join([*kept[:last], *more, *kept[last:], ""])


def _is_option(line: str, option: str) -> bool:
    return line == f"#SBATCH {option}" or line.startswith(f"#SBATCH {option}=")


def prologue(site: Site) -> list[str]:
    """Lines of a batch script before its command: what a site wants to be loaded and set."""
    lines = ["trap '' USR1 USR2  # until python listens: Slurm may send it a minute early"]
    if site.setup:
        said = 'echo "this line of the site\'s setup failed: $BASH_COMMAND" >&2; exit 1'
        lines += [f"trap {shlex.quote(said)} ERR", *site.setup, "trap - ERR"]
    variables = {
        "SLURM_EXPORT_ENV": "ALL",  # or srun would hand down what SBATCH_EXPORT says
        "PYTHONPATH": os.pathsep.join(own_paths()),
        **site.environment,
    }
    return [*lines, *(f"export {key}={shlex.quote(value)}" for key, value in variables.items())]


def cancel(id: str, signal: str | None = None) -> None:
    """End a job, or send a signal (``"TERM"``) to its steps; nothing happens to a job that is over.

    ``id`` may also be a step, ``12.0``.
    """
    try:
        run(["scancel", *([f"--signal={signal}"] if signal else []), id])
    except SlurmError as error:
        if not re.search("Invalid job id|already completing or completed", str(error)):
            raise


def requeue(id: str) -> None:
    """Put a running job back into the queue: Slurm ends it and starts it again later, with the same id.

    A process of that job may do so: the SIGTERM by which Slurm ends the job reaches scontrol too, maybe
    before it has its answer, and does not end it.

    Raises
    ------
    SlurmError
        where Slurm refuses.
    Unreachable
        where it does not answer, and has not ended the job either.
    """
    try:
        run(["scontrol", "requeue", id], deaf=True)
    except Unreachable:  # the answer may be lost, and not the request
        if is_still_running(id):
            raise


def is_still_running(id: str) -> bool:
    """Whether a job runs and nobody is ending it."""
    return states([id])[id].state == "RUNNING"


@functools.lru_cache(maxsize=4096)
def hosts(nodelist: str) -> tuple[str, ...]:
    """Names of the nodes in Slurm's short form: ``n[1-3]``."""
    if "[" not in nodelist:
        return tuple(name for name in nodelist.split(",") if name)
    return tuple(run(["scontrol", "show", "hostnames", nodelist]).split())


def usage(ids: Iterable[str]) -> Usage | None:
    """What jobs asked for and used; None where the accounting knows none of them, or there is none."""
    wanted = set(ids)
    if not wanted:
        return None
    jobs = ",".join(sorted(wanted))
    fields = "JobID,State,ElapsedRaw,TotalCPU,AllocCPUS,TimelimitRaw,AllocTRES,TRESUsageInTot,TRESUsageInAve"
    command = ["sacct", "--noheader", "--parsable2", "--duplicates", f"--jobs={jobs}", f"--format={fields}"]
    try:
        text = run(command)
    except SlurmError:
        return None
    rows = [line.split("|") for line in text.splitlines()]
    whole = [row for row in rows if "." not in row[0]]
    steps = [row for row in rows if "." in row[0]]
    if not whole:
        return None
    last = {row[0]: row for row in whole}  # of each job, its last attempt
    busy = [_tres(row[8]).get("gres/gpuutil", "") for row in steps]
    limits = [row[5] for row in last.values()]
    return Usage(
        elapsed=sum(float(row[2]) for row in whole),
        cpu_seconds=sum(seconds(row[3] or "00:00") for row in whole),
        max_rss=max((n_bytes(_tres(row[7]).get("mem", "0")) for row in steps), default=0),
        cpus=sum(int(row[4]) for row in last.values()),
        memory_asked=sum(n_bytes(_tres(row[6]).get("mem", "0")) for row in last.values()),
        time_limit=max(float(text) * 60 for text in limits) if all(map(str.isdigit, limits)) else None,
        gpus=sum(int(_tres(row[6]).get("gres/gpu", "0")) for row in last.values()),
        gpu_utilization=max((float(text.rstrip("%")) for text in busy if text), default=None),
        state=next(reversed(last.values()))[1].split()[0],
        restarts=len(whole) - len(last),
    )


def is_silence(words: str) -> bool:
    """Whether a command of Slurm says that the controller does not answer."""
    return _SILENCE.search(words) is not None


_has_answered = False
"""Whether Slurm has ever answered this process. Then it has a configuration, and may only not find it now."""


def run(command: Sequence[str], deaf: bool = False) -> str:
    """What a command of Slurm prints. It sees nothing of a job around this process.

    A ``deaf`` one does not end of SIGTERM either, which Slurm sends to all that is in a job.
    """
    global _has_answered
    started = [*_DEAF, *command] if deaf else command
    try:
        done = subprocess.run(
            started, capture_output=True, text=True, timeout=_TIMEOUT, env=_environment(), check=False
        )
    except FileNotFoundError:
        raise SlurmError(
            f"{command[0]} is not on PATH: this machine has no Slurm (use --site local), "
            "or its module is not loaded"
        ) from None
    except subprocess.TimeoutExpired:
        raise Unreachable(f"{shlex.join(command)}: no answer in {_TIMEOUT:.0f} s") from None
    if done.returncode == 0:
        _has_answered = True
        return done.stdout
    if -done.returncode in _ENDED:
        how = signal.Signals(-done.returncode).name
        raise Unreachable(f"{shlex.join(command)}: ended by {how} before Slurm answered")
    words = done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}"
    if _NOWHERE in words and not _has_answered:
        raise SlurmError(
            f"{command[0]} finds no cluster: set SLURM_CONF to the path of its slurm.conf (the development "
            f'Slurm\'s: eval "$(slurm/dev/up)"), or call this on a node of the cluster. It said: {words}'
        )
    if is_silence(words):
        raise Unreachable(f"{command[0]}: Slurm does not answer: {words}")
    raise SlurmError(f"{shlex.join(command)}: {words}")


def _environment() -> dict[str, str]:
    """The environment of Slurm's commands: without what a job around this process, or a user's taste in
    formats, would tell them. Of sbatch's variables, which win over what stands in a script, only those stay
    that say who pays."""
    dropped, wanted = ["SQUEUE_", "SACCT_", "SCANCEL_", "SBATCH_"], {"SLURM_CONF"}
    if own_job():
        dropped += ["SLURM_", "SLURMD_", "PMI_", "PMIX_"]
    else:
        wanted |= {"SBATCH_ACCOUNT", "SBATCH_QOS", "SBATCH_RESERVATION"}
    kept = {
        key: value for key, value in os.environ.items() if key in wanted or not key.startswith(tuple(dropped))
    }
    return kept | {"SLURM_TIME_FORMAT": "%s", "SLURM_BITSTR_LEN": "0"}


def _base(id: str) -> str:
    return id.partition("_")[0]


def _elements(id: str) -> list[str]:
    """``12_[0,3-5%2]``, elements that never started, one by one."""
    match = re.fullmatch(r"(\d+)_\[([\d,-]+)(%\d+)?\]", id)
    if match is None:
        return [id]
    ranges = (part.partition("-") for part in match[2].split(","))
    return [f"{match[1]}_{n}" for low, _, high in ranges for n in range(int(low), int(high or low) + 1)]


def _time(text: str) -> float | None:
    return float(text) if text.isdigit() else None


def _tres(text: str) -> dict[str, str]:
    """``cpu=4,mem=6000M``."""
    return dict(pair.split("=", 1) for pair in text.split(",") if "=" in pair)


def main(calls: Path) -> None:
    """What the batch script runs: the call of this job, or of this element of an array."""
    document = durable.read_json(calls)
    index = int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))
    rank.load(document["function"])(**document["arguments"][index])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
