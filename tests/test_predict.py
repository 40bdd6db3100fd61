"""Predictions: tiles are the whole box, a broken-off run goes on, metrics are those of the written fields."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from small_grids import CLASSIFIER, filled, make_grids, small_disk

from galdist.data.datasets import tiles
from galdist.grids.store import Field, SimulationAttrs, StoreError, create_store, open_store
from galdist.statistics.metrics import load_metrics
from galdist.training.checkpoint import load_model
from galdist.training.predict import PredictConfig, _signed, predict, split_mix, voxel_uniforms
from galdist.training.train import TrainConfig, train
from hpc import durable

N_MESH = 32
MATTER = Field(name="matter_counts", assignment="ngp")


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Grids, a classifier and a regressor; reach 9, so that a mesh of 32 has tiles of 8."""
    folder = tmp_path_factory.mktemp("predict")
    make_grids(folder / "grids", N_MESH, ("train", "validation", "test", "test"))
    shape = {"channels": [2, 3], "recurrence": 0}
    classifier = CLASSIFIER | {
        "model": {"name": "r2unet-classifier", "positive_weight": 20, "recall": 0.9} | shape
    }
    fast = {
        "epochs": 3,
        "data": CLASSIFIER["data"] | {"tile": N_MESH},
        "optimizer": {"learning_rate": 1e-2},
    }
    train(TrainConfig(**classifier | fast), {"grids": [folder / "grids"]}, folder / "classifier")
    regressor = CLASSIFIER | {"model": {"name": "r2unet-regressor", "nonempty_weight": 5} | shape}
    inputs = {"grids": [folder / "grids"], "models": [folder / "classifier"]}
    train(TrainConfig(**regressor | fast), inputs, folder / "regressor")
    return {name: folder / name for name in ("grids", "classifier", "regressor")}


def run(steps: dict[str, Path], out: Path, model: str = "regressor", **config: Any) -> Path:
    predict(PredictConfig(**config), {"grids": [steps["grids"]], "model": [steps[model]]}, out)
    return out


def fields(out: Path) -> dict[tuple[str, str], np.ndarray]:
    store = open_store(out / "prediction.zarr")
    return {(name, field): store[name].read(field) for name in store for field in store[name].fields}


def test_a_prediction_has_the_schema_of_the_truth(steps: dict[str, Path], tmp_path: Path) -> None:
    run(steps, tmp_path)
    truth, store = open_store(steps["grids"] / "grids.zarr"), open_store(tmp_path / "prediction.zarr")
    assert store.names() == truth.names("test")
    assert store.attrs["model"] == "r2unet-regressor"
    assert store.attrs["checkpoint"] == load_model(steps["regressor"])[1]
    for name in store:
        assert store[name].attrs == truth[name].attrs
        assert store[name].fields == ["galaxy_counts", "galaxy_probability"]
        assert store[name].field("galaxy_counts") == truth[name].field("galaxy_counts")
        assert store[name].field("galaxy_probability").assignment == "none"
        counts, probability = (store[name].read(field) for field in store[name].fields)
        assert counts.min() == 0 < counts.max()
        assert 0 <= probability.min() < probability.max() <= 1


@pytest.mark.parametrize("tile", [8])
def test_tiles_are_exact(steps: dict[str, Path], tmp_path: Path, tile: int) -> None:
    whole = fields(run(steps, tmp_path / "whole", tile=N_MESH))
    tiled = run(steps, tmp_path / "tiled", tile=tile)
    assert len(list((tiled / "parts").iterdir())) == 2 * N_MESH // tile
    for key, values in fields(tiled).items():
        assert np.abs(values - whole[key]).max() < 1e-5 * whole[key].max()
    wanted = {(row["metric"], row["sample"]): row["value"] for row in load_metrics(tmp_path / "whole")}
    for row in load_metrics(tiled):
        assert row["value"] == pytest.approx(wanted[row["metric"], row["sample"]], rel=1e-4), row


def test_a_smaller_halo_is_an_approximation(steps: dict[str, Path], tmp_path: Path) -> None:
    whole = fields(run(steps, tmp_path / "whole", tile=N_MESH))
    rough = fields(run(steps, tmp_path / "rough", tile=8, halo=2))
    key = ("box_2", "galaxy_probability")
    difference = np.abs(rough[key] - whole[key]).max()
    assert 1e-5 * whole[key].max() < difference < 0.5


def test_metrics_are_those_of_the_fields(steps: dict[str, Path], tmp_path: Path) -> None:
    run(steps, tmp_path)
    model, _ = load_model(steps["regressor"])
    metrics = {(row["metric"], row["sample"]): row["value"] for row in load_metrics(tmp_path)}
    truth = open_store(steps["grids"] / "grids.zarr")
    called, labels = [], []
    for name in ("box_2", "box_3"):
        predicted = open_store(tmp_path / "prediction.zarr")[name]
        called.append(predicted.read("galaxy_probability") >= model.classifier.threshold.item())
        labels.append(truth[name].read("galaxy_counts") > 0)
        assert metrics["true_positives", name] == (called[-1] & labels[-1]).sum()
        assert metrics["false_positives", name] == (called[-1] & ~labels[-1]).sum()
    assert metrics["recall", "all"] == (np.array(called) & labels).sum() / np.sum(labels)
    assert metrics["accuracy", "all"] == (np.array(called) == labels).mean()


def test_boxes_of_several_steps_are_summed_up_apart(steps: dict[str, Path], tmp_path: Path) -> None:
    make_grids(tmp_path / "far", N_MESH, ("train",) * 4 + ("test",))
    inputs = {"grids": [steps["grids"], tmp_path / "far"], "model": [steps["classifier"]]}
    predict(PredictConfig(), inputs, tmp_path / "out")
    recall = {
        row["sample"]: row["value"] for row in load_metrics(tmp_path / "out") if row["metric"] == "recall"
    }
    assert recall.keys() == {"box_2", "box_3", "box_4", "all of grids", "all of far"}
    assert recall["all of far"] == recall["box_4"]
    assert (
        min(recall["box_2"], recall["box_3"])
        <= recall["all of grids"]
        <= max(recall["box_2"], recall["box_3"])
    )


def test_a_broken_off_prediction_goes_on(
    steps: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(steps, tmp_path / "whole", tile=8, halo=2)
    done = []
    write_json = durable.write_json

    def fails_at_the_third(path: Path, value: Any) -> None:
        if len(done) == 2:
            raise OSError(28, "No space left on device")
        done.append(path.name)
        write_json(path, value)

    monkeypatch.setattr(durable, "write_json", fails_at_the_third)
    with pytest.raises(OSError, match="No space"):
        run(steps, tmp_path / "cut", tile=8, halo=2)
    written = {name: (tmp_path / "cut" / "parts" / name).stat().st_mtime_ns for name in done}
    monkeypatch.setattr(durable, "write_json", write_json)
    run(steps, tmp_path / "cut", tile=8, halo=2)
    assert {name: (tmp_path / "cut" / "parts" / name).stat().st_mtime_ns for name in done} == written
    found, expected = fields(tmp_path / "cut"), fields(whole)
    assert all(np.array_equal(found[key], expected[key]) for key in expected)
    assert load_metrics(tmp_path / "cut") == load_metrics(whole)


def test_a_slab_that_does_not_fit_is_told_of(steps: dict[str, Path], tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 4 << 20) as out:
        run(steps, out)
        (out / "parts" / "box_2-0000.json").unlink()
        with filled(out), pytest.raises(durable.NotEnoughSpace, match="no room for slab 0 of box_2 in"):
            run(steps, out)
        run(steps, out)
        assert len(load_metrics(out)) > 0


def test_slabs_of_another_model_are_done_again(steps: dict[str, Path], tmp_path: Path) -> None:
    expected = fields(run(steps, tmp_path / "fresh"))
    run(steps, tmp_path / "out", model="classifier")
    found = fields(run(steps, tmp_path / "out"))
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[key], expected[key]) for key in expected)
    assert load_metrics(tmp_path / "out") == load_metrics(tmp_path / "fresh")


def test_matter_alone_is_enough(steps: dict[str, Path], tmp_path: Path) -> None:
    """Boxes without galaxies: an N-body run that nobody has painted."""
    attrs = SimulationAttrs(name="dark", box_size=25.0, redshift=0.0, suite="dark", split="test")
    store = create_store(tmp_path / "grids" / "grids.zarr", [attrs], [MATTER], N_MESH)
    matter = open_store(steps["grids"] / "grids.zarr")["box_2"].read("matter_counts")
    store["dark"].write("matter_counts", matter)
    run(steps, tmp_path / "known")
    run(steps | {"grids": tmp_path / "grids"}, tmp_path / "dark")
    key = "galaxy_counts"
    assert np.array_equal(fields(tmp_path / "dark")["dark", key], fields(tmp_path / "known")["box_2", key])
    assert load_metrics(tmp_path / "dark") == []


def test_bf16_is_close(steps: dict[str, Path], tmp_path: Path) -> None:
    exact = fields(run(steps, tmp_path / "fp32", model="classifier"))
    rough = fields(run(steps, tmp_path / "bf16", model="classifier", precision="bf16"))
    for key, values in rough.items():
        odds, expected = (torch.logit(torch.from_numpy(field)) for field in (values, exact[key]))
        assert 0 < (odds - expected).abs().max() < 0.3


@pytest.fixture(scope="module")
def counts(steps: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A regressor with a likelihood, conditioned on a parameter, that needs no classifier."""
    folder = tmp_path_factory.mktemp("counts")
    model = {"name": "inception-regressor", "branches": [1, 1, 1, 1], "parameters": ["A_SN1"]}
    config = CLASSIFIER | {"model": model | {"loss": "negative-binomial"}}
    train(TrainConfig(**config), {"grids": [steps["grids"]]}, folder / "counts")
    return steps | {"counts": folder / "counts"}


def test_draws_belong_to_their_voxels_whatever_the_tiles(counts: dict[str, Path], tmp_path: Path) -> None:
    whole = fields(run(counts, tmp_path / "whole", model="counts", tile=N_MESH, samples=2))
    tiled = fields(run(counts, tmp_path / "tiled", model="counts", tile=8, samples=2))
    other = fields(run(counts, tmp_path / "other", model="counts", tile=N_MESH, samples=1, seed=1))
    assert sorted({field for _, field in whole}) == [
        "galaxy_counts",
        "galaxy_counts_sample_0",
        "galaxy_counts_sample_1",
        "galaxy_probability",
    ]
    drawn = open_store(tmp_path / "whole" / "prediction.zarr")["box_2"].field("galaxy_counts_sample_1")
    assert drawn.assignment == "ngp"
    for name in ("box_2", "box_3"):
        first, second = (whole[name, f"galaxy_counts_sample_{n}"] for n in (0, 1))
        # A voxel whose random number lies within rounding of a step may change.
        assert np.mean(first != tiled[name, "galaxy_counts_sample_0"]) < 1e-4
        assert np.mean(second != tiled[name, "galaxy_counts_sample_1"]) < 1e-4
        expected = whole[name, "galaxy_counts"].sum(dtype=float)
        for draw in (first, second, other[name, "galaxy_counts_sample_0"]):
            assert draw.sum() == pytest.approx(expected, abs=8 * expected**0.5)
        assert np.sum((first > 0) & (second > 0)) < 0.5 * np.sum(first > 0)
        assert not np.array_equal(first, other[name, "galaxy_counts_sample_0"])
    assert not np.array_equal(
        whole["box_2", "galaxy_counts_sample_0"], whole["box_3", "galaxy_counts_sample_0"]
    )


def test_random_numbers_of_voxels_are_uniform_and_independent() -> None:
    (tile,) = tiles(32, 32, 0, 1)
    u = voxel_uniforms(tile, 32, (3, 1), 2, torch.device("cpu"))[0].numpy()
    assert stats.kstest(u.ravel(), "uniform").pvalue > 1e-3
    for axis in range(4):
        neighbors = np.corrcoef(u.ravel(), np.roll(u, 1, axis).ravel())[0, 1]
        assert abs(neighbors) < 4 / u.size**0.5
    part = tiles(32, 8, 0, 1)[37]
    assert np.array_equal(
        voxel_uniforms(part, 32, (3, 1), 2, torch.device("cpu"))[0].numpy(), u[:, *part.interior]
    )
    # SplitMix64's own first numbers from the seed 1234567, as published with it.
    state = torch.arange(1, 3) * _signed(0x9E3779B97F4A7C15) + 1234567
    assert [int(word) & (2**64 - 1) for word in split_mix(state)] == [
        6457827717110365317,
        3203168211198807973,
    ]


def test_what_a_model_lacks_is_told_before_work_starts(counts: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="of which nothing can be drawn"):
        run(counts, tmp_path / "out", samples=1)
    with pytest.raises(
        ValueError, match=r"drawing is \{'crop': 8\}, but .*counts \(inception-regressor\) .*: leave it out"
    ):
        run(counts, tmp_path / "out", model="counts", samples=1, drawing={"crop": 8})
    attrs = SimulationAttrs(name="dark", box_size=25.0, redshift=0.0, suite="dark", split="test")
    create_store(tmp_path / "grids" / "grids.zarr", [attrs], [MATTER], N_MESH)
    with pytest.raises(StoreError, match="simulation dark: parameter 'A_SN1' is not there"):
        run(counts | {"grids": tmp_path / "grids"}, tmp_path / "out", model="counts")
    assert not (tmp_path / "out").exists()


def other_box(folder: Path, redshift: float = 0.0, n_mesh: int = N_MESH, assignment: str = "ngp") -> Path:
    """Grids of one empty box of matter."""
    attrs = SimulationAttrs(name="other", box_size=25.0, redshift=redshift, suite="dark", split="test")
    field = MATTER.model_copy(update={"assignment": assignment})
    create_store(folder / "grids.zarr", [attrs], [field], n_mesh)
    return folder


def test_grids_unlike_those_of_training_are_refused(steps: dict[str, Path], tmp_path: Path) -> None:
    """A network knows cells, not Mpc/h, and what a field made with one scheme looks like."""
    coarse = other_box(tmp_path / "coarse", n_mesh=16)
    with pytest.raises(ValueError, match=r"cells of 1\.562 Mpc/h .* cells of 0\.7812 Mpc/h.* n_mesh = 32"):
        run(steps | {"grids": coarse}, tmp_path / "out")
    smooth = other_box(tmp_path / "smooth", assignment="cic")
    with pytest.raises(ValueError, match=r"matter_counts was made with assignment 'cic', .*from 'ngp'"):
        run(steps | {"grids": smooth}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_learns_from_fields_of_one_scheme(steps: dict[str, Path], tmp_path: Path) -> None:
    attrs = SimulationAttrs(name="other", box_size=25.0, redshift=0.0, suite="dark", split="train")
    fields = [MATTER, Field(name="galaxy_counts", assignment="cic")]
    create_store(tmp_path / "smooth" / "grids.zarr", [attrs], fields, N_MESH)
    config = TrainConfig(**CLASSIFIER)
    with pytest.raises(ValueError, match=r"other: galaxy_counts has .*'cic'.* in box_0 it has .*'ngp'"):
        train(config, {"grids": [steps["grids"], tmp_path / "smooth"]}, tmp_path / "out")


def test_another_redshift_is_told_of(
    steps: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(steps, tmp_path / "same")
    assert "redshift" not in caplog.text
    run(steps | {"grids": other_box(tmp_path / "early", redshift=0.47)}, tmp_path / "out")
    assert "other is at redshift 0.47" in caplog.text


def test_nothing_to_predict_is_an_error(steps: dict[str, Path], tmp_path: Path) -> None:
    make_grids(tmp_path / "grids", N_MESH, ("train", "validation"))
    with pytest.raises(ValueError, match="no simulation has the split 'test'"):
        run(steps | {"grids": tmp_path / "grids"}, tmp_path / "out")
    twice = {"grids": [steps["grids"], steps["grids"]], "model": [steps["regressor"]]}
    with pytest.raises(ValueError, match="in two stores"):
        predict(PredictConfig(), twice, tmp_path / "out")


@pytest.mark.parametrize(
    ("tile", "words"),
    [
        (2, "greater than or equal to 4"),
        (9, "tile is 9: this network halves its mesh, so it must be a multiple of 2"),
        (12, r"tile is 12, which does not divide n_mesh = 32: one of \[4, 8, 16, 32\]"),
    ],
)
def test_tiles_that_do_not_fit_touch_nothing(
    steps: dict[str, Path], tmp_path: Path, tile: int, words: str
) -> None:
    """Neither a new folder nor slabs that another prediction has left."""
    (tmp_path / "parts").mkdir()
    with pytest.raises(ValueError, match=words):
        run(steps, tmp_path, tile=tile, halo=2)
    assert [path.name for path in tmp_path.iterdir()] == ["parts"]
