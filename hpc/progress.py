"""Progress of a job, as a file, so that it can be followed from any process and any node.

The launcher names the file in ``HPC_PROGRESS``; a function that reports without one reports to nobody.
"""

import os
import time
from pathlib import Path
from typing import Any

from hpc import durable

VARIABLE = "HPC_PROGRESS"
_INTERVAL = 0.2  # seconds between writes: a report must cost nothing in an inner loop
_state: dict[str, Any] = {}
_written = 0.0


def report(done: float, total: float, note: str = "") -> None:
    """Say that ``done`` of ``total`` units of the job are finished. Call it on one rank only."""
    _state.update(done=done, total=total, note=note)
    _write(force=done >= total)


def link(name: str, address: str) -> None:
    """Publish an address people may open while the job runs (a dashboard)."""
    _state.setdefault("links", {})[name] = address
    _write(force=True)


def _write(force: bool) -> None:
    global _written
    path = os.environ.get(VARIABLE)
    now = time.time()
    if path is None or (not force and now - _written < _INTERVAL):
        return
    _written = now
    durable.write_json(Path(path), {**_state, "time": now})
