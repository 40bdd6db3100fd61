"""Any number of ranks learns and predicts the same, and ranks that die can be started again."""

import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from small_grids import CLASSIFIER, Ranks, make_grids

from galdist.grids.store import open_store
from galdist.statistics.metrics import load_metrics
from galdist.training.checkpoint import Checkpoints

CONFIG: dict[str, Any] = CLASSIFIER | {
    "batch_size": 4,
    "data": {"crop": 8, "margin": 1, "crops_per_box": 16, "workers": 0},
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


def last_weights(out: Path) -> dict[str, torch.Tensor]:
    checkpoints = Checkpoints(out / "checkpoints")
    name = checkpoints.latest()
    assert name is not None
    return checkpoints.weights(name) | {f"ema.{k}": v for k, v in checkpoints.weights(name, "ema").items()}


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_ranks_train_as_one_does(grids: Path, alone: Path, tmp_path: Path, n_ranks: int) -> None:
    out = trained(grids, tmp_path / "out", n_ranks)
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
    grids: Path, tmp_path: Path, dies: int
) -> None:
    uninterrupted = trained(grids, tmp_path / "uninterrupted", 2)
    out = tmp_path / "out"
    with Ranks("train", CONFIG | {"checkpoint_minutes": 1e-6}, {"grids": [grids]}, out, 2) as ranks:
        ranks.signal_when(out / "checkpoints", "step-*", 2, signal.SIGKILL, rank=dies)
        statuses = ranks.wait(60)
    assert statuses[dies] == -signal.SIGKILL
    assert statuses[1 - dies] not in (0, None)
    trained(grids, out, 2)
    one, other = last_weights(out), last_weights(uninterrupted)
    assert all(torch.equal(one[name], other[name]) for name in one)
    model = "model/weights.safetensors"
    best, expected = load_file(out / model), load_file(uninterrupted / model)
    assert all(torch.equal(best[name], expected[name]) for name in best)


def test_random_numbers_of_all_generators_go_on(grids: Path, tmp_path: Path) -> None:
    uninterrupted = trained(grids, tmp_path / "uninterrupted", 2, NOISY, ("noisy_objective",))
    out = tmp_path / "out"
    often = NOISY | {"checkpoint_minutes": 1e-6}
    with Ranks("train", often, {"grids": [grids]}, out, 2, ("noisy_objective",)) as ranks:
        ranks.signal_when(out / "checkpoints", "step-*", 2, signal.SIGKILL)
        ranks.wait(60)
    trained(grids, out, 2, NOISY, ("noisy_objective",))
    one, other = last_weights(out), last_weights(uninterrupted)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_one_asked_to_stop_stops_all_at_one_step(grids: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    long = CONFIG | {"epochs": 12}
    with Ranks("train", long, {"grids": [grids]}, out, 2) as ranks:
        ranks.signal_when(out / "checkpoints", "best-*", 1, signal.SIGTERM, rank=1)
        assert ranks.wait(60) == [128 + signal.SIGTERM] * 2
    checkpoints = Checkpoints(out / "checkpoints")
    newest = checkpoints.latest()
    assert newest is not None
    assert len(checkpoints.state(newest)["random"]) == 2  # of both ranks, at one step
    assert not (out / "model").exists()
    trained(grids, out, 2, long)
    assert f"continues from {newest}" in (tmp_path / "out-log.txt").read_text()
    one, other = last_weights(out), last_weights(trained(grids, tmp_path / "uninterrupted", 2, long))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("n_ranks", [1, 2, 4])
def test_ranks_share_a_prediction(grids: Path, alone: Path, tmp_path: Path, n_ranks: int) -> None:
    outs = []
    for name, n in (("one", 1), ("several", n_ranks)):
        inputs = {"grids": [grids], "model": [alone]}
        with Ranks("predict", {"tile": 4, "halo": 2}, inputs, tmp_path / name, n) as ranks:
            ranks.succeed()
        outs.append(tmp_path / name)
    fields = [open_store(out / "prediction.zarr")["box_3"].read("galaxy_probability") for out in outs]
    assert fields[0].max() > 0
    assert np.array_equal(*fields)
    assert load_metrics(outs[0]) == load_metrics(outs[1])
