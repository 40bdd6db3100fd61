"""Models of voxels on any number of ranks: conditioned, with losses of whole samples, and drawn from."""

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


def ranks(stage: str, config: dict[str, Any], inputs: dict[str, list[Path]], out: Path, n: int) -> Path:
    with Ranks(stage, config, inputs, out, n) as processes:
        processes.succeed()
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        {"name": "inception-classifier", "loss": "dice"},
        {"name": "inception-regressor", "loss": "negative-binomial"},
    ],
)
def test_two_ranks_train_and_draw_as_one(model: dict[str, Any], tmp_path: Path) -> None:
    make_grids(tmp_path / "grids")
    grids = [tmp_path / "grids"]
    shape = {"branches": [1, 2, 1, 1], "parameters": ["A_SN1"], "checkpoint_activations": True}
    config = CLASSIFIER | {"model": model | shape, "optimizer": {"learning_rate": 1e-2}}
    one, two = (ranks("train", config, {"grids": grids}, tmp_path / f"{n}", n) for n in (1, 2))
    expected = load_file(one / "model" / "weights.safetensors")
    for name, value in load_file(two / "model" / "weights.safetensors").items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-5)
    if model["loss"] == "dice":
        return
    settings = {"tile": 8, "samples": 2}
    inputs = {"grids": grids, "model": [one]}
    drawn = [ranks("predict", settings, inputs, tmp_path / f"draws-{n}", n) for n in (1, 2)]
    first, second = (open_store(out / "prediction.zarr")["box_3"] for out in drawn)
    for field in first.fields:
        assert np.array_equal(first.read(field), second.read(field))
    assert first.read("galaxy_counts_sample_0").sum() > 0
