"""Any number of ranks trains a diffusion model alike, and draws the same boxes, jointly or side by side."""

import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from moments import Moment
from small_grids import Ranks, make_grids

from galdist.grids.store import open_store
from galdist.statistics.metrics import load_metrics
from galdist.training.checkpoint import Checkpoints

MODEL: dict[str, Any] = {
    "name": "vdm",
    "inputs": [{"field": "galaxy_counts"}],
    "targets": [
        {"field": "matter_counts", "quantum": 1, "normalization": ["standardize"]},
        {"field": "momentum", "components": 3, "normalization": ["standardize"]},
    ],
    "parameters": ["Omega_m"],
    "unknown": 0.5,
    "channels": [2, 3],
    "checkpoint_activations": True,
    "schedule": {"kind": "monotone", "hidden": 8},
}
CONFIG: dict[str, Any] = {
    "model": MODEL,
    "data": {"crop": 8, "margin": 1, "crops_per_box": 8, "workers": 0, "tile": 8, "halo": 2},
    "epochs": 2,
    "batch_size": 4,
    "optimizer": {"learning_rate": 1e-3},
    "ema_decay": 0.9,
    "seed": 3,
}
SAMPLER = {"kind": "ancestral", "steps": 3}
SETTINGS: dict[str, dict[str, Any]] = {
    how: {"samples": 1, "seed": 5, "halo": 2, "tile": 8, "drawing": {"sampler": SAMPLER} | crops}
    for how, crops in (("crops", {"crop": 8, "overlap": 4}), ("whole", {}))
}
"""Of boxes that are drawn in crops, and as one."""


def ran(
    stage: str, config: dict[str, Any], inputs: dict[str, list[Path]], out: Path, n: int, at: Any = None
) -> Path:
    with Ranks(stage, config, inputs, out, n, at=at) as ranks:
        if at is None:
            ranks.succeed()
        else:
            assert set(ranks.wait()) != {0}
    return out


@pytest.fixture(scope="module")
def grids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    step = tmp_path_factory.mktemp("diffusion") / "grids"
    make_grids(step, 16, ("train", "validation", "test", "test"))
    return step


@pytest.fixture(scope="module")
def alone(grids: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one rank trains."""
    return ran("train", CONFIG, {"grids": [grids]}, tmp_path_factory.mktemp("diffusion") / "alone", 1)


@pytest.fixture(scope="module")
def drawn(grids: Path, alone: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What one rank draws."""
    folder = tmp_path_factory.mktemp("diffusion")
    return {
        how: ran("predict", settings, {"grids": [grids], "model": [alone]}, folder / how, 1)
        for how, settings in SETTINGS.items()
    }


def test_two_ranks_train_as_one_does(grids: Path, alone: Path, tmp_path: Path) -> None:
    out = ran("train", CONFIG, {"grids": [grids]}, tmp_path / "two", 2)
    weights, losses = [], []
    for step in (alone, out):
        checkpoints = Checkpoints(step / "checkpoints")
        name = checkpoints.latest()
        assert name is not None
        weights.append(
            checkpoints.weights(name) | {"ema." + k: v for k, v in checkpoints.weights(name, "ema").items()}
        )
        losses.append({row["metric"]: row["value"] for row in load_metrics(step) if row["sample"] != "train"})
    for key, value in weights[0].items():
        torch.testing.assert_close(
            weights[1][key], value, atol=1e-5, rtol=1e-5, msg=lambda m, key=key: f"{key}: {m}"
        )
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def same(one: Path, other: Path, how: str) -> None:
    """Bitwise where boxes are one crop; else crops may be added in another order."""
    stores = [open_store(out / "prediction.zarr") for out in (one, other)]
    assert stores[0].names() == stores[1].names() == ["box_2", "box_3"]
    for name in stores[0]:
        fields = ["matter_counts", "matter_counts_sample_0", "momentum", "momentum_sample_0"]
        assert stores[0][name].fields == stores[1][name].fields == fields
        for field in fields:
            first, second = (store[name].read(field) for store in stores)
            assert first.std() > 0
            if how == "whole":
                assert np.array_equal(first, second)
            elif field.startswith("momentum"):
                np.testing.assert_allclose(second, first, rtol=0, atol=1e-5 * first.std())
                print(how, field, np.abs(second - first).max() / first.std())
            else:  # one that lies within rounding of a step may change
                assert np.mean(first != second) < 1e-3
    metrics = [
        {(row["metric"], row["sample"]): row["value"] for row in load_metrics(out)} for out in (one, other)
    ]
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-5)


@pytest.mark.parametrize("n_ranks", [2, 4])
@pytest.mark.parametrize("how", ["crops", "whole"])
def test_ranks_draw_as_one_does(
    grids: Path, alone: Path, drawn: dict[str, Path], tmp_path: Path, how: str, n_ranks: int
) -> None:
    inputs = {"grids": [grids], "model": [alone]}
    same(ran("predict", SETTINGS[how], inputs, tmp_path / "out", n_ranks), drawn[how], how)


@pytest.mark.parametrize("how", ["crops", "whole"])
def test_killed_ranks_keep_what_is_drawn(
    grids: Path, alone: Path, drawn: dict[str, Path], tmp_path: Path, how: str
) -> None:
    """Two ranks, one of which is killed when a draw is there; one rank goes on, two finish."""
    inputs, out = {"grids": [grids], "model": [alone]}, tmp_path / "out"
    made: dict[str, int] = {}
    for n_ranks, signum, number in ((2, signal.SIGKILL, 1), (1, signal.SIGTERM, 3)):
        at = Moment(signum, "parts/*.drawn", number, rank=0)
        ran("predict", SETTINGS[how], inputs, out, n_ranks, at)
        now = {path.name: path.stat().st_mtime_ns for path in out.glob("parts/*.drawn")}
        assert number <= len(now) < 4
        assert now.items() >= made.items()
        made = now
    ran("predict", SETTINGS[how], inputs, out, 2)
    now = {path.name: path.stat().st_mtime_ns for path in out.glob("parts/*.drawn")}
    assert len(now) == 4
    assert now.items() >= made.items()
    same(out, drawn[how], how)
