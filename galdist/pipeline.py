"""Runs the steps of a run file: in order, each at most once, from where they stopped.

Every step has a folder in the run's folder; `galdist.plan` tells which of them hold their result already. A
result that no longer fits is moved to ``.replaced/`` and moved back when its configuration returns, so
nothing computed is lost. A step's done marker is written last, so a run may be killed at any moment and
started again.
"""

import contextlib
import datetime
import fcntl
import os
import platform
import re
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO

import yaml

from galdist import provenance
from galdist.config import Run
from galdist.plan import CONFIG, DONE, PROVENANCE, PlannedStep, plan, read_record, replaced_folder
from galdist.stages import STAGES, Stage
from galdist.status import PLAN, duration, size_text, tree_size
from hpc import durable, launch, progress
from hpc.progress import Progress
from hpc.site import Site
from hpc.strict import Problem, SettingsError

State = Literal["waiting", "running", "done", "kept", "failed", "blocked"]

_TICK = 0.1  # seconds between looks at the running jobs
_PATIENCE = 1.0  # seconds to wait for a run's folder


class RunLocked(RuntimeError):
    """Another process works in the run's folder."""


class StepFailed(RuntimeError):
    """At least one step failed. ``str()`` says what happened, step by step."""


class Interrupted(RuntimeError):
    """The run was asked to stop (Ctrl-C, SIGTERM); its jobs have ended."""

    def __init__(self, number: int, names: list[str]) -> None:
        self.exit_code = 128 + number
        super().__init__(f"stopped in {', '.join(names)}" if names else "stopped")


@dataclass
class StepView:
    """What a display shows of a step."""

    name: str
    stage: str
    state: State
    detail: str = ""
    progress: Progress | None = None
    started: float = 0.0
    seconds: float = 0.0
    seconds_left: float | None = None


@dataclass
class RunView:
    """What a display shows of a run."""

    name: str
    folder: Path
    steps: list[StepView]
    seconds_left: float | None = None
    """None while nothing is known of a step to come."""


@dataclass
class _Running:
    planned: PlannedStep
    job: launch.Job
    view: StepView
    record: dict[str, Any]
    seconds_before: float
    """What earlier, interrupted attempts took."""


@dataclass
class _State:
    """The run while it goes on."""

    out: Path
    site: Site
    run_seed: int
    view: RunView
    planned: dict[str, PlannedStep]
    waiting: dict[str, PlannedStep] = field(default_factory=dict)
    running: dict[str, _Running] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)


def execute(
    run: Run,
    out: Path,
    site: Site | None = None,
    show: Callable[[RunView], None] = lambda view: None,
    start_from: str | None = None,
    only: str | None = None,
    stages: Mapping[str, Stage] = STAGES,
) -> None:
    """Do every step that is not done.

    Parameters
    ----------
    out:
        The run's folder.
    show:
        Called with the state of the run several times a second.
    start_from:
        This step and those that depend on it are computed again.
    only:
        Only this step.

    Raises
    ------
    hpc.strict.SettingsError, RunLocked, StepFailed, Interrupted
    """
    site = site or Site()
    _check_launchers(plan(run, out, start_from, only, stages), site)  # before the folder is made
    out.mkdir(parents=True, exist_ok=True)
    with _lock(out), _stop_signals():
        steps = plan(run, out, start_from, only, stages)
        durable.write_text(out / "run.yaml", run.to_yaml())
        durable.write_json(out / PLAN, {entry.name: entry.fingerprint for entry in steps})
        for entry in reversed(steps):  # what is read goes last: killed in between, the rest is computed again
            if entry.again and entry.runs and (out / entry.name).exists():
                _put_aside(out, entry.name, restorable=False)
        view = RunView(run.file.name, out, [_first_view(entry) for entry in steps])
        state = _State(out, site, run.file.seed, view, {entry.name: entry for entry in steps})
        for entry in steps:
            if entry.runs:
                state.waiting[entry.name] = entry
            elif only is None or entry.name in state.planned[only].inputs:
                _take_back(out, entry)
        try:
            _loop(state, show)
        except BaseException as stop:
            names = list(state.running)
            for running in state.running.values():
                running.job.cancel()
                _write_record(out, running, running.job.poll(), stopped=True)
            if isinstance(stop, KeyboardInterrupt):
                raise Interrupted(stop.args[0] if stop.args else signal.SIGINT, names) from None
            raise
    if state.messages:
        raise StepFailed("\n\n".join(state.messages))


def _check_launchers(steps: list[PlannedStep], site: Site) -> None:
    mpi = [entry for entry in steps if entry.runs and entry.stage.runtime == "mpi" and entry.ranks > 1]
    if mpi and site.launcher == "local":
        try:
            site.find_mpirun()
        except FileNotFoundError as error:
            raise SettingsError("site", [Problem(("steps", mpi[0].name), str(error))]) from None


def _first_view(entry: PlannedStep) -> StepView:
    return StepView(entry.name, entry.step.stage, "waiting" if entry.runs else "kept", entry.why)


def _loop(state: _State, show: Callable[[RunView], None]) -> None:
    views = {view.name: view for view in state.view.steps}
    while state.waiting or state.running:
        for name, entry in list(state.waiting.items()):
            stuck = [other for other in entry.inputs if views[other].state in ("failed", "blocked")]
            if stuck:
                views[name].state, views[name].detail = "blocked", f"needs {', '.join(stuck)}"
                del state.waiting[name]
            # On one machine a step has all cores, so one runs at a time.
            elif not state.running and all(views[other].state in ("done", "kept") for other in entry.inputs):
                del state.waiting[name]
                state.running[name] = _start(state, entry, views[name])
        for name, running in list(state.running.items()):
            view = running.view
            view.progress = progress.read(state.out / name / "progress.json")
            view.seconds = time.time() - view.started
            outcome = running.job.poll()
            if outcome is not None:
                del state.running[name]
                _finish(state, running, outcome)
        _estimate(state)
        show(state.view)
        if state.running:
            time.sleep(_TICK)


def _start(state: _State, entry: PlannedStep, view: StepView) -> _Running:
    name, folder = entry.name, state.out / entry.name
    _make_room(state.out, entry)
    before = read_record(folder)
    seconds_before = _seconds_so_far(folder, before) if before else 0.0
    record = {
        "step": name,
        "stage": entry.step.stage,
        "fingerprint": entry.fingerprint,
        "inputs": entry.inputs,
        "external": entry.external,
        "seed": getattr(entry.config, "seed", None),
        "run_seed": state.run_seed,
        "ranks": entry.ranks,
        "runtime": entry.stage.runtime,
        "versions": provenance.versions(),
        "git_commit": provenance.git_commit(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "command": sys.argv,
        "started": _now(),
        "finished": None,
        "seconds": seconds_before,
        "peak_memory": before.get("peak_memory", {}),
        "error": None,
    }
    durable.write_json(folder / PROVENANCE, record)
    config = entry.config.model_dump(mode="json")
    durable.write_text(folder / CONFIG, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        log.write(f"--- {record['started']} {name} on {record['host']}\n")
    view.state, view.started, view.detail = "running", time.time(), entry.why
    job = launch.submit(
        "galdist.stages:call",
        {
            "function": entry.stage.function,
            "config": config,
            "inputs": {
                role: [str((state.out / other).absolute()) for other in entry.step.inputs.get(role, ())]
                for role in entry.stage.roles
            },
            "out": str(folder.absolute()),
        },
        folder,
        entry.stage.runtime,
        entry.step.resources.model_copy(update={"ranks": entry.ranks}),
        state.site,
    )
    return _Running(entry, job, view, record, seconds_before)


def _finish(state: _State, running: _Running, outcome: launch.Outcome) -> None:
    name, view = running.planned.name, running.view
    folder = state.out / name
    _write_record(state.out, running, outcome)
    if outcome.failures:
        view.state, view.detail = "failed", str(outcome.failures[0]).splitlines()[0]
        state.messages.append(
            f"step {name} failed after {duration(view.seconds)}: {outcome.describe()}\nits folder: {folder}"
        )
        return
    shutil.rmtree(folder / ".job", ignore_errors=True)
    size = tree_size(folder)
    durable.write_json(
        folder / DONE, {"fingerprint": running.planned.fingerprint, "finished": _now(), "bytes": size}
    )
    view.state = "done"
    peak = max(running.record["peak_memory"].values(), default=0)
    view.detail = f"{size_text(size)}, peak memory {size_text(peak)} a process"


def _write_record(
    out: Path, running: _Running, outcome: launch.Outcome | None, stopped: bool = False
) -> None:
    """Write down how an attempt ended; one that was ``stopped`` is neither finished nor failed."""
    running.record["seconds"] = running.seconds_before + time.time() - running.view.started
    if outcome is not None:
        peaks = running.record["peak_memory"]  # of earlier attempts
        running.record["peak_memory"] = peaks | {
            who: max(peak, peaks.get(who, 0)) for who, peak in outcome.peak_memory.items()
        }
    if outcome is not None and not stopped:
        running.record["hosts"] = sorted(set(outcome.hosts))
        running.record["error"] = str(outcome.failures[0]) if outcome.failures else None
        running.record["finished"] = None if outcome.failures else _now()
    durable.write_json(out / running.planned.name / PROVENANCE, running.record)


def _seconds_so_far(folder: Path, before: Mapping[str, Any]) -> float:
    """What earlier attempts took; of one that was killed, the time to its last sign of life."""
    if before["seconds"] or before["error"]:
        return float(before["seconds"])
    last = progress.read(folder / "progress.json")
    started = datetime.datetime.fromisoformat(before["started"]).timestamp()
    return max(0.0, last.time - started) if last else 0.0


def _make_room(out: Path, entry: PlannedStep) -> None:
    """Leave the step's folder with what belongs to its fingerprint, or empty."""
    name, folder = entry.name, out / entry.name
    if folder.exists() and read_record(folder).get("fingerprint") != entry.fingerprint:
        _put_aside(out, name)
    if not entry.again:
        _take_back(out, entry)
    folder.mkdir(exist_ok=True)


def _take_back(out: Path, entry: PlannedStep) -> None:
    """Move a result that was put aside back into its place, and what is there out of the way."""
    folder = out / entry.name
    kept = replaced_folder(out, entry.name, entry.fingerprint)
    if read_record(kept).get("fingerprint") != entry.fingerprint:
        return
    if read_record(folder).get("fingerprint") == entry.fingerprint:
        return
    if folder.exists():
        _put_aside(out, entry.name)
    kept.rename(folder)


def _put_aside(out: Path, name: str, restorable: bool = True) -> None:
    """Move a step's folder to ``.replaced/<step>-<fingerprint>``.

    What shall not come back gets a number, and takes the place of the step's last one of this kind.
    """
    folder = out / name
    launch.end_leftovers(folder)
    place = replaced_folder(out, name, str(read_record(folder).get("fingerprint", "unknown")))
    place.parent.mkdir(exist_ok=True)
    numbered = next(
        path for number in range(1, 10**6) if not (path := place.with_name(f"{place.name}.{number}")).exists()
    )
    if restorable and place.exists():
        place.rename(numbered)
    folder.rename(place if restorable else numbered)
    for copy in place.parent.iterdir():
        # Of what shall not come back one is enough. What no step made (of an unknown fingerprint) stays.
        if copy != numbered and numbered.exists() and re.fullmatch(rf"{name}-[0-9a-f]{{8}}\.\d+", copy.name):
            shutil.rmtree(copy)


def _estimate(state: _State) -> None:
    """Time left: of what runs from its rate, of what waits from earlier runs or the run file's ratios."""
    spent = expected = 0.0
    for view in state.view.steps:
        entry = state.planned[view.name]
        if entry.step.expected and (view.state == "done" or (view.state == "kept" and entry.measured)):
            spent += view.seconds or entry.expected or 0.0
            expected += entry.step.expected
    speed = spent / expected if expected else 1.0
    active = [view for view in state.view.steps if view.state in ("running", "waiting")]
    total: float | None = 0.0 if active else None
    for view in active:
        entry, left = state.planned[view.name], None
        if entry.expected is not None:
            left = entry.expected * (1.0 if entry.measured else speed)
            left = max(0.0, left - view.seconds)
        if view.state == "running" and view.progress is not None and view.progress.seconds_left is not None:
            left = view.progress.seconds_left
        view.seconds_left = left if view.state == "running" else None
        total = None if total is None or left is None else total + left
    state.view.seconds_left = total


@contextlib.contextmanager
def _lock(out: Path) -> Iterator[None]:
    """Hold the run's folder. The lock is the kernel's: that of a killed process is gone with it."""
    with open(out / ".lock", "a+", encoding="utf-8") as stream:
        try:
            _take(stream)
        except BlockingIOError:
            stream.seek(0)
            raise RunLocked(
                f"{out} is in use by another run: {stream.read().strip() or 'it has just started'}. "
                "Wait for it, stop it, or choose another folder with --out"
            ) from None
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}, since {_now()}\n")
        stream.flush()
        try:
            yield
        finally:
            stream.truncate(0)


def _take(stream: TextIO) -> None:
    """Lock the file; try again for a moment, as `galdist.status.holder` has it for an instant."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            return fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


@contextlib.contextmanager
def _stop_signals() -> Iterator[None]:
    """Inside, SIGINT and SIGTERM raise `KeyboardInterrupt` with their number."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
