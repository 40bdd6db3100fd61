"""What a run's folder tells: states of its steps, results, who works in it. Reads files only."""

import contextlib
import datetime
import fcntl
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from galdist.plan import DONE, read_record
from hpc import durable, launch, progress
from hpc.strict import Problem, SettingsError

PLAN = ".plan.json"


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


def steps_of(out: Path) -> list[StepStatus]:
    """The steps of a run, from its folder alone.

    Raises
    ------
    hpc.strict.SettingsError
        where there is no run.
    """
    planned = read_plan(out)
    if not planned or not (out / "run.yaml").exists():
        raise SettingsError(str(out), [Problem((), f"there is no run here (no {PLAN} and run.yaml)")])
    steps = yaml.safe_load((out / "run.yaml").read_text(encoding="utf-8"))["steps"]
    busy = holder(out) is not None
    # A run killed between its two files leaves steps without a plan: what they hold is not what was meant.
    return [_status(out / step["name"], step["stage"], planned.get(step["name"]), busy) for step in steps]


def _status(folder: Path, stage: str, fingerprint: str | None, busy: bool) -> StepStatus:
    entry = read_record(folder)
    if not entry:
        return StepStatus(folder.name, stage, "pending", None, 0, 0, "")
    done = durable.read_json(folder / DONE) if (folder / DONE).exists() else None
    last = progress.read(folder / "progress.json")
    seconds, detail = float(entry["seconds"]), ""
    if entry["fingerprint"] != fingerprint:
        state = "stale"
    elif done is not None:
        state = "done"
    elif entry["error"]:
        state, detail = "failed", entry["error"].splitlines()[0]
    elif busy and launch.is_running(folder):
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
