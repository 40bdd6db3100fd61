"""Runs that nobody waits for: queued, watched, followed and canceled from a login node, on a real Slurm."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

import galdist
from hpc import slurm as door

ROOT = Path(__file__).parents[2]
PROGRAM = [sys.executable, str(ROOT / "tests" / "small_stages.py")]
SITE = {
    "launcher": "slurm",
    "partition": "cpu",
    "interface": "lo",
    "mpi": "pmi2",
    "time": "20 min",
    "grace": "10 s",
    "orchestrator": {"cpus": 1, "memory": "500 MB"},
}
SMALL = {"cpus": 1, "memory": "300 MB"}


@dataclass
class Desk:
    """A folder on the login node, with a run file and a site."""

    folder: Path

    @property
    def out(self) -> Path:
        return self.folder / "runs" / "study"

    def environment(self) -> dict[str, str]:
        path = os.pathsep.join([str(Path(galdist.__file__).parents[1]), str(ROOT / "tests")])
        return {**os.environ, "PYTHONPATH": path, "GALDIST_SITE": "site.yaml", "COLUMNS": "120"}

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*PROGRAM, *arguments],
            cwd=self.folder,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def call(self, *arguments: str, status: int = 0) -> str:
        process = self.start(*arguments)
        output = process.communicate(timeout=150)[0]
        assert process.returncode == status, output
        assert "Traceback" not in output
        return output

    def detach(self, *arguments: str) -> str:
        """The id of the orchestrator's job."""
        text = self.call("run", "study.yaml", "--detach", *arguments)
        match = re.search(r"queued as job (\d+)", text)
        assert match, text
        return match[1]

    def record(self, step: str) -> dict[str, Any]:
        return dict(json.loads((self.out / step / "provenance.json").read_text()))

    def job(self, step: str) -> str:
        """The id of a step's last job."""
        return str(json.loads((self.out / step / ".slurm" / "job.json").read_text())["id"])


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    """A study of two steps, the first of which takes some seconds."""
    steps = [
        {"name": "a", "stage": "pieces", "resources": SMALL, "config": {"n_pieces": 4, "seconds": 1.0}},
        {"name": "b", "stage": "pieces", "resources": SMALL, "inputs": {"before": "a"}},
    ]
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({"name": "study", "seed": 3, "steps": steps}))
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(SITE))
    desk = Desk(tmp_path)
    yield desk
    if desk.out.exists():
        desk.call("cancel", "runs/study")


def until(condition: Callable[[], object], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.1)


def test_detached_watched_and_followed(desk: Desk) -> None:
    id = desk.detach("--set", "a.seconds=2")
    text = desk.call("run", "study.yaml", "--detach", status=2)
    assert f"runs/study is in use by job {id}" in text
    assert "galdist watch runs/study" in text

    follower = desk.start("logs", "b", "-f")
    watched = desk.call("watch")
    assert re.search(r"a  starts \(pieces\) as job \d+ on n\d", watched)
    assert "b  done in" in watched
    assert "nobody works" not in watched

    followed = follower.communicate(timeout=30)[0]
    assert "b: has not started yet" in followed
    assert f"job {desk.job('b')}: starts on n" in followed

    log = desk.call("logs", "orchestrator")
    assert "study in runs/study: 2 of 2 steps to do" in log
    assert "Results of b" in log, "what `galdist run` prints at its end"
    table = desk.call("watch", "--once")
    assert "study: 2 of 2 steps" in table
    assert "0 of 2 steps to do" in desk.call("run", "study.yaml", "--detach", "--set", "a.seconds=2")
    assert door.states([id])[id].state == "COMPLETED"


def test_cancel(desk: Desk) -> None:
    orchestrator = desk.detach("--set", "a.seconds=60")
    until((desk.out / "a" / "log.txt").exists)
    until(lambda: "running" in desk.call("status"))
    job = desk.job("a")
    assert (
        desk.call("cancel", "runs/study") == f"ended orchestrator: job {orchestrator}\nended a: job {job}\n"
    )
    assert all(state.is_over for state in door.states([orchestrator, job]).values())
    lines = desk.call("status", "runs/study").splitlines()
    assert lines[0] == "runs/study: nobody works here"
    assert lines[2].split()[:3] == ["a", "pieces", "stopped"]
    assert desk.call("cancel", "runs/study") == "runs/study: nothing runs and nothing waits\n"
    assert "2 of 2 steps to do" in desk.call("run", "study.yaml"), "the same command goes on"


def test_cancel_what_waits_in_the_queue(desk: Desk) -> None:
    """And what people see until then."""
    orchestrator = desk.detach()
    subprocess.run(["scontrol", "requeuehold", orchestrator], check=False, capture_output=True)
    subprocess.run(["scontrol", "hold", orchestrator], check=False, capture_output=True)
    until(lambda: door.states([orchestrator])[orchestrator].is_pending)
    assert f"in use by job {orchestrator}, which waits in the queue (" in desk.call("status")
    follower = desk.start("logs", "-f", "orchestrator")
    assert follower.stdout is not None
    lines = [follower.stdout.readline(), follower.stdout.readline()]
    assert any(line.startswith(f"orchestrator: queued as job {orchestrator} (") for line in lines), lines
    assert f"ended orchestrator: job {orchestrator}" in desk.call("cancel", "runs/study")
    follower.communicate(timeout=20)
    assert follower.returncode in (0, 2), "it ends with the job; 2 where that never wrote anything"


def test_a_requeued_orchestrator_takes_its_jobs_over(desk: Desk) -> None:
    """What preemption, a lost node and the time limit come to. Nothing is submitted twice."""
    orchestrator = desk.detach("--set", "a.seconds=3")
    until((desk.out / "a" / "piece-0.txt").exists)
    job, made = desk.job("a"), (desk.out / "a" / "piece-0.txt").stat().st_mtime_ns
    subprocess.run(["scontrol", "requeue", orchestrator], check=True)
    desk.call("watch")
    assert "b     pieces  done" in desk.call("status")
    assert desk.record("a")["job"]["id"] == job
    assert desk.record("a")["attempts"] == []
    assert (desk.out / "a" / "piece-0.txt").stat().st_mtime_ns == made
    assert door.states([orchestrator])[orchestrator].state == "COMPLETED"
    log = desk.call("logs", "orchestrator")
    assert f"the next run takes them over: a (job {job})" in log
    assert log.count("steps to do") == 2


def test_an_orchestrator_near_its_time_limit_queues_itself_again(desk: Desk) -> None:
    orchestrator = desk.detach("--set", "a.seconds=3")
    until((desk.out / "a" / "piece-0.txt").exists)
    subprocess.run(["scancel", "--batch", "--signal=USR2", orchestrator], check=True)  # as Slurm does
    desk.call("watch")
    assert "b     pieces  done" in desk.call("status")
    assert f"job {orchestrator} is queued again and will continue the run" in desk.call(
        "logs", "orchestrator"
    )


def test_again_from_a_step_happens_once(desk: Desk) -> None:
    """A requeued orchestrator goes on; it does not begin again where ``--from`` said."""
    desk.call("run", "study.yaml", "--set", "a.seconds=0")

    def made(step: str) -> int:
        path = desk.out / step / "piece-0.txt"
        return path.stat().st_mtime_ns if path.exists() else 0

    first = made("a")
    orchestrator = desk.detach("--set", "a.seconds=0", "--set", "b.seconds=3", "--from", "a")
    until(lambda: made("b") > made("a") > first)
    second = made("a")
    subprocess.run(["scontrol", "requeue", orchestrator], check=True)
    desk.call("watch")
    assert "b     pieces  done" in desk.call("status")
    assert made("a") == second


def test_what_is_wrong_fails_before_the_queue(desk: Desk) -> None:
    before = subprocess.run(["squeue", "--states=all"], capture_output=True, text=True, check=True).stdout
    text = desk.call("run", "study.yaml", "--detach", "--set", "a.n_peices=3", status=2)
    assert "did you mean n_pieces?" in text
    text = desk.call("run", "study.yaml", "--detach", "--set", "a.resources.nodes=2", status=2)
    assert "the stage is one process" in text
    assert not desk.out.exists()
    (desk.folder / "site.yaml").write_text(yaml.safe_dump(SITE | {"partition": "nowhere"}))
    text = desk.call("run", "study.yaml", "--detach", status=1)
    assert "invalid partition" in text
    assert "#SBATCH --partition=nowhere" in text
    assert "nobody works here" in desk.call("status")
    after = subprocess.run(["squeue", "--states=all"], capture_output=True, text=True, check=True).stdout
    assert "galdist-study" not in set(after.split()) - set(before.split())


def test_a_queued_step_says_why(desk: Desk) -> None:
    """Nothing to do with the orchestrator, which here runs in this terminal."""
    desk.folder.joinpath("site.yaml").write_text(yaml.safe_dump(SITE | {"directives": ["--hold"]}))
    process = desk.start("run", "study.yaml", "--only", "a")
    until((desk.out / "a" / ".slurm" / "job.json").exists)
    until(lambda: desk.job("a") != "None")
    job = desk.job("a")
    follower = desk.start("logs", "-f", "runs/study/a")
    assert follower.stdout is not None
    until(lambda: f"a: queued as job {job} (JobHeldUser)" in follower.stdout.readline(), 20)
    assert f"ended a: job {job}" in desk.call("cancel", "runs/study", "a")
    follower.communicate(timeout=20)
    output = process.communicate(timeout=30)[0]
    assert f"a  queued as job {job} (JobHeldUser)" in output
    assert process.returncode == 1
    assert "step a was stopped" in output
