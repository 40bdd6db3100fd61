"""The sbatch launchers and their chain, unchanged, on a real Slurm."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from test_kill import MINIATURE, results

from hpc import durable

FOLDER = Path(__file__).parents[2] / "slurm"
LAUNCHERS = {path.stem: path for path in sorted(FOLDER.glob("*.sbatch"))}
CHAIN = FOLDER / "chain.sh"
DEV = FOLDER / "sites" / "dev.yaml"
VENV = Path(sys.prefix)
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}


@dataclass
class Desk:
    """A folder in which somebody works: sbatch is called there."""

    folder: Path
    jobs: list[str] = field(default_factory=list)

    def call(self, *command: str | Path, environment: dict[str, str] | None = None, status: int = 0) -> str:
        done = subprocess.run(
            [str(word) for word in command],
            cwd=self.folder,
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        text = done.stdout + done.stderr
        self.jobs += re.findall(r"job (\d+)", text)
        assert done.returncode == status, text
        return text

    def sbatch(self, launcher: str, *words: str, options: tuple[str, ...] = ()) -> str:
        """The id of the job."""
        self.call("sbatch", *options, LAUNCHERS[launcher], *words)
        return self.jobs[-1]

    def output(self, job: str) -> str:
        return "".join(path.read_text() for path in self.folder.glob(f"galdist-*-{job}.out"))

    def show(self, job: str) -> dict[str, str]:
        text = self.call("scontrol", "show", "job", "--oneliner", job)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait(self, job: str, timeout: float) -> str:
        """The state in which the job ended."""
        deadline = time.monotonic() + timeout
        while (state := self.show(job)["JobState"]) not in OVER:
            assert time.monotonic() < deadline, f"{state}: {self.output(job)}"
            time.sleep(0.3)
        return state

    def completes(self, job: str, timeout: float) -> None:
        assert self.wait(job, timeout) == "COMPLETED", self.output(job)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    (tmp_path / ".venv").symlink_to(VENV)
    desk = Desk(tmp_path)
    yield desk
    if desk.jobs:
        subprocess.run(["scancel", *desk.jobs], check=False)


def tiny(folder: Path) -> str:
    """A run file whose steps take seconds; it trains and predicts nothing."""
    universe = {"suite": "MockA", "simulations": 1, "n_particles": 16, "box_size": 8, "steps": 2}
    split = {"split": {"test": ["CV_0"]}}
    steps = [
        {"name": "universe", "stage": "simulate", "config": universe},
        {
            "name": "halos",
            "stage": "catalog",
            "inputs": {"simulations": "universe"},
            "config": split,
        },
        {
            "name": "grids",
            "stage": "ingest",
            "inputs": {"simulations": "universe"},
            "config": {"n_mesh": 16, **split},
        },
        {"name": "report", "stage": "report", "inputs": {"steps": ["*"]}},
    ]
    content = {"name": "tiny", "description": "no galaxies", "seed": 1, "steps": steps}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(content))
    return "tiny.yaml"


def test_the_chain(desk: Desk) -> None:
    """Jobs for what the file has, by MPI ranks, Dask workers and single processes; then all is kept."""
    text = desk.call(CHAIN, tiny(desk.folder), "--set", "seed=7", environment={"SPECTRA": "--comment=more"})
    ingest, spectra = desk.jobs
    assert re.findall(r"(\w+): job (\d+)", text) == [("ingest", ingest), ("spectra", spectra)]
    assert desk.show(spectra)["Comment"] == "more"
    assert desk.show(spectra)["Dependency"].startswith(f"afterok:{ingest}")
    watch, output = re.search("state:   (.*)", text), re.search("output:  (.*)", text)
    assert watch is not None
    assert output is not None
    assert all(job in desk.call(*shlex.split(watch[1])) for job in desk.jobs)
    for job in (ingest, spectra):
        desk.completes(job, 120)
    assert "3 of 4 steps to do" in desk.output(ingest)
    assert "1 of 4 steps to do" in desk.output(spectra)
    shown = desk.call("bash", "-c", output[1].replace("tail -F", "cat"))
    assert "3 of 4 steps" in shown
    assert "1 of 4 steps" in shown
    assert (desk.folder / "runs" / "tiny" / "report" / "done.json").exists()
    assert "seed: 7" in (desk.folder / "runs" / "tiny" / "run.yaml").read_text()
    again = desk.sbatch("run", "tiny.yaml", "--set", "seed=7")
    desk.completes(again, 60)
    assert "0 of 4 steps to do" in desk.output(again)


def test_options_win_over_the_script(desk: Desk) -> None:
    job = desk.sbatch("train", "tiny.yaml", options=("--begin=now+1hour", "--nodes=2", "--time=30"))
    shown = desk.show(job)
    assert (shown["NumNodes"], shown["TimeLimit"]) == ("2-2", "00:30:00")
    assert (shown["Requeue"], shown["JobName"], shown["CPUs/Task"]) == ("1", "galdist-train", "2")


def test_steps_take_what_sbatch_was_told(desk: Desk) -> None:
    """But where they say themselves what they want."""
    words = (tiny(desk.folder), "--set", "halos.resources.cpus=1", "--site", str(DEV))
    options = ("--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1")
    desk.completes(desk.sbatch("ingest", *words, options=options), 120)
    records = {
        step: durable.read_json(desk.folder / "runs" / "tiny" / step / "provenance.json")
        for step in ("universe", "halos")
    }
    asked = {
        step: [record["asked"][key] for key in ("nodes", "ranks", "cpus")] for step, record in records.items()
    }
    assert asked == {"universe": [2, 4, 1], "halos": [1, 1, 1]}
    assert len(records["universe"]["hosts"]) == 2


def test_no_environment(desk: Desk) -> None:
    (desk.folder / ".venv").unlink()
    job = desk.sbatch("train", "tiny.yaml")
    assert desk.wait(job, 30) == "FAILED"
    assert f"there is no {desk.folder}/.venv/bin/galdist: call sbatch in the folder that holds .venv" in (
        desk.output(job)
    )


def test_environment_by_name(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    (desk.folder / ".venv").unlink()
    monkeypatch.setenv("GALDIST_VENV", str(VENV))
    job = desk.sbatch("train", "no-such-file.yaml")
    assert desk.wait(job, 60) == "FAILED"
    assert "no-such-file" in desk.output(job)


def test_the_chain_looks_before_it_queues(desk: Desk) -> None:
    (desk.folder / "bad.yaml").write_text("name: bad\nseed: 1\nsteps: [{name: a, stage: trian}]\n")
    text = desk.call(CHAIN, "bad.yaml", status=2)
    assert "trian" in text
    assert desk.jobs == []


def test_the_chain_takes_back_what_it_queued(desk: Desk) -> None:
    """sbatch refuses the second job."""
    options = {"INGEST": "--begin=now+1hour", "SPECTRA": "--partition=nowhere"}
    text = desk.call(CHAIN, tiny(desk.folder), environment=options, status=1)
    (job,) = re.findall(r"ingest: job (\d+)", text)
    assert "invalid partition specified: nowhere" in text
    assert f"canceled what was queued already: {job}" in text
    assert desk.wait(job, 20) == "CANCELLED"


def test_the_chain_stops_where_a_job_fails(desk: Desk) -> None:
    text = desk.call(CHAIN, tiny(desk.folder), "--set", "halos.split={test: [CV_9]}")
    ingest, spectra = desk.jobs
    assert f"scancel {ingest} {spectra}" in text
    assert desk.wait(ingest, 120) == "FAILED", desk.output(ingest)
    assert "CV_9" in desk.output(ingest)
    assert desk.wait(spectra, 30) == "CANCELLED"


# The quickstart in miniature: minutes.


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature, run without Slurm."""
    pytest.importorskip("nbodykit")
    folder = tmp_path_factory.mktemp("reference")
    subprocess.run(
        [sys.executable, "-m", "galdist", "run", *miniature()], cwd=folder, check=True, timeout=900
    )
    return folder / "runs" / "quickstart"


def miniature(*more: str) -> list[str]:
    """With one thread a rank wherever it runs: sums of several threads differ in the last bit."""
    ranks = ("universe-a", "universe-b", "classifier", "regressor", "r2unet", "spectra")
    values = (*MINIATURE, *(f"{step}.resources.cpus=1" for step in ranks), *more)
    return ["quickstart", *(word for value in values for word in ("--set", value))]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_chain_of_the_quickstart(desk: Desk, reference: Path) -> None:
    """By all launchers but `run`, unchanged."""
    desk.call(CHAIN, *miniature())
    assert len(desk.jobs) == 4
    for job in desk.jobs:
        desk.completes(job, 600)
    assert "report.html" in desk.output(desk.jobs[-1])
    assert results(desk.folder / "runs" / "quickstart") == results(reference)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_run(desk: Desk, reference: Path) -> None:
    """All that depends on the grids, in one allocation."""
    out = desk.folder / "runs" / "quickstart"
    shutil.copytree(reference, out)
    for step in ("r2unet", "hod", "spectra", "report"):
        shutil.rmtree(out / step)
    job = desk.sbatch("run", *miniature())
    desk.completes(job, 600)
    assert "4 of 12 steps to do" in desk.output(job)
    assert results(out) == results(reference)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_time_limit(desk: Desk, reference: Path) -> None:
    """A training on two nodes that needs longer than its time limit gets there by itself, with the same
    weights as one without Slurm.

    Slurm looks at its clock every 30 s: here the signal comes 20 to 50 s after the start.
    """
    words = miniature("classifier.epochs=120")
    out, undisturbed = desk.folder / "runs" / "quickstart", desk.folder / "undisturbed"
    for copy in (out, undisturbed):
        shutil.copytree(reference, copy)
    command = [sys.executable, "-m", "galdist", "run", *words, "--stage", "train", "--out", undisturbed]
    subprocess.run(command, cwd=desk.folder, check=True, timeout=600)
    options = ("--nodes=2", "--ntasks-per-node=1", "--time=1", "--signal=B:USR2@10")
    job = desk.sbatch("train", *words, "--site", str(DEV), options=options)
    desk.completes(job, 600)
    assert int(desk.show(job)["Restarts"]) >= 1
    for step in ("classifier", "regressor"):
        weights = Path(step, "model", "weights.safetensors")
        assert (out / weights).read_bytes() == (undisturbed / weights).read_bytes()
        assert len(durable.read_json(out / step / "provenance.json")["job"]["nodes"]) == 2
