"""The same run with every step a Slurm job.

A small quickstart (its twelve steps; a universe of 32^3 particles, trainings of three epochs) on this machine
and on the development Slurm, four nodes on this same machine: what differs is what jobs cost. On Slurm,
steps that do not wait for one another run at the same time; the training has two nodes with two ranks each.
Then a training on two nodes alone: the time from sbatch to its first batch, and, after a rank was killed with
SIGKILL in the middle of it, to the first batch after it has loaded its checkpoint again. The site's retries
start ranks again within the job, without going back into the queue.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cluster_runs import Cluster
from test_kill import MINIATURE

from hpc import durable, rank

DEV = Path(__file__).parents[2] / "slurm" / "dev"
TWICE = [
    f"{step}.resources.{value}"
    for step in ("classifier", "regressor", "r2unet")
    for value in ("ranks=4", "nodes=2")
]


def words(extra: list[str]) -> list[str]:
    """What is run."""
    return ["quickstart", *(word for value in (*MINIATURE, *extra) for word in ("--set", value))]


def here(folder: Path) -> float:
    """Seconds of the run on this machine, with as many ranks."""
    command = [sys.executable, "-m", "galdist", "run", *words(TWICE), "--out", "here"]
    start = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return time.perf_counter() - start


def there(folder: Path, environment: dict[str, str]) -> float:
    """Seconds of the run on Slurm."""
    cluster = Cluster(folder, environment, words(TWICE), folder / "there")
    start = time.perf_counter()
    cluster.start()
    cluster.succeed()
    return time.perf_counter() - start


def first_batch(cluster: Cluster, after: float) -> float:
    """Seconds from a moment to the next report of the training, which it makes after a batch."""
    path = cluster.out / "classifier" / "progress.json"
    cluster.wait(lambda: path.exists() and durable.read_json(path)["first_time"] > after)
    return float(durable.read_json(path)["first_time"]) - after


def training(folder: Path, environment: dict[str, str]) -> tuple[float, float]:
    """Seconds from sbatch to the first batch, and from a rank's death to the next one."""
    alone = shutil.copytree(folder / "there", folder / "alone")
    shutil.rmtree(alone / "classifier")
    cluster = Cluster(folder, environment, words([*TWICE, "classifier.epochs=30"]), alone)
    cluster.words += ["--only", "classifier"]
    cluster.start()
    try:
        job = cluster.job("classifier")
        submitted = float(durable.read_json(alone / "classifier" / ".slurm" / "job.json")["submitted"])
        started = first_batch(cluster, submitted)
        cluster.wait_for_checkpoint(0.1)
        killed = time.time()
        os.kill(durable.read_json(rank.report_path(alone / "classifier", 1))["child"], signal.SIGKILL)
        resumed = first_batch(cluster, killed)
        assert cluster.job("classifier") == job
    finally:
        cluster.stop()
    return started, resumed


def run() -> list[dict[str, Any]]:
    """Rows of the table."""
    up = subprocess.run([DEV / "up"], capture_output=True, text=True, check=True)
    variable, _, value = shlex.split(up.stdout)[1].partition("=")
    environment = {**os.environ, variable: value}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        local, slurm = here(folder), there(folder, environment)
        started, resumed = training(folder, environment)
    return [
        {"what": "small quickstart on this machine", "seconds": local, "ratio": 1.0},
        {"what": "the same, every step a Slurm job", "seconds": slurm, "ratio": slurm / local},
        {"what": "training on 2 nodes x 2 ranks: sbatch to first batch", "seconds": started, "ratio": None},
        {"what": "the same: a rank killed to next batch", "seconds": resumed, "ratio": None},
    ]


if __name__ == "__main__":
    for row in run():
        print(row)
