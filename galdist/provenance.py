"""What made a result: inputs, versions, commit, machine, what the step asked for and what it used."""

import contextlib
import datetime
import functools
import importlib.metadata
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import galdist
from galdist.plan import PROVENANCE, PlannedStep, read_record
from galdist.status import waits
from hpc import durable, launch, progress
from hpc.resources import Resources
from hpc.site import Site

_FRESH = 10.0  # seconds for which the commit is not looked up again: a thousand steps may start at once

PACKAGES = (
    "numpy",
    "scipy",
    "pandas",
    "numba",
    "h5py",
    "hdf5plugin",
    "zarr",
    "numcodecs",
    "xarray",
    "dask",
    "distributed",
    "dask-jobqueue",
    "submitit",
    "mpi4py",
    "mpich",
    "torch",
    "safetensors",
    "pydantic",
    "nbodykit",
    "pmesh",
    "pfft-python",
    "classylss",
    "colossus",
    "matplotlib",
)


class Record:
    """The provenance of a step, on disk from the moment the step starts.

    ``seconds`` in it are those that are over; while the step runs, the time since ``running_since`` comes on
    top. Time in a queue does not count.
    """

    def __init__(self, folder: Path, data: dict[str, Any]) -> None:
        self.data = data
        self._folder, self._before = folder, float(data["seconds"])
        self._attempts = list(data["attempts"])

    @classmethod
    def begin(
        cls, folder: Path, entry: PlannedStep, resources: Resources, site: Site, run_seed: int
    ) -> "Record":
        """Write down that an attempt at a step starts in ``folder``, after those that were there before."""
        before = read_record(folder)
        record = cls(
            folder,
            {
                "step": entry.name,
                "stage": entry.step.stage,
                "fingerprint": entry.fingerprint,
                "inputs": entry.inputs,
                "external": entry.external,
                "seed": getattr(entry.config, "seed", None),
                "run_seed": run_seed,
                "ranks": resources.ranks,
                "runtime": entry.stage.runtime,
                "asked": asked(site, resources),
                **_made_by(int(time.monotonic() / _FRESH)),
                "host": socket.gethostname(),
                "platform": platform.platform(),
                "command": sys.argv,
                "started": now(),
                "running_since": None if site.launcher == "slurm" else time.time(),
                "finished": None,
                "seconds": seconds_so_far(folder, before),
                "peak_memory": before.get("peak_memory", {}),
                "attempts": _attempts(before),
                "job": None,
                "usage": {},
                "error": None,
            },
        )
        record._write()
        return record

    @classmethod
    def resume(cls, folder: Path, over: bool) -> "Record":
        """Go on with the record of an attempt that another process began, and that may be ``over``."""
        record = cls(folder, read_record(folder))
        last = progress.read(folder / "progress.json")
        if record.data["running_since"] is None and last is not None:
            record.data["running_since"] = last.first_time
        if over:
            record.data |= {"seconds": seconds_so_far(folder, record.data), "running_since": None}
        return record

    @property
    def seconds(self) -> float:
        """Running time of this attempt [s]."""
        return float(self.data["seconds"]) - self._before + self._running()

    def follow(self, job: launch.JobInfo) -> None:
        """Write down where the job is, where that is new: in a queue, running, or in the queue again."""
        queued = waits(job)
        if queued != (self.data["running_since"] is None):
            self.data["seconds"] += self._running()
            self.data["running_since"] = None if queued else time.time()
        elif self.data["job"] is not None and self.data["job"]["id"] == job.id:
            return
        self.data["job"] = _about(job)
        self._write()

    def end(self, job: launch.JobInfo, outcome: launch.Outcome | None, stopped: bool) -> None:
        """Write down how the attempt ended; one that was ``stopped`` is neither finished nor failed."""
        self.data["seconds"] += self._running()
        self.data["running_since"] = None
        known = self.data["job"] or {}
        self.data["job"] = _about(job) | ({"nodes": known["nodes"]} if known.get("nodes") else {})
        if outcome is not None:
            peaks = self.data["peak_memory"]  # of earlier attempts
            self.data["peak_memory"] = peaks | {
                who: max(peak, peaks.get(who, 0)) for who, peak in outcome.peak_memory.items()
            }
            self.data["usage"] = outcome.usage
            if not self.seconds:  # too short to be seen running
                self.data["seconds"] += outcome.usage.get("elapsed", 0.0)
            self.data["attempts"] = self._attempts + [
                {"started": self.data["started"], "job": job.id, "error": why} for why in outcome.earlier
            ]
        if outcome is not None and not stopped:
            self.data["hosts"] = sorted(set(outcome.hosts))
            self.data["error"] = str(outcome.failures[0]) if outcome.failures else None
            self.data["finished"] = None if outcome.failures else now()
        self._write()

    def refused(self, error: str) -> None:
        """Write down that no job came of the attempt."""
        self.data |= {"error": error, "running_since": None}
        self._write()

    def _running(self) -> float:
        since = self.data["running_since"]
        return 0.0 if since is None else time.time() - since

    def _write(self) -> None:
        durable.write_json(self._folder / PROVENANCE, self.data)


def asked(site: Site, resources: Resources) -> dict[str, Any]:
    """What a step asks for, as it is on record."""
    return {"launcher": site.launcher, **resources.model_dump(mode="json")}


def seconds_so_far(folder: Path, before: Mapping[str, Any]) -> float:
    """What earlier attempts took [s]; of one that was killed, the time to its last sign of life."""
    seconds, since = float(before.get("seconds", 0.0)), before.get("running_since")
    last = progress.read(folder / "progress.json")
    return seconds + (max(0.0, last.time - since) if since and last else 0.0)


def _attempts(before: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Attempts that did not end well, the last one of ``before`` too."""
    if not before or before["finished"]:
        return []
    found, job = list(before.get("attempts", [])), before.get("job")
    if before["error"] or job or before.get("running_since"):  # it came as far as a job
        error = before["error"] or "stopped"
        found.append({"started": before["started"], "job": job and job["id"], "error": error})
    return found


def _about(job: launch.JobInfo) -> dict[str, Any]:
    return {"id": job.id, "nodes": list(dict.fromkeys(job.nodes)), "restarts": job.restarts}


@functools.lru_cache(maxsize=1)
def _made_by(moment: int) -> dict[str, Any]:
    return {"versions": versions(), "git_commit": git_commit()}


def now() -> str:
    """The time, as records hold it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def versions() -> dict[str, str]:
    """Versions of galdist, Python and the packages that make the numbers."""
    found = {"galdist": galdist.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def git_commit() -> str | None:
    """Commit of the source in use, with ``-dirty`` where it was changed; None for an installed galdist."""
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
