"""The quickstart as it ships, from simulation files to the report: what it promises."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import galdist
from galdist.run import Run

HELD_OUT = ("MockA_CV_7", "MockB_CV_0")
MEMORY = 6 * 2**30  # bytes


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("quickstart") / "run"
    command = [sys.executable, "-m", "galdist", "run", "quickstart", "--out", str(out)]
    log = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=3000)
    assert log.returncode == 0, log.stdout[-3000:]
    assert log.stdout.rstrip().endswith("report.html")
    assert "dashboard" in log.stdout
    assert "run: " in log.stdout  # the time left of the whole run is known in a first run too
    return galdist.open_run(out)


@pytest.fixture(scope="module")
def measured(run: Run) -> Callable[[str, str, str], float]:
    table = run.metrics.set_index(["step", "metric", "sample"])["value"]
    return lambda step, metric, sample: float(table[step, metric, sample])


pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.mark.parametrize("box", HELD_OUT)
def test_the_classifier_finds_galaxies(measured: Callable[[str, str, str], float], box: str) -> None:
    assert measured("r2unet", "recall", box) >= 0.90
    assert measured("r2unet", "accuracy", box) >= 0.97


@pytest.mark.parametrize("box", HELD_OUT)
@pytest.mark.parametrize("baseline", ["hod", "hod:expected_galaxy_counts"])
def test_the_network_knows_more_than_halo_masses(
    measured: Callable[[str, str, str], float], box: str, baseline: str
) -> None:
    correlation = {label: measured("spectra", f"r/{label}/k0.3-3", box) for label in ("r2unet", baseline)}
    assert correlation["r2unet"] > correlation[baseline]


@pytest.mark.parametrize("step", ["classifier", "regressor"])
def test_training_does_not_wait_for_data(run: Run, step: str) -> None:
    epochs = run.history(step)
    assert (epochs.data_wait_fraction * epochs.seconds).sum() < 0.1 * epochs.seconds.sum()


def test_it_fits_a_small_machine(run: Run) -> None:
    for name, step in run.steps.items():
        assert sum(step.provenance["peak_memory"].values()) < MEMORY, name


def test_the_report_is_there(run: Run) -> None:
    assert (Path(run.steps["report"].path) / "report.html").stat().st_size > 100_000
