"""Progress of a job, as a file, so that it can be followed from any process and any node.

The launcher names the file in ``HPC_PROGRESS``; a function that reports without one reports to nobody.
"""

import contextlib
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from hpc import durable

VARIABLE = "HPC_PROGRESS"
_INTERVAL = 0.2  # seconds between writes: a report must cost nothing in an inner loop


@dataclass
class Progress:
    """How far a job is."""

    done: float = 0.0
    total: float = 0.0
    """Zero until the job has said."""
    note: str = ""
    links: dict[str, str] = field(default_factory=dict)
    """Addresses people may open while the job runs: name -> URL."""
    time: float = 0.0
    """When this was written, in seconds since the epoch."""
    first_done: float = 0.0
    """``done`` at the first report: what a resumed job found already made."""
    first_time: float = 0.0

    @property
    def seconds_left(self) -> float | None:
        """Time left at the rate since the first report; None while there is no rate."""
        worked, elapsed = self.done - self.first_done, self.time - self.first_time
        if worked <= 0 or elapsed <= 0:
            return None
        return max(0.0, (self.total - self.done) * elapsed / worked - (time.time() - self.time))


_now: dict[str, Progress] = {}  # by file: in the debug launcher one process runs several jobs
_written = 0.0


def start(path: str | os.PathLike[str]) -> None:
    """Send this process's reports to a file, from zero."""
    os.environ[VARIABLE] = str(path)
    _now.pop(str(path), None)


def report(done: float, total: float, note: str = "") -> None:
    """Say that ``done`` of ``total`` units of the job are finished. Call it on one rank only."""
    path = os.environ.get(VARIABLE)
    if path is None:
        return
    state = _now.setdefault(path, Progress())
    force = done >= total or note != state.note or not state.first_time
    state.done, state.total, state.note, state.time = float(done), float(total), note, time.time()
    if not state.first_time:
        state.first_done, state.first_time = state.done, state.time
    _write(path, state, force)


def link(name: str, address: str) -> None:
    """Publish an address people may open while the job runs (a dashboard)."""
    path = os.environ.get(VARIABLE)
    if path is None:
        return
    state = _now.setdefault(path, Progress())
    state.links[name], state.time = address, time.time()
    _write(path, state, force=True)


def read(path: str | os.PathLike[str]) -> Progress | None:
    """The last report in a progress file; None where there is none that can be read."""
    try:
        return Progress(**durable.read_json(path))
    except (FileNotFoundError, json.JSONDecodeError, TypeError):
        return None  # it is not flushed to the disk: a machine that goes down may leave it empty


def _write(path: str, state: Progress, force: bool) -> None:
    global _written
    if force or state.time - _written >= _INTERVAL:
        _written = state.time
        # A job does not end because the disk is too full to tell how far it is.
        with contextlib.suppress(durable.NotEnoughSpace), durable.room_for("progress", path):
            durable.write_json(Path(path), vars(state), sync=False)
