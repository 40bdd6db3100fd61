"""What happens to jobs beside their work: file servers, controllers and administrators. On a real Slurm."""

import dataclasses
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_jobs import MEMORY, SITE, counted, job_id, report, starts, state, task, until, wait

from hpc import durable, launch, queued, slurm
from hpc.launch import Outcome
from hpc.resources import Resources

DEV = Path(__file__).parents[2] / "slurm" / "dev"

pytestmark = pytest.mark.usefixtures("slurm")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A step's folder; its job ends with the test."""
    folder = tmp_path / "a step"
    yield folder
    launch.end_leftovers(folder)


def log(folder: Path) -> str:
    return (folder / "log.txt").read_text()


def test_a_file_server_that_is_away_for_a_while(folder: Path) -> None:
    job = launch.submit(task("count", folder, more={"n": 120}), SITE)
    until(lambda: counted(folder) > 3)
    order = folder / ".slurm" / "job.json"
    order.rename(order.with_name("kept"))
    order.symlink_to(order)  # who opens it gets an OSError
    time.sleep(7)
    order.with_name("kept").replace(order)
    outcome = wait(job)
    assert outcome.describe() == "done"
    assert counted(folder) == 120
    assert len(starts(folder)) == 1


def test_the_other_signal_before_a_time_limit(folder: Path) -> None:
    job = launch.submit(task("count", folder, more={"n": 100}), SITE)
    until(lambda: counted(folder) > 3)
    slurm.run(["scancel", "--batch", "--signal=USR1", job_id(folder)])
    outcome = wait(job)
    assert outcome.describe() == "done"
    assert "the time limit is near: saving" in log(folder)
    assert [start[2] for start in starts(folder)] == ["0", "1"]


def test_a_job_that_is_queued_again_when_all_is_done(folder: Path) -> None:
    job = launch.submit(task("count", folder, more={"n": 2}), SITE)
    assert wait(job).describe() == "done"
    until(lambda: state(folder).is_over)
    written = (folder / ".slurm" / "outcome.json").stat().st_mtime_ns
    slurm.requeue(job_id(folder))
    until(lambda: state(folder).restarts == 1 and state(folder).is_over)
    assert state(folder).state == "COMPLETED"
    assert len(starts(folder)) == 1
    assert (folder / ".slurm" / "outcome.json").stat().st_mtime_ns == written


def test_mpi_ranks_that_were_killed_start_again_when_the_job_is_requeued(folder: Path) -> None:
    """In a world of the same name, whose shared memory the dead have left behind."""
    pytest.importorskip("mpi4py")
    job = launch.submit(task("mpi_world_killed_once", folder, "mpi", ranks=2, nodes=1), SITE)
    until(lambda: (folder / "ready").exists())
    slurm.requeue(job_id(folder))
    assert wait(job).describe() == "done"
    assert state(folder).restarts == 1
    assert durable.read_json(folder / "world.json")[:2] == [2, 3]


def test_ranks_that_crash_while_they_are_to_save_are_not_started_again_here(folder: Path) -> None:
    job = launch.submit(task("crash_when_told", folder), SITE)
    until(lambda: starts(folder))
    time.sleep(0.5)
    slurm.run(["scancel", "--batch", "--signal=USR2", job_id(folder)])
    until(lambda: len(starts(folder)) == 2, job=job)
    assert [start[2] for start in starts(folder)] == ["0", "1"]
    assert "attempt 2" not in log(folder)
    job.cancel()


def test_attempts_are_counted_over_a_requeue_of_the_allocation(tmp_path: Path) -> None:
    resources = Resources(memory=MEMORY, time=300)
    layout = resources.layout("serial", 1)
    call, name = {"folder": str(tmp_path)}, f"test-again-{os.getpid()}"
    slurm.submit("small_jobs:in_allocation_again", [call], tmp_path, name, layout, resources, SITE, name)
    until(lambda: (tmp_path / "outcome.json").exists())
    outcome = Outcome.from_json(durable.read_json(tmp_path / "outcome.json"))
    assert outcome.attempts == 3
    assert log(tmp_path / "step").count("attempt 2 of 3 starts") == 1
    assert not list((tmp_path / "step" / ".slurm").glob("history*")), "who runs it again has all attempts"


def test_a_time_limit_that_came_before_anything_was_saved(folder: Path) -> None:
    """It is submitted again, as long as that leads any further."""
    job = launch.submit(task("count", folder, more={"n": 10**6}), SITE)
    assert isinstance(job, queued.QueuedJob)
    ids = []
    for number in range(4):
        until(lambda: starts(folder) and len(starts(folder)) > number and (folder / "progress.json").exists())  # noqa: B023
        ids.append(job_id(folder))
        slurm.cancel(ids[-1], "KILL")  # with its batch process, so that nobody says anything
        until(lambda: state(folder).is_over)
        if number > 1:
            (folder / "progress.json").unlink(missing_ok=True)
        outcome = job._without_a_word(slurm.JobState(ids[-1], "TIMEOUT", ("n1",)))
        if number < 3:
            assert outcome is None
            assert job_id(folder) != ids[-1]
    assert outcome is not None
    assert "reached its time limit 4 times and did not get further the last 2 times" in str(
        outcome.failures[0]
    )
    assert not outcome.stopped


@pytest.mark.slow
def test_ranks_that_crash_while_the_controller_is_away(folder: Path) -> None:
    """srun needs it to start others, and gives up: that is no attempt."""
    site = SITE.model_copy(update={"retries": 1})
    job = launch.submit(task("count", folder, "ddp", more={"n": 100}, ranks=2, nodes=2), site)
    until(lambda: counted(folder) > 3)
    subprocess.run([DEV / "down", "slurmctld"], check=True, capture_output=True)
    try:
        os.kill(report(folder, 1)["child"], signal.SIGKILL)
        until(lambda: "before it started the ranks; trying again" in log(folder), 90, job)
    finally:
        subprocess.run([DEV / "up"], check=True, capture_output=True)
    outcome = wait(job, 120)
    assert outcome.describe() == "done"
    assert outcome.attempts == 2
    assert counted(folder) == 100


def test_a_job_that_cannot_be_submitted_again_at_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = launch.submit(
        task("count", folder, more={"n": 3}), SITE.model_copy(update={"directives": ("--hold",)})
    )
    assert isinstance(job, queued.QueuedJob)
    first, conf = job_id(folder), Path(os.environ["SLURM_CONF"])
    job.order = dataclasses.replace(job.order, site=SITE)
    nobody = tmp_path / "slurm.conf"
    text = conf.read_text()
    nobody.write_text(re.sub(r"(?m)^SlurmctldPort=.*$", "SlurmctldPort=1", text))
    monkeypatch.setattr(queued, "_SILENCE", 0.5)
    with monkeypatch.context() as patch:
        patch.setenv("SLURM_CONF", str(nobody))
        began = time.monotonic()
        assert job._submit_again() is None
        assert time.monotonic() - began < 60, "others wait meanwhile"
        assert job.about().state == "pending"
        assert "Slurm does not answer" in job.about().reason
    slurm.cancel(first)
    assert wait(job).describe() == "done"
    assert job_id(folder) != first
    assert counted(folder) == 3


def test_a_job_that_slurm_does_not_take_again(folder: Path) -> None:
    job = launch.submit(task("see", folder), SITE.model_copy(update={"directives": ("--hold",)}))
    assert isinstance(job, queued.QueuedJob)
    first = job_id(folder)
    job.order = dataclasses.replace(job.order, site=SITE.model_copy(update={"partition": "not-there"}))
    outcome = job._submit_again()
    slurm.cancel(first)
    assert outcome is not None
    assert "cannot be submitted again: " in str(outcome.failures[0])
    assert "invalid partition" in str(outcome.failures[0])
    assert job.poll() == outcome


def test_a_queue_that_takes_no_more(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As limits of the accounting make it, which do not hold for administrators."""
    words = "sbatch: error: QOSMaxSubmitJobPerUserLimit\\nsbatch: error: Batch job submission failed"
    refusing = tmp_path / "bin" / "sbatch"
    refusing.parent.mkdir()
    refusing.write_text(f"#!/bin/sh\nprintf '{words}\\n' >&2\nexit 1\n")
    refusing.chmod(0o755)
    waiting = launch.submit(task("see", folder), SITE.model_copy(update={"directives": ("--hold",)}))
    monkeypatch.setenv("PATH", f"{refusing.parent}:{os.environ['PATH']}")
    began = time.monotonic()
    with pytest.raises(slurm.QueueFull, match=r"until some have ended: sbatch .*QOSMaxSubmitJobPerUserLimit"):
        launch.submit(task("see", tmp_path / "another"), SITE)
    assert time.monotonic() - began < 10, "nobody waits here"
    waiting.cancel()
