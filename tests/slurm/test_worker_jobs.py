"""Dask on Slurm: its workers are jobs, which come, die, are replaced and end."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from hpc import cluster, durable, mpi, progress, rank
from hpc import slurm as door
from hpc.site import Site, own_paths

pytestmark = pytest.mark.usefixtures("slurm")
SITE = {"launcher": "slurm", "interface": "lo" if sys.platform == "linux" else "lo0"}

CLIENT = """
import time
from pathlib import Path
from hpc import cluster

with cluster.client() as client:
    client.wait_for_workers(2)
    Path("ready").touch()
    client.submit(time.sleep, 600).result()
"""


class Step:
    """What the launcher tells a step that is a Slurm job."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.token = f"test{time.time_ns():x}"
        self.variables: dict[str, str] = {}

    def asks(self, workers: int, jobs: int, **facts: Any) -> None:
        self.variables = {
            cluster.SITE_VARIABLE: Site.model_validate(SITE | facts).model_dump_json(),
            cluster.FOLDER_VARIABLE: str(self.folder),
            cluster.NODES_VARIABLE: str(jobs),
            cluster.MEMORY_VARIABLE: str(workers // jobs * 500 * 2**20),
            mpi.VARIABLE: str(workers),
            progress.VARIABLE: str(self.folder / "progress.json"),
            rank.JOB_VARIABLE: self.token,
        }

    def queued(self) -> list[str]:
        """Ids of the worker jobs that are not over, as Slurm knows them."""
        states = door.states(door.find(self.token))
        return [id for id, state in states.items() if not state.is_over and state.state != "COMPLETING"]

    def processes(self) -> list[psutil.Process]:
        return [process for process in psutil.process_iter() if rank._belongs(process, self.token)]

    def links(self) -> dict[str, str]:
        return dict(durable.read_json(self.folder / "progress.json")["links"])


@pytest.fixture
def step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Step]:
    """A step in this process, whose jobs are ended whatever happens."""
    found = Step(tmp_path / "my step")
    found.folder.mkdir()
    asks = found.asks

    def in_this_process(*arguments: Any, **facts: Any) -> None:
        asks(*arguments, **facts)
        for name, value in found.variables.items():
            monkeypatch.setenv(name, value)

    monkeypatch.setattr(found, "asks", in_this_process)
    yield found
    for id in found.queued():
        door.cancel(id)


def until(condition: Callable[[], Any], timeout: float) -> float:
    """Wait for ``condition``; returns the seconds it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < timeout, "it does not happen"
        time.sleep(0.1)
    return time.monotonic() - start


def square(number: int, seconds: float = 0.0) -> tuple[int, str, int]:
    time.sleep(seconds)
    return number**2, os.environ["SLURM_JOB_ID"], os.getpid()


def workers(client: Any) -> set[str]:
    return {worker.name for worker in client.cluster.scheduler.workers.values()}


def listening(processes: list[psutil.Process]) -> set[str]:
    found = set()
    for process in processes:
        for connection in process.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN:
                found.add(connection.laddr.ip)
    return found


@pytest.mark.parametrize("number", [2, 4])
def test_workers_are_jobs(number: int, step: Step) -> None:
    step.asks(number, 2, environment={"GREETING": "a b"})
    started = time.monotonic()
    with cluster.client() as client:
        client.wait_for_workers(number, timeout=120)
        print(f"{number} workers in 2 jobs: {time.monotonic() - started:.1f} s")
        seen = client.gather(client.map(square, range(40), [0.05] * 40, pure=False))
        assert [value for value, _, _ in seen] == [n**2 for n in range(40)]
        assert len({pid for _, _, pid in seen}) == number
        jobs = {job for _, job, _ in seen}
        assert len(jobs) == 2
        assert jobs == set(step.queued()) == set(cluster.worker_jobs(step.folder))
        infos = client.scheduler_info()["workers"].values()
        assert {(info["nthreads"], info["memory_limit"]) for info in infos} == {(1, 500 * 2**20)}
        read = ["OMP_NUM_THREADS", "GREETING"]
        told = client.run(lambda: [os.environ[name] for name in read])
        assert list(told.values()) == [["1", "a b"]] * number
        below = [process for process in step.processes() if process.pid != os.getpid()]
        assert listening(below) <= {"127.0.0.1"}
        assert urllib.request.urlopen(step.links()["dashboard"], timeout=10).status == 200
    assert step.queued() == []
    assert until(lambda: step.processes() == [], 15) < 15
    assert not (step.folder / ".slurm" / "tls").exists()


def test_a_cancelled_job_is_replaced(step: Step) -> None:
    step.asks(4, 2)
    with cluster.client() as client:
        client.wait_for_workers(4, timeout=120)
        before = workers(client)
        tasks = client.map(square, range(200), [0.2] * 200, pure=False)
        until(lambda: sum(task.done() for task in tasks) > 5, 30)
        victim = cluster.worker_jobs(step.folder)[0]
        door.cancel(victim)
        took = until(lambda: len(workers(client)) == 4 and workers(client) != before, 60)
        print(f"replaced after {took:.1f} s, {sum(task.done() for task in tasks)} tasks done")
        assert [value for value, _, _ in client.gather(tasks)] == [n**2 for n in range(200)]
        assert len(workers(client) & before) == 2
        assert len(cluster.worker_jobs(step.folder)) == 3
        assert victim not in step.queued()


def test_a_killed_worker_process_comes_back_in_its_job(step: Step) -> None:
    step.asks(2, 1)
    with cluster.client() as client:
        client.wait_for_workers(2, timeout=120)
        victim = min(client.run(os.getpid).values())
        tasks = client.map(square, range(20), [0.1] * 20, pure=False)
        os.kill(victim, signal.SIGKILL)
        assert [value for value, _, _ in client.gather(tasks)] == [n**2 for n in range(20)]
        until(lambda: len(workers(client)) == 2, 60)
        assert victim not in client.run(os.getpid).values()
        assert len(cluster.worker_jobs(step.folder)) == 1


def test_adaptive(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between one job and all of them, as there is work; a job stays while one of its workers works."""
    monkeypatch.setattr(cluster, "_IDLE", 3)
    step.asks(4, 2, dask={"adaptive": True})
    with cluster.client() as client:
        until(lambda: len(workers(client)) == 2, 120)
        tasks = client.map(square, range(100), [0.3] * 100, pure=False)
        print(f"up: {until(lambda: len(workers(client)) == 4, 120):.1f} s")
        assert [value for value, _, _ in client.gather(tasks)] == [n**2 for n in range(100)]
        del tasks
        jobs = set(step.queued())
        assert len(jobs) == 2
        one_of_each = [name for name in workers(client) if name.endswith("-0")]
        held = [client.submit(square, 7, 10.0, pure=False, workers=name) for name in one_of_each]
        time.sleep(7)
        assert set(step.queued()) == jobs
        assert {job for _, job, _ in client.gather(held)} == jobs
        del held
        print(f"down: {until(lambda: len(step.queued()) == 1, 60):.1f} s")
        assert len(workers(client)) == 2
        door.cancel(step.queued()[0])
        assert client.submit(square, 3).result()[0] == 9, "also the last job is replaced"
        # of unknown length, so half a second each is assumed; 5 s of work for each worker
        tasks = client.map(time.sleep, [600.0] * 25, pure=False)
        until(lambda: len(client.cluster.scheduler.tasks) >= len(tasks), 10)
        assert client.cluster.sync(client.cluster._adaptive.target) == 4, "whole jobs, not 3 workers"


def test_an_option_that_the_site_rejects(step: Step) -> None:
    """Without it a job gets what the partition gives; the worker keeps to its memory all the same."""
    step.asks(1, 1, skip_directives=["--mem"], dask={"dashboard": "interface"})
    with cluster.client() as client:
        assert "--mem=" not in client.cluster.job_script()
        (job,) = cluster.worker_jobs(step.folder)
        assert "MinMemoryCPU=1500M" in door.run(["scontrol", "show", "job", job])
        (info,) = client.scheduler_info()["workers"].values()
        assert info["memory_limit"] == 500 * 2**20


def test_setup_that_fails(step: Step) -> None:
    step.asks(2, 2, setup=["echo loading", "module-that-is-not-there load python"])
    started = time.monotonic()
    with pytest.raises(cluster.WorkersLost) as caught, cluster.client():
        pytest.fail("there is no worker")
    print(f"{time.monotonic() - started:.1f} s until:\n{caught.value}")
    text = str(caught.value)
    assert re.search(r"The last: worker job \d+ ended: FAILED \(NonZeroExitCode\) on n\d", text)
    assert "  | loading" in text
    assert "module-that-is-not-there: command not found" in text
    assert 6 <= len(cluster.worker_jobs(step.folder)) <= 8
    assert step.queued() == []


def test_setup_that_begins_to_fail(step: Step) -> None:
    """Who waits for tasks is woken and hears why."""
    from distributed import as_completed, performance_report

    flag = step.folder / "broken"
    step.asks(2, 2, setup=[f'test ! -e "{flag}"'])

    def work() -> None:
        with cluster.client() as client, performance_report(step.folder / "report.html"):
            client.wait_for_workers(2, timeout=120)
            tasks = client.map(square, range(1000), [1.0] * 1000, pure=False)
            flag.touch()
            for id in step.queued():
                door.cancel(id)
            for task in as_completed(tasks):
                task.result()

    with pytest.raises(cluster.WorkersLost, match="this line of the site's setup failed: test"):
        work()
    assert step.queued() == []


def test_what_sbatch_refuses(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_ASK", 1.0)
    step.asks(1, 1, partition="not-there")
    with pytest.raises(cluster.WorkersLost, match="invalid partition specified: not-there"), cluster.client():
        pytest.fail("there is no worker")
    assert cluster.worker_jobs(step.folder) == []


@pytest.fixture
def process(step: Step) -> Iterator[subprocess.Popen[bytes]]:
    """A client of two worker jobs in a process of its own, in the middle of a long task."""
    step.asks(2, 2)
    paths = {"PYTHONPATH": os.pathsep.join(own_paths())}
    with subprocess.Popen(
        [sys.executable, "-c", CLIENT], cwd=step.folder, env=os.environ | step.variables | paths
    ) as started:
        try:
            until(lambda: (step.folder / "ready").exists(), 120)
            yield started
        finally:
            started.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_client_that_is_told_to_stop(
    number: signal.Signals, step: Step, process: subprocess.Popen[bytes]
) -> None:
    assert len(step.queued()) == 2
    assert len(step.processes()) >= 5, "the client, and nanny and worker of each job"
    process.send_signal(number)
    process.send_signal(number if number == signal.SIGTERM else signal.SIGCONT)  # Slurm and the supervisor
    status = process.wait(timeout=10)
    assert status == (143 if number == signal.SIGTERM else -signal.SIGINT)
    assert step.queued() == []
    print(f"gone after {until(lambda: step.processes() == [], 15):.1f} s")


def test_a_client_that_is_a_job(step: Step) -> None:
    """sbatch inside a job that asked for something else; scancel of that job."""
    step.asks(2, 2)
    script = step.folder / "client.sh"
    command = shlex.join([sys.executable, "-c", CLIENT])
    script.write_text(f"#!/bin/bash\nexport PYTHONPATH={os.pathsep.join(own_paths())}\nexec {command}\n")
    asked = ["--ntasks=2", "--cpus-per-task=2", "--mem=700M", "--job-name=client", "--time=7"]
    answer = door.run(["sbatch", *asked, f"--chdir={step.folder}", "--output=client.out", str(script)])
    own = answer.split()[-1]
    try:
        until(lambda: (step.folder / "ready").exists(), 120)
        jobs = cluster.worker_jobs(step.folder)
        assert set(jobs) == set(step.queued())
        shown = door.run(["scontrol", "show", "job", jobs[0]])
        assert f"JobName=galdist-dask-{step.token}" in shown
        assert "NumCPUs=1 " in shown
        assert "TimeLimit=00:07:00" not in shown
    finally:
        door.cancel(own)
    print(f"gone after {until(lambda: step.queued() == [], 10):.1f} s")
    until(lambda: not (step.folder / ".slurm" / "tls").exists(), 10)


@pytest.mark.slow
def test_a_killed_client(step: Step, process: subprocess.Popen[bytes]) -> None:
    """Nobody cancels the jobs: the workers miss the scheduler and end by themselves."""
    process.kill()
    print(f"gone after {until(lambda: step.queued() == [], 90):.0f} s")
    assert [process for process in step.processes() if process.pid != os.getpid()] == []
