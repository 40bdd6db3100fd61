"""Whoever starts the steps and follows them, in bad weather; and what others see of it meanwhile."""

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml
from small_stages import STAGES

from galdist import config, control, pipeline, provenance, status
from hpc import allocation, durable, launch, slurm
from hpc.job import Outcome
from hpc.queued import Order, QueuedJob
from hpc.resources import Resources
from hpc.site import Site


def load(folder: Path, *steps: dict[str, Any]) -> config.Run:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({"name": "weather", "seed": 1, "steps": list(steps)}))
    return config.load(str(path), (), STAGES)


def step(name: str, **keys: Any) -> dict[str, Any]:
    return {"name": name, "stage": "pieces", "config": {"n_pieces": 1}, **keys}


def order(folder: Path, id: str | None = "12") -> Order:
    """A step's order to Slurm, as another process has left it."""
    task = launch.Task("galdist.stages:call", {}, folder, "serial", Resources())
    made = Order(folder, "token", "comment", 0, folder / ".slurm", id, 0.0, task, Site(launcher="slurm"))
    made.write()
    return made


# What others see


def test_a_finished_step_keeps_its_job(tmp_path: Path) -> None:
    pipeline.execute(load(tmp_path, step("a")), tmp_path / "out", Site(launcher="debug"), stages=STAGES)
    path = tmp_path / "out" / "a" / "provenance.json"
    job = {"id": "12", "nodes": ["n1", "n2"], "restarts": 1}
    durable.write_json(path, durable.read_json(path) | {"job": job})
    (found,) = status.steps_of(tmp_path / "out")
    assert found.state == "done"
    assert found.job == launch.JobInfo("12", "ended", ("n1", "n2"), restarts=1)


def test_a_job_that_is_over_and_not_yet_recorded(tmp_path: Path) -> None:
    """Somebody follows it and is about to; where nobody does, it waits for the next run."""
    out = tmp_path / "out"
    pipeline.execute(load(tmp_path, step("a")), out, Site(launcher="debug"), stages=STAGES)
    (out / "a" / "done.json").unlink()
    order(out / "a").conclude(Outcome(hosts=("n1",)))
    assert status.steps_of(out)[0].state == "stopped"
    with pipeline._lock(out):
        assert status.steps_of(out)[0].state == "running"


def test_who_watches_asks_slurm_seldom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(control, "orchestrator_job", asked.append)
    assert [control.worker(tmp_path) for _ in range(5)] == [None] * 5
    assert len(asked) == 1
    with pipeline._lock(tmp_path):
        seen = [control.worker(tmp_path) for _ in range(5)]
        assert len(asked) == 2, "somebody came"
    assert set(seen) == {seen[0]}
    assert f"process {os.getpid()} on " in str(seen[0])
    assert control.worker(tmp_path) is None, "and is gone"


def test_a_job_that_another_version_queued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is shown, ended, and where it runs taken over; one that waits would find nothing that it can do."""
    order(tmp_path)
    path = tmp_path / ".slurm" / "job.json"
    content = durable.read_json(path) | {"more": 1}
    content["site"] |= {"colour": "red", "grace": "soon", "partition": "cpu"}
    content["task"]["resources"] |= {"shape": "round", "cpus": 3}
    content["task"]["more"] = 1
    durable.write_json(path, content)
    state = "RUNNING"
    monkeypatch.setattr(slurm, "states", lambda ids: {id: slurm.JobState(id, state, ("n1",)) for id in ids})
    monkeypatch.setattr(slurm, "cancel", lambda id, signal=None: canceled.append(id))
    canceled: list[str] = []
    assert launch.describe([tmp_path]) == {tmp_path: launch.JobInfo("12", "running", ("n1",))}
    site = Site(launcher="slurm", grace=30)
    job = launch.attach(tmp_path, site)
    assert isinstance(job, QueuedJob)
    assert (job.order.site, job.order.task.resources) == (site, Resources(cpus=3))
    state = "PENDING"
    assert launch.attach(tmp_path, site) is None
    with pytest.raises(SystemExit, match="another version of this code; run it again to queue it anew"):
        allocation.run(str(tmp_path), "token")
    words = launch.describe([tmp_path])[tmp_path].state
    failed = durable.read_json(tmp_path / ".slurm" / "outcome.json")["outcome"]["failures"][0]["reason"]
    assert words == "failed"
    assert all(text in failed for text in ("site.colour: unknown key", "site.grace: ", "resources.shape: "))
    (tmp_path / ".slurm" / "outcome.json").unlink()
    state = "CANCELLED"
    launch.end_leftovers(tmp_path)
    assert canceled == ["12"]
    assert not path.exists()


def test_the_accounting_is_asked_once_for_a_job_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def usage(ids: list[str]) -> slurm.Usage | None:
        asked.extend(ids)
        return used if ids else None

    used = slurm.Usage(60.0, 30.0, 2**30, 1, 2**30, 600.0, 0, None, "OUT_OF_MEMORY", 0)
    monkeypatch.setattr(slurm, "usage", usage)
    outcome = QueuedJob(order(tmp_path))._without_a_word(slurm.JobState("12", "OUT_OF_MEMORY", ("n1",)))
    assert outcome is not None
    assert "it asked for 1.00 GiB" in str(outcome.failures[0])
    assert outcome.usage["max_rss"] == 2**30
    assert asked == ["12"]


# Bad weather


class Troubled:
    """A job on a cluster, in place of a real one: what cannot be brought about on a real one in seconds."""

    def __init__(self, *troubles: Exception) -> None:
        self._troubles = list(troubles)

    def poll(self) -> launch.Outcome | None:
        if self._troubles:
            raise self._troubles.pop(0)
        return Outcome(hosts=("n1",))

    def about(self) -> launch.JobInfo:
        return launch.JobInfo("12", "running", ("n1",))

    def cancel(self, grace: float = 10.0) -> None:
        raise AssertionError


def on_cluster(
    folder: Path, patch: pytest.MonkeyPatch, jobs: dict[str, Troubled], *steps: dict[str, Any]
) -> set[str]:
    """Do the steps; returns all that was said of them meanwhile."""
    said: set[str] = set()
    patch.setattr(launch, "submit", lambda task, site: jobs[task.folder.name])
    patch.setattr(pipeline, "_SLOW_TICK", 0.01)
    patch.setattr(pipeline, "_SILENCE", 0.1)
    pipeline.execute(
        load(folder, *steps),
        folder / "out",
        Site(launcher="slurm"),
        lambda view: said.update(step.detail for step in view.steps),
        stages=STAGES,
    )
    return said


@pytest.mark.parametrize(
    "trouble",
    [slurm.Unreachable("Slurm does not answer"), OSError(errno.ESTALE, "Stale file handle")],
    ids=["slurm", "files"],
)
def test_what_does_not_answer_is_asked_again(
    trouble: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = on_cluster(tmp_path, monkeypatch, {"a": Troubled(*[trouble] * 20)}, step("a"))
    assert f"asked again soon: {trouble}" in said
    assert status.view(tmp_path / "out").steps[0].state == "done"


def test_files_that_stay_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_BLIND", 0.2)
    jobs = {"a": Troubled(*[OSError(errno.EIO, "Input/output error")] * 1000)}
    with pytest.raises(OSError, match="Input/output error"):
        on_cluster(tmp_path, monkeypatch, jobs, step("a"))


def test_a_job_that_slurm_does_not_take_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its step fails, and says why; the others go on."""
    jobs = {"a": Troubled(slurm.SlurmError("sbatch: QOSMaxSubmitJobPerUserLimit")), "b": Troubled()}
    jobs["c"] = Troubled()
    with pytest.raises(pipeline.StepFailed, match=r"step a failed after .*QOSMaxSubmitJobPerUserLimit"):
        on_cluster(tmp_path, monkeypatch, jobs, step("a"), step("b"), step("c", inputs={"before": "b"}))
    states = {step.name: step.state for step in status.view(tmp_path / "out").steps}
    assert states == {"a": "failed", "b": "done", "c": "done"}


def test_files_that_are_away_when_a_step_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin, troubles = provenance.Record.begin, [OSError(errno.EIO, "Input/output error")]

    def troubled(*given: Any) -> provenance.Record:
        if troubles:
            raise troubles.pop()
        return begin(*given)

    monkeypatch.setattr(provenance.Record, "begin", troubled)
    said = on_cluster(tmp_path, monkeypatch, {"a": Troubled()}, step("a"))
    assert "asked again soon: [Errno 5] Input/output error" in said
    assert status.view(tmp_path / "out").steps[0].state == "done"


# A job that orchestrates


def test_only_the_job_that_galdist_is_goes_back_into_the_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal of somebody's session on a node is in a job as well."""
    monkeypatch.setenv("PATH", str(tmp_path))  # whoever asks Slurm hears that there is none
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert pipeline._queue_again() == (False, "")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_TASK_PID", str(os.getppid()))
    requeued, words = pipeline._queue_again()
    assert (requeued, words[:44]) == (False, "; job 12 is not queued again: it runs someth")
    monkeypatch.setenv("SLURM_TASK_PID", str(os.getpid()))
    assert "; job 12 could not be queued again: squeue is not on PATH" in pipeline._queue_again()[1]


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes shell scripts that are taken for Slurm's commands."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def make(**scripts: str) -> None:
        for name, script in scripts.items():
            (folder / name).write_text(f"#!/bin/sh\n{script}\n")
            (folder / name).chmod(0o755)

    return make


def test_who_queues_its_own_job_again_outlives_the_signal_that_follows(
    commands: Callable[..., None], tmp_path: Path
) -> None:
    """It may come before scontrol has its answer, and to both."""
    commands(scontrol=f"kill -TERM $$ $PPID; sleep 0.2; touch {tmp_path}/answered")
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        slurm.requeue("12")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (tmp_path / "answered").exists()
    assert heard == [signal.SIGTERM]


@pytest.mark.parametrize("lost", ["kill -KILL $$", "echo 'Socket timed out on send/recv' >&2; exit 1"])
def test_a_lost_answer_is_no_refusal(lost: str, commands: Callable[..., None]) -> None:
    """What became of the job says whether it was asked."""
    commands(scontrol=lost, squeue="echo '12|COMPLETING|None|0|1||'")
    slurm.requeue("12")
    commands(squeue="echo '12|RUNNING|None|0|0||'")
    with pytest.raises(slurm.Unreachable, match="scontrol"):
        slurm.requeue("12")


def test_a_file_server_that_is_away_does_not_keep_a_stopped_run_from_going_on() -> None:
    entry, job, record = Mock(), Mock(), Mock()
    entry.name = "a"
    record.end.side_effect = OSError(errno.ESTALE, "Stale file handle")
    view = status.StepView("a", "pieces", "running")
    running = pipeline._Running(entry, job, view, record)
    problems = pipeline._Execution.cancel(Mock(_running={"a": running}, _starting=[]))
    assert problems == ["how a ended could not be written down: [Errno 116] Stale file handle"]
    job.cancel.assert_called_once()


def test_a_time_limit_is_counted_once_the_file_server_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    (tmp_path / ".slurm").mkdir()
    write, away = durable.write_json, [True, True]

    def troubled(*args: Any) -> None:
        if away and away.pop():
            raise OSError(errno.ESTALE, "Stale file handle")
        write(*args)

    monkeypatch.setattr(durable, "write_json", troubled)
    assert launch.count_limit(tmp_path) == ""
    assert durable.read_json(tmp_path / ".slurm" / "history-12.json")["limits"] == [0.0]


def test_a_time_limit_that_cannot_be_counted_does_not_stop_whoever_queues_the_job_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*args: Any) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(allocation, "_BRIEF", 0.0)
    monkeypatch.setattr(durable, "write_json", gone)
    assert launch.count_limit(tmp_path) == ""


def test_a_job_is_wanted_where_slurm_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(job: str) -> bool:
        raise slurm.SlurmError("squeue: Invalid user")

    monkeypatch.setattr(slurm, "is_still_running", refused)
    assert allocation._is_wanted()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP])
def test_signals_that_ask_to_stop(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt) as caught, pipeline._stop_signals(Site(launcher="slurm")):
        signal.raise_signal(number)
    assert caught.value.args == (number,)
    assert signal.getsignal(number) is before


@pytest.fixture
def held(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The lock of a run on another machine."""
    code = (
        "import fcntl, time\n"
        f"stream = open({str(tmp_path / '.lock')!r}, 'a+')\n"
        "fcntl.flock(stream, fcntl.LOCK_EX)\n"
        "stream.write('process 4711 on n7, since Monday'); stream.flush(); print('held', flush=True)\n"
        "time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    other.stdout.readline()
    yield other
    other.kill()
    other.communicate()


def test_a_lock_that_outlives_its_node(
    held: "subprocess.Popen[str]", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm starts the job of a lost node again before the file server knows that the node is lost."""
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    text = rf"process 4711 on n7, since Monday\. Wait .* is down and its lock stays: rm {tmp_path}/\.lock"
    with pytest.raises(pipeline.RunLocked, match=text), pipeline._lock(tmp_path):
        raise AssertionError
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    threading.Timer(2, held.kill).start()
    with pipeline._lock(tmp_path):
        assert status.holder(tmp_path) is not None


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".lock").touch()

    def flock(*given: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    text = r"has no locks .*No locks available.*--out.*-o flock"
    with pytest.raises(pipeline.RunLocked, match=text), pipeline._lock(tmp_path):
        raise AssertionError
    assert status.holder(tmp_path) is None
