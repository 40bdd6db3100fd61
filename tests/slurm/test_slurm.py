"""The door to Slurm, on a real Slurm."""

import json
import os
import shlex
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hpc import slurm
from hpc.resources import Resources
from hpc.site import GpuSite, Site

HERE = __name__
SITE = Site(launcher="slurm", partition="cpu", grace=15)
SMALL = Resources(memory=200 * 2**20, time=600)


# Functions that run as jobs


def record(out: str, word: str = "", seconds: float = 0.0) -> None:
    """Write what this job sees."""
    started = time.time()
    time.sleep(seconds)
    seen = {"word": word, "started": started, "ended": time.time(), "job": slurm.own_job()}
    write(out, seen | {"environment": dict(os.environ), "directory": os.getcwd()})


def write(out: str, value: Any) -> None:
    path = Path(out)
    path.with_suffix(".tmp").write_text(json.dumps(value))
    path.with_suffix(".tmp").rename(path)


def fail() -> None:
    raise ValueError("as it was told to")


def burn(seconds: float, n_bytes: int) -> None:
    block = b"1" * n_bytes
    while time.process_time() < seconds:
        sum(block[:100000])


def await_signal(out: str) -> None:
    got: list[int] = []
    signal.signal(signal.SIGUSR2, lambda signum, frame: got.append(signum))
    write(f"{out}.ready", os.getpid())
    while not got:
        time.sleep(0.05)
    write(out, got)


STEP = """
import pathlib, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
out = pathlib.Path(sys.argv[1])
out.with_suffix(".ready").touch()
signal.sigwait({signal.SIGTERM})
out.touch()
"""


def start_step(out: str) -> None:
    """A step whose process waits for SIGTERM."""
    subprocess.run(["srun", "python3", "-c", STEP, out], check=True)


def submit_from_inside(folder: str, out: str) -> None:
    ids = slurm.submit(
        f"{HERE}:record",
        [{"out": out}],
        Path(folder),
        "inner",
        Resources().layout("serial", 1),
        SMALL,
        SITE,
        "inner",
    )
    write(f"{out}.ids", ids)


# How the tests speak to them


Submit = Callable[..., list[str]]


@pytest.fixture
def submit(tmp_path: Path) -> Iterator[Submit]:
    """`slurm.submit` for small jobs, which end with the test."""
    ids: list[str] = []
    unique = uuid.uuid4().hex  # the queue remembers the jobs of earlier tests

    def start(function: str, *arguments: dict[str, Any], **other: Any) -> list[str]:
        resources = other.pop("resources", SMALL)
        layout = other.pop("layout", None) or resources.layout("serial", 1)
        site, token = SITE.model_copy(update=other.pop("site", {})), other.pop("token", unique)
        folder = other.pop("folder", tmp_path / ".slurm")
        function = f"{HERE}:{function}"
        new = slurm.submit(
            function, arguments or ({},), folder, "test", layout, resources, site, token, **other
        )
        ids.extend(new)
        return new

    yield start
    for job in {id.partition("_")[0] for id in ids}:
        slurm.cancel(job)


def wait(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.2)
    return value


def state(id: str) -> slurm.JobState:
    return slurm.states([id])[id]


def ended(ids: list[str]) -> dict[str, str]:
    """State of each job when all are over."""
    wait(lambda: all(job.is_over for job in slurm.states(ids).values()))
    return {id: job.state for id, job in slurm.states(ids).items()}


def directives(script: Path) -> list[str]:
    lines = script.read_text().splitlines()
    return [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]


class Controller:
    """A configuration that names the real controller, or a port on which nobody listens."""

    def __init__(self, path: Path) -> None:
        self.path, self.real = path, Path(os.environ["SLURM_CONF"]).read_text()

    def dies(self) -> None:
        kept = [line for line in self.real.splitlines() if not line.startswith(("SlurmctldPort", "MessageT"))]
        self.path.write_text("\n".join([*kept, "SlurmctldPort=9", "MessageTimeout=2", ""]))

    def lives(self) -> None:
        self.path.write_text(self.real)


@pytest.fixture
def controller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Controller:
    controller = Controller(tmp_path / "slurm.conf")
    controller.lives()
    monkeypatch.setenv("SLURM_CONF", str(controller.path))
    return controller


LATER = {"directives": ("--begin=now+1hour",)}


# Tests


def test_a_job_from_the_queue_to_its_end(submit: Submit, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    (id,) = submit("record", {"out": str(out), "word": "two words; $HOME", "seconds": 2})
    seen = set()

    def over() -> bool:
        job = state(id)
        seen.add("pending" if job.is_pending else "running" if job.is_running else job.state)
        return job.is_over

    wait(over)
    assert seen >= {"running", "COMPLETED"}
    assert state(id).nodes
    assert state(id).start is not None
    result = json.loads(out.read_text())
    assert result["word"] == "two words; $HOME"
    assert result["job"] == id
    assert abs(result["started"] - (state(id).start or 0)) < 5
    assert slurm.own_job() is None


def test_a_job_that_fails(submit: Submit, tmp_path: Path) -> None:
    (id,) = submit("fail")
    assert ended([id]) == {id: "FAILED"}
    assert state(id).reason == "NonZeroExitCode"
    assert "ValueError: as it was told to" in (tmp_path / ".slurm" / f"slurm-{id}.out").read_text()


def test_a_job_that_waits(submit: Submit) -> None:
    (id,) = submit("record", {"out": ""}, site=LATER)
    job = wait(lambda: state(id) if state(id).reason else None)
    assert (job.is_pending, job.is_running, job.is_over, job.reason) == (True, False, False, "BeginTime")
    assert 3000 < job.start - time.time() < 3700
    slurm.cancel(id)
    assert ended([id]) == {id: "CANCELLED"}
    slurm.cancel(id)  # once more does not matter


def test_an_array_with_a_cap(submit: Submit, tmp_path: Path) -> None:
    outs = [tmp_path / f"{n}.json" for n in range(4)]
    arguments = [{"out": str(out), "word": f"job {n}", "seconds": 2} for n, out in enumerate(outs)]
    ids = submit("record", *arguments, at_once=2, token=(token := uuid.uuid4().hex))
    assert [id.partition("_")[2] for id in ids] == ["0", "1", "2", "3"]
    assert slurm.find(token) == ids
    assert ended(ids) == dict.fromkeys(ids, "COMPLETED")
    results = [json.loads(out.read_text()) for out in outs]
    assert [result["word"] for result in results] == [f"job {n}" for n in range(4)]
    assert [result["job"] for result in results] == ids
    for result in results:
        others = [r for r in results if r["started"] <= result["started"] < r["ended"]]
        assert len(others) <= 2, "more at once than asked for"


def test_many_jobs_in_one_question(submit: Submit, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = submit("record", *({"out": ""} for _ in range(400)), site=LATER, token=(token := uuid.uuid4().hex))
    assert slurm.find(token) == ids, "in order of their index"
    calls: list[list[str]] = []
    run = slurm.run
    monkeypatch.setattr(slurm, "run", lambda command: calls.append(command) or run(command))
    found = slurm.states([*ids, "99999999"])
    assert found.pop("99999999") == slurm.JobState("99999999", "GONE")
    assert found.keys() == set(ids)
    assert all(job.is_pending for job in found.values())
    assert [call[0] for call in calls] == ["squeue", "sacct"]
    slurm.cancel(ids[7])  # of which Slurm keeps no trace
    states = wait(lambda: (s := slurm.states(ids))[ids[7]].is_over and s)
    assert [id for id, job in states.items() if job.is_over] == [ids[7]]
    slurm.cancel(ids[0].partition("_")[0])
    others = dict.fromkeys({*ids} - {ids[7]}, "CANCELLED")
    assert ended(ids) == others | {ids[7]: "GONE"}
    # what the queue says after the end, the accounting says when the queue has forgotten it
    wait(lambda: {id: job.state for id, job in slurm._accounting(set(ids)).items()} == others)


def test_the_accounting_remembers(submit: Submit) -> None:
    ids = submit("record", {"out": "/dev/null/no"}, {"out": "/dev/null/no"})
    assert ended(ids) == dict.fromkeys(ids, "FAILED")
    accounted = wait(
        lambda: (a := slurm._accounting(set(ids))) == {} or {j.state for j in a.values()} == {"FAILED"}
    )
    assert accounted
    for id, job in slurm._accounting(set(ids)).items():
        assert (job.id, job.nodes, job.start) == (id, state(id).nodes, state(id).start)


def test_jobs_that_nobody_knows() -> None:
    assert slurm.states([]) == {}
    assert slurm.states(["99999999"])["99999999"].state == "GONE"
    assert slurm.states(["99999998", "99999999"])["99999998"].is_over
    assert slurm.find("no such token") == []
    assert slurm.usage(["99999999"]) is None
    assert slurm.usage([]) is None


def test_usage_of_a_job_that_waits(submit: Submit) -> None:
    (id,) = submit("record", {"out": ""}, site=LATER)
    usage = wait(lambda: slurm.usage([id]))
    assert (usage.state, usage.cpu_seconds, usage.max_rss) == ("PENDING", 0, 0)


def test_use_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """What sacct says where GPUs are measured, which those of the development Slurm cannot be."""
    tres = "billing=4,cpu=4,gres/gpu:a100=2,gres/gpu=2,mem=8G,node=1"
    lines = [
        f"7|COMPLETED|100|00:50.5|4|60|{tres}||",
        f"7.batch|COMPLETED|100|00:00.5|4||{tres}|mem=10M|gres/gpumem=0,gres/gpuutil=0",
        f"7.0|COMPLETED|99|00:50|4||{tres}|mem=3G|gres/gpumem=9G,gres/gpuutil=87",
    ]
    monkeypatch.setattr(slurm, "run", lambda command: "\n".join(lines))
    usage = slurm.usage(["7"])
    assert usage is not None
    assert (usage.gpus, usage.gpu_utilization, usage.max_rss) == (2, 87, 3 * 2**30)


def test_a_job_that_nobody_knows_does_not_run() -> None:
    assert not slurm.is_still_running("99999999")


def test_watching(submit: Submit) -> None:
    first, second = submit("record", {"out": ""}, site=LATER), submit("fail")
    watcher = slurm.Watcher(interval=0.2)
    assert watcher.state(first[0]) is None, "it does not wait"
    wait(lambda: (job := watcher.state(second[0])) and job.is_over)
    assert wait(lambda: watcher.state(first[0])).is_pending
    assert watcher.silent_since is None


def test_cancel_and_signals(submit: Submit, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (id,) = submit("start_step", {"out": str(out)})
    wait(out.with_suffix(".ready").exists)
    slurm.cancel(f"{id}.0", "TERM")
    assert ended([id]) == {id: "COMPLETED"}
    assert out.exists()
    (id,) = submit("record", {"out": "", "seconds": 600})
    wait(lambda: slurm.is_still_running(id))
    slurm.cancel(id)
    assert not slurm.is_still_running(id)
    assert ended([id]) == {id: "CANCELLED"}


def test_requeue(submit: Submit, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (id,) = submit("await_signal", {"out": str(out)})
    ready = tmp_path / "out.ready"
    wait(ready.exists)
    ready.unlink()
    slurm.requeue(id)
    assert not slurm.is_still_running(id)
    wait(ready.exists)
    assert state(id).restarts == 1
    assert slurm.is_still_running(id)
    assert slurm.run(["scancel", "--signal=USR2", "--batch", id]) == ""
    assert ended([id]) == {id: "COMPLETED"}
    usage = wait(lambda: (u := slurm.usage([id])) and u.state == "COMPLETED" and u)
    assert usage.restarts == 1
    with pytest.raises(slurm.SlurmError, match="scontrol requeue 99999999: Invalid job id"):
        slurm.requeue("99999999")


def test_the_sign_of_the_time_limit_reaches_python(submit: Submit, tmp_path: Path) -> None:
    """``--batch`` signals one process as ``--signal=B:`` does; and one that comes too early ends nothing."""
    out = tmp_path / "out"
    (id,) = submit("await_signal", {"out": str(out)}, site={"setup": ("sleep 3",)})
    wait(lambda: state(id).is_running)
    time.sleep(1)
    slurm.run(["scancel", "--signal=USR2", "--batch", id])
    wait((tmp_path / "out.ready").exists)
    assert not out.exists()
    slurm.run(["scancel", "--signal=USR2", "--batch", id])
    assert ended([id]) == {id: "COMPLETED"}
    assert json.loads(out.read_text()) == [signal.SIGUSR2]


def test_usage(submit: Submit) -> None:
    asked = Resources(memory=400 * 2**20, time=601, gpus=1, cpus=2)
    (id,) = submit("burn", {"seconds": 4, "n_bytes": 250 * 10**6}, resources=asked)
    assert ended([id]) == {id: "COMPLETED"}
    # The accounting may hear of the end and the steps of a job before its beginning, which has the limit.
    usage = wait(
        lambda: (u := slurm.usage([id])) and u.state == "COMPLETED" and u.max_rss and u.time_limit and u
    )
    assert 3 < usage.cpu_seconds < 8
    assert usage.elapsed >= 3
    assert 250e6 < usage.max_rss < 400e6
    assert (usage.cpus, usage.gpus, usage.restarts) == (2, 1, 0)
    assert (usage.memory_asked, usage.time_limit) == (400 * 2**20, 660), (
        "the limit in whole minutes, rounded up"
    )
    assert usage.gpu_utilization is None
    (other,) = submit("burn", {"seconds": 0, "n_bytes": 0}, resources=asked)
    assert ended([other]) == {other: "COMPLETED"}
    both = wait(lambda: (u := slurm.usage([id, other])) and u.cpus == 4 and u)
    assert both.max_rss == usage.max_rss
    assert both.memory_asked == 2 * usage.memory_asked


def test_what_is_asked_for(submit: Submit, tmp_path: Path) -> None:
    elastic = Resources(nodes=4, min_nodes=2, gpus=2, cpus=2, memory=10**9, time=90)
    site = {
        **{"account": "a", "qos": "q", "constraint": "c|d", "grace": 20},
        "gpu": GpuSite(partition="scavenge"),
        "directives": ("--hold", "--time=3"),
        "skip_directives": ("--account", "--qos", "--constraint", "--mem"),
    }
    (id,) = submit("record", {"out": ""}, resources=elastic, layout=elastic.layout("ddp", 1), site=site)
    script = directives(tmp_path / ".slurm" / "job.sh")
    assert set(script) >= {
        "--nodes=2-4",
        "--mincpus=4",
        "--cpus-per-task=2",
        "--gpus-per-node=2",
        "--time=2",
    }
    assert set(script) >= {"--partition=scavenge", "--signal=B:USR2@20", "--requeue", "--open-mode=append"}
    assert script[-2:] == ["--hold", "--time=3"], "last, where they win"
    assert slurm.run(["squeue", "--noheader", f"--jobs={id}", "--format=%l"]).strip() == "3:00"
    skipped = ("--account", "--qos", "--constraint", "--mem", "--wckey", "--error")
    assert not [line for line in script if line.startswith(skipped)]
    (held,) = submit("record", {"out": ""}, site={"skip_directives": ("--time",), "directives": ("--hold",)})
    script = directives(tmp_path / ".slurm" / "job.sh")
    assert "--mem=200M" in script
    assert "--nodes=1" in script
    assert not [line for line in script if line.startswith(("--time", "--gpus"))]
    assert state(held).is_pending


def test_the_environment_of_a_job(submit: Submit, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    words = 'it\'s $HOME, `pwd` and "quotes"'
    site = {
        "environment": {"WORDS": words, "FROM_SETUP": "the environment wins"},
        "setup": (
            "export FROM_SETUP=setup",
            "export HOST_OF_SETUP=$(hostname)",
            "export PYTHONPATH=/nonsense",
        ),
    }
    ended(submit("record", {"out": str(out)}, site=site))
    result = json.loads(out.read_text())
    environment = result["environment"]
    assert (environment["WORDS"], environment["FROM_SETUP"]) == (words, "the environment wins")
    assert environment["HOST_OF_SETUP"]
    assert environment["SLURM_EXPORT_ENV"] == "ALL"
    assert str(Path(slurm.__file__).parents[1]) in environment["PYTHONPATH"].split(":")
    assert result["directory"] == os.getcwd()


def test_setup_that_fails(submit: Submit, tmp_path: Path) -> None:
    (id,) = submit("record", {"out": ""}, site={"setup": ("true", "ls /no-such-module", "echo not reached")})
    assert ended([id]) == {id: "FAILED"}
    said = (tmp_path / ".slurm" / f"slurm-{id}.out").read_text()
    assert "this line of the site's setup failed: ls /no-such-module" in said
    assert "not reached" not in said


def test_a_job_queued_from_inside_a_job(submit: Submit, tmp_path: Path) -> None:
    """It inherits nothing of the job around it, here an element of an array with more cores."""
    outs = [tmp_path / f"{n}.json" for n in range(2)]
    arguments = [{"folder": str(tmp_path / f"inner{n}"), "out": str(out)} for n, out in enumerate(outs)]
    outer = submit("submit_from_inside", *arguments, resources=Resources(cpus=2, memory=2**29, time=1200))
    assert set(ended(outer).values()) == {"COMPLETED"}
    inner = [json.loads(Path(f"{out}.ids").read_text())[0] for out in outs]
    assert set(ended(inner).values()) == {"COMPLETED"}
    for id, out in zip(inner, outs, strict=True):
        environment = json.loads(out.read_text())["environment"]
        assert environment["SLURM_JOB_ID"] == id
        assert environment["SLURM_JOB_NAME"] == "inner"
        assert environment["SLURM_CPUS_PER_TASK"] == "1"
        assert not [key for key in environment if key.startswith("SLURM_ARRAY_")]


@pytest.mark.parametrize(
    ("site", "resources", "words"),
    [
        ({"partition": "gpuu"}, SMALL, "invalid partition specified: gpuu"),
        ({"partition": "cpu"}, Resources(memory=10**12), "Memory specification can not be satisfied"),
        ({"directives": ("--bogus=1",)}, SMALL, "unrecognized option '--bogus=1'"),
    ],
)
def test_refusals(
    submit: Submit, tmp_path: Path, site: dict[str, Any], resources: Resources, words: str
) -> None:
    with pytest.raises(slurm.SlurmError, match=words) as caught:
        submit("record", {"out": ""}, site=site, resources=resources)
    assert not isinstance(caught.value, slurm.Unreachable)
    for line in directives(tmp_path / ".slurm" / "job.sh"):
        assert f"  #SBATCH {line}" in str(caught.value)


def test_a_machine_without_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(
        slurm.SlurmError, match=r"squeue is not on PATH: this machine has no Slurm \(use --site local"
    ):
        slurm.states(["1"])


def test_a_controller_that_does_not_answer(
    submit: Submit, controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller.dies()
    questions: list[Callable[[], object]] = [
        lambda: slurm.states(["1"]),
        lambda: slurm.find("x"),
        lambda: slurm.cancel("1"),
        lambda: slurm.requeue("1"),
    ]
    for question in questions:
        with pytest.raises(slurm.Unreachable):
            question()
    monkeypatch.setattr(slurm, "_PATIENCE", 0.0)
    with pytest.raises(slurm.Unreachable, match=r"sbatch: Slurm does not answer: .*Unable to contact"):
        submit("record", {"out": ""})


def test_what_was_known_stands_while_nobody_answers(submit: Submit, controller: Controller) -> None:
    (id,) = submit("record", {"out": ""}, site=LATER)
    watcher = slurm.Watcher(interval=0.1)
    known = wait(lambda: (job := watcher.state(id)) and job.reason == "BeginTime" and job)
    controller.dies()
    wait(lambda: watcher.state(id) and watcher.silent_since)
    assert watcher.state(id) == known
    assert "Unable to contact" in watcher.silence
    controller.lives()
    wait(lambda: watcher.state(id) and watcher.silent_since is None)
    assert watcher.silence == ""


def test_a_job_is_offered_until_the_controller_is_back(submit: Submit, controller: Controller) -> None:
    controller.dies()
    threading.Timer(4, controller.lives).start()
    (id,) = submit("record", {"out": ""}, site=LATER)
    assert state(id).is_pending


def test_a_job_that_was_taken_in_silence_is_not_queued_twice(
    submit: Submit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sbatch delivers the job, and the answer is lost."""
    wrapper = tmp_path / "bin" / "sbatch"
    wrapper.parent.mkdir()
    real = subprocess.run(["which", "sbatch"], capture_output=True, text=True, check=True).stdout.strip()
    words = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"
    wrapper.write_text(f"#!/bin/sh\n{shlex.quote(real)} \"$@\"\necho '{words}' >&2\nexit 1\n")
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    ids = submit("record", {"out": ""}, site=LATER, token=(token := uuid.uuid4().hex))
    assert slurm.find(token) == ids
    assert len(ids) == 1


def test_names_of_nodes() -> None:
    assert slurm.hosts("") == ()
    assert slurm.hosts("n1") == ("n1",)
    assert slurm.hosts("n1,m2") == ("n1", "m2")
    assert slurm.hosts("n[1-3,7],gpu[01-02]") == ("n1", "n2", "n3", "n7", "gpu01", "gpu02")
