"""Tasks as Slurm jobs, seen from those who submit and follow them.

Everything passes through files in the task's folder, so that any process can follow a job, and the one that
submitted it may be killed: ``.slurm/job.json`` is the order, written before the job exists and again with its
id; `hpc.allocation.run`, which is what the job runs, reads it and leaves ``.slurm/outcome.json``. What Slurm
says of the job counts only where no outcome is.
"""

import dataclasses
import logging
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpc import cluster, durable, progress, rank, ranks, slurm
from hpc.job import Failure, JobInfo, Outcome, Task, last_lines
from hpc.resources import Layout, Resources
from hpc.site import Site
from hpc.strict import M, Problem, SettingsError, validate

log = logging.getLogger(__name__)

_LATE = 2.0  # seconds that a file server may keep an outcome to itself
_SILENCE = 30.0  # seconds until an order that was not taken is offered again
_POLL = 0.25  # seconds between looks for the outcome
_STALLED = 2  # time limits without progress after which another one would be in vain
_KILL = 60.0  # seconds given to Slurm to end a job that is killed

_ANEW = {
    "FAILED",
    "NODE_FAIL",
    "BOOT_FAIL",
    "GONE",
}  # ends of jobs that may go better when they are submitted again
_FRESH = 3.0  # seconds for which an answer of Slurm is good enough for people

_watcher = slurm.Watcher()
_answers: dict[str, slurm.JobState] = {}
_answered = float("-inf")


@dataclass(frozen=True)
class Order:
    """What a Slurm job is to do, as it lies in its folder."""

    folder: Path
    token: str
    comment: str
    """By which Slurm knows the job, or the array it is an element of."""
    index: int
    """Its place in the array."""
    batch: Path
    """Folder of the batch script and Slurm's output."""
    id: str | None
    submitted: float
    task: Task
    site: Site
    foreign: str = ""
    """What another version of this code wrote that this one does not understand, and leaves out. Such a job
    can be followed and ended, not done."""

    @classmethod
    def read(cls, folder: Path) -> "Order | None":
        """The last order in a task's folder; None where there is none."""
        path = folder / ".slurm" / "job.json"
        try:
            content = durable.read_json(path)
        except FileNotFoundError:
            return None
        task, problems = content["task"], list[Problem]()
        resources = _understood(Resources, task["resources"], "resources", problems)
        return cls(
            folder,
            **{key: content[key] for key in ("token", "comment", "index", "id", "submitted")},
            batch=Path(content["batch"]),
            task=Task(task["function"], task["arguments"], folder, task["runtime"], resources, task["name"]),
            site=_understood(Site, content["site"], "site", problems),
            foreign=str(SettingsError(str(path), problems)) if problems else "",
        )

    def write(self) -> None:
        """Put it into its folder."""
        resources = self.task.resources.model_dump(mode="json")
        content = {
            **{key: getattr(self, key) for key in ("token", "comment", "index", "id", "submitted")},
            "batch": str(self.batch),
            "task": {
                "function": self.task.function,
                "arguments": dict(self.task.arguments),
                "runtime": self.task.runtime,
                "resources": resources,
                "name": self.task.name,
            },
            "site": self.site.model_dump(mode="json"),
        }
        durable.write_json(self.folder / ".slurm" / "job.json", content)

    @property
    def outcome(self) -> Outcome | None:
        """How the job ended, once that is written."""
        try:
            content = durable.read_json(self.folder / ".slurm" / "outcome.json")
        except FileNotFoundError:
            return None
        return Outcome.from_json(content["outcome"]) if content["token"] == self.token else None

    def conclude(self, outcome: Outcome) -> None:
        """Write how the job ended. The last thing that is done for it."""
        content = {"token": self.token, "outcome": outcome.as_json()}
        durable.write_json(self.folder / ".slurm" / "outcome.json", content)

    @property
    def output(self) -> Path:
        """What Slurm and the batch process said."""
        return self.batch / f"slurm-{self.id}.out"

    @property
    def retries(self) -> int:
        return retries(self.task, self.site)


def _understood(model: type[M], content: dict[str, Any], name: str, problems: list[Problem]) -> M:
    """The model of what a file has, without the keys that are wrong; they are added to ``problems``."""
    found, wrong = validate(model, content, (name,))
    problems += wrong
    keys = {problem.location[1] for problem in wrong if len(problem.location) > 1}
    rest = {key: value for key, value in content.items() if key not in keys}
    return found or validate(model, rest)[0] or model()


@dataclass
class History:
    """What later attempts at a task must know, in a file of its folder."""

    folder: Path
    name: str = "history.json"
    earlier: list[str] = field(default_factory=list)
    """Why attempts failed."""
    limits: list[float] = field(default_factory=list)
    """The progress at each time limit."""

    @classmethod
    def read(cls, folder: Path, name: str = "history.json") -> "History":
        """What is written in the folder; empty where nothing is."""
        try:
            return cls(folder, name, **durable.read_json(folder / ".slurm" / name))
        except FileNotFoundError:
            return cls(folder, name)

    def write(self) -> None:
        """Put it into the folder."""
        content = {"earlier": self.earlier, "limits": self.limits}
        durable.write_json(self.folder / ".slurm" / self.name, content)

    def forget(self) -> None:
        """Remove the file: the task is done, or nobody tries it again."""
        (self.folder / ".slurm" / self.name).unlink(missing_ok=True)

    def count_limit(self) -> str:
        """Note a time limit. Returns what to say where limits pass and nothing is done in between."""
        last = progress.read(self.folder / "progress.json")
        self.limits.append(last.done if last else 0.0)
        self.write()
        best = max(self.limits[:-_STALLED], default=float("-inf"))
        if len(self.limits) <= _STALLED or max(self.limits[-_STALLED:]) > best:
            return ""
        return (
            f"reached its time limit {len(self.limits)} times and did not get further the last {_STALLED} "
            "times: ask for more time (resources.time, or --time of your own sbatch), or save more often"
        )


def retries(task: Task, site: Site) -> int:
    """Times that a task is started again after a crash."""
    asked = task.resources.retries
    return site.retries if asked is None else asked


def submit(tasks: Sequence[Task], site: Site, at_once: int | None = None) -> Iterator["QueuedJob"]:
    """Queue tasks that ask for the same: one job, or one array of which ``at_once`` elements run at a time.

    Nothing of earlier jobs may still be in their folders (`end`).

    Raises
    ------
    ValueError
        where they do not ask for the same.
    hpc.slurm.SlurmError
        where Slurm does not take them.
    """
    first = tasks[0]
    if any((task.runtime, task.resources) != (first.runtime, first.resources) for task in tasks):
        raise ValueError("the tasks of a job array have one runtime and the same resources")
    comment = uuid.uuid4().hex
    alone = len(tasks) == 1
    batch = (first.folder / ".slurm" if alone else first.folder.parent / ".slurm" / comment).absolute()
    orders = [
        Order(task.folder, uuid.uuid4().hex, comment, index, batch, None, time.time(), task, site)
        for index, task in enumerate(tasks)
    ]
    for order in orders:
        order.write()
    return (QueuedJob(order) for order in _queue(orders, at_once))


def _queue(orders: Sequence[Order], at_once: int | None = None, patience: float | None = None) -> list[Order]:
    """Let Slurm have the orders that lie in their folders; gives them their ids."""
    first = orders[0]
    resources, layout = _asked(first.task)
    try:
        ids = slurm.submit(
            "hpc.allocation:run",
            [{"folder": str(order.folder.absolute()), "token": order.token} for order in orders],
            first.batch,
            first.task.name or first.folder.name,
            layout,
            resources,
            first.site,
            first.comment,
            at_once,
            patience,
        )
    except slurm.Unreachable:
        raise  # Slurm may have the job all the same: the orders stay
    except slurm.SlurmError:
        for order in orders:
            (order.folder / ".slurm" / "job.json").unlink()
        raise
    orders = [dataclasses.replace(order, id=id) for order, id in zip(orders, ids, strict=True)]
    for order in orders:
        order.write()
    return orders


def _asked(task: Task) -> tuple[Resources, Layout]:
    """What the Slurm job of a task asks for."""
    if task.runtime == "dask":  # the workers are jobs of their own
        resources = Resources(cpus=2, time=task.resources.time)
        return resources, resources.layout("serial", 1)
    return task.resources, task.resources.layout(task.runtime, 1)


class QueuedJob:
    """A task that Slurm has, waiting or running."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self._outcome: Outcome | None = None
        self._looked = float("-inf")
        self._over: float | None = None  # since when the job is over without an outcome
        self._untaken = ""  # why Slurm has not taken the order yet

    def poll(self) -> Outcome | None:
        """How the job ended; None while it waits or runs."""
        if self._outcome is not None or time.monotonic() - self._looked < _POLL:
            return self._outcome
        self._looked = time.monotonic()
        if self.order.id is None:
            return self._queue() if self._is_ours() else self._leave()
        if (outcome := self.order.outcome) is not None:
            if not outcome.stopped:
                return self._finish(outcome)
            return self._submit_again()  # it could not go back into the queue by itself
        state = _watcher.state(str(self.order.id))
        if state is None or not state.is_over:
            self._over = None
            return None
        self._over = self._over or time.monotonic()
        if time.monotonic() - self._over < _LATE:
            os.listdir(self.order.folder / ".slurm")  # makes file servers look again
            return None
        return self._without_a_word(state)

    def _without_a_word(self, state: slurm.JobState) -> Outcome | None:
        """The job is over, and its batch process could not say why."""
        order, history = self.order, History.read(self.order.folder)
        # An element of an array that is cancelled while it waits leaves no trace in Slurm.
        name = "CANCELLED" if state.state == "GONE" and not order.output.exists() else state.state
        if name == "PREEMPTED":
            return self._submit_again()
        used = slurm.usage([str(order.id)])
        why = _explain(order, dataclasses.replace(state, state=name), used)
        failure = Failure(f"job {order.id}", why, order.output, time.time())
        if name == "TIMEOUT":
            if not (stalled := history.count_limit()):
                log.warning("%s %s", order.folder.name, failure)
                return self._submit_again()
            failure = dataclasses.replace(failure, reason=f"{stalled}. At last it {why}")
        if name in _ANEW and len(history.earlier) < order.retries:
            history.earlier.append(str(failure))
            history.write()
            return self._submit_again()
        outcome = Outcome((failure,), earlier=tuple(history.earlier), stopped=name == "CANCELLED")
        if self._is_ours():
            order.conclude(outcome)
        return self._close(outcome, used)

    def _is_ours(self) -> bool:
        """Whether nobody gave the folder to another job, or ended this one for good, meanwhile."""
        current = Order.read(self.order.folder)
        return current is not None and current.token == self.order.token

    def _leave(self) -> Outcome:
        why = "was ended, and its folder cleared, by another process"
        failure = Failure(f"job {self.order.id or ''}", why, self.order.output, time.time())
        return self._finish(Outcome((failure,), stopped=True))

    def _submit_again(self) -> Outcome | None:
        if not self._is_ours():
            return self._leave()
        new = dataclasses.replace(
            self.order,
            token=uuid.uuid4().hex,
            comment=uuid.uuid4().hex,
            index=0,
            batch=(self.order.folder / ".slurm").absolute(),
            id=None,
            submitted=time.time(),
        )
        new.write()
        self.order, self._over = new, None
        return self._queue()

    def _queue(self) -> Outcome | None:
        """Have Slurm take the order, or try it again a while later."""
        self._looked = time.monotonic() + _SILENCE  # where Slurm does not answer
        try:
            taken = _identified(self.order) if self._untaken else None  # before Slurm fell silent
            self.order = taken or _queue([self.order], patience=0)[0]
        except slurm.Unreachable as error:
            self._untaken = str(error).splitlines()[0]
            return None
        except slurm.SlurmError as error:
            reason = f"cannot be submitted again: {error}"
            failure = Failure("", reason, rank.log_path(self.order.folder, 0), time.time())
            earlier = tuple(History.read(self.order.folder).earlier)
            return self._finish(Outcome((failure,), earlier=earlier))
        self._looked, self._untaken = time.monotonic(), ""
        log.warning("%s is submitted again, as job %s", self.order.folder.name, self.order.id)
        return None

    def _finish(self, outcome: Outcome) -> Outcome:
        return self._close(outcome, slurm.usage([str(self.order.id)]))

    def _close(self, outcome: Outcome, counted: slurm.Usage | None) -> Outcome:
        resources, layout = _asked(self.order.task)
        usage: dict[str, Any] = {
            "cpus": layout.ranks * layout.cpus,
            "gpus": layout.nodes * layout.gpus,
            "memory_asked": layout.nodes * (resources.memory or 0),
            "time_limit": resources.time or self.order.site.time,
            **outcome.usage,
        }
        # Slurm counts earlier attempts too, but what was a moment ago it may not have counted yet.
        for key, value in dataclasses.asdict(counted).items() if counted else ():
            if isinstance(value, float | int):
                usage[key] = max(value, usage.get(key) or 0)
        if (workers := slurm.usage(cluster.worker_jobs(self.order.folder))) is not None:
            usage["workers"] = dataclasses.asdict(workers)
        self._outcome = dataclasses.replace(outcome, usage=usage)
        return self._outcome

    def cancel(self, grace: float = 10.0) -> None:
        """Ask the job to end (scancel), kill it after ``grace`` seconds, and wait until it is over.

        Raises
        ------
        hpc.slurm.SlurmError
            where Slurm does not end it.
        """
        if self._outcome is None:
            _end(self.order, grace)
            outcome = self.order.outcome
            if outcome is None:
                failure = Failure(f"job {self.order.id}", "was canceled", self.order.output, time.time())
                outcome = Outcome((failure,), stopped=True)
                self.order.conclude(outcome)
            self._finish(outcome)

    def about(self) -> JobInfo:
        """Where the job is."""
        if self._outcome is None and self._untaken:
            return JobInfo("", "pending", reason=self._untaken)
        if self._outcome is None and self.order.id is not None:
            return _about(self.order, _watcher.state(self.order.id), _watcher.silent_since)
        return _about(self.order, None)


def attach(folder: Path, site: Site) -> QueuedJob | None:
    """See `hpc.launch.attach`."""
    order = Order.read(folder)
    if order is None:
        return None
    order = dataclasses.replace(order, site=site)
    if (outcome := order.outcome) is not None:
        return None if outcome.failures else QueuedJob(order)
    if (order := _identified(order)) is None:
        return None
    state = slurm.states([str(order.id)])[str(order.id)]
    if state.is_pending and order.foreign:  # it would find nothing that it can do
        return None
    if state.is_over:
        outcome = order.outcome  # it may have come meanwhile
        return QueuedJob(order) if outcome is not None and not outcome.failures else None
    return QueuedJob(order)


def describe(folders: Iterable[Path]) -> dict[Path, JobInfo]:
    """Where the Slurm jobs of folders are; folders without one are left out."""
    global _answered
    orders = {folder: order for folder in folders if (order := Order.read(folder)) is not None}
    ids = {order.id for order in orders.values() if order.id is not None and order.outcome is None}
    silent_since = None
    if ids and (ids - _answers.keys() or time.monotonic() - _answered > _FRESH):
        try:
            _answers.update(slurm.states(ids))
        except slurm.SlurmError:
            silent_since = time.time()
        _answered = time.monotonic()
    return {
        folder: _about(order, _answers.get(str(order.id)), silent_since) for folder, order in orders.items()
    }


def end(folder: Path, grace: float = 10.0) -> None:
    """End the Slurm job of a folder, if there is one, and forget it.

    Raises
    ------
    hpc.slurm.SlurmError
        where Slurm does not end it.
    """
    if (order := Order.read(folder)) is None:
        return
    if order.outcome is None:
        _end(order, grace)
    for name in ("job.json", "outcome.json", "history.json"):
        (folder / ".slurm" / name).unlink(missing_ok=True)


def end_workers(folder: Path) -> None:
    """End the Dask worker jobs of a folder.

    Raises
    ------
    hpc.slurm.SlurmError
        where Slurm does not end them.
    """
    ids = {*cluster.worker_jobs(folder)}
    if (token := ranks.token_of(folder)) is not None:
        ids |= {*slurm.find(token)}  # who was killed after sbatch has not written their ids
    for state in slurm.states(ids).values():
        if not state.is_over:
            slurm.cancel(state.id)


def _identified(order: Order) -> Order | None:
    """The order with its id, which whoever was killed after sbatch has not written; None if there is no
    job."""
    if order.id is not None:
        return order
    found = slurm.find(order.comment)
    if not found:
        return None
    array, is_element, _ = found[0].partition("_")  # of which Slurm may have forgotten some already
    order = dataclasses.replace(order, id=f"{array}_{order.index}" if is_element else array)
    path = order.folder / ".slurm" / "job.json"
    durable.write_json(path, durable.read_json(path) | {"id": order.id})
    return order


def _end(order: Order, grace: float) -> None:
    found = _identified(order)
    if found is None:
        return
    order, id = found, str(found.id)
    slurm.cancel(id)
    started, killed = time.monotonic(), False
    while not (state := slurm.states([id])[id]).is_over:
        waited = time.monotonic() - started
        if waited > grace and not killed:
            slurm.cancel(id, "KILL")
            killed = True
        if waited > grace + _KILL:
            raise slurm.SlurmError(
                f"job {id} does not end, {waited:.0f} s after scancel: it is {state.state} on "
                f"{', '.join(state.nodes)}. Its node may be down: ask the cluster's people, or use another "
                "folder (--out)"
            )
        time.sleep(0.2)
    if order.task.runtime == "dask":
        end_workers(order.folder)


def _about(order: Order, state: slurm.JobState | None, silent_since: float | None = None) -> JobInfo:
    if order.id is None:
        return JobInfo("", "pending", reason="is being submitted")
    if (outcome := order.outcome) is not None:
        word = "stopped" if outcome.stopped else "failed" if outcome.failures else "completed"
        return JobInfo(order.id, word, tuple(dict.fromkeys(outcome.hosts)), restarts=outcome.restarts)
    reason = "" if state is None else state.reason
    if silent_since is not None:
        minutes, seconds = divmod(int(time.time() - silent_since), 60)
        reason = f"Slurm has not answered for {minutes}:{seconds:02d}"
    if state is None:
        return JobInfo(order.id, "pending", reason=reason)
    word = "pending" if state.is_pending else "running" if state.is_running else state.state.lower()
    return JobInfo(order.id, word, state.nodes, reason, state.restarts)


def _explain(order: Order, state: slurm.JobState, used: slurm.Usage | None) -> str:
    """A sentence on a job that ended without an outcome, with what to do."""
    where = f" on {', '.join(state.nodes)}" if state.nodes else ""
    match state.state:
        case "GONE":
            return "is in no queue, and Slurm's accounting does not know it: nobody can tell how it ended"
        case "TIMEOUT":
            limit = f" of {used.time_limit / 60:.0f} min" if used and used.time_limit else ""
            return (
                f"reached its time limit{limit}{where} before it had saved and left: ask for more "
                f"(resources.time), or give it longer to save (grace of the site, now {order.site.grace} s)"
            )
        case "OUT_OF_MEMORY":
            numbers = "" if used is None else f": it asked for {_size(used.memory_asked)} and had at least "
            numbers += "" if used is None else _size(used.max_rss)
            return f"ran out of memory{where}{numbers}; ask for more (resources.memory)"
        case "NODE_FAIL" | "BOOT_FAIL":
            return f"lost a node{where}, and Slurm did not start it again"
        case "CANCELLED":
            by = f" ({state.reason})" if state.reason else ""
            return f"was canceled{by}, not by this run"
        case "COMPLETED":
            return f"ended{where} without a word: do the nodes see the same {order.folder.absolute()}?"
        case "FAILED":
            said = "".join(last_lines(order.output, 1)) or "it wrote nothing"
            return f"its batch process ended{where} before it could say how its ranks did: {said}"
        case other:
            why = f" ({state.reason})" if state.reason else ""
            return f"ended as {other}{why}{where}"


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.2f} GiB"
