"""Any number of ranks draws the same galaxies, and ranks that were stopped or killed go on."""

import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from linear_galaxies import TARGETS, make_centrals, make_model
from moments import Moment
from small_grids import Ranks

from galdist.catalogs.samples import Samples, open_samples
from galdist.statistics.metrics import load_metrics

MODULES = ("linear_galaxies",)
CONFIG: dict[str, Any] = {"split": "all", "samples": 100, "levels": [0.5], "seed": 2}
"""2,048 rows a chunk: ten chunks."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    folder = tmp_path_factory.mktemp("ranks")
    catalogs = make_centrals(folder / "catalogs", {"one": 15_000, "two": 3000})
    models = [make_model(folder / target, catalogs, [target]) for target in TARGETS]
    return {"catalogs": [catalogs], "models": models}


def sampled(inputs: dict[str, list[Path]], out: Path, n_ranks: int) -> Path:
    with Ranks("sample", CONFIG, inputs, out, n_ranks, MODULES) as ranks:
        ranks.succeed()
    return out


@pytest.fixture(scope="module")
def alone(inputs: dict[str, list[Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sampled(inputs, tmp_path_factory.mktemp("alone") / "out", 1)


def same(one: Path, other: Path) -> bool:
    found: list[Samples] = [open_samples(path / "samples.zarr").read() for path in (one, other)]
    names = ("simulation", "row", "point", "samples", "extrapolated", "quantiles")
    return all(np.array_equal(*(getattr(part, name) for part in found)) for name in names)


def results(out: Path) -> list[dict[str, Any]]:
    """Metrics but that of the clock."""
    return [dict(row) for row in load_metrics(out) if row["metric"] != "rows_per_second"]


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_ranks_draw_as_one_does(
    inputs: dict[str, list[Path]], alone: Path, tmp_path: Path, n_ranks: int
) -> None:
    out = sampled(inputs, tmp_path / "out", n_ranks)
    assert len(list((out / "parts").glob("0*.json"))) == 10
    assert same(out, alone)
    assert results(out) == results(alone)


@pytest.mark.parametrize(
    ("signum", "statuses"),
    [(signal.SIGTERM, {128 + signal.SIGTERM}), (signal.SIGKILL, {-signal.SIGKILL})],
)
def test_what_was_broken_off_goes_on_with_other_ranks(
    inputs: dict[str, list[Path]], alone: Path, tmp_path: Path, signum: signal.Signals, statuses: set[int]
) -> None:
    out = tmp_path / "out"
    with Ranks("sample", CONFIG, inputs, out, 2, MODULES, Moment(signum, "parts/0*.json")) as ranks:
        assert set(ranks.wait()) == statuses, ranks.log.read_text()
    made = {path.name: path.stat().st_mtime_ns for path in out.glob("parts/0*.json")}
    assert 1 <= len(made) < 10
    sampled(inputs, out, 3)
    assert {name: (out / "parts" / name).stat().st_mtime_ns for name in made} == made
    assert same(out, alone)
    assert results(out) == results(alone)
