"""Runs the steps of a run file: in order, each at most once, from where they stopped.

Every step has a folder in the run's folder. Its `fingerprint` covers the stage, the resolved configuration and the
fingerprints of its inputs; a folder whose done marker carries that fingerprint is not computed again. A result that
no longer fits is moved to ``.replaced/`` and moved back when its configuration returns, so nothing computed is lost.
Only the finished files of a folder count, so a run may be killed at any moment.
"""

import contextlib
import datetime
import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel
from pydantic_core import to_jsonable_python

import galdist
from galdist.config import ExternalPath, Run, Step, external_paths
from galdist.stages import STAGES, Stage
from hpc import durable, launch, progress
from hpc.progress import Progress
from hpc.site import Site
from hpc.strict import Problem, SettingsError, StrictModel

State = Literal["waiting", "running", "done", "kept", "failed", "blocked"]

PROVENANCE, DONE, CONFIG = "provenance.json", "done.json", "config.yaml"
_REPLACED = ".replaced"
_TICK = 0.1  # seconds between looks at the running jobs
_VERSIONS = (
    "numpy scipy pandas numba h5py hdf5plugin zarr numcodecs xarray dask distributed mpi4py mpich torch safetensors "
    "pydantic nbodykit pmesh pfft-python classylss colossus matplotlib"
).split()


class RunLocked(RuntimeError):
    """Another process works in the run's folder."""


class StepFailed(RuntimeError):
    """At least one step failed. ``str()`` says what happened, step by step."""


class Interrupted(RuntimeError):
    """The run was asked to stop (Ctrl-C, SIGTERM); its jobs have ended."""

    def __init__(self, number: int, names: list[str]) -> None:
        self.exit_code = 128 + number
        super().__init__(f"stopped in {', '.join(names)}" if names else "stopped")


# ---------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class PlannedStep:
    """A step and what is to be done about it."""

    step: Step
    stage: Stage
    config: StrictModel
    fingerprint: str
    inputs: dict[str, str]
    """Input step -> its fingerprint."""
    external: dict[str, str]
    """External path -> fingerprint of what is there."""
    runs: bool
    why: str
    """For people: why it runs, or why it does not."""
    fresh: bool = False
    """Computed again although there is a result (``--from``)."""
    expected: float | None = None
    """Seconds it will take, from earlier runs or the run file."""
    measured: bool = False
    """Whether ``expected`` is a measurement."""

    @property
    def ranks(self) -> int:
        """Number of processes."""
        return self.step.resources.ranks or self.stage.ranks


def plan(
    run: Run,
    out: Path,
    start_from: str | None = None,
    only: str | None = None,
    stages: Mapping[str, Stage] = STAGES,
) -> list[PlannedStep]:
    """What `execute` would do, in order. Reads the run's folder and changes nothing.

    Raises
    ------
    hpc.strict.SettingsError
        for an external path where nothing is, a step name that does not exist, and inputs of an ``only`` step
        that are not there.
    """
    steps = run.steps
    for option, name in (("--from", start_from), ("--only", only)):
        if name is not None and name not in steps:
            from hpc.strict import nearest

            raise SettingsError(option, [Problem((), f"there is no step {name!r}{nearest(name, steps)}")])
    earlier = _durations(out)
    planned: dict[str, PlannedStep] = {}
    problems: list[Problem] = []
    fresh: set[str] = set()
    for name, step in steps.items():
        config = run.configs[name]
        before = _read(out / name / PROVENANCE) or {}
        try:
            external = {str(path): _listing(path, before) for path in external_paths(config)}
        except FileNotFoundError as error:
            problems.append(Problem(("steps", name, "config"), str(error)))
            external = {}
        inputs = {other: planned[other].fingerprint for names in step.inputs.values() for other in names}
        fingerprint = durable.fingerprint(
            {
                "stage": step.stage,
                "config": _without_places(config, external),
                "inputs": {role: [[n, inputs[n]] for n in names] for role, names in step.inputs.items()},
            }
        )
        if name == start_from or any(other in fresh for other in inputs):
            fresh.add(name)
        runs, why = _decide(out, name, fingerprint, step, config, inputs, external, before, planned)
        if name in fresh:
            runs, why = True, "asked for with --from" if name == start_from else f"follows {start_from}"
        if only is not None and name != only:
            if runs and any(name in names for names in steps[only].inputs.values()):
                problems.append(Problem(("--only", only), f"reads {name}, which is not done ({why})"))
            runs, why = False, "not asked for"
        measured = earlier.get(name)
        planned[name] = PlannedStep(
            step,
            stages[step.stage],
            config,
            fingerprint,
            inputs,
            external,
            runs,
            why,
            name in fresh,
            measured if measured is not None else step.expected,
            measured is not None,
        )
    if problems:
        raise SettingsError("run file", problems)
    return list(planned.values())


def _decide(
    out: Path,
    name: str,
    fingerprint: str,
    step: Step,
    config: StrictModel,
    inputs: dict[str, str],
    external: dict[str, str],
    before: dict[str, Any],
    planned: Mapping[str, PlannedStep],
) -> tuple[bool, str]:
    """Whether the step runs, and why."""
    folder, kept = out / name, _replaced(out, name, fingerprint)
    if before.get("fingerprint") == fingerprint:
        if (folder / DONE).exists():
            return False, "done"
        return True, "failed before" if before.get("error") else "continues"
    if kept is not None:
        return (
            (False, "done before; moved back") if (kept / DONE).exists() else (True, "continues; moved back")
        )
    if not before:
        return True, "new"
    changes = []
    if before.get("stage") != step.stage:
        changes.append(f"stage changed: {before.get('stage')} -> {step.stage}")
    old = yaml.safe_load((folder / CONFIG).read_text()) if (folder / CONFIG).exists() else {}
    changes += [f"config changed: {text}" for text in _differences(old, config.model_dump(mode="json"))]
    changes += [
        f"{path} changed"
        for path, listing in external.items()
        if before.get("external", {}).get(path, listing) != listing
    ]
    old_inputs = before.get("inputs", {})
    changed = [other for other in inputs if other in old_inputs and old_inputs[other] != inputs[other]]
    changes += [f"input {other} changed" for other in changed]
    changes += [f"input {other} added" for other in inputs if other not in old_inputs]
    changes += [f"input {other} removed" for other in old_inputs if other not in inputs]
    return True, "; ".join(changes[:3]) + (f"; {len(changes) - 3} more" if len(changes) > 3 else "")


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [
            text
            for key in keys
            if old.get(key) != new.get(key)
            for text in _differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        ]
    return [f"{path}: {_short(old)} -> {_short(new)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text.strip('"') if len(text) <= 40 else text[:37] + "..."


def _listing(path: ExternalPath, before: Mapping[str, Any]) -> str:
    """Fingerprint of names, sizes and times of the files at ``path``.

    Where the data is gone but a finished step remembers it, what it remembers: raw data may be deleted once used.
    """
    if not path.exists():
        known = before.get("external", {}).get(str(path))
        if known is None or before.get("finished") is None:
            raise FileNotFoundError(f"there is nothing at {path}")
        return str(known)
    entries = []
    seen: set[str] = set()
    for folder, folders, names in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        for name in names:
            file = Path(folder, name)
            with contextlib.suppress(FileNotFoundError):  # a link to nowhere
                facts = file.stat()
                entries.append([str(file.relative_to(path)), facts.st_size, facts.st_mtime_ns])
    if path.is_file():
        facts = path.stat()
        entries.append([path.name, facts.st_size, facts.st_mtime_ns])
    return durable.fingerprint(sorted(entries))


def _without_places(value: Any, external: Mapping[str, str]) -> Any:
    """The configuration as plain data, external paths replaced by what is there: moved data is the same data."""
    if isinstance(value, ExternalPath):
        return {"external": external.get(str(value))}
    if isinstance(value, BaseModel):
        return {name: _without_places(getattr(value, name), external) for name in type(value).model_fields}
    if isinstance(value, Mapping):
        return {str(key): _without_places(item, external) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((_without_places(item, external) for item in value), key=str)
    if isinstance(value, list | tuple):
        return [_without_places(item, external) for item in value]
    return to_jsonable_python(value)


def _durations(out: Path) -> dict[str, float]:
    """Step -> seconds that it took the last time, whatever its configuration was."""
    found: dict[str, tuple[str, float]] = {}
    for path in [*out.glob(f"*/{PROVENANCE}"), *out.glob(f"{_REPLACED}/*/{PROVENANCE}")]:
        entry = _read(path) or {}
        if entry.get("finished") and found.get(entry["step"], ("",))[0] < entry["finished"]:
            found[entry["step"]] = (entry["finished"], float(entry["seconds"]))
    return {name: seconds for name, (_, seconds) in found.items()}


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return dict(durable.read_json(path))
    except FileNotFoundError:
        return None


def _replaced(out: Path, name: str, fingerprint: str) -> Path | None:
    """The folder in which this step's result for this fingerprint was put aside."""
    folder = out / _REPLACED / f"{name}-{fingerprint[:8]}"
    return folder if (_read(folder / PROVENANCE) or {}).get("fingerprint") == fingerprint else None


# ------------------------------------------------------------------------------------------- execute


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
    provenance: dict[str, Any]
    seconds_before: float
    """What earlier, interrupted attempts took."""


@dataclass
class _State:
    """The run while it goes on."""

    out: Path
    site: Site
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
    plan(run, out, start_from, only, stages)  # what is wrong is said before the folder is made
    out.mkdir(parents=True, exist_ok=True)
    with _lock(out), _stop_signals():
        steps = plan(run, out, start_from, only, stages)
        durable.write_text(out / "run.yaml", run.to_yaml())
        durable.write_json(out / ".plan.json", {entry.step.name: entry.fingerprint for entry in steps})
        for entry in steps:
            if entry.fresh and entry.runs and (out / entry.step.name).exists():
                _put_aside(out, entry.step.name, restorable=False)
        view = RunView(run.file.name, out, [_first_view(entry) for entry in steps])
        state = _State(out, site or Site(), view, {entry.step.name: entry for entry in steps})
        for entry in steps:
            if entry.runs:
                state.waiting[entry.step.name] = entry
            else:
                _take_back(out, entry)
        try:
            _loop(state, show)
        except KeyboardInterrupt as stop:
            number = stop.args[0] if stop.args else signal.SIGINT
            names = list(state.running)
            for running in state.running.values():
                running.job.cancel()
                _write_provenance(out, running, None)
            raise Interrupted(number, names) from None
    if state.messages:
        raise StepFailed("\n\n".join(state.messages))


def _first_view(entry: PlannedStep) -> StepView:
    return StepView(entry.step.name, entry.step.stage, "waiting" if entry.runs else "kept", entry.why)


def _loop(state: _State, show: Callable[[RunView], None]) -> None:
    views = {view.name: view for view in state.view.steps}
    while state.waiting or state.running:
        for name, entry in list(state.waiting.items()):
            if any(views[other].state in ("failed", "blocked") for other in entry.inputs):
                views[name].state, views[name].detail = "blocked", "waits for a step that failed"
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
    name, folder = entry.step.name, state.out / entry.step.name
    _make_room(state.out, entry)
    before = _read(folder / PROVENANCE)
    seconds_before = _seconds_so_far(folder, before) if before else 0.0
    provenance = {
        "step": name,
        "stage": entry.step.stage,
        "fingerprint": entry.fingerprint,
        "inputs": entry.inputs,
        "external": entry.external,
        "seed": getattr(entry.config, "seed", None),
        "ranks": entry.ranks,
        "runtime": entry.stage.runtime,
        "versions": versions(),
        "git_commit": git_commit(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "command": sys.argv,
        "started": _now(),
        "finished": None,
        "seconds": seconds_before,
        "peak_memory": {},
        "error": None,
    }
    durable.write_json(folder / PROVENANCE, provenance)
    config = entry.config.model_dump(mode="json")
    durable.write_text(folder / CONFIG, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        log.write(f"--- {provenance['started']} {name} on {provenance['host']}\n")
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
    return _Running(entry, job, view, provenance, seconds_before)


def _finish(state: _State, running: _Running, outcome: launch.Outcome) -> None:
    name, view = running.planned.step.name, running.view
    folder = state.out / name
    _write_provenance(state.out, running, outcome)
    if outcome.failures:
        view.state, view.detail = "failed", str(outcome.failures[0]).splitlines()[0]
        state.messages.append(
            f"step {name} failed after {duration(view.seconds)}: {outcome.describe()}\nall of it: {folder}"
        )
        return
    shutil.rmtree(folder / ".job")
    size = tree_size(folder)
    durable.write_json(
        folder / DONE, {"fingerprint": running.planned.fingerprint, "finished": _now(), "bytes": size}
    )
    view.state = "done"
    peak = max(outcome.peak_memory.values(), default=0)
    view.detail = f"{size_text(size)}, peak memory {size_text(peak)} a process"


def _write_provenance(out: Path, running: _Running, outcome: launch.Outcome | None) -> None:
    running.provenance["seconds"] = running.seconds_before + time.time() - running.view.started
    if outcome is not None:
        running.provenance["peak_memory"] = outcome.peak_memory
        running.provenance["error"] = str(outcome.failures[0]) if outcome.failures else None
        running.provenance["finished"] = None if outcome.failures else _now()
    durable.write_json(out / running.planned.step.name / PROVENANCE, running.provenance)


def _seconds_so_far(folder: Path, before: Mapping[str, Any]) -> float:
    """What earlier attempts took; of one that was killed, the time to its last sign of life."""
    if before["seconds"] or before["error"]:
        return float(before["seconds"])
    last = progress.read(folder / "progress.json")
    started = datetime.datetime.fromisoformat(before["started"]).timestamp()
    return max(0.0, last.time - started) if last else 0.0


def _make_room(out: Path, entry: PlannedStep) -> None:
    """Leave the step's folder with what belongs to its fingerprint, or empty."""
    name, folder = entry.step.name, out / entry.step.name
    if folder.exists() and (_read(folder / PROVENANCE) or {}).get("fingerprint") != entry.fingerprint:
        _put_aside(out, name)
    if not entry.fresh:
        _take_back(out, entry)
    folder.mkdir(exist_ok=True)


def _take_back(out: Path, entry: PlannedStep) -> None:
    """Move a result that was put aside back into its place, and what is there out of the way."""
    folder = out / entry.step.name
    kept = _replaced(out, entry.step.name, entry.fingerprint)
    if kept is None or (_read(folder / PROVENANCE) or {}).get("fingerprint") == entry.fingerprint:
        return
    if folder.exists():
        _put_aside(out, entry.step.name)
    kept.rename(folder)


def _put_aside(out: Path, name: str, restorable: bool = True) -> None:
    """Move a step's folder to ``.replaced/<step>-<fingerprint>``; what is not to come back gets a number too."""
    folder = out / name
    launch.end_leftovers(folder)
    fingerprint = str((_read(folder / PROVENANCE) or {}).get("fingerprint", "unknown"))
    place = out / _REPLACED / f"{name}-{fingerprint[:8]}"
    place.parent.mkdir(exist_ok=True)
    numbered = next(
        path for number in range(1, 10**6) if not (path := place.with_name(f"{place.name}.{number}")).exists()
    )
    if restorable and place.exists():
        place.rename(numbered)
    folder.rename(place if restorable else numbered)


def _estimate(state: _State) -> None:
    """Time left: of running steps from their rate, of the others from earlier runs or the run file's ratios."""
    spent = expected = 0.0
    for view in state.view.steps:
        entry = state.planned[view.name]
        if view.state == "done" and entry.step.expected:
            spent, expected = spent + view.seconds, expected + entry.step.expected
    speed = spent / expected if expected else 1.0
    total: float | None = 0.0
    for view in state.view.steps:
        entry = state.planned[view.name]
        if view.state not in ("running", "waiting"):
            continue
        left = None
        if entry.expected is not None:
            left = entry.expected * (1.0 if entry.measured else speed)
            left = max(0.0, left - view.seconds)
        if view.state == "running" and view.progress is not None and view.progress.seconds_left is not None:
            left = view.progress.seconds_left
        view.seconds_left = left if view.state == "running" else None
        total = None if total is None or left is None else total + left
    state.view.seconds_left = total


# ---------------------------------------------------------------------------------------------- lock


@contextlib.contextmanager
def _lock(out: Path) -> Iterator[None]:
    """Hold the run's folder. The lock is the kernel's: that of a killed process is gone with it."""
    with open(out / ".lock", "a+", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
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


def holder(out: Path) -> str | None:
    """Who works in the run's folder now; None for nobody."""
    try:
        with open(out / ".lock", encoding="utf-8") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return stream.read().strip() or "a process that has just started"
    except FileNotFoundError:
        return None
    return None


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


# --------------------------------------------------------------------------------------------- facts


@dataclass(frozen=True)
class StepStatus:
    """A step's folder as it is found."""

    name: str
    stage: str
    state: str
    """``done``, ``running``, ``failed``, ``stopped``, ``stale`` (of another configuration) or ``pending``."""
    seconds: float | None
    bytes: int
    peak_memory: int
    """Largest of one process [bytes]."""
    detail: str


def status(out: Path) -> list[StepStatus]:
    """The steps of a run, from its folder alone.

    Raises
    ------
    hpc.strict.SettingsError
        where there is no run.
    """
    planned = _read(out / ".plan.json")
    if planned is None:
        raise SettingsError(str(out), [Problem((), "there is no run here (no .plan.json)")])
    stages = {step["name"]: step["stage"] for step in yaml.safe_load((out / "run.yaml").read_text())["steps"]}
    busy = holder(out) is not None
    return [_status(out / name, stages[name], fingerprint, busy) for name, fingerprint in planned.items()]


def _status(folder: Path, stage: str, fingerprint: str, busy: bool) -> StepStatus:
    entry = _read(folder / PROVENANCE)
    if entry is None:
        return StepStatus(folder.name, stage, "pending", None, 0, 0, "")
    done = _read(folder / DONE)
    last = progress.read(folder / "progress.json")
    seconds, detail = float(entry["seconds"]), ""
    if entry["fingerprint"] != fingerprint:
        state = "stale"
    elif done is not None:
        state = "done"
    elif entry["error"]:
        state, detail = "failed", entry["error"].splitlines()[0]
    elif busy and (folder / ".job").exists():
        state = "running"
        seconds += time.time() - datetime.datetime.fromisoformat(entry["started"]).timestamp()
    else:
        state = "stopped"
    if state in ("running", "stopped") and last is not None and last.total:
        detail = f"{100 * last.done / last.total:.0f}% {last.note}"
    size = done["bytes"] if done else tree_size(folder)
    peak = max(entry["peak_memory"].values(), default=0)
    return StepStatus(folder.name, stage, state, seconds, size, peak, detail)


def results(out: Path) -> list[dict[str, Any]]:
    """The rows of every step's ``metrics.json``, each with its ``step``, in the order of the run."""
    planned = _read(out / ".plan.json") or {}
    return [
        {"step": name, **row}
        for name in planned
        if (out / name / DONE).exists() and (out / name / "metrics.json").exists()
        for row in durable.read_json(out / name / "metrics.json")
    ]


def reports(out: Path) -> list[Path]:
    """The HTML reports that the run's steps wrote."""
    planned = _read(out / ".plan.json") or {}
    return [path for name in planned if (path := out / name / "report.html").exists()]


def versions() -> dict[str, str]:
    """Versions of galdist, Python and the packages that make the numbers."""
    found = {"galdist": galdist.__version__, "python": platform.python_version()}
    for name in _VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def git_commit() -> str | None:
    """Commit of the source tree galdist runs from, with ``-dirty`` where it was changed; None when installed."""
    file = Path(galdist.__file__)

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(file.parent), *arguments],
                capture_output=True,
                text=True,
                check=False,
                timeout=10,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", file.name) is None:
        return None
    commit = git("rev-parse", "HEAD")
    return f"{commit}-dirty" if git("status", "--porcelain", "--untracked-files=no") else commit


def tree_size(folder: Path) -> int:
    """Bytes of all files under ``folder``."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total


def size_text(n_bytes: float) -> str:
    """``"12 MB"``."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if n_bytes >= 10 or unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} TB"


def duration(seconds: float) -> str:
    """``"0:42"``, ``"12:05"``, ``"3:07:12"``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
