"""Slurm jobs seen from those who submit and follow them: adoption, arrays, accidents. On a real Slurm."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_runs import down
from small_jobs import SITE, batch_process, counted, job_id, report, starts, state, task, until, wait

from hpc import durable, launch, queued, rank, slurm
from hpc.site import Site

pytestmark = pytest.mark.usefixtures("slurm")

DEV = Path(__file__).parents[2] / "slurm" / "dev"


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A step's folder, with a long name; its job ends with the test."""
    folder = tmp_path / ("a step of 100% " + "x" * 85)
    yield folder
    launch.end_leftovers(folder)


# Another process goes on


SUBMITTER = """
import os, signal, sys, time
sys.path[:0] = {path!r}
from pathlib import Path
from small_jobs import SITE, task
from hpc import launch, slurm
if {early}:
    real = slurm.submit
    def submit(*arguments, **named):
        real(*arguments, **named)
        os.kill(os.getpid(), signal.SIGKILL)  # before anybody has written down the id
    slurm.submit = submit
launch.submit(task("count", Path({folder!r}), more={{"n": {n}}}), SITE)
os.kill(os.getpid(), signal.SIGKILL)
"""


def submit_and_die(folder: Path, n: int, early: bool = False) -> None:
    code = SUBMITTER.format(path=sys.path, folder=str(folder), n=n, early=early)
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize("early", [False, True], ids=["later", "before the id is written"])
def test_a_job_is_adopted(early: bool, folder: Path) -> None:
    submit_and_die(folder, 150, early)  # Slurm is asked every 5 s: the job runs long enough to be seen
    assert (durable.read_json(folder / ".slurm" / "job.json")["id"] is None) is early
    job = launch.attach(folder, SITE)
    assert job is not None
    id = job_id(folder)
    until(lambda: job.about().state == "running", job=job)
    assert job.about().id == id
    assert launch.describe([folder])[folder] == job.about()
    assert wait(job).failures == ()
    assert [start[1] for start in starts(folder)] == [0], "nothing was submitted twice"
    assert job.about().state == "completed"


def test_work_that_was_done_while_nobody_looked(folder: Path) -> None:
    submit_and_die(folder, 1)
    until(lambda: (folder / ".slurm" / "outcome.json").exists())
    job = launch.attach(folder, SITE)
    assert job is not None
    outcome = job.poll()
    assert outcome is not None
    assert outcome.failures == ()
    assert launch.describe([folder])[folder].state == "completed"


def test_there_is_nothing_to_adopt(folder: Path, tmp_path: Path) -> None:
    folder.mkdir()
    assert launch.attach(folder, SITE) is None
    wait(launch.submit(task("fail", folder, more={"on": 0}), SITE))
    assert launch.describe([folder, tmp_path]) == {folder: launch.JobInfo(job_id(folder), "failed", ("n1",))}
    assert launch.attach(folder, SITE) is None, "to run a failed step again is to try again"
    wait(launch.submit(task("count", folder, more={"n": 1}), SITE))
    assert launch.attach(folder, Site()) is None, "on this machine"


def test_a_canceled_job_is_not_adopted(folder: Path) -> None:
    submit_and_die(folder, 10**6)
    slurm.cancel(job_id(folder))
    until(lambda: state(folder).is_over)
    assert launch.attach(folder, SITE) is None


def test_what_still_runs_is_ended_before_something_else_starts(folder: Path) -> None:
    submit_and_die(folder, 10**6)
    until(lambda: counted(folder) > 2)
    id = job_id(folder)
    wait(launch.submit(task("see", folder)))  # on this machine
    assert slurm.states([id])[id].state == "CANCELLED"
    assert not (folder / ".slurm" / "job.json").exists()


def test_a_job_that_comes_too_late(folder: Path) -> None:
    """Its submitter was killed, and so was the record of it; another one has the folder now."""
    later = SITE.model_copy(update={"directives": ("--begin=now+4",)})
    launch.submit(task("count", folder, more={"n": 3}), later)
    id = job_id(folder)
    (folder / ".slurm" / "job.json").unlink()
    assert wait(launch.submit(task("count", folder, more={"n": 3}), SITE)).failures == ()
    until(lambda: slurm.states([id])[id].is_over)
    assert len(starts(folder)) == 1
    assert "was given to another job meanwhile" in (folder / ".slurm" / f"slurm-{id}.out").read_text()


def test_a_running_job_whose_folder_was_given_away(folder: Path) -> None:
    launch.submit(task("count", folder, "ddp", more={"n": 10**6}, ranks=2, nodes=2), SITE)
    until(lambda: counted(folder) > 2)
    id = job_id(folder)
    order = queued.Order.read(folder)
    assert order is not None
    dataclasses.replace(order, token="of another").write()
    until(lambda: slurm.states([id])[id].is_over, 20)
    assert not (folder / ".slurm" / "outcome.json").exists()


# Arrays


def test_an_array_runs_few_at_a_time(tmp_path: Path) -> None:
    folders = [tmp_path / f"member {number}" for number in range(3)]
    tasks = [
        task("count" if number != 1 else "fail", folder, more={"n": 10} if number != 1 else {"on": 0})
        for number, folder in enumerate(folders)
    ]
    jobs = launch.submit_array(tasks, SITE, at_once=1)
    array = {job_id(folder).partition("_")[0] for folder in folders}
    assert len(array) == 1
    assert [job_id(folder).partition("_")[2] for folder in folders] == ["0", "1", "2"]
    running: list[int] = []
    ids = [job_id(folder) for folder in folders]

    def over() -> bool:
        running.append(sum(each.state == "RUNNING" for each in slurm.states(ids).values()))
        return all(job.poll() is not None for job in jobs)

    until(over)
    assert max(running) == 1
    outcomes = [wait(job) for job in jobs]
    assert [bool(outcome.failures) for outcome in outcomes] == [False, True, False]
    assert "snapshot.hdf5" in outcomes[1].describe()
    assert [counted(folder) for folder in folders] == [10, 0, 10]


def test_an_element_goes_back_into_the_queue_and_another_is_adopted(tmp_path: Path) -> None:
    folders = [tmp_path / f"member-{number}" for number in range(2)]
    launch.submit_array([task("count", folder, more={"n": 100}) for folder in folders], SITE)
    for number, folder in enumerate(folders):
        until(lambda: counted(folder) > 3)  # noqa: B023
        if number == 0:
            slurm.run(["scancel", "--signal=TERM", job_id(folder)])
        else:  # as if it had been killed before it wrote the ids
            order = queued.Order.read(folder)
            assert order is not None
            dataclasses.replace(order, id=None).write()
    jobs = [launch.attach(folder, SITE) for folder in folders]
    for job, folder in zip(jobs, folders, strict=True):
        assert job is not None
        assert wait(job).failures == ()
        assert counted(folder) == 100
    assert [len(starts(folder)) for folder in folders] == [2, 1]


def test_an_element_that_is_canceled_while_it_waits(tmp_path: Path) -> None:
    """Slurm forgets it at once: neither is it submitted again, nor are others taken for it."""
    folders = [tmp_path / f"member-{number}" for number in range(3)]
    later = SITE.model_copy(update={"directives": ("--begin=now+1hour",)})
    jobs = launch.submit_array([task("see", folder) for folder in folders], later)
    ids = [job_id(folder) for folder in folders]
    slurm.cancel(ids[0])
    outcome = wait(jobs[0])
    assert outcome.stopped
    assert str(outcome.failures[0]).startswith(f"job {ids[0]}: was canceled")
    order = queued.Order.read(folders[2])
    assert order is not None
    dataclasses.replace(order, id=None).write()  # as if the submitter had been killed
    job = launch.attach(folders[2], later)
    assert job is not None
    assert job.about().id == ids[2]
    launch.end_leftovers(folders[1])  # by another process, for good
    outcome = wait(jobs[1])
    assert outcome.stopped
    assert not (folders[1] / ".slurm" / "job.json").exists()
    job.cancel()


def test_a_stopped_job_whose_folder_was_given_away_is_not_submitted_again(folder: Path) -> None:
    job = launch.submit(task("see", folder), SITE.model_copy(update={"directives": ("--hold",)}))
    id, order = job_id(folder), queued.Order.read(folder)
    assert order is not None
    order.conclude(launch.Outcome((launch.Failure("", "was told to stop", order.output, 0.0),), stopped=True))
    dataclasses.replace(order, token="of another").write()
    assert wait(job).stopped
    assert job_id(folder) == id
    slurm.cancel(id)


def test_members_of_an_array_ask_for_the_same(tmp_path: Path) -> None:
    tasks = [task("count", tmp_path / str(n), more={"n": 1}, cpus=n) for n in (1, 2)]
    with pytest.raises(ValueError, match="the same resources"):
        launch.submit_array(tasks, SITE)


# Accidents


def test_a_killed_batch_process_is_replaced(folder: Path) -> None:
    job = launch.submit(task("count", folder, "ddp", more={"n": 100}, ranks=2, nodes=2), SITE)
    until(lambda: counted(folder) > 5)
    first, ranks_ = job_id(folder), [report(folder, number) for number in range(2)]
    os.kill(batch_process(folder), signal.SIGKILL)
    outcome = wait(job)
    assert outcome.failures == ()
    assert outcome.attempts == 2
    assert outcome.earlier[0].startswith(f"job {first}: its batch process ended on n")
    assert job_id(folder) != first
    assert counted(folder) == 100
    assert starts(folder)[1][1] > 5
    assert not any(rank.is_alive(each) for each in ranks_)


def test_batch_processes_that_are_killed_again_and_again(folder: Path) -> None:
    site = SITE.model_copy(update={"setup": ("module_that_is_not_there",), "retries": 1})
    outcome = wait(launch.submit(task("see", folder), site))
    failure = outcome.failures[0]
    assert failure.who == f"job {job_id(folder)}"
    assert "before it could say how its ranks did: " in failure.reason
    assert "module_that_is_not_there" in outcome.describe()
    assert outcome.attempts == 2
    assert (folder / ".slurm" / "outcome.json").exists(), "for others to see"


@pytest.mark.slow
def test_a_controller_that_is_away_for_a_while(folder: Path) -> None:
    job = launch.submit(task("count", folder, "ddp", more={"n": 300}, ranks=2, nodes=2), SITE)
    until(lambda: counted(folder) > 3)
    subprocess.run([DEV / "down", "slurmctld"], check=True, capture_output=True)
    try:
        until(lambda: "Slurm has not answered for 0:0" in job.about().reason, job=job)
    finally:
        subprocess.run([DEV / "up"], check=True, capture_output=True)
    outcome = wait(job)
    assert outcome.failures == ()
    assert counted(folder) == 300
    assert len(starts(folder)) == 1, "nobody was disturbed"
    until(lambda: "not answered" not in job.about().reason)


@pytest.mark.slow
def test_a_node_that_is_set_down(folder: Path) -> None:
    job = launch.submit(task("count", folder, "ddp", more={"n": 100}, ranks=2, nodes=2), SITE)
    until(lambda: counted(folder) > 3)
    lost = state(folder).nodes[1]
    with down(lost):
        outcome = wait(job, 120)
    assert outcome.failures == ()
    assert counted(folder) == 100
    assert lost not in outcome.hosts
    assert [start[2] for start in starts(folder)] == ["0", "1"]


@pytest.mark.slow
def test_a_training_goes_on_with_fewer_nodes(folder: Path) -> None:
    """A job that may have two to four nodes and loses one when no other is free."""
    until(lambda: slurm.run(["sinfo", "--noheader", "--partition=cpu", "--format=%D %T"]) == "4 idle\n")
    more = {"n": 120}
    job = launch.submit(task("count", folder, "ddp", more=more, ranks=4, nodes=4, min_nodes=2, cpus=4), SITE)
    until(lambda: counted(folder) > 3)
    lost = state(folder).nodes[3]
    with down(lost):
        outcome = wait(job, 120)
    assert outcome.failures == ()
    assert [start[3] for start in starts(folder)] == ["4", "2"]
    assert len(outcome.hosts) == 2


@pytest.mark.slow
def test_a_node_that_is_lost(folder: Path) -> None:
    """Nothing there answers any more, and Slurm has not noticed yet (here: the node's slurmd is killed)."""
    job = launch.submit(task("count", folder, "ddp", more={"n": 250}, ranks=2, nodes=2), SITE)
    until(lambda: counted(folder) > 3)
    lost, orphan = state(folder).nodes[1], report(folder, 1)
    slurmd = Path(os.environ["SLURM_CONF"]).parent / "run" / f"slurmd.{lost}.pid"
    os.kill(int(slurmd.read_text()), signal.SIGKILL)
    try:
        os.kill(report(folder, 0)["child"], signal.SIGKILL)
        outcome = wait(job, 180)
    finally:
        subprocess.run([DEV / "up"], check=True, capture_output=True)
    assert outcome.failures == ()
    assert counted(folder) == 250
    assert lost not in outcome.hosts
    assert any(f"srun: could not start ranks on {lost}" in why for why in outcome.earlier), outcome.earlier
    assert not rank.is_alive(orphan)


def test_slurm_refuses(folder: Path) -> None:
    site = SITE.model_copy(update={"partition": "not-there"})
    with pytest.raises(slurm.SlurmError, match="invalid partition"):
        launch.submit(task("see", folder), site)
    assert launch.describe([folder]) == {}, "no job was queued"


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("TIMEOUT", r"reached its time limit of 10 min on n1 before it had saved.*resources\.time.*now 10 s"),
        ("OUT_OF_MEMORY", r"ran out of memory on n1: it asked for 0\.20 GiB.*resources\.memory"),
        ("NODE_FAIL", "lost a node on n1"),
        ("CANCELLED", "was canceled"),
        ("COMPLETED", "without a word: do the nodes see the same /"),
        ("GONE", "nobody can tell how it ended"),
        ("DEADLINE", "ended as DEADLINE on n1"),
    ],
)
def test_what_is_said_of_jobs_that_say_nothing(word: str, said: str, folder: Path) -> None:
    """Of ends that this Slurm cannot bring about, with the numbers of a real job."""
    import re

    wait(launch.submit(task("count", folder, more={"n": 1}), SITE))
    time.sleep(1)
    order = queued.Order.read(folder)
    assert order is not None
    used = slurm.usage([str(order.id)])
    text = queued._explain(order, slurm.JobState(str(order.id), word, ("n1",)), used)
    assert re.search(said, text), text
