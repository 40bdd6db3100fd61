"""What goes wrong on a cluster goes wrong here: the run ends with the results of an undisturbed one.

A real training on two nodes, and a real ingest, are disturbed as a cluster disturbs them. What a person sees
meanwhile is compared too, since `docs/cluster.md` quotes it.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from cluster_runs import Cluster, down
from clustered import clustered_particles
from test_kill import results
from universe import make_truth, write_snapshot

from galdist.grids.store import open_store
from hpc import durable, rank

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS: list[dict[str, Any]] = [
    {
        "name": "universe",
        "stage": "simulate",
        "config": {"suite": "MockA", "simulations": 2, "n_particles": 32, "box_size": 12, "steps": 5},
    },
    {
        "name": "grids",
        "stage": "ingest",
        "inputs": {"simulations": "universe"},
        "config": {"n_mesh": 32, "min_stellar_mass": 1.0e9, "split": {"validation": ["CV_1"]}},
    },
    {
        "name": "classifier",
        "stage": "train",
        "inputs": {"grids": "grids"},
        "resources": {"nodes": 2, "ranks": 2},
        "config": {
            "model": {"name": "r2unet-classifier", "channels": [4, 8]},
            "data": {"crop": 16, "crops_per_box": 400, "tile": 32},
            "batch_size": 4,
            "epochs": 4,
            "ema_decay": 0.9,
            "checkpoint_minutes": 0.05,
        },
    },
]
"""A training of half a minute on two nodes, one rank each."""


def write(folder: Path, steps: list[dict[str, Any]]) -> None:
    """The run file of some steps."""
    (folder / "chaos.yaml").write_text(yaml.safe_dump({"name": "chaos", "seed": 1, "steps": steps}))


def run_here(folder: Path, out: str) -> None:
    """The run on this machine, undisturbed."""
    command = [sys.executable, "-m", "galdist", "run", "chaos.yaml", "--out", out]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def universe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run up to the grids, made on this machine."""
    pytest.importorskip("nbodykit")
    folder = tmp_path_factory.mktemp("universe")
    write(folder, STEPS[:2])
    run_here(folder, "run")
    return folder / "run"


@pytest.fixture
def training(universe: Path, slurm: dict[str, str], tmp_path: Path) -> Iterator[Cluster]:
    """The training, not yet started; its grids are there."""
    shutil.copytree(universe, tmp_path / "run")
    write(tmp_path, STEPS)
    cluster = Cluster(tmp_path, slurm, ["chaos.yaml"], tmp_path / "run")
    try:
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def undisturbed(
    universe: Path, slurm: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Results of the training that nobody disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    shutil.copytree(universe, folder / "run")
    write(folder, STEPS)
    cluster = Cluster(folder, slurm, ["chaos.yaml"], folder / "run")
    cluster.start()
    cluster.succeed()
    return results(cluster.out)


def test_preemption(training: Cluster, undisturbed: dict[str, Any]) -> None:
    """A job of a better partition takes the nodes in the middle of the training."""
    training.site = {"partition": "scavenge"}
    training.start()
    training.wait_for_checkpoint()
    options = ["--partition=cpu", "--nodes=4", "--exclusive", f"--output={training.folder}/other.out"]
    training.slurm("sbatch", *options, "--wrap=sleep 5")
    text = training.succeed()
    assert results(training.out) == undisturbed
    assert training.restarts() == 1
    assert "goes back into the queue" in training.log()
    assert "restart 1" in training.log()
    assert re.search(r"classifier .*queued", text.partition("starts")[2]), text


def test_three_time_limits(training: Cluster, undisturbed: dict[str, Any]) -> None:
    """Slurm says three times that the limit is near, as it does on its own clock."""
    training.start()
    for number in range(3):
        training.wait_for_checkpoint(0.2 * (number + 1))
        training.slurm("scancel", "--batch", "--signal=USR2", training.job("classifier"))
        training.wait(lambda n=number: training.log().count("goes back into the queue") == n + 1)
    training.succeed()
    assert results(training.out) == undisturbed
    assert training.restarts() == 3
    assert training.log().count("the time limit is near: saving") == 3


def test_a_real_time_limit(training: Cluster, undisturbed: dict[str, Any]) -> None:
    """Slurm's own clock. The ranks are slowed down, so that the training does not end before."""
    training.words += ["--set", "classifier.resources.time=80 s"]
    training.start()
    training.wait_for_checkpoint(0.05)
    reports = [rank.report_path(training.out / "classifier", number) for number in range(2)]
    children = [durable.read_json(report)["child"] for report in reports]
    deadline = time.monotonic() + 180
    while "the time limit is near" not in training.log():
        assert time.monotonic() < deadline, training.log()
        for number, seconds in ((signal.SIGSTOP, 0.8), (signal.SIGCONT, 0.2)):
            for child in children:
                os.kill(child, number)
            time.sleep(seconds)
    training.succeed()
    assert results(training.out) == undisturbed
    assert training.restarts() == 1


@pytest.mark.parametrize("number", [0, 1])
def test_a_rank_is_killed(training: Cluster, undisturbed: dict[str, Any], number: int) -> None:
    training.start()
    training.wait_for_checkpoint()
    report = durable.read_json(rank.report_path(training.out / "classifier", number))
    os.kill(report["child"], signal.SIGKILL)
    training.succeed()
    assert results(training.out) == undisturbed
    assert re.search(
        rf"rank {number}.*: killed by signal 9 \(SIGKILL.*; attempt 2 of 3 starts", training.log()
    )
    attempts = durable.read_json(training.out / "classifier" / "provenance.json")["attempts"]
    assert len(attempts) == 1
    assert f"rank {number}" in str(attempts[0])


def test_a_node_goes_down(training: Cluster, undisturbed: dict[str, Any]) -> None:
    training.start()
    training.wait_for_checkpoint()
    node = training.slurm("squeue", "-h", "-j", training.job("classifier"), "-o", "%N")
    lost = training.slurm("scontrol", "show", "hostnames", node.strip()).split()[1]
    with down(lost):
        training.succeed()
    assert results(training.out) == undisturbed
    assert training.restarts() == 1
    nodes = durable.read_json(training.out / "classifier" / "provenance.json")["job"]["nodes"]
    assert lost not in nodes


def test_the_controller_is_restarted(training: Cluster, undisturbed: dict[str, Any]) -> None:
    dev = Path(__file__).parents[2] / "slurm" / "dev"
    training.start()
    training.wait_for_checkpoint()
    subprocess.run([dev / "down", "slurmctld"], check=True, capture_output=True)
    try:
        time.sleep(8)
        assert training.process is not None
        assert training.process.poll() is None
    finally:
        subprocess.run([dev / "up"], check=True, capture_output=True)
    training.succeed()
    assert results(training.out) == undisturbed
    assert training.restarts() == 0


def test_the_orchestrator_is_killed(training: Cluster, undisturbed: dict[str, Any]) -> None:
    """Started again it takes over the job that runs: one job in all."""
    training.start()
    training.wait_for_checkpoint()
    job = training.job("classifier")
    assert training.process is not None
    training.process.kill()
    training.process.communicate()
    time.sleep(2)
    assert training.step("classifier").state == "running"
    training.start()
    training.succeed()
    assert training.job("classifier") == job
    assert results(training.out) == undisturbed
    assert training.log().count("starts on") == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 48 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", place]).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def test_a_full_disk(
    training: Cluster, small_disk: Path, universe: Path, undisturbed: dict[str, Any]
) -> None:
    """Full while checkpoints are written; somebody makes room."""
    training.out = small_disk / "run"
    shutil.copytree(universe, training.out)
    training.start()
    training.wait_for_checkpoint()
    ballast = small_disk / "ballast"
    subprocess.run(["dd", "if=/dev/zero", f"of={ballast}", "bs=4k"], capture_output=True, check=False)
    training.wait(lambda: "No space left" in training.log() or "checkpoint" in training.log())
    time.sleep(5)
    ballast.unlink()
    status, text = training.finish()
    if status:
        assert "No space left" in text or "free" in text
        training.start()
        training.succeed()
    assert results(training.out) == undisturbed


@pytest.fixture
def ingest(slurm: dict[str, str], tmp_path: Path) -> Iterator[Cluster]:
    """An ingest of some seconds, in 32 files, by two worker jobs."""
    truth = make_truth(0, 128**3, 25.0)
    truth.position = clustered_particles(128, 25.0)
    write_snapshot(tmp_path / "tree" / "Sims" / "Chaos_DM" / "CV" / "CV_0", truth, 32)
    names = ("matter_counts", "matter_mass", "matter_momentum")
    config = {
        "path": str(tmp_path / "tree"),
        "n_mesh": 256,
        "fields": [{"name": name} for name in names],
        "chunking": {"chunk": 16},
    }
    step = {"name": "grids", "stage": "ingest", "resources": {"ranks": 2}, "config": config}
    write(tmp_path, [step])
    cluster = Cluster(tmp_path, slurm, ["chaos.yaml"], tmp_path / "run")
    try:
        yield cluster
    finally:
        cluster.stop()


def test_a_worker_job_is_cancelled(ingest: Cluster) -> None:
    run_here(ingest.folder, "local")
    ingest.start()
    ingest.wait(lambda: ingest.done("grids") > 0.1)
    spec = durable.read_json(ingest.out / "grids" / ".job" / "spec.json")
    rows = ingest.slurm("squeue", "-h", "--me", "-t", "running", "-o", "%i %j").splitlines()
    workers = [row.split()[0] for row in rows if spec["token"] in row]
    assert len(workers) == 2
    ingest.slurm("scancel", workers[0])
    ingest.succeed()
    stores = [open_store(folder / "grids" / "grids.zarr") for folder in (ingest.out, ingest.folder / "local")]
    for name in ("matter_counts", "matter_mass", "matter_momentum"):
        ours, theirs = (np.asarray(store[next(iter(store))].read(name)) for store in stores)
        assert np.array_equal(ours, theirs), name
    assert spec["token"] not in ingest.slurm("squeue", "-h", "--me", "-o", "%j")
