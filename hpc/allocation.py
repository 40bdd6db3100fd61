"""Jobs inside an allocation of Slurm: ranks that are started again when they crash; and `run`, what the batch
process of a job does.

Slurm tells a job that it shall end in three ways. Before its time limit the batch process alone gets SIGUSR2
(or SIGUSR1, where somebody asked for that).
Preemption sends SIGTERM to every process of the ranks and nothing to the batch process, which hears of it
from the ranks' reports. After scancel, and when the time of a preemption is over, all get SIGTERM, and Slurm
no longer counts the job as running. In each case the ranks save their work and end; a job that Slurm still
counts as running then goes back into the queue by itself.
"""

import contextlib
import dataclasses
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from hpc import queued, rank, slurm
from hpc.job import Failure, JobInfo, Outcome, Task
from hpc.queued import History, Order
from hpc.ranks import RankJob
from hpc.site import Site
from hpc.strict import SettingsError

log = logging.getLogger(__name__)
_T = TypeVar("_T")

_WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)  # of a time limit; whose --signal it was does not matter

_TICK = 0.2  # seconds between looks at the ranks
_FENCE = 5.0  # seconds between looks whether this job is still the one that its folder names
_MOVES = 3  # attempts on top of the others until Slurm, too, has noticed that a node is lost
_OUTAGE = 600.0  # seconds for which a file server may be away
_BRIEF = 5.0  # the same where Slurm ends the job soon
_PACE = 10.0  # seconds between starts of ranks while Slurm does not answer
_REQUEUED = 120.0  # seconds that Slurm may take to end a job that was put back into the queue


class AllocationJob:
    """A task on the nodes of the Slurm job that this process is in; ranks that crash are started again.

    Parameters
    ----------
    history:
        Attempts before this one count. By default those in the same Slurm job, which may have been requeued.
    """

    def __init__(self, task: Task, site: Site, history: History | None = None) -> None:
        self.task, self.site = task, site
        self._history = history or _own_history(task.folder)
        self._retries = queued.retries(task, site)
        self._outcome: Outcome | None = None
        self._told = False
        self._end_workers()
        self._start()

    def _start(self) -> None:
        self._ranks = RankJob(self.task, self.site)
        self._started = time.monotonic()

    def about(self) -> JobInfo:
        """Where the job is."""
        ranks = self._ranks.about()
        return dataclasses.replace(ranks, id=slurm.own_job() or ranks.id)

    def poll(self) -> Outcome | None:
        """How the job ended; None while it runs."""
        if self._outcome is None and (outcome := self._ranks.poll()) is not None:
            self._outcome = self._judge(outcome)
        return self._outcome

    def cancel(self, grace: float = 10.0) -> None:
        """Ask the ranks to end, kill what is left after ``grace`` seconds."""
        self._told = True
        self._ranks.cancel(grace)

    def _judge(self, outcome: Outcome) -> Outcome | None:
        """What is made of how the ranks ended: None where they are started again."""
        first = outcome.failures[0] if outcome.failures else None
        again = first.again if first is not None and not outcome.stopped else ""
        if again == "later" and not self._told:
            if time.monotonic() - self._started > _PACE:
                self.say(f"{first}; trying again")
                self._start()
            return None
        self._end_workers()
        n_earlier = len(self._history.earlier)
        if again and (self._told or not _is_wanted()):
            # They crashed while they were to save, or because Slurm takes the job, or a node, away.
            outcome = dataclasses.replace(outcome, stopped=True)
        elif again == "elsewhere" and n_earlier < self._retries + _MOVES:
            self.say(f"{first}; other nodes are needed")
            self._remember(str(first))
            outcome = dataclasses.replace(outcome, stopped=True)
        elif again and n_earlier < self._retries:
            self.say(f"{first}; attempt {n_earlier + 2} of {self._retries + 1} starts")
            self._start()
            self._remember(str(first))
            return None
        if not outcome.stopped:
            self._history.forget()
        return dataclasses.replace(outcome, earlier=tuple(self._history.earlier))

    def _remember(self, failure: str) -> None:
        self._history = dataclasses.replace(self._history, earlier=[*self._history.earlier, failure])
        with contextlib.suppress(OSError):  # in this process it counts all the same
            self._history.write()

    def say(self, text: str) -> None:
        """Write a line to the output of this process and to the task's log."""
        line = f"--- {time.strftime('%Y-%m-%dT%H:%M:%S')} job {slurm.own_job()}: {text}"
        with contextlib.suppress(OSError):  # a job does not end because it cannot say how it is
            print(line, flush=True)
            with open(rank.log_path(self.task.folder, 0), "a", encoding="utf-8") as stream:
                stream.write(f"{line}\n")

    def _end_workers(self) -> None:
        if self.task.runtime == "dask" and self.site.launcher == "slurm":
            try:
                queued.end_workers(self.task.folder)
            except slurm.SlurmError as error:
                self.say(f"worker jobs are left to end by themselves: {error}")


def count_limit(folder: Path) -> str:
    """Note that this Slurm job reached its time limit during the task of ``folder``, whose ranks have ended.

    Returns what to say where limits pass and nothing is done in between. A limit that cannot be noted is not
    counted: to have the job queued again in time is worth more.
    """
    try:
        return _patiently(lambda: _own_history(folder).count_limit(), _BRIEF)
    except OSError as error:
        log.warning("the time limit of %s is not counted: %s", folder, error)
        return ""


def _own_history(folder: Path) -> History:
    return History.read(folder, f"history-{slurm.own_job()}.json")


def _is_wanted() -> bool:
    """Whether Slurm still wants this job to run; assumed where it does not say."""
    try:
        return slurm.is_still_running(str(slurm.own_job()))
    except slurm.SlurmError:
        return True


def _patiently(do: Callable[[], _T], outage: float = _OUTAGE) -> _T:
    """What ``do`` returns; it is tried again while the file server is away, for ``outage`` seconds.

    Raises
    ------
    OSError
        where that takes too long; at once where there is no such file.
    """
    deadline, told = time.monotonic() + outage, False
    while True:
        try:
            return do()
        except FileNotFoundError:
            raise
        except OSError as error:
            if time.monotonic() > deadline:
                raise
            if not told:
                log.warning("a file cannot be used now: %s", error)
            told = True
            time.sleep(_TICK)


def run(folder: str, token: str) -> None:
    """Do what the order in ``folder`` says, on the nodes of this Slurm job.

    Leaves ``outcome.json``, unless the job goes back into the queue or is ended by Slurm.
    """
    order = Order.read(Path(folder))
    if order is None or order.token != token:
        print(f"{folder} was given to another job meanwhile; nothing to do")
        return
    if order.outcome is not None:
        print(f"{folder} has its outcome, and this job was queued again after that; nothing to do")
        return
    if order.foreign:
        reason = f"was queued by another version of this code; run it again to queue it anew. {order.foreign}"
        failure = Failure(f"job {slurm.own_job()}", reason, rank.log_path(order.folder, 0), time.time())
        order.conclude(Outcome((failure,)))
        sys.exit(str(failure))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    sys.exit(_Batch(dataclasses.replace(order, id=slurm.own_job())).run())


class _Batch:
    """The batch process."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.told: int | None = None
        for number in (signal.SIGTERM, *_WARNINGS):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        self.told = number

    def run(self) -> int:
        """Returns the exit status."""
        order, restarts = self.order, int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        try:
            history = History.read(order.folder)
            job = _patiently(lambda: AllocationJob(order.task, order.site, history))
            job.say(
                f"starts on {', '.join(slurm.hosts(os.environ['SLURM_JOB_NODELIST']))}"
                + (f", restart {restarts}" if restarts else "")
            )
            outcome = self._follow(job)
        except (SettingsError, slurm.SlurmError, OSError) as error:
            outcome = Outcome((Failure(f"job {order.id}", str(error), order.output, time.time()),))
        if outcome is None:
            return 0
        last = dataclasses.replace(outcome, restarts=restarts)
        _patiently(lambda: order.conclude(last))
        return 1 if outcome.failures else 0

    def _follow(self, job: AllocationJob) -> Outcome | None:
        """How the job ended; None where that is for another one, or for Slurm, to say."""
        looked, told = time.monotonic(), None
        while (outcome := _patiently(job.poll)) is None:
            if self.told is not None:
                told = self.told
                job.say(
                    "the time limit is near: saving" if told in _WARNINGS else "Slurm ends the job: saving"
                )
                _patiently(lambda: job.cancel(0.8 * self.order.site.grace))
                continue
            if time.monotonic() - looked > _FENCE:
                looked = time.monotonic()
                current = _patiently(lambda: Order.read(self.order.folder))
                if current is None or current.token != self.order.token:
                    print("the folder was given to another job; this one ends", flush=True)
                    job.cancel(0.0)
                    return None
            time.sleep(_TICK)
        if not outcome.stopped:
            return outcome
        return self._go_back(job, outcome, at_limit=told in _WARNINGS)

    def _go_back(self, job: AllocationJob, outcome: Outcome, at_limit: bool) -> Outcome | None:
        """Put this job back into the queue, if Slurm has not already decided what becomes of it."""
        own = str(slurm.own_job())
        folder = self.order.folder
        if at_limit and (stalled := _patiently(lambda: History.read(folder).count_limit())):
            failure = Failure(f"job {self.order.id}", stalled, rank.log_path(folder, 0), time.time())
            return dataclasses.replace(outcome, failures=(failure,), stopped=False)
        deadline = time.monotonic() + self.order.site.grace
        while True:
            try:
                if not slurm.is_still_running(own):
                    job.say("Slurm has ended the job")
                    return None
                job.say("goes back into the queue")
                self.told = None  # Slurm may end this process before it has answered
                slurm.requeue(own)
                break
            except slurm.Unreachable as error:
                if time.monotonic() > deadline:
                    job.say(f"cannot go back into the queue: {error}")
                    return outcome
                time.sleep(2)
            except slurm.SlurmError as error:  # this site does not allow it: whoever follows submits again
                job.say(f"cannot go back into the queue: {error}")
                return outcome
        deadline = time.monotonic() + _REQUEUED
        while self.told is None and time.monotonic() < deadline:
            time.sleep(_TICK)
        return None
