"""Steps as Slurm jobs: what ranks see, how they end, and how they are started again. On a real Slurm."""

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import small_jobs
from small_jobs import SITE, counted, job_id, report, starts, state, task, until, wait

from hpc import cluster, durable, launch, rank, slurm
from hpc.launch import Outcome
from hpc.resources import Resources
from hpc.site import Container, Site

pytestmark = pytest.mark.usefixtures("slurm")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A step's folder; its job ends with the test."""
    folder = tmp_path / "a step"
    yield folder
    launch.end_leftovers(folder)


def submit(task: launch.Task, site: Site = SITE) -> launch.Job:
    return launch.submit(task, site)


def send(folder: Path, *options: str) -> None:
    slurm.run(["scancel", *options, job_id(folder)])


def log(folder: Path) -> str:
    return (folder / "log.txt").read_text()


# What ranks see


def test_one_process(folder: Path) -> None:
    outcome = wait(submit(task("see", folder, cpus=2)))
    assert outcome.describe() == "done"
    seen = durable.read_json(folder / "seen-0.json")
    assert (seen["HPC_WORLD_SIZE"], seen["OMP_NUM_THREADS"], seen["RANK"]) == ("1", "2", None)
    assert Site.model_validate_json(seen["site"]) == SITE, "doors that start jobs find the site"
    assert outcome.hosts == (seen["SLURMD_NODENAME"],)
    assert outcome.usage["cpus"] == 2
    assert outcome.usage["memory_asked"] == small_jobs.MEMORY
    assert 0 < outcome.usage["cpu_seconds"] < 10


def test_ddp_ranks_on_two_nodes(folder: Path) -> None:
    outcome = wait(submit(task("reduce", folder, "ddp", ranks=4, nodes=2, memory=1500 * 2**20)))
    assert outcome.describe() == "done"
    total, places = durable.read_json(folder / "reduced.json")
    assert total == 1 + 2 + 3 + 4
    assert [place[:2] for place in places] == [[0, 0], [1, 1], [2, 0], [3, 1]], "rank and local rank"
    nodes = [place[2] for place in places]
    assert nodes[0] == nodes[1] != nodes[2] == nodes[3]
    assert outcome.hosts == tuple(nodes)


def test_ddp_variables(folder: Path) -> None:
    wait(submit(task("see", folder, "ddp", ranks=2, nodes=2, cpus=3)))
    seen = durable.read_json(folder / "seen-1.json")
    expected = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    assert {name: seen[name] for name in expected} == expected
    assert (seen["HPC_WORLD_SIZE"], seen["OMP_NUM_THREADS"]) == ("2", "3")
    assert seen["MASTER_ADDR"] == "127.0.0.1", "the address of the site's interface"


def test_mpi_ranks_on_two_nodes(folder: Path) -> None:
    pytest.importorskip("mpi4py")
    outcome = wait(submit(task("mpi_world", folder, "mpi", ranks=4, nodes=2)))
    assert outcome.describe() == "done"
    size, total, nodes = durable.read_json(folder / "world.json")
    assert (size, total) == (4, 10)
    assert len(set(nodes)) == 2


def test_mpi_ranks_by_mpirun(folder: Path, tmp_path: Path) -> None:
    """One that opens no port to the network, unlike MPICH's: it leaves the ranks to srun."""
    pytest.importorskip("mpi4py")
    program = tmp_path / "mpirun"
    program.write_text(f'#!/bin/sh\nenv >{tmp_path}/env\nexec srun --overlap --mpi=pmi2 "$@"\n')
    program.chmod(0o755)
    site = SITE.model_copy(update={"mpi": "mpirun", "mpirun": program})
    outcome = wait(submit(task("mpi_world", folder, "mpi", ranks=4, nodes=2), site))
    assert outcome.describe() == "done"
    size, total, nodes = durable.read_json(folder / "world.json")
    assert (size, total, len(set(nodes))) == (4, 10, 2)
    assert "HYDRA_LAUNCHER" not in (tmp_path / "env").read_text(), "or all ranks would start on one node"


def test_an_mpi_that_does_not_know_its_ranks(folder: Path) -> None:
    """Every rank believes that it is alone."""
    pytest.importorskip("mpi4py")
    site = SITE.model_copy(update={"srun": ("--mpi=none",)})
    outcome = wait(submit(task("mpi_world", folder, "mpi", ranks=2, nodes=2), site))
    assert "2 MPI ranks were started but this one sees 1" in str(outcome.failures[0])
    assert "mpi: pmi2" in str(outcome.failures[0])


# How ranks end


def test_a_function_that_raises_is_not_started_again(folder: Path) -> None:
    began = time.monotonic()
    outcome = wait(submit(task("fail", folder, "ddp", more={"on": 1}, ranks=2, nodes=2)))
    assert time.monotonic() - began < 30, "the other rank would sleep for a minute"
    assert str(outcome.failures[0]) == "rank 1: ValueError: snapshot.hdf5: PartType1/Coordinates is missing"
    assert (outcome.attempts, outcome.stopped) == (1, False)
    until(lambda: state(folder).is_over)
    assert state(folder).state == "FAILED", "so that what is chained to it does not start"


@pytest.mark.parametrize("which", ["child", "pid"])
def test_a_killed_rank_is_started_again(which: str, folder: Path) -> None:
    """Whichever of a rank's two processes it hits."""
    job = submit(task("count", folder, "ddp", more={"n": 80}, ranks=2, nodes=2))
    until(lambda: counted(folder) > 5)
    os.kill(report(folder, 1)[which], signal.SIGKILL)
    killed = time.monotonic()
    until(lambda: len(starts(folder)) == 2)
    print(f"again after {time.monotonic() - killed:.2f} s")
    outcome = wait(job)
    assert outcome.failures == ()
    assert counted(folder) == 80
    assert starts(folder)[1][1] >= 5, "it went on from what was kept"
    assert outcome.attempts == 2
    said = "killed by signal 9 (SIGKILL" if which == "child" else "was killed"
    assert outcome.earlier[0].startswith(f"rank 1: {said}")
    for text in (log(folder), (folder / ".slurm" / f"slurm-{job_id(folder)}.out").read_text()):
        assert f"job {job_id(folder)}: rank 1: {said}" in text
        assert "; attempt 2 of 3 starts" in text


def test_attempts_are_counted(folder: Path) -> None:
    outcome = wait(submit(task("lose_peer", folder, retries=1)))
    assert str(outcome.failures[0]) == "ConnectionError: rank 1 has left"
    assert outcome.earlier == ("ConnectionError: rank 1 has left",)
    assert "this was attempt 2; before it:" in outcome.describe()


def test_a_rank_that_makes_no_sound(folder: Path) -> None:
    """A node that hangs: the job goes back into the queue, for other nodes."""
    site = SITE.model_copy(update={"heartbeat": 8})
    job = submit(task("count", folder, "ddp", more={"n": 150}, ranks=2, nodes=2), site)
    until(lambda: counted(folder) > 5)
    frozen = report(folder, 1)
    psutil.Process(frozen["pid"]).suspend()
    outcome = wait(job, 120)
    assert outcome.failures == ()
    assert "rank 1: on n" in outcome.earlier[0]
    assert "s: is its node up?" in outcome.earlier[0]
    assert [start[2] for start in starts(folder)] == ["0", "1"]
    assert not psutil.pid_exists(frozen["child"]) or not rank.is_alive(frozen)


# How jobs are told to stop


def test_before_its_time_limit_a_job_saves_and_goes_back_into_the_queue(folder: Path) -> None:
    job = submit(task("count", folder, "ddp", more={"n": 100, "linger": 1.0}, ranks=2, nodes=2))
    until(lambda: counted(folder) > 5)
    id = job_id(folder)
    send(folder, "--batch", "--signal=USR2")
    until(lambda: state(folder).restarts == 1)
    outcome = wait(job)
    assert outcome.failures == ()
    assert outcome.earlier == (), "that is no failure"
    assert counted(folder) == 100
    (_, first, _, _), (_, second, restart, _) = starts(folder)
    assert first == 0 < second
    assert restart == "1"
    assert job_id(folder) == id
    assert f"rank 0 saved {second}" in log(folder)
    assert "the time limit is near: saving" in log(folder)
    assert "goes back into the queue" in log(folder)
    assert "rank 1 saved" in (folder / "log.1.txt").read_text(), "srun waited for the last one"


def test_what_slurm_sends_to_the_ranks_alone(folder: Path) -> None:
    """The beginning of a preemption: the batch process hears nothing."""
    job = submit(task("count", folder, "ddp", more={"n": 100, "linger": 1.0}, ranks=2, nodes=2))
    until(lambda: counted(folder) > 5)
    send(folder, "--signal=TERM")
    outcome = wait(job)
    assert outcome.failures == ()
    assert [start[2] for start in starts(folder)] == ["0", "1"]
    assert "rank 1 saved" in (folder / "log.1.txt").read_text()


@pytest.mark.slow
def test_a_preempted_job_goes_on_where_it_stopped(folder: Path, tmp_path: Path) -> None:
    low = SITE.model_copy(update={"partition": "scavenge"})
    job = submit(task("count", folder, "ddp", more={"n": 100}, ranks=2, nodes=2, cpus=4), low)
    until(lambda: counted(folder) > 5)
    nodes = ",".join(state(folder).nodes)
    high = SITE.model_copy(update={"directives": (f"--nodelist={nodes}",)})
    other = submit(task("count", tmp_path / "other", "ddp", more={"n": 30}, ranks=2, nodes=2, cpus=4), high)
    wait(other)
    outcome = wait(job)
    assert outcome.failures == ()
    assert counted(folder) == 100
    assert [start[2] for start in starts(folder)] == ["0", "1"]
    assert 5 < starts(folder)[1][1] < 100


@pytest.mark.slow
def test_a_job_that_needs_several_time_limits(folder: Path) -> None:
    """Slurm counts in minutes and looks every half of one."""
    site = SITE.model_copy(update={"grace": 5})
    job = submit(task("count", folder, more={"n": 900}, time=60), site)
    outcome = wait(job, 300)
    assert outcome.failures == ()
    assert counted(folder) == 900
    assert len(starts(folder)) >= 2


def test_time_limits_without_progress_come_to_an_end(folder: Path) -> None:
    job = submit(task("count", folder, more={"n": 10**6, "report": False}))
    for number in range(1, 4):
        until(lambda: len(starts(folder)) == number, job=job)  # noqa: B023
        send(folder, "--batch", "--signal=USR2")
    outcome = wait(job)
    said = "reached its time limit 3 times and did not get further the last 2 times"
    assert said in str(outcome.failures[0])


def test_scancel_is_the_end(folder: Path) -> None:
    job = submit(task("count", folder, "ddp", more={"n": 10**6}, ranks=2, nodes=2))
    until(lambda: counted(folder) > 2)
    ranks = [report(folder, number) for number in range(2)]
    send(folder)
    outcome = wait(job)
    assert outcome.stopped
    assert "was canceled" in str(outcome.failures[0])
    assert state(folder).state == "CANCELLED"
    assert not any(rank.is_alive(rank_) for rank_ in ranks)
    assert "saved" in log(folder)


def test_cancel(folder: Path) -> None:
    job = submit(task("tidy", folder))
    until(lambda: (folder / "held").exists())
    job.cancel()
    outcome = job.poll()
    assert outcome is not None
    assert outcome.stopped
    assert (folder / "given-back").exists(), "what the function held"
    assert state(folder).state == "CANCELLED"


def test_cancel_of_a_job_that_waits(folder: Path) -> None:
    site = SITE.model_copy(update={"directives": ("--begin=now+1hour",)})
    job = submit(task("see", folder), site)
    until(lambda: "BeginTime" in job.about().reason)
    assert job.about().state == "pending"
    began = time.monotonic()
    job.cancel()
    assert time.monotonic() - began < 5
    assert state(folder).state == "CANCELLED"


@pytest.mark.parametrize(
    "options", [("--batch", "--signal=USR2"), ("--signal=TERM",)], ids=["limit", "preempted"]
)
def test_ranks_that_do_not_listen(options: tuple[str, ...], folder: Path) -> None:
    """They are killed after the site's grace, and the job goes back into the queue all the same."""
    site = SITE.model_copy(update={"grace": 3})
    job = submit(task("ignore", folder), site)
    until(lambda: state(folder).state == "RUNNING" and rank.report_path(folder, 0).exists())
    time.sleep(1)
    first = report(folder)
    send(folder, *options)
    until(lambda: state(folder).restarts == 1, job=job)
    assert not rank.is_alive(first)
    job.cancel(grace=1)
    assert state(folder).state == "CANCELLED"


def test_slurm_ends_a_job_that_goes_back_before_it_has_answered(folder: Path, tmp_path: Path) -> None:
    """It signals every process of the job, scontrol too."""
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    waits = '[ "$1" != requeue ] || sleep 2'
    program.write_text(f'#!/bin/sh\n{shutil.which("scontrol")} "$@"; status=$?; {waits}; exit $status\n')
    program.chmod(0o755)
    site = SITE.model_copy(update={"setup": (f"export PATH={program.parent}:$PATH",)})
    job = submit(task("count", folder, more={"n": 100}), site)
    until(lambda: counted(folder) > 5)
    id = job_id(folder)
    send(folder, "--batch", "--signal=USR2")
    outcome = wait(job)
    assert outcome.describe() == "done"
    assert (job_id(folder), outcome.restarts) == (id, 1)
    assert "cannot go back into the queue" not in log(folder)


def test_where_jobs_may_not_go_back_they_are_submitted_again(folder: Path) -> None:
    site = SITE.model_copy(update={"setup": ("scontrol update job=$SLURM_JOB_ID requeue=0",)})
    job = submit(task("count", folder, more={"n": 100}), site)
    until(lambda: counted(folder) > 5)
    first = job_id(folder)
    send(folder, "--batch", "--signal=USR2")
    outcome = wait(job)
    assert outcome.failures == ()
    assert outcome.earlier == ()
    assert job_id(folder) != first
    assert counted(folder) == 100
    assert len(starts(folder)) == 2
    assert "cannot go back into the queue: " in log(folder)


# With Dask the ranks are one client, whose workers are jobs too


def test_the_workers_of_a_client(folder: Path) -> None:
    outcome = wait(submit(task("dask_sum", folder, "dask", ranks=2)))
    assert outcome.describe() == "done"
    assert (folder / "sums.txt").read_text() == "45\n"
    workers = cluster.worker_jobs(folder)
    assert len(workers) == 2
    assert outcome.usage["workers"]["memory_asked"] == 2 * 2**28
    until(lambda: all(each.is_over for each in slurm.states(workers).values()))


@pytest.mark.parametrize("how", ["cancel", "kill"])
def test_workers_do_not_stay_behind(how: str, folder: Path) -> None:
    job = submit(task("dask_sum", folder, "dask", more={"hold": True}, ranks=1))
    until(lambda: (folder / "sums.txt").exists())
    workers = cluster.worker_jobs(folder)
    if how == "cancel":
        job.cancel()
    else:  # the client, which cannot end them any more
        (folder / "go").touch()
        os.kill(report(folder)["child"], signal.SIGKILL)
        assert wait(job).attempts == 2
        assert (folder / "sums.txt").read_text() == "45\n45\n"
    until(lambda: all(each.is_over for each in slurm.states(workers).values()), 10)


# In a container


def test_ranks_in_a_container(folder: Path, tmp_path: Path) -> None:
    program = tmp_path / "bin" / "apptainer"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/said\nshift 3\nexec "$@"\n')
    program.chmod(0o755)
    container = Container(image=tmp_path / "image.sif", options=("--nv",))
    setup = (f"export PATH={program.parent}:$PATH",)
    site = SITE.model_copy(update={"container": container, "python": Path(sys.executable), "setup": setup})
    assert wait(submit(task("see", folder, "ddp", ranks=2), site)).describe() == "done"
    said = (tmp_path / "said").read_text().splitlines()
    assert len(said) == 2, "each rank has one"
    assert said[0].startswith(f"exec --nv {tmp_path}/image.sif {sys.executable} ")


# In an allocation that somebody else has


def test_steps_of_this_job(tmp_path: Path) -> None:
    """What ``--in-allocation`` does: the caller is the batch process."""
    resources = Resources(nodes=2, ranks=4, memory=small_jobs.MEMORY, time=300)
    layout = resources.layout("ddp", 1)
    call = {"folder": str(tmp_path)}
    name = "test-in-allocation"
    slurm.submit("small_jobs:in_allocation", [call], tmp_path, name, layout, resources, SITE, name)
    until(lambda: (tmp_path / "outcomes.json").exists())
    content = durable.read_json(tmp_path / "outcomes.json")
    everywhere, one, long = [Outcome.from_json(each) for each in content]
    assert (everywhere.describe(), one.describe()) == ("done", "done")
    assert (len(everywhere.hosts), len(set(everywhere.hosts)), len(one.hosts)) == (4, 2, 1)
    assert long.stopped
    assert "rank 1 saved" in (tmp_path / "long" / "log.1.txt").read_text()
    seen = durable.read_json(tmp_path / "one" / "seen-0.json")
    assert Site.model_validate_json(seen["site"]).launcher == "allocation"
    assert (seen["OMP_NUM_THREADS"], seen["SLURM_CPUS_ON_NODE"]) == ("2", "2"), "what the step asked for"
