"""Any number of ranks learns and predicts the same, and ranks that die can be started again."""

import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from moments import Moment
from small_grids import CLASSIFIER, Ranks, make_grids
from small_tables import make_tables

from galdist.grids.store import open_store
from galdist.statistics.metrics import load_metrics
from galdist.training.checkpoint import Checkpoints
from hpc import progress

CONFIG: dict[str, Any] = CLASSIFIER | {
    "batch_size": 4,
    "data": {"crop": 8, "margin": 1, "crops_per_box": 16, "workers": 0, "tile": 8},
    "clip_norm": 0.5,
    "ema_decay": 0.9,
}


@pytest.fixture(scope="module")
def grids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    step = tmp_path_factory.mktemp("ranks") / "grids"
    make_grids(step)
    return step


NOISY = CONFIG | {"model": CLASSIFIER["model"] | {"name": "noisy"}}


def trained(
    grids: Path, out: Path, n_ranks: int, config: dict[str, Any] = CONFIG, modules: tuple[str, ...] = ()
) -> Path:
    with Ranks("train", config, {"grids": [grids]}, out, n_ranks, modules) as ranks:
        ranks.succeed()
    return out


@pytest.fixture(scope="module")
def alone(grids: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(grids, tmp_path_factory.mktemp("ranks") / "alone", 1)


@pytest.fixture(scope="module")
def two(grids: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks train, undisturbed."""
    return trained(grids, tmp_path_factory.mktemp("ranks") / "two", 2)


def last_weights(out: Path) -> dict[str, torch.Tensor]:
    checkpoints = Checkpoints(out / "checkpoints")
    name = checkpoints.latest()
    assert name is not None
    return checkpoints.weights(name) | {f"ema.{k}": v for k, v in checkpoints.weights(name, "ema").items()}


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_ranks_train_as_one_does(grids: Path, alone: Path, two: Path, tmp_path: Path, n_ranks: int) -> None:
    out = two if n_ranks == 2 else trained(grids, tmp_path / "out", n_ranks)
    expected = last_weights(alone)
    start_to_end = max((value - 0).abs().max() for value in expected.values())
    assert start_to_end > 0.1
    for name, value in last_weights(out).items():
        torch.testing.assert_close(
            value, expected[name], atol=1e-5, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )
    assert (out / "history.jsonl").read_text().count("\n") == CONFIG["epochs"]


@pytest.mark.parametrize("dies", [0, 1])
def test_a_killed_rank_ends_the_others_and_the_next_start_finishes(
    grids: Path, two: Path, tmp_path: Path, dies: int
) -> None:
    out, often = tmp_path / "out", CONFIG | {"checkpoint_minutes": 1e-6}
    moment = Moment(signal.SIGKILL, "checkpoints/step-*", number=2, rank=dies)
    with Ranks("train", often, {"grids": [grids]}, out, 2, at=moment) as ranks:
        statuses = ranks.wait()
    assert statuses[dies] == -signal.SIGKILL
    assert statuses[1 - dies] not in (0, None)
    trained(grids, out, 2)
    one, other = last_weights(out), last_weights(two)
    assert all(torch.equal(one[name], other[name]) for name in one)
    model = "model/weights.safetensors"
    best, expected = load_file(out / model), load_file(two / model)
    assert all(torch.equal(best[name], expected[name]) for name in best)


def test_random_numbers_of_all_generators_go_on(grids: Path, tmp_path: Path) -> None:
    uninterrupted = trained(grids, tmp_path / "uninterrupted", 2, NOISY, ("noisy_objective",))
    out = tmp_path / "out"
    often = NOISY | {"checkpoint_minutes": 1e-6}
    moment = Moment(signal.SIGKILL, "checkpoints/step-*", number=2, rank=0)
    with Ranks("train", often, {"grids": [grids]}, out, 2, ("noisy_objective",), moment) as ranks:
        assert -signal.SIGKILL in ranks.wait()
    trained(grids, out, 2, NOISY, ("noisy_objective",))
    one, other = last_weights(out), last_weights(uninterrupted)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_one_asked_to_stop_stops_all_at_one_step(grids: Path, tmp_path: Path) -> None:
    """Four: of more than two gradients the sum depends on the order."""
    out = tmp_path / "out"
    long = NOISY | {"epochs": 3}
    modules = ("noisy_objective",)
    moment = Moment(signal.SIGTERM, "history.jsonl", rank=1)
    with Ranks("train", long, {"grids": [grids]}, out, 4, modules, moment) as ranks:
        assert ranks.wait() == [128 + signal.SIGTERM] * 4
    checkpoints = Checkpoints(out / "checkpoints")
    newest = checkpoints.latest()
    assert newest is not None
    assert len(checkpoints.state(newest)["ranks"]) == 4  # all, at one step
    assert not (out / "model").exists()
    trained(grids, out, 4, long, modules)
    assert f"continues from {newest}" in (tmp_path / "out-log.txt").read_text()
    one = last_weights(out)
    other = last_weights(trained(grids, tmp_path / "uninterrupted", 4, long, modules))
    assert all(torch.equal(one[name], other[name]) for name in one)


STOPPED = 128 + signal.SIGTERM
TILES = CONFIG | {"data": CONFIG["data"] | {"tile": 4, "halo": 2}, "checkpoint_minutes": 60}
"""A validation of 64 tiles."""
IN_VALIDATION = Moment(signal.SIGTERM, "checkpoints/step-00000008", votes=10)
"""Ten votes after the training of the first epoch is saved, or found to be."""


def saved(out: Path) -> dict[str, Any]:
    """State of the newest checkpoint."""
    checkpoints = Checkpoints(out / "checkpoints")
    name = checkpoints.latest()
    assert name is not None
    return checkpoints.state(name)


def test_validation_stops_within_a_tile_and_goes_on_there(grids: Path, tmp_path: Path) -> None:
    uninterrupted, out = trained(grids, tmp_path / "uninterrupted", 2, TILES), tmp_path / "out"
    done = [0]
    for _ in range(2):
        with Ranks("train", TILES, {"grids": [grids]}, out, 2, at=IN_VALIDATION) as ranks:
            assert ranks.wait() == [STOPPED] * 2, ranks.log.read_text()
        position = saved(out)["position"]
        assert (position["epoch"], position["step"]) == (0, 8)
        done.append(position["validated"])
    assert 0 < done[1] < done[2] < 64
    trained(grids, out, 2, TILES)
    one, other = last_weights(out), last_weights(uninterrupted)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert results(out) == results(uninterrupted)


def results(out: Path) -> list[dict[str, Any]]:
    """Metrics but those of the clock."""
    return [row for row in load_metrics(out) if row["sample"] != "train"]


def test_a_model_that_is_being_prepared_stops(grids: Path, tmp_path: Path) -> None:
    config = CONFIG | {"model": CLASSIFIER["model"] | {"name": "slow"}}
    out = tmp_path / "out"
    with Ranks("train", config, {"grids": [grids]}, out, 2, ("noisy_objective",)) as ranks:
        ranks.when(lambda: "looks at a box" in ranks.log.read_text())
        ranks.signal_all(signal.SIGTERM)
        assert ranks.wait() == [STOPPED] * 2, ranks.log.read_text()
    assert not list(out.glob("checkpoints/*"))


def test_fewer_ranks_go_on(grids: Path, tmp_path: Path) -> None:
    """4, then 2 in the middle of an epoch, then 1 in the middle of its validation."""
    alone, out = trained(grids, tmp_path / "alone", 1, TILES), tmp_path / "out"
    for n_ranks, config, moment in (
        (4, TILES | {"checkpoint_minutes": 1e-6}, Moment(signal.SIGTERM, "checkpoints/step-0000000[3-6]")),
        (2, TILES, IN_VALIDATION),
    ):
        with Ranks("train", config, {"grids": [grids]}, out, n_ranks, at=moment) as ranks:
            assert ranks.wait() == [STOPPED] * n_ranks, ranks.log.read_text()
    assert 0 < saved(out)["position"]["validated"] < 64
    trained(grids, out, 1, TILES)
    said = (tmp_path / "out-log.txt").read_text()
    for now, before in ((2, 4), (1, 2)):
        assert (
            f"{now} ranks continue what {before} ranks began: random numbers drawn by the model will" in said
        )
    for name, value in last_weights(alone).items():
        torch.testing.assert_close(last_weights(out)[name], value, atol=1e-5, rtol=1e-5)
    expected = {row["metric"]: row["value"] for row in results(alone)}
    assert {row["metric"]: row["value"] for row in results(out)} == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("n_ranks", [1, 2])
def test_ten_stops_need_no_hand(grids: Path, tmp_path: Path, n_ranks: int) -> None:
    """SIGTERM to all processes at any moment: while they start, decode, train, validate or write."""
    config = NOISY | {
        "epochs": 12,
        "data": {"crop": 8, "margin": 1, "crops_per_box": 32, "workers": 1, "tile": 4, "halo": 2},
    }
    modules = ("noisy_objective",)
    uninterrupted = trained(grids, tmp_path / "uninterrupted", n_ranks, config, modules)
    out, moments = tmp_path / "out", random.Random(n_ranks)

    def done(ranks: Ranks) -> float:
        found = progress.read(ranks.progress)
        return 0 if found is None else found.done

    places = []
    for _ in range(10):
        with Ranks("train", config, {"grids": [grids]}, out, n_ranks, modules) as ranks:
            before = done(ranks)
            ranks.when(ranks.has_workers)
            if moments.random() < 0.8:
                ranks.when(lambda ranks=ranks, before=before: done(ranks) > before)
                time.sleep(moments.uniform(0, 0.5))
            ranks.signal_all(signal.SIGTERM)
            assert ranks.wait() == [STOPPED] * n_ranks, ranks.log.read_text()
        if list(out.glob("checkpoints/step-*")):
            position = saved(out)["position"]
            places.append((position["epoch"], position["step"], position["validated"]))
    print(places)
    assert len(set(places)) >= 5
    trained(grids, out, n_ranks, config, modules)
    one, other = last_weights(out), last_weights(uninterrupted)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert results(out) == results(uninterrupted)


PREDICTION = {"tile": 4, "halo": 4}
"""Four slabs of 16 tiles."""


def predicted(grids: Path, model: Path, out: Path, n_ranks: int, config: dict[str, Any] = PREDICTION) -> Path:
    with Ranks("predict", config, {"grids": [grids], "model": [model]}, out, n_ranks) as ranks:
        ranks.succeed()
    return out


@pytest.fixture(scope="module")
def prediction(grids: Path, alone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one rank predicts."""
    return predicted(grids, alone, tmp_path_factory.mktemp("ranks") / "prediction", 1)


def same_prediction(one: Path, other: Path) -> bool:
    fields = [open_store(out / "prediction.zarr")["box_3"].read("galaxy_probability") for out in (one, other)]
    assert fields[0].max() > 0
    return np.array_equal(*fields) and load_metrics(one) == load_metrics(other)


def test_a_prediction_stops_within_a_tile_and_goes_on(
    grids: Path, alone: Path, prediction: Path, tmp_path: Path
) -> None:
    inputs, out = {"grids": [grids], "model": [alone]}, tmp_path / "out"
    moment = Moment(signal.SIGTERM, "parts/*")
    with Ranks("predict", PREDICTION, inputs, out, 2, at=moment) as ranks:
        assert ranks.wait() == [STOPPED] * 2, ranks.log.read_text()
    made = {path.name: path.stat().st_mtime_ns for path in out.glob("parts/*")}
    assert 1 <= len(made) < 4
    predicted(grids, alone, out, 3)
    assert {name: (out / "parts" / name).stat().st_mtime_ns for name in made} == made
    assert same_prediction(out, prediction)


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_ranks_share_a_prediction(
    grids: Path, alone: Path, prediction: Path, tmp_path: Path, n_ranks: int
) -> None:
    assert same_prediction(predicted(grids, alone, tmp_path / "out", n_ranks), prediction)


ROWS: dict[str, Any] = {
    "model": {"name": "gaussian"},
    "epochs": 4,
    "batch_size": 32,
    "optimizer": {"learning_rate": 1e-2},
    "ema_decay": 0.9,
    "seed": 3,
}


@pytest.fixture(scope="module")
def centrals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tables(tmp_path_factory.mktemp("ranks") / "centrals")


def trained_on_rows(centrals: Path, out: Path, n_ranks: int, config: dict[str, Any] = ROWS) -> Path:
    with Ranks("train", config, {"catalogs": [centrals]}, out, n_ranks, ("small_tables",)) as ranks:
        ranks.succeed()
    return out


@pytest.fixture(scope="module")
def rows_alone(centrals: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_on_rows(centrals, tmp_path_factory.mktemp("ranks") / "rows-alone", 1)


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_ranks_train_on_rows_as_one_does(
    centrals: Path, rows_alone: Path, tmp_path: Path, n_ranks: int
) -> None:
    out = trained_on_rows(centrals, tmp_path / "out", n_ranks)
    expected = last_weights(rows_alone)
    for name, value in last_weights(out).items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-5)
    metrics = {row["metric"]: row["value"] for row in results(rows_alone)}
    assert {row["metric"]: row["value"] for row in results(out)} == pytest.approx(metrics, rel=1e-3)


FAMILIES: dict[str, dict[str, Any]] = {
    "src": {"hidden": [8]},
    "sqr": {"hidden": [8]},
    "autoregressive-sqr": {"width": 8, "blocks": 1, "bins": 4},
    "graph-sqr": {"width": 8, "blocks": 1, "bins": 4, "message": 8, "neighbors": {"linking_length": 4.0}},
    "nn-class": {"dropout": 0.0},
    "voronoi": {},
    "nn-gauss": {},
    "flow": {},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_two_ranks_learn_every_family_of_tables_as_one_does(
    centrals: Path, tmp_path: Path, name: str
) -> None:
    """Without dropout, and with the same levels of quantiles on all ranks: each draws its own otherwise."""
    model = {"name": name, "inputs": ["log_halo_mass", "spin"], "targets": ["log_stellar_mass", "color_gi"]}
    # Adam makes steps of the learning rate even of gradients that are rounding: small ones.
    config = ROWS | {"model": model | FAMILIES[name], "epochs": 1, "optimizer": {"learning_rate": 1e-3}}
    found = []
    for n_ranks in (1, 2):
        out = tmp_path / str(n_ranks)
        with Ranks("train", config, {"catalogs": [centrals]}, out, n_ranks, ("fixed_levels",)) as ranks:
            ranks.succeed()
        found.append(last_weights(out))
    for key, value in found[0].items():
        torch.testing.assert_close(
            found[1][key], value, atol=1e-5, rtol=1e-5, msg=lambda m, key=key: f"{key}: {m}"
        )


def test_ranks_that_train_on_rows_stop_together_and_go_on(centrals: Path, tmp_path: Path) -> None:
    """Each draws its own random numbers."""
    config = ROWS | {"model": {"name": "gaussian", "noise": 0.3}, "epochs": 6}
    uninterrupted = trained_on_rows(centrals, tmp_path / "uninterrupted", 2, config)
    out = tmp_path / "out"
    moment = Moment(signal.SIGTERM, "history.jsonl", rank=1)
    with Ranks("train", config, {"catalogs": [centrals]}, out, 2, ("small_tables",), moment) as ranks:
        assert ranks.wait() == [STOPPED] * 2, ranks.log.read_text()
    assert 0 < saved(out)["position"]["epoch"] < 6
    trained_on_rows(centrals, out, 2, config)
    assert "continues from" in (tmp_path / "out-log.txt").read_text()
    one, other = last_weights(out), last_weights(uninterrupted)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert results(out) == results(uninterrupted)
