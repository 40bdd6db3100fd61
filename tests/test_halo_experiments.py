"""The studies of galaxies in halos as they ship, cut down: from simulation or table to the report."""

import math
from pathlib import Path

import numpy as np
import pytest
from small_runs import cut_down

from galdist.catalogs.centrals import read_centrals
from galdist.run import Run
from galdist.simulations.formation import PHYSICS
from galdist.statistics.scores import load_scores

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def crps(run: Run, of: str) -> dict[str, float]:
    """By label."""
    rows = load_scores(run.steps["scores"].path)["rows"]
    return {row["label"]: row["value"] for row in rows if (row["metric"], row["of"]) == ("crps", of)}


@pytest.fixture(scope="module")
def mock(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return cut_down(
        "mock-halos",
        tmp_path_factory.mktemp("mock") / "run",
        universe__simulations=20,
        universe__box_size=12.5,
        universe__n_particles=32,
        catalog__split__validation="[CV_15, CV_16]",
        catalog__split__test="[CV_17, CV_18, CV_19]",
        centrals__minimum__log_halo_mass=11,
        sqr__sweep__seed="[1]",
        chain__epochs=100,
        chain_mass__epochs=100,
    )


class TestMock:
    def test_galaxies_of_universes_that_were_kept_out_are_scored(self, mock: Run) -> None:
        path = Path(mock.steps["centrals"].path)
        split = {part: read_centrals([path], ["log_halo_mass"], part) for part in ("train", "test")}
        assert len(split["train"]) > 3 * len(split["test"]) > 200
        assert set(np.unique(split["test"].simulation)).isdisjoint(np.unique(split["train"].simulation))
        assert load_scores(mock.steps["scores"].path)["n_rows"] == len(split["test"])

    def test_models_find_what_galaxies_owe_to_more_than_the_mass(self, mock: Run) -> None:
        """A Gaussian of standard deviation sigma has the CRPS sigma / sqrt(pi), if it is perfect."""
        law = PHYSICS["MockA"]
        found = crps(mock, "log_stellar_mass")
        best = law.scatter / math.sqrt(math.pi)  # who knows all of the halo
        assert best < found["Chain"] < 0.8 * found["Chain, halo mass alone"]
        mass_alone = math.hypot(law.scatter, law.environment) / math.sqrt(math.pi)
        assert found["Chain, halo mass alone"] == pytest.approx(mass_alone, rel=0.4)

    def test_draws_are_calibrated(self, mock: Run) -> None:
        rows = load_scores(mock.steps["scores"].path)["rows"]
        covered = {
            row["of"]: row["value"]
            for row in rows
            if row["label"] == "Chain" and row["metric"] == "coverage_0.9"
        }
        assert covered["log_stellar_mass"] == pytest.approx(0.9, abs=0.1)
        assert covered["color_gi"] == pytest.approx(0.9, abs=0.1)


def test_astrid(shared_data: Path, tmp_path: Path) -> None:
    run = cut_down(
        "astrid-halos",
        tmp_path / "run",
        centrals__tables__0__file=shared_data / "camels_astrid_galaxies.parquet",
        centrals__tables__0__parameters__file=shared_data / "camels_astrid_parameters.csv",
        sqr__sweep__seed="[1]",
        sqr__epochs=3,
        flow__epochs=6,
        chain__epochs=3,
        flow_halo__epochs=6,
        scores__bootstrap=10,
        scores__floor_draws=5,
    )
    split = {
        part: read_centrals([Path(run.steps["centrals"].path)], ["Omega_m"], part)
        for part in ("train", "validation", "test")
    }
    assert [len(np.unique(part.columns["Omega_m"])) for part in split.values()] == [20, 5, 5]
    found = crps(run, "log_stellar_mass")
    assert set(found) == {"SQR", "Flow", "Chain", "Flow, halo alone", "Random forest"}
    assert max(found.values()) < 0.25
