"""Runs the steps of a run file: each at most once, as soon as what it reads is done, from where it stopped.

Every step has a folder in the run's folder; `galdist.plan` tells which of them hold their result already. A
result that no longer fits is moved to ``.replaced/`` and moved back when its configuration returns, so
nothing computed is lost. A step's done marker is written last, so a run may be killed at any moment and
started again. On a cluster its jobs go on meanwhile, and the next run takes them over.
"""

import collections
import contextlib
import fcntl
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import yaml

from galdist.config import Run
from galdist.plan import CONFIG, DONE, PlannedStep, plan, read_record
from galdist.provenance import Record, asked, now
from galdist.replaced import Replaced
from galdist.schedule import Schedule
from galdist.stages import STAGES, Stage
from galdist.status import NO_LOCKS, PLAN, Forecast, duration, estimate, size_text, tree_size, waits
from galdist.status import RunView as RunView
from galdist.status import StepView as StepView
from hpc import durable, launch, progress, slurm
from hpc.site import Site
from hpc.strict import Problem, SettingsError

_TICK = 0.1  # seconds between looks at the running jobs
_SLOW_TICK = 0.5  # the same on a cluster, whose file system others use too
_LOOKS = 50  # jobs looked at in one tick: of a thousand, each has its turn every ten seconds
_SHARE = 0.1  # of its time that the orchestrator may spend on showing the run
_ARRAY = 1000  # most elements of a job array: what Slurm takes unless told otherwise
_SILENCE = 30.0  # seconds until a cluster that did not answer is asked again
_BLIND = 600.0  # seconds for which a file server may fail
_GRACE = 10.0  # seconds that a job has to end
_CANCELLING = 8  # jobs ended at the same time
_LIMIT = [signal.SIGUSR1, signal.SIGUSR2]  # Slurm's word for: your time is nearly over
_PATIENCE = 1.0  # seconds to wait for a run's folder
_RESTARTED = 300.0  # the same after a restart by Slurm: file servers keep the lock of a lost node for minutes


class RunLocked(RuntimeError):
    """Another process works in the run's folder."""


class StepFailed(RuntimeError):
    """At least one step failed. ``str()`` says what happened, step by step."""


class Interrupted(RuntimeError):
    """The run was asked to stop. ``str()`` says what became of its jobs.

    Attributes
    ----------
    exit_code : int
    left_running : list of str
        steps whose Slurm jobs go on; the next run takes them over. The jobs of all others have ended.
    requeued : bool
        whether this process is a Slurm job that will start again and continue the run.
    """

    def __init__(self, number: int, message: str, left_running: Collection[str], requeued: bool) -> None:
        self.exit_code = 128 + number
        self.left_running = list(left_running)
        self.requeued = requeued
        super().__init__(message)


def execute(
    run: Run,
    out: Path,
    site: Site | None = None,
    show: Callable[[RunView], None] = lambda view: None,
    start_from: str | None = None,
    only: Collection[str] | None = None,
    stages: Mapping[str, Stage] = STAGES,
) -> None:
    """Do every step that is not done.

    On ``slurm`` steps that do not need each other run at the same time, elsewhere one after the other. Asked
    to stop by SIGINT it ends its jobs. By other signals too, but on ``slurm``, where jobs go on; inside a
    job, whose time is over or which is preempted, it has that job started again later.

    Parameters
    ----------
    out:
        The run's folder.
    show:
        Called with the state of the run several times a second.
    start_from:
        This step, or all members of this swept step, and those that depend on it are computed again.
    only:
        Only these steps.

    Raises
    ------
    hpc.strict.SettingsError, RunLocked, StepFailed, Interrupted
    """
    site = site or Site()
    check_site(plan(run, out, start_from, only, stages), site)  # before the folder is made
    out.mkdir(parents=True, exist_ok=True)
    with _lock(out), _stop_signals(site):
        execution = _Execution(run, out, site, [])  # what a signal finds until there is a plan
        try:
            steps = plan(run, out, start_from, only, stages)
            durable.write_text(out / "run.yaml", run.to_yaml())
            durable.write_json(out / PLAN, {entry.name: entry.fingerprint for entry in steps})
            execution = _Execution(run, out, site, steps)
            execution.arrange()
            execution.loop(show)
        except KeyboardInterrupt as stop:
            raise execution.stop(stop.args[0] if stop.args else signal.SIGINT) from None
        except BaseException:
            if site.launcher != "slurm":  # nothing runs on unseen; on a cluster the next run takes it over
                execution.cancel()
            raise
    if execution.messages:
        raise StepFailed("\n\n".join(execution.messages))


def check_site(steps: list[PlannedStep], site: Site) -> None:
    """Everything that the machine cannot give to the steps that run.

    Raises
    ------
    hpc.strict.SettingsError
    """
    steps = [entry for entry in steps if entry.runs]
    problems = [
        Problem(("steps", entry.name, "resources", *problem.location), problem.message)
        for entry in (steps if site.launcher in ("slurm", "allocation") else ())
        for problem in _beyond(entry, site)
    ]
    mpi = [entry for entry in steps if entry.stage.runtime == "mpi" and entry.ranks > 1]
    if mpi and site.launcher == "local":
        try:
            site.find_mpirun()
        except FileNotFoundError as error:
            problems.append(Problem(("steps", mpi[0].name), str(error)))
    if problems:
        raise SettingsError("site", problems)


def _beyond(entry: PlannedStep, site: Site) -> list[Problem]:
    try:
        return site.problems(entry.step.resources, entry.layout(site))
    except SettingsError as error:
        return error.problems


@dataclass
class _Running:
    entry: PlannedStep
    job: launch.Job
    view: StepView
    record: Record


class _Execution:
    """A run while it goes on."""

    def __init__(self, run: Run, out: Path, site: Site, steps: list[PlannedStep]) -> None:
        self.messages: list[str] = []
        """What failed, and how."""
        self._out, self._site, self._run_seed = out, site, run.file.seed
        self._planned = {entry.name: entry for entry in steps}
        self._views = {entry.name: _first_view(entry) for entry in steps}
        self._view = RunView(run.file.name, out, list(self._views.values()))
        self._forecasts = {
            entry.name: Forecast(
                entry.inputs, entry.step.expected, entry.expected if entry.measured else None
            )
            for entry in steps
        }
        self._on_slurm = site.launcher == "slurm"
        self._parallel = (site.max_jobs or len(steps)) if self._on_slurm else 1  # one machine, one step
        reads = {entry.name: entry.inputs for entry in steps if entry.runs}
        self._schedule = Schedule(reads, self._parallel, run.sweeps)
        self._sweeps = run.sweeps
        self._sweep_of = {name: swept for swept, sweep in run.sweeps.items() for name in sweep.members}
        self._replaced = Replaced(out)
        self._running: dict[str, _Running] = {}
        self._turns: collections.deque[str] = collections.deque()  # what runs; next whose turn it is
        self._starting: list[str] = []  # whose jobs are being submitted
        self._blind: dict[str, float] = {}  # since when a step's files cannot be read or written
        self._silent_until = 0.0  # while Slurm does not answer nothing is submitted
        self._next_show = 0.0

    def arrange(self) -> None:
        """Put every folder in order before the first step starts, and take over jobs that run already."""
        # What is read goes last: killed in between, the rest is computed again.
        for entry in reversed([entry for entry in self._planned.values() if entry.runs]):
            folder = self._out / entry.name
            if entry.again and folder.exists():
                self._replaced.put_aside(entry.name, restorable=False)
            elif read_record(folder).get("fingerprint", entry.fingerprint) != entry.fingerprint:
                # What the job of an earlier configuration reads may change now. Where Slurm does not answer,
                # the job is ended before the step starts.
                with contextlib.suppress(slurm.SlurmError):
                    launch.end_leftovers(folder)
        read = {other for entry in self._planned.values() if entry.asked for other in entry.inputs}
        for entry in self._planned.values():
            if not entry.runs and (entry.asked or entry.name in read):
                self._replaced.take_back(entry)
        self._replaced.tidy()
        # What is not found now is found when its step starts.
        with contextlib.suppress(slurm.SlurmError, OSError):
            for name in self._schedule.ready if self._on_slurm else ():
                if self._adopt(name):
                    self._schedule.start(name)

    def loop(self, show: Callable[[RunView], None]) -> None:
        """Until nothing is left that can be done."""
        while not self._schedule.over:
            self._start_ready(show)
            self._look()
            self._show(show)
            if self._running or time.monotonic() < self._silent_until:
                time.sleep(_SLOW_TICK if self._on_slurm else _TICK)
        self._next_show = 0.0
        self._show(show)
        self._replaced.tidy()

    def _show(self, show: Callable[[RunView], None]) -> None:
        """Not so often that a large run would do little else."""
        begun = time.monotonic()
        if begun >= self._next_show:
            parallel = None if self._on_slurm and self._site.max_jobs is None else self._parallel
            self._view.seconds_left = estimate(self._view.steps, self._forecasts, parallel)
            show(self._view)
            took = time.monotonic() - begun
            self._next_show = begun + max(_TICK, took / _SHARE)

    def _start_ready(self, show: Callable[[RunView], None]) -> None:
        for group in self._schedule.take() if time.monotonic() >= self._silent_until else ():
            for name in group[_ARRAY:]:
                self._schedule.put_back(name)
            self._start(group[:_ARRAY])
            self._look()  # Slurm may take its time
            self._show(show)

    def _start(self, names: list[str]) -> None:
        """Submit steps, several as one array, but those whose job is there already."""
        records: dict[str, Record] = {}
        try:
            names = [name for name in names if not self._adopt(name)]
            for name in names:
                records[name] = self._prepare(name)
            label = self._sweep_of[names[0]] if len(names) > 1 else "".join(names)
            tasks = [self._task(name, f"{self._view.name}-{label}") for name in names]
            self._starting = names
            if len(tasks) > 1:
                jobs = launch.submit_array(tasks, self._site, self._sweeps[label].at_once)
            else:
                jobs = [launch.submit(task, self._site) for task in tasks]
        except (slurm.Unreachable, OSError) as error:
            if isinstance(error, OSError) and not self._on_slurm:
                raise
            self._silent_until = time.monotonic() + _SILENCE
            for name in names:
                if name not in self._running:
                    self._later(name, error)
                    self._schedule.put_back(name)
        except (slurm.SlurmError, SettingsError) as error:
            if self._site.launcher == "debug":
                raise  # it is the stage's, for a debugger
            for name in names:
                if name in records:
                    records[name].refused(str(error))
                if name not in self._running:
                    self._fail(name, str(error), str(error))
        else:
            for name, job in zip(names, jobs, strict=True):
                self._follow(name, job, records[name])
        self._starting = []

    def _adopt(self, name: str) -> bool:
        """Take over the job that an earlier run left in the step's folder, also one that is done by now.

        One that waits and asks for something else than the step does now is taken out of the queue.
        """
        entry, folder = self._planned[name], self._out / name
        before = read_record(folder)
        if not self._on_slurm or before.get("fingerprint") != entry.fingerprint:
            return False
        if before["error"] or before["finished"]:  # seen already
            return False
        job = launch.attach(folder, self._site)
        if job is None:
            return False
        over = job.poll() is not None
        if not over and before["asked"] != asked(self._site, entry.resources(self._site)):
            id = job.about().id
            if slurm.states([id])[id].is_pending:
                launch.end_leftovers(folder)
                return False
        self._follow(name, job, Record.resume(folder, over))
        return True

    def _prepare(self, name: str) -> Record:
        entry = self._planned[name]
        folder = self._replaced.make_room(entry)
        record = Record.begin(folder, entry, entry.resources(self._site), self._site, self._run_seed)
        if not (folder / CONFIG).exists():  # else it is what the fingerprint of a step that continues is of
            config = yaml.safe_dump(entry.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
            durable.write_text(folder / CONFIG, config)
        with open(folder / "log.txt", "a", encoding="utf-8") as log:
            log.write(f"--- {record.data['started']} {name} on {record.data['host']}\n")
        return record

    def _task(self, name: str, label: str) -> launch.Task:
        entry = self._planned[name]
        folder = self._out / name
        arguments = {
            "function": entry.stage.function,
            "config": entry.config.model_dump(mode="json"),
            "inputs": {
                role: [str(self._out.absolute() / other) for other in entry.step.inputs.get(role, ())]
                for role in entry.stage.roles
            },
            "out": str(folder.absolute()),
        }
        resources = entry.resources(self._site)
        return launch.Task("galdist.stages:call", arguments, folder, entry.stage.runtime, resources, label)

    def _follow(self, name: str, job: launch.Job, record: Record) -> None:
        view = self._views[name]
        view.started = time.time()
        self._running[name] = running = _Running(self._planned[name], job, view, record)
        self._turns.append(name)
        try:
            self._see(running)
        except OSError as error:
            self._later(name, error)

    def _look(self) -> None:
        """See what became of what runs."""
        for name in [self._turns.popleft() for _ in range(min(_LOOKS, len(self._turns)))]:
            try:
                outcome = self._poll(self._running[name])
            except (slurm.Unreachable, OSError) as error:
                self._turns.append(name)
                self._later(name, error)
                continue
            self._blind.pop(name, None)
            if outcome is None:
                self._turns.append(name)
            else:
                del self._running[name]
                self._finish(name, outcome)

    def _poll(self, running: _Running) -> launch.Outcome | None:
        """How a job ended, once that is on record; asked again it does again what it could not do."""
        try:
            outcome = running.job.poll()
        except slurm.Unreachable:
            raise
        except slurm.SlurmError as error:  # the job had to be submitted again
            failure = launch.Failure(
                "its job", str(error), self._out / running.view.name / "log.txt", time.time()
            )
            outcome = launch.Outcome((failure,))
        self._see(running)
        if outcome is not None:
            running.record.end(running.job.about(), outcome, outcome.stopped)
            running.view.seconds = running.record.seconds
            if not outcome.failures:
                self._mark_done(running)
        return outcome

    def _later(self, name: str, error: Exception) -> None:
        """What does not answer now is asked again. Slurm may be silent for days, a file server for minutes.

        Raises
        ------
        OSError
            ``error``, when it has gone on for too long.
        """
        self._views[name].detail = f"asked again soon: {str(error).splitlines()[0]}"
        if not isinstance(error, slurm.Unreachable):
            since = self._blind.setdefault(name, time.monotonic())
            if time.monotonic() - since >= (_BLIND if self._site.launcher in ("slurm", "allocation") else 0):
                raise error

    def _see(self, running: _Running) -> None:
        view, record, job = running.view, running.record, running.job.about()
        queued = self._on_slurm and waits(job)
        if self._on_slurm:
            record.follow(job)
        view.job, view.state, view.seconds = job, "queued" if queued else "running", record.seconds
        view.progress = None if queued else progress.read(self._out / view.name / "progress.json")
        why = f"attempt {job.restarts + 1}" if job.restarts else running.entry.why
        view.detail = job.reason or why

    def _finish(self, name: str, outcome: launch.Outcome) -> None:
        if not outcome.failures:
            self._schedule.done(name)
            return
        self._fail(name, str(outcome.failures[0]), outcome.describe(), outcome.stopped)
        if outcome.stopped and self._site.launcher == "allocation":
            signal.raise_signal(signal.SIGTERM)  # so is the job that this process is in

    def _mark_done(self, running: _Running) -> None:
        name, view, record = running.view.name, running.view, running.record
        folder = self._out / name
        shutil.rmtree(folder / ".job", ignore_errors=True)
        size = tree_size(folder)
        done = {
            "fingerprint": self._planned[name].fingerprint,
            "finished": record.data["finished"],
            "bytes": size,
        }
        durable.write_json(folder / DONE, done)
        view.state = "done"
        peak = max(record.data["peak_memory"].values(), default=0)
        view.detail = f"{size_text(size)}, peak memory {size_text(peak)} a process"

    def _fail(self, name: str, reason: str, description: str, stopped: bool = False) -> None:
        view = self._views[name]
        view.state, view.detail = "stopped" if stopped else "failed", reason.splitlines()[0]
        how = f"{'was stopped' if stopped else 'failed'} after {duration(view.seconds)}"
        self.messages.append(f"step {name} {how}: {description}\nits folder: {self._out / name}")
        for reader, cause in self._schedule.failed(name):
            self._views[reader].state, self._views[reader].detail = "blocked", f"needs {cause}"

    def stop(self, number: int) -> Interrupted:
        """What a signal asks for; returns what is to be said about it."""
        left: dict[str, str] = {}
        stalled = ""
        if self._on_slurm and number != signal.SIGINT:
            left = {name: running.job.about().id for name, running in self._running.items()}
            text = "stopped"
        else:
            names = [
                name for name, view in self._views.items() if view.state == "stopped" or name in self._running
            ]
            text = f"stopped in {', '.join(names)}" if names else "stopped"
            inside = self._site.launcher == "allocation" and number != signal.SIGINT
            for problem in self.cancel(self._site.grace if inside else _GRACE):
                text += f"; {problem}"
            if inside and number in _LIMIT:
                found = {name: launch.count_limit(self._out / name) for name in names}
                text += (stalled := "".join(f"; {name} {why}" for name, why in found.items() if why))
        if left:
            jobs = ", ".join(f"{name} (job {id})" for name, id in left.items())
            text += f"; these go on in Slurm, and the next run takes them over: {jobs}"
        requeued = False
        if not stalled and number != signal.SIGINT and self._site.launcher in ("slurm", "allocation"):
            requeued, words = _queue_again()
            text += words
        return Interrupted(number, text, list(left), requeued)

    def cancel(self, grace: float = _GRACE) -> list[str]:
        """End all jobs; returns what is to be said of those that do not end."""

        def end(running: _Running) -> str:
            try:
                running.job.cancel(grace)
                running.record.end(running.job.about(), running.job.poll(), stopped=True)
            except slurm.SlurmError as error:
                return f"the job of {running.entry.name} could not be ended: {error}"
            except OSError as error:  # whoever is stopped has more to do
                return f"how {running.entry.name} ended could not be written down: {error}"
            return ""

        with ThreadPoolExecutor(_CANCELLING) as pool:
            problems = [problem for problem in pool.map(end, self._running.values()) if problem]
        for name in self._starting:
            launch.end_leftovers(self._out / name)
        return problems


def _queue_again() -> tuple[bool, str]:
    """Where this process is what a Slurm job runs, and nobody ends that job for good: have it start again."""
    own = slurm.own_job()
    if own is None:
        return False, ""
    if os.environ.get("SLURM_TASK_PID") != str(os.getpid()):
        # Somebody's session on a node, maybe: it is not ours to end.
        why = (
            "it runs something else too (a batch script that ends in exec galdist run ... goes on by itself)"
        )
        return False, f"; job {own} is not queued again: {why}"
    try:
        if not slurm.is_still_running(own):
            return False, ""
        slurm.requeue(own)
    except slurm.SlurmError as error:
        return False, f"; job {own} could not be queued again: {error}"
    time.sleep(1)  # the SIGTERM that follows is not to end this process before it has said so
    return True, f"; job {own} is queued again and will continue the run"


def _first_view(entry: PlannedStep) -> StepView:
    return StepView(entry.name, entry.step.stage, "waiting" if entry.runs else "kept", entry.why)


@contextlib.contextmanager
def _lock(out: Path) -> Iterator[None]:
    """Hold the run's folder. The lock is the kernel's: that of a killed process is gone with it."""
    with open(out / ".lock", "a+", encoding="utf-8") as stream:
        try:
            _take(stream)
        except BlockingIOError:
            stream.seek(0)
            who = stream.read().strip() or "it has just started"
            text = (
                f"{out} is in use by another run: {who}. "
                "Wait for it, stop it, or choose another folder with --out"
            )
            if " on " in who and f" on {socket.gethostname()}," not in who:
                text += f". Where that machine is down and its lock stays: rm {out / '.lock'}"
            raise RunLocked(text) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            raise RunLocked(
                f"the file system of {out} has no locks to keep other runs away ({error.strerror}). Choose a "
                "folder on another one with --out, or have it mounted with them (Lustre: -o flock; NFS: "
                "with its lock service)"
            ) from None
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}, since {now()}\n")
        stream.flush()
        try:
            yield
        finally:
            stream.truncate(0)


def _take(stream: TextIO) -> None:
    """Lock the file; try again for a while, as `galdist.status.holder` has it for an instant."""
    restarted = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    begun = time.monotonic()
    while True:
        try:
            return fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() - begun > (_RESTARTED if restarted else _PATIENCE):
                raise
            time.sleep(0.02 if time.monotonic() - begun < _PATIENCE else 1)


@contextlib.contextmanager
def _stop_signals(site: Site) -> Iterator[None]:
    """Inside, signals that ask to stop raise `KeyboardInterrupt` with their number.

    A second one while the first is obeyed changes nothing, but for Ctrl-C: then nobody waits any longer.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    told = False

    def stop(number: int, frame: object) -> None:
        nonlocal told
        if not told or number == signal.SIGINT:
            told = True
            raise KeyboardInterrupt(number)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup sets it
        numbers.append(signal.SIGHUP)
    if site.launcher in ("slurm", "allocation"):
        numbers += _LIMIT
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
