"""Whole runs whose steps are jobs of a real Slurm: several at a time, taken over, left alone, canceled."""

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_stages import STAGES
from test_dev import Cluster
from test_kill import RUNTIMES, SMALL, Session, until

import galdist
from galdist import config, pipeline, status
from galdist.pipeline import RunView
from hpc import durable, queued
from hpc import slurm as door
from hpc.site import Site, load_site

SITE = Path(__file__).parents[2] / "slurm" / "sites" / "dev.yaml"
LONG = 120  # seconds: other jobs may be in the way


class Run(Session):
    """A run file in a folder of its own, and its jobs."""

    def __init__(self, folder: Path, steps: list[dict[str, Any]]) -> None:
        self.name = f"test-{time.time_ns():x}"  # so that its jobs are known by their names
        for step in steps:
            step.setdefault("resources", {}).setdefault("memory", "300 MB")
        document = {"name": self.name, "seed": 5, "steps": steps}
        (folder / "run.yaml").write_text(yaml.safe_dump(document))
        command = [*SMALL, "run", "run.yaml", "--site", str(SITE)]
        super().__init__(folder, command, folder / "runs" / self.name)

    def load(self) -> config.Run:
        return config.load(str(self.folder / "run.yaml"), (), STAGES)

    def execute(self, site: Site | None = None, **options: Any) -> list[RunView]:
        """Run in this process; returns what was shown, again and again."""
        shown: list[RunView] = []

        def show(view: RunView) -> None:
            steps = [pipeline.StepView(**vars(step)) for step in view.steps]
            shown.append(RunView(view.name, view.folder, steps, view.seconds_left))

        pipeline.execute(self.load(), self.out, site or load_site(str(SITE)), show, stages=STAGES, **options)
        return shown

    def jobs(self, step: str) -> list[dict[str, str]]:
        """Every job that was ever submitted for a step."""
        fields = ["JobArrayID", "State", "StartTime", "EndTime"]
        words = ["squeue", "--noheader", "--array", "--states=all", f"--name={self.name}-{step}"]
        columns = ",".join(f"{field}:|" for field in fields)
        table = subprocess.run([*words, f"--Format={columns}"], capture_output=True, text=True, check=True)
        rows = [line.rstrip("|").split("|") for line in table.stdout.splitlines()]
        return [dict(zip(fields, map(str.strip, row), strict=True)) for row in sorted(rows)]

    def states(self) -> dict[str, str]:
        return {step.name: step.state for step in status.view(self.out).steps}

    def record(self, step: str) -> dict[str, Any]:
        return dict(durable.read_json(self.out / step / "provenance.json"))

    def result(self, step: str) -> str:
        return (self.out / step / "result.txt").read_text()

    def has(self, step: str, number: int) -> Callable[[], bool]:
        return (self.out / step / f"piece-{number}.txt").exists


@pytest.fixture
def make(slurm: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Makes runs; whatever of theirs is still in the queue at the end is canceled."""
    made: list[Run] = []

    def make(*steps: dict[str, Any]) -> Run:
        folder = tmp_path / str(len(made))
        folder.mkdir()
        made.append(Run(folder, list(steps)))
        return made[-1]

    yield make
    for run in made:
        if run.process is not None and run.process.poll() is None:
            run.kill()
        names = ",".join(f"{run.name}-{name}" for name in (*run.load().order, *run.load().sweeps, "run"))
        subprocess.run(["scancel", f"--name={names}"], check=True)


def step(name: str, stage: str = "pieces", **keys: Any) -> dict[str, Any]:
    """``n_pieces`` and ``seconds`` are configuration."""
    given = {key: keys.pop(key) for key in ("n_pieces", "seconds") if key in keys}
    return {"name": name, "stage": stage, "config": given, **keys}


def expected(run: Run, tmp_path: Path) -> dict[str, str]:
    """What the steps of a run give without Slurm."""
    pipeline.execute(run.load(), tmp_path / "here", Site(launcher="debug"), stages=STAGES)
    return {name: (tmp_path / "here" / name / "result.txt").read_text() for name in run.load().order}


def test_every_runtime_is_a_job(make: Callable[..., Run], tmp_path: Path) -> None:
    """And gives what it gives on one machine; what it asked for and used is on record."""
    asked = {"ddp": {"nodes": 2, "ranks": 4}, "mpi": {"nodes": 2, "ranks": 2}}
    run = make(
        *(step(kind, kind, resources=asked.get(kind, {})) for kind in RUNTIMES),
        step("all", "many", inputs={"sources": "*"}),
    )
    status_, text = run.run(LONG)
    assert status_ == 0, text
    assert {name: run.result(name) for name in run.load().order} == expected(run, tmp_path)
    for name in run.load().order:
        (job,) = run.jobs(name)
        record = run.record(name)
        assert job["State"] == "COMPLETED"
        assert record["job"]["id"] == job["JobArrayID"]
        assert record["asked"]["launcher"] == "slurm"
        assert record["usage"]["cpu_seconds"] > 0
        assert 0 < record["seconds"] < LONG
        assert record["attempts"] == []
    record = run.record("ddp")
    assert (record["ranks"], record["asked"]["nodes"]) == (4, 2)
    assert record["usage"]["cpus"] == 4
    assert set(record["peak_memory"]) == {f"rank {number}" for number in range(4)}
    assert set(run.states().values()) == {"done"}


def test_steps_that_do_not_need_each_other_run_at_the_same_time(make: Callable[..., Run]) -> None:
    run = make(
        step("a", seconds=1.5),
        step("b", seconds=1.5),
        step("c", "many", inputs={"sources": ["a", "b"]}),
    )
    shown = run.execute()
    states = [{step.name: step.state for step in view.steps} for view in shown]
    assert any(now["a"] == now["b"] == "running" and now["c"] == "waiting" for now in states)
    assert states[-1] == dict.fromkeys("abc", "done")
    running = next(
        step for view in shown for step in view.steps if step.name == "a" and step.state == "running"
    )
    assert running.job is not None
    assert running.job.id == run.record("a")["job"]["id"]
    queued = [step for view in shown for step in view.steps if step.name == "a" and step.state == "queued"]
    assert queued
    assert all(step.seconds == 0 for step in queued), "time in the queue does not count"


def test_no_more_jobs_than_the_site_allows(make: Callable[..., Run]) -> None:
    run = make(*(step(name, seconds=0.5, n_pieces=2) for name in "abc"))
    site = load_site(str(SITE)).model_copy(update={"max_jobs": 2})
    shown = run.execute(site)
    active = [sum(step.state in ("queued", "running") for step in view.steps) for view in shown]
    assert max(active) == 2


def test_a_failing_step_blocks_what_depends_on_it_and_nothing_else(make: Callable[..., Run]) -> None:
    run = make(
        step("bad", "fail"),
        step("good", seconds=0.5),
        step("after", inputs={"before": "bad"}),
        step("last", inputs={"before": "good"}),
    )
    run.load()
    status_, text = run.run(LONG)
    assert status_ == 1
    assert "ValueError: snapshot.hdf5: PartType1/Coordinates is missing" in text
    assert run.states() == {"bad": "failed", "good": "done", "after": "pending", "last": "done"}
    assert len(run.jobs("bad")) == 1, "an exception comes again: no second attempt"
    assert run.jobs("after") == []
    status_, text = run.run(LONG)
    assert status_ == 1
    assert len(run.jobs("bad")) == 2, "the next run tries again"
    assert [attempt["error"] for attempt in run.record("bad")["attempts"]] == [run.record("bad")["error"]]
    assert len(run.jobs("good")) == 1


# Whoever follows the jobs may be killed


def test_killed_and_started_again(make: Callable[..., Run], tmp_path: Path) -> None:
    """SIGKILL: the jobs go on, and the next run takes them over. Nothing is submitted twice."""
    run = make(
        step("a", seconds=1.0, n_pieces=8),
        step("b", "ddp", seconds=1.0, n_pieces=6, resources={"nodes": 2, "ranks": 2}),
        step("c", "many", inputs={"sources": ["a", "b"]}),
    )
    run.start()
    until(run.has("a", 1), LONG, run)
    run.kill()
    assert run.states()["a"] == "running", "also seen while nobody follows it"
    before = run.record("a")
    status_, text = run.run(LONG)
    assert status_ == 0, text
    assert {name: run.result(name) for name in "abc"} == expected(run, tmp_path)
    assert [len(run.jobs(name)) for name in "abc"] == [1, 1, 1]
    after = run.record("a")
    assert (after["started"], after["host"], after["attempts"]) == (before["started"], before["host"], [])
    assert after["seconds"] == pytest.approx(8, abs=5)


def test_a_job_that_ends_while_nobody_looks(make: Callable[..., Run]) -> None:
    run = make(step("a", seconds=0.5, n_pieces=4), step("b", inputs={"before": "a"}))
    run.start()
    until(run.has("a", 0), LONG, run)
    run.kill()
    until(lambda: (run.out / "a" / ".slurm" / "outcome.json").exists(), LONG)
    assert not (run.out / "a" / "done.json").exists()
    found = {step.name: step for step in status.view(run.out).steps}
    assert (found["a"].state, found["b"].state) == ("stopped", "pending")
    assert "is completed; the next galdist run takes it over" in found["a"].detail
    status_, text = run.run(LONG)
    assert status_ == 0, text
    assert [len(run.jobs(name)) for name in "ab"] == [1, 1]
    assert 1 < run.record("a")["seconds"] < 15


def test_killed_before_it_knew_the_jobs_id(make: Callable[..., Run]) -> None:
    """Between sbatch and the file: the job is found by its comment."""
    run = make(step("a", seconds=1.0, n_pieces=6))
    run.start()
    until(run.has("a", 0), LONG, run)
    run.kill()
    path = run.out / "a" / ".slurm" / "job.json"
    durable.write_json(path, {**durable.read_json(path), "id": None})
    status_, text = run.run(LONG)
    assert status_ == 0, text
    assert len(run.jobs("a")) == 1


def test_a_job_of_another_configuration_is_ended(make: Callable[..., Run]) -> None:
    run = make(step("a", seconds=1.0, n_pieces=60), step("b", inputs={"before": "a"}))
    run.start()
    until(run.has("a", 0), LONG, run)
    run.kill()
    run.command = [*run.command, "--set", "a.n_pieces=2", "--set", "a.seconds=0"]
    status_, text = run.run(LONG)
    assert status_ == 0, text
    assert sorted(job["State"] for job in run.jobs("a")) == ["CANCELLED", "COMPLETED"]
    (aside,) = (run.out / ".replaced").iterdir()
    assert (aside / "piece-0.txt").exists(), "what it had done is kept"
    assert not (run.out / "a" / "piece-2.txt").exists(), "and it wrote nothing into the new folder"


def test_a_waiting_job_that_asks_for_something_else(make: Callable[..., Run], tmp_path: Path) -> None:
    """It is taken out of the queue; one that runs goes on as it is."""
    site = tmp_path / "held.yaml"
    site.write_text(SITE.read_text() + "\ndirectives: [--hold]\n")
    run = make(step("a"), step("b", seconds=1.0, n_pieces=8))
    command = run.command
    run.command = [*command, "--only", "b"]
    run.start()
    until(run.has("b", 0), LONG, run)
    run.kill()
    run.command = [*command[:-1], str(site), "--only", "a"]
    run.start()
    until(lambda: run.jobs("a") and run.states()["a"] == "queued", LONG, run)
    run.kill()
    changes = [f"--set={name}.resources.time=10 min" for name in "ab"]
    run.command = [*command, *changes]
    status_, text = run.run(LONG)
    assert status_ == 0, text
    assert sorted(job["State"] for job in run.jobs("a")) == ["CANCELLED", "COMPLETED"]
    assert run.record("a")["asked"]["time"] == 600
    assert len(run.jobs("b")) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_leaves_the_jobs_running(make: Callable[..., Run], number: signal.Signals) -> None:
    run = make(step("a", seconds=0.7, n_pieces=6), step("b", inputs={"before": "a"}))
    run.start()
    until(run.has("a", 1), LONG, run)
    assert run.process is not None
    run.process.send_signal(number)
    status_, text = run.finish(20)
    assert status_ == 128 + number
    id = run.jobs("a")[0]["JobArrayID"]
    assert f"these go on in Slurm, and the next run takes them over: a (job {id})" in text
    assert run.states()["a"] == "running"
    status_, text = run.run(LONG)
    assert status_ == 0, text
    assert [len(run.jobs(name)) for name in "ab"] == [1, 1]
    assert run.record("a")["attempts"] == []


def test_ctrl_c_cancels(make: Callable[..., Run], tmp_path: Path) -> None:
    run = make(
        step("a", seconds=0.7, n_pieces=6),
        step("b", seconds=0.7, n_pieces=6),
        step("c", "many", inputs={"sources": ["a", "b"]}),
    )
    run.start()
    until(lambda: run.has("a", 1)() and run.has("b", 1)(), LONG, run)
    assert run.process is not None
    run.process.send_signal(signal.SIGINT)
    status_, text = run.finish(30)
    assert status_ == 130
    assert "stopped in a, b" in text
    states = [job["State"] for name in "ab" for job in run.jobs(name)]
    assert states == ["CANCELLED", "CANCELLED"]
    assert run.states() == {"a": "stopped", "b": "stopped", "c": "pending"}
    kept = (run.out / "a" / "piece-0.txt").stat().st_mtime_ns
    status_, text = run.run(LONG)
    assert status_ == 0, text
    assert {name: run.result(name) for name in "abc"} == expected(run, tmp_path)
    assert (run.out / "a" / "piece-0.txt").stat().st_mtime_ns == kept
    assert [attempt["error"] for attempt in run.record("a")["attempts"]] == ["stopped"]


def test_a_job_that_somebody_cancels(make: Callable[..., Run]) -> None:
    """scancel: the step is not submitted again behind their back; the next run goes on with it."""
    run = make(
        step("a", seconds=0.7, n_pieces=8),
        step("b", inputs={"before": "a"}),
        step("c", seconds=0.7, n_pieces=8),
    )
    run.start()
    until(run.has("a", 1), LONG, run)
    subprocess.run(["scancel", run.jobs("a")[0]["JobArrayID"]], check=True)
    status_, text = run.finish(LONG)
    assert status_ == 1
    assert "step a was stopped after" in text
    assert run.states() == {"a": "stopped", "b": "pending", "c": "done"}
    assert len(run.jobs("a")) == 1
    status_, text = run.run(LONG)
    assert status_ == 0, text
    assert len(run.jobs("c")) == 1


# Sweeps


def at_the_same_time(jobs: list[dict[str, str]]) -> int:
    """Most of the jobs that ran at one moment."""
    times = [
        (datetime.fromisoformat(job["StartTime"]), datetime.fromisoformat(job["EndTime"])) for job in jobs
    ]
    return max(sum(start <= moment < end for start, end in times) for moment, _ in times)


def test_a_sweep_is_one_array(make: Callable[..., Run], tmp_path: Path) -> None:
    run = make(
        step("first"),
        step(
            "swept",
            inputs={"before": "first"},
            sweep={"seed": [1, 2, 3, 4]},
            at_once=2,
            seconds=0.5,
        ),
        step("follower", inputs={"before": "swept"}, sweep="swept", n_pieces=1),
        step("report", "many", inputs={"sources": "*"}),
    )
    members = run.load().sweeps["swept"].members
    status_, text = run.run(2 * LONG)
    assert status_ == 0, text
    assert {name: run.result(name) for name in run.load().order} == expected(run, tmp_path)
    jobs = [job for name in ("swept", *members) for job in run.jobs(name)]
    base = jobs[0]["JobArrayID"].partition("_")[0]
    assert sorted(job["JobArrayID"] for job in jobs) == [f"{base}_{number}" for number in range(4)], (
        "one sbatch"
    )
    assert at_the_same_time(jobs) == 2
    assert run.record("swept-seed3")["job"]["id"] == f"{base}_2"


def test_an_array_is_taken_over(make: Callable[..., Run], tmp_path: Path) -> None:
    run = make(step("swept", sweep={"seed": [1, 2, 3]}, at_once=1, seconds=0.5))
    run.start()
    until(run.has("swept-seed1", 1), LONG, run)
    run.kill()
    states = run.states()
    assert states["swept-seed1"] == "running"
    assert states["swept-seed3"] == "queued"
    status_, text = run.run(LONG)
    assert status_ == 0, text
    assert {name: run.result(name) for name in run.load().order} == expected(run, tmp_path)
    jobs = [job for name in ("swept", *run.load().order) for job in run.jobs(name)]
    assert len(jobs) == 3


# From outside


def test_what_is_seen_from_outside(make: Callable[..., Run]) -> None:
    """By a process that does not run the steps: while the run lives, and when only its jobs are left."""
    run = make(
        step("a", seconds=0.7, n_pieces=8, expected=10),
        step("b", inputs={"before": "a"}, expected=20),
        step("huge", resources={"nodes": 4, "ranks": 4, "cpus": 4}, stage="mpi"),
    )
    run.start()
    until(lambda: run.has("a", 1)() and run.states()["a"] == "running", LONG, run)
    seen = {step.name: step for step in status.view(run.out).steps}
    assert seen["a"].job is not None
    assert seen["a"].job.id == run.jobs("a")[0]["JobArrayID"]
    assert len(seen["a"].job.nodes) == 1
    assert seen["a"].progress is not None
    assert seen["a"].progress.total == 8
    assert seen["b"].state == "pending"
    assert seen["huge"].state == "queued", "it needs all nodes, and one is taken"
    assert seen["huge"].detail in ("Resources", "Priority")
    run.kill()
    assert run.states() == {"a": "running", "b": "pending", "huge": "queued"}


def test_what_a_site_cannot_give(make: Callable[..., Run]) -> None:
    """All of it, before anything is submitted."""
    run = make(
        step("a", "mpi", resources={"nodes": 5, "ranks": 5}),
        step("b", "ddp", resources={"nodes": 2, "ranks": 3}),
        step("c"),
    )
    status_, text = run.run(30)
    assert status_ == 2
    assert "steps.a.resources.nodes: 5 nodes are more than the site's max_nodes, 4" in text
    assert "steps.b.resources.ranks: 3 for 2 nodes, which each get as many: ask for 2 or 4" in text
    assert not run.out.exists()


def test_what_sbatch_refuses(make: Callable[..., Run]) -> None:
    """Its words are the step's error; other steps go on."""
    run = make(step("a", resources={"memory": "900 GB"}), step("b", inputs={"before": "a"}), step("c"))
    status_, text = run.run(LONG)
    assert status_ == 1
    assert "step a failed" in text
    assert "Requested node configuration is not available" in text
    assert run.states() == {"a": "failed", "b": "pending", "c": "done"}


# The orchestrator in a job of its own


def batch(run: Run, site: Path, *options: str) -> str:
    """Queue the run's command itself; returns the job's id."""
    paths = os.pathsep.join([str(Path(galdist.__file__).parents[1]), str(Path(__file__).parents[1])])
    words = [*run.command[: run.command.index("--site")], "--site", str(site)]
    script = f"#!/bin/bash\ntrap '' USR2\nexport PYTHONPATH={paths}\nexec {shlex.join(words)}"
    done = subprocess.run(
        [
            *("sbatch", "--parsable", "--requeue", "--open-mode=append", "--output=run.out", "--mem=1000M"),
            *(f"--job-name={run.name}-run", f"--chdir={run.folder}", "--time=20", *options),
        ],
        input=script,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def finished(run: Run) -> bool:
    (job,) = run.jobs("run")
    assert job["State"] in ("PENDING", "RUNNING", "COMPLETING", "COMPLETED"), (
        run.folder / "run.out"
    ).read_text()
    return job["State"] == "COMPLETED"


def test_an_orchestrator_that_is_a_job_starts_again(make: Callable[..., Run], tmp_path: Path) -> None:
    """At the end of its time it goes back into the queue, and then takes over the jobs it left."""
    run = make(step("a", seconds=1.0, n_pieces=25), step("b", inputs={"before": "a"}))
    id = batch(run, SITE)
    until(run.has("a", 1), LONG)
    subprocess.run(["scancel", "--signal=USR2", "--batch", id], check=True)
    until(lambda: finished(run), 2 * LONG)
    text = (run.folder / "run.out").read_text()
    assert f"job {id} is queued again and will continue the run" in text
    assert "continues" in text
    assert [len(run.jobs(name)) for name in ("a", "b", "run")] == [1, 1, 1]
    assert {name: run.result(name) for name in "ab"} == expected(run, tmp_path)


def test_a_canceled_orchestrator_does_not_start_again(make: Callable[..., Run]) -> None:
    run = make(step("a", seconds=1.0, n_pieces=8))
    id = batch(run, SITE)
    until(run.has("a", 1), LONG)
    subprocess.run(["scancel", id], check=True)
    until(lambda: run.jobs("run")[0]["State"] == "CANCELLED", LONG)
    assert "queued again" not in (run.folder / "run.out").read_text()
    assert run.states()["a"] == "running"


@pytest.mark.parametrize("how", ["--signal=USR2 --batch", "--signal=TERM"], ids=["limit", "preemption"])
def test_a_run_inside_one_job(make: Callable[..., Run], how: str, tmp_path: Path) -> None:
    """Its steps are ranks on the nodes of the job, which goes back into the queue when it must end early."""
    site = tmp_path / "site.yaml"
    site.write_text(SITE.read_text().replace("launcher: slurm", "launcher: allocation"))
    run = make(
        step("a", n_pieces=2),
        step("b", "ddp", seconds=1.0, n_pieces=6, inputs={"before": "a"}, resources={"nodes": 2, "ranks": 2}),
        step("c", inputs={"before": "b"}, resources={"cpus": 2}),
    )
    id = batch(run, site, "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=3")
    until(run.has("b", 1), LONG)
    kept = (run.out / "b" / "piece-0.txt").stat().st_mtime_ns
    subprocess.run(["scancel", *how.split(), id], check=True)
    until(lambda: finished(run), 2 * LONG)
    text = (run.folder / "run.out").read_text()
    assert f"stopped in b; job {id} is queued again and will continue the run" in text
    assert {name: run.result(name) for name in "abc"} == expected(run, tmp_path)
    assert (run.out / "b" / "piece-0.txt").stat().st_mtime_ns == kept
    assert [attempt["error"] for attempt in run.record("b")["attempts"]] == ["stopped"]
    assert run.record("b")["job"]["id"] == id
    assert run.jobs("b") == [], "no job of its own"
    asked = {name: [run.record(name)["asked"][key] for key in ("nodes", "ranks", "cpus")] for name in "abc"}
    assert asked == {"a": [1, 1, 3], "b": [2, 2, 3], "c": [1, 1, 2]}


def test_a_run_inside_one_job_that_gets_no_further(make: Callable[..., Run], tmp_path: Path) -> None:
    """After three time limits in which a step has done nothing the job fails, and says so."""
    site = tmp_path / "site.yaml"
    site.write_text(SITE.read_text().replace("launcher: slurm", "launcher: allocation"))
    run = make(step("a", seconds=600.0))
    id, output = batch(run, site), run.folder / "run.out"
    for number in range(3):
        until(lambda n=number: output.exists() and output.read_text().count("starts (pieces)") > n, LONG)
        subprocess.run(["scancel", "--signal=USR2", "--batch", id], check=True)
    until(lambda: run.jobs("run")[0]["State"] == "FAILED", LONG)
    text = output.read_text()
    assert text.count(f"job {id} is queued again") == 2
    assert "stopped in a; a reached its time limit 3 times and did not get further the last 2 times" in text
    assert "Continue with: galdist run" in text


# Without Slurm for a while


def test_slurm_is_away(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that becomes ready meanwhile waits until Slurm answers; nothing fails, nothing is queued twice.

    With a Slurm of its own: others need theirs.
    """
    folder = tmp_path_factory.mktemp("own")
    own = Cluster(folder)
    monkeypatch.setattr(door, "_PATIENCE", 0.0)
    monkeypatch.setattr(pipeline, "_SILENCE", 2.0)
    monkeypatch.setattr(queued, "_watcher", door.Watcher(0.5))
    steps = [step("a", seconds=1.0, n_pieces=4), step("b", inputs={"before": "a"})]
    run = Run(tmp_path_factory.mktemp("run"), steps)
    said: list[str] = []

    def show(view: RunView) -> None:
        a, b = view.steps
        if run.has("a", 0)() and a.state == "running" and not said:
            own.output("$DEV/down slurmctld")
            said.append("down")
        if b.state == "waiting" and "Slurm does not answer" in b.detail and said == ["down"]:
            said.append(b.detail)
            own.output("$DEV/up")

    try:
        own.output("$DEV/up")
        monkeypatch.setenv("SLURM_CONF", own.environment["SLURM_CONF"])
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
        pipeline.execute(run.load(), run.out, load_site(str(SITE)), show, stages=STAGES)
        assert len(said) == 2
        assert run.states() == {"a": "done", "b": "done"}
        assert [len(run.jobs(name)) for name in "ab"] == [1, 1]
        assert run.record("b")["attempts"] == [], "it never came as far as a job"
    finally:
        own("$DEV/down")
