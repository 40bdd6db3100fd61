"""Runs on the development Slurm, started, looked at and disturbed."""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import galdist
from galdist.status import StepStatus, steps_of
from hpc import durable, slurm

SITE = Path(__file__).parents[1] / "slurm" / "sites" / "dev.yaml"


@contextlib.contextmanager
def down(node: str) -> Iterator[None]:
    """As long as this lasts a node is down, and jobs on it have lost it."""
    slurm.run(["scontrol", "update", f"nodename={node}", "state=down", "reason=test"])
    try:
        yield
    finally:
        slurm.run(["scontrol", "update", f"nodename={node}", "state=resume"])


@dataclass
class Cluster:
    """A run on the development Slurm, started and disturbed by a test."""

    folder: Path
    environment: dict[str, str]
    words: list[str]
    """What is run: name or file, ``--set``, ``--only``."""
    out: Path
    site: dict[str, Any] = field(default_factory=dict)
    """Changes to the site."""
    process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        site = self.folder / "site.yaml"
        site.write_text(yaml.safe_dump(yaml.safe_load(SITE.read_text()) | self.site))
        command = [sys.executable, "-m", "galdist", "run", *self.words, "--out", str(self.out)]
        self.process = subprocess.Popen(
            [*command, "--site", str(site)],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.environment | {"PYTHONPATH": str(Path(galdist.__file__).parents[1])},
        )

    def finish(self, timeout: float = 600) -> tuple[int, str]:
        """Exit status and everything that was said."""
        assert self.process is not None
        text, _ = self.process.communicate(timeout=timeout)
        with open(self.folder / "console.txt", "a", encoding="utf-8") as stream:  # to be looked at afterwards
            stream.write(text)
        return self.process.returncode, text

    def succeed(self) -> str:
        status, text = self.finish()
        assert status == 0, text
        return text

    def stop(self) -> None:
        """End the run and its jobs, however the test went."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.communicate(timeout=60)

    def slurm(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True)
        return done.stdout

    def step(self, name: str) -> StepStatus:
        return next(step for step in steps_of(self.out) if step.name == name)

    def job(self, name: str) -> str:
        """Id of a step's Slurm job, once it has one."""
        path = self.out / name / ".slurm" / "job.json"
        self.wait(lambda: path.exists() and durable.read_json(path)["id"])
        return str(durable.read_json(path)["id"])

    def done(self, name: str) -> float:
        """How far a step is, from 0 to 1."""
        path = self.out / name / "progress.json"
        if not path.exists():
            return 0.0
        report = durable.read_json(path)
        return float(report["done"] / report["total"]) if report["total"] else 0.0

    def wait(self, condition: Callable[[], Any], timeout: float = 240) -> None:
        """Wait for something that must come while the run goes on."""
        assert self.process is not None
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, "it does not happen"
            if self.process.poll() is not None:
                raise AssertionError(f"the run has ended: {self.finish(5)[1]}")
            time.sleep(0.05)

    def wait_for_checkpoint(self, progress: float = 0.2) -> None:
        """Wait for the middle of the training."""
        checkpoints = self.out / "classifier" / "checkpoints"
        self.wait(lambda: self.done("classifier") > progress and list(checkpoints.glob("step-*")))

    def log(self, name: str = "classifier") -> str:
        return (self.out / name / "log.txt").read_text()

    def restarts(self, name: str = "classifier") -> int:
        record = durable.read_json(self.out / name / "provenance.json")
        return int(record["job"]["restarts"])
