"""What a run's folder tells: states of its steps, results, who works in it. Reads files, and asks Slurm.

It works while the run's own process lives, on this machine or another one, and when only its jobs run on.
"""

import contextlib
import errno
import fcntl
import functools
import os
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from galdist.plan import DONE, durations, read_record
from hpc import durable, launch, progress
from hpc.progress import Progress
from hpc.strict import Problem, SettingsError

PLAN = ".plan.json"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a file system without locks says. No run can work there."""
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the first is ten times faster

State = Literal[
    "waiting", "queued", "running", "done", "kept", "failed", "blocked", "stopped", "stale", "pending"
]
"""While a run goes on, a step is ``waiting``, ``queued`` (in Slurm's queue), ``running``, ``done``, ``kept``
(done before), ``failed``, ``stopped`` or ``blocked``. From outside it is ``pending`` (not started),
``queued``, ``running``, ``done``, ``failed``, ``stopped`` or ``stale`` (of another configuration)."""


def waits(job: launch.JobInfo) -> bool:
    """Whether a job has not started, or waits to start again."""
    return job.state == "pending"


def on_cluster(job: launch.JobInfo | None) -> bool:
    """Whether a job is Slurm's, with a number people know it by, and not processes of one machine, which end
    with the run."""
    return job is not None and not job.id.startswith("pid ")


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
    job: launch.JobInfo | None = None


@dataclass
class RunView:
    """What a display shows of a run."""

    name: str
    folder: Path
    steps: list[StepView]
    seconds_left: float | None = None
    """None while nothing is known of a step to come."""


@dataclass(frozen=True)
class StepStatus:
    """A step's folder as it is found."""

    name: str
    stage: str
    state: State
    seconds: float | None
    bytes: int
    peak_memory: int
    """Largest of one process [bytes]."""
    detail: str
    progress: Progress | None = None
    job: launch.JobInfo | None = None


@dataclass(frozen=True)
class Forecast:
    """What is known of a step's duration before it runs."""

    inputs: Collection[str]
    expected: float | None
    """Seconds, from the run file: only ratios between steps count."""
    measured: float | None
    """Seconds that it took before."""


def estimate(
    steps: Sequence[StepView], forecasts: Mapping[str, Forecast], parallel: int | None
) -> float | None:
    """Fill in the time left of steps that run; returns that of the run [s], None where it is unknown.

    A step that runs is judged by its rate, one that waits by earlier runs, or by the run file's ratios and
    the speed at which others went. Steps run ``parallel`` at a time (None: all that may): the run takes as
    long as its longest chain, or as all its work shared out. Nobody knows the time in a queue.
    """
    spent = expected = 0.0
    for view in steps:
        known = forecasts[view.name]
        if known.expected and (view.state == "done" or (view.state == "kept" and known.measured is not None)):
            spent += view.seconds or known.measured or 0.0
            expected += known.expected
    speed = spent / expected if expected else 1.0
    ends: dict[str, float] = {}  # seconds until a step is done
    work = 0.0
    unknown = False
    for view in steps:
        view.seconds_left = None
        if view.state not in ("running", "queued", "waiting", "pending", "stopped", "stale"):
            continue
        known = forecasts[view.name]
        left = known.measured
        if left is None and known.expected is not None:
            left = known.expected * speed
        if left is not None:
            left = max(0.0, left - view.seconds)
        if view.state == "running":
            if view.progress is not None and view.progress.seconds_left is not None:
                left = view.progress.seconds_left
            view.seconds_left = left
        unknown = unknown or left is None
        work += left or 0.0
        ends[view.name] = (left or 0.0) + max((ends.get(name, 0.0) for name in known.inputs), default=0.0)
    if unknown or not ends:
        return None
    return max(max(ends.values()), work / parallel if parallel else 0.0)


def view(out: Path) -> RunView:
    """A run as it is now, for a display in any process and on any machine that sees its folder.

    Raises
    ------
    hpc.strict.SettingsError
        where there is no run.
    """
    declared = _declared(out)
    steps = [
        StepView(
            status.name,
            status.stage,
            status.state,
            status.detail,
            status.progress,
            time.time() - (status.seconds or 0.0),
            status.seconds or 0.0,
            job=status.job,
        )
        for status in _look(out, declared)
    ]
    shown = RunView(declared["name"], out, steps)
    if not any(step.state in ("running", "queued") for step in steps):
        return shown
    measured = durations(out)
    forecasts = {
        step["name"]: Forecast(
            [name for names in step.get("inputs", {}).values() for name in names],
            step.get("expected"),
            measured.get(step["name"]),
        )
        for step in declared["steps"]
    }
    lost: set[str] = set()  # what failed, and what waits for it
    place = {name: number for number, name in enumerate(read_plan(out))}
    order = sorted(steps, key=lambda step: place.get(step.name, 0))
    for step in order:
        if step.state == "failed" or lost.intersection(forecasts[step.name].inputs):
            lost.add(step.name)
    alone = any(step.job and not on_cluster(step.job) for step in steps if step.state == "running")
    shown.seconds_left = estimate([s for s in order if s.name not in lost], forecasts, 1 if alone else None)
    return shown


def steps_of(out: Path) -> list[StepStatus]:
    """The steps of a run as their folders are found, in the order of the run file.

    Raises
    ------
    hpc.strict.SettingsError
        where there is no run.
    """
    return [
        status if status.state in ("done", "pending") else replace(status, bytes=tree_size(out / status.name))
        for status in _look(out, _declared(out))
    ]


def _declared(out: Path) -> dict[str, Any]:
    """The resolved run file."""
    path = out / "run.yaml"
    if not (out / PLAN).exists() or not path.exists():
        raise SettingsError(str(out), [Problem((), f"there is no run here (no {PLAN} and run.yaml)")])
    return _read_run(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _read_run(path: Path, modified: int) -> dict[str, Any]:
    """Watching a run of a thousand steps reads its file once."""
    return dict(_LOADER(path.read_text(encoding="utf-8")).get_single_data())


def _look(out: Path, declared: Mapping[str, Any]) -> list[StepStatus]:
    # A run killed between its two files leaves steps without a plan: what they hold is not what was meant.
    planned, busy = read_plan(out), holder(out) is not None
    records = {step["name"]: read_record(out / step["name"]) for step in declared["steps"]}
    begun = [out / name for name, entry in records.items() if entry and not (out / name / DONE).exists()]
    jobs = launch.describe(begun)
    return [
        _status(out / step["name"], step["stage"], records[step["name"]], planned, busy, jobs)
        for step in declared["steps"]
    ]


def _status(
    folder: Path,
    stage: str,
    entry: Mapping[str, Any],
    planned: Mapping[str, str],
    busy: bool,
    jobs: Mapping[Path, launch.JobInfo],
) -> StepStatus:
    if not entry:
        return StepStatus(folder.name, stage, "pending", None, 0, 0, "")
    done = durable.read_json(folder / DONE) if (folder / DONE).exists() else None
    last, job = progress.read(folder / "progress.json"), jobs.get(folder)
    seconds, detail = float(entry["seconds"]), ""
    state: State
    if entry["fingerprint"] != planned.get(folder.name):
        state = "stale"
    elif done is not None:
        state = "done"
    elif entry["error"]:
        state, detail = "failed", entry["error"].splitlines()[0]
    elif job is not None and waits(job):
        state, detail = "queued", job.reason
    elif job is not None and job.state == "running" and (busy or on_cluster(job)):
        state = "running"
    elif job is not None and job.state == "completed" and busy and on_cluster(job):
        state = "running"  # whoever works here is about to see that it is done
    else:
        state = "stopped"
    if state == "running" and entry.get("running_since"):
        seconds += time.time() - entry["running_since"]
    if state in ("running", "stopped") and last is not None and last.total:
        detail = f"{100 * last.done / last.total:.0f}% {last.note}"
    if state == "stopped" and job is not None and job.state == "completed":
        detail = f"job {job.id} is completed; the next galdist run takes it over"
    return StepStatus(
        folder.name,
        stage,
        state,
        seconds,
        done["bytes"] if done else 0,
        max(entry["peak_memory"].values(), default=0),
        detail,
        last if state == "running" else None,
        job or _last_job(entry),
    )


def _last_job(entry: Mapping[str, Any]) -> launch.JobInfo | None:
    """The job that is over, as the step's record tells."""
    job = entry.get("job")
    return launch.JobInfo(job["id"], "ended", tuple(job["nodes"]), restarts=job["restarts"]) if job else None


def results(out: Path) -> list[dict[str, Any]]:
    """The rows of every step's ``metrics.json``, each with its ``step``, in the order of the run."""
    planned = read_plan(out)
    return [
        {"step": name, **row}
        for name in planned
        if (out / name / DONE).exists() and (out / name / "metrics.json").exists()
        for row in durable.read_json(out / name / "metrics.json")
    ]


def reports(out: Path) -> list[Path]:
    """The HTML reports that the run's steps wrote."""
    planned = read_plan(out)
    return [path for name in planned if (path := out / name / "report.html").exists()]


def read_plan(out: Path) -> dict[str, str]:
    """Step -> fingerprint that the last `galdist.pipeline.execute` meant it to have, in order."""
    return dict(durable.read_json(out / PLAN)) if (out / PLAN).exists() else {}


def holder(out: Path) -> str | None:
    """Who works in the run's folder now; None for nobody."""
    try:
        with open(out / ".lock", encoding="utf-8") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return stream.read().strip() or "a process that has just started"
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
    except FileNotFoundError:
        return None
    return None


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
