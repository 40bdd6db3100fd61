"""The stage `sample`: draws have the distribution, models stand side by side, a broken-off run goes on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from linear_galaxies import COVARIANCE, INPUTS, TARGETS, halos, make_centrals, make_model, truth
from scipy import stats
from small_grids import filled, small_disk

from galdist.catalogs import samples as samples_module
from galdist.catalogs.catalog import open_catalog
from galdist.catalogs.samples import Samples, SamplesStore, open_samples
from galdist.grids.store import StoreError
from galdist.models import build
from galdist.models.quantiles import SumOfQuantilesConfig
from galdist.models.r2unet import R2UNetClassifier, R2UNetClassifierConfig
from galdist.statistics.metrics import load_metrics
from galdist.training.checkpoint import CheckpointError, save_model
from galdist.training.sample import SampleConfig, Union, sample
from hpc import durable

SIZES = {"one": 3000, "two": 500}


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two simulations, and models of both properties and of each."""
    folder = tmp_path_factory.mktemp("sample")
    catalogs = make_centrals(folder / "catalogs", SIZES)
    return {
        "catalogs": catalogs,
        "both": make_model(folder / "both", catalogs),
        "mass": make_model(folder / "mass", catalogs, TARGETS[:1]),
        "color": make_model(folder / "color", catalogs, TARGETS[1:], INPUTS[1:]),
        "pointless": make_model(folder / "pointless", catalogs, quantiles=False),
    }


def run(steps: dict[str, Path], out: Path, *models: str, **config: Any) -> SamplesStore:
    inputs = {"catalogs": [steps["catalogs"]], "models": [steps[name] for name in models or ("both",)]}
    sample(SampleConfig(**{"samples": 4, **config}), inputs, out)
    return open_samples(out / "samples.zarr")


def rows(steps: dict[str, Path], simulation: str) -> dict[str, np.ndarray]:
    return open_catalog(steps["catalogs"] / "catalog.zarr").table(simulation, "centrals")


def same(one: Samples, other: Samples) -> bool:
    return all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for name in ("simulation", "row", "point", "samples", "extrapolated")
    )


def test_draws_have_the_distribution(steps: dict[str, Path], tmp_path: Path) -> None:
    store = run(steps, tmp_path, samples=50, levels=(0.16, 0.5, 0.84), label="Linear")
    assert (store.label, store.model, store.targets) == ("Linear", "linear", TARGETS)
    assert store.source_columns == {"log_stellar_mass": "smass", "color_gi": "color"}
    found = store.read("one")
    table = rows(steps, "one")
    assert np.array_equal(found.row, np.flatnonzero(table["split"] == 2))
    mean = truth(table)[found.row]
    assert np.abs(found.point - mean).max() < 0.1  # fitted to 2,000 rows
    noise = found.samples - mean[:, None]
    whitened = np.linalg.solve(np.linalg.cholesky(COVARIANCE), noise.reshape(-1, 2).T)
    for values in whitened:  # joint: after whitening with the true covariance independent standard normals
        assert stats.kstest(values, "norm").statistic < 0.03
    assert abs(np.corrcoef(whitened)[0, 1]) < 0.07  # fitted: to 0.02; drawn one by one it were 0.5
    assert found.quantiles is not None
    below = (found.samples[:, None] <= found.quantiles[:, :, None]).mean((0, 2))
    assert np.abs(below - np.array([0.16, 0.5, 0.84])[:, None]).max() < 0.01


def test_metrics_are_those_of_the_points(steps: dict[str, Path], tmp_path: Path) -> None:
    store = run(steps, tmp_path)
    metrics = {row["metric"]: row for row in load_metrics(tmp_path)}
    tables = [rows(steps, name) for name in store.names()]
    found = [store.read(name) for name in store.names()]
    for i, target in enumerate(TARGETS):
        errors = np.concatenate(
            [part.point[:, i] - table[target][part.row] for part, table in zip(found, tables, strict=True)]
        )
        assert metrics[f"rmse_{target}"]["value"] == pytest.approx(np.sqrt(np.mean(errors**2)), rel=1e-5)
    assert metrics["rmse_color_gi"]["unit"] == "mag"
    assert metrics["extrapolated_fraction"]["value"] == pytest.approx(store.read().extrapolated.mean())
    assert metrics["rows_per_second"]["value"] > 0


def test_what_is_outside_the_training_range_is_marked(steps: dict[str, Path], tmp_path: Path) -> None:
    def inputs(step: Path, name: str, split: int | None = None) -> np.ndarray:
        table = open_catalog(step / "catalog.zarr").table(name, "centrals")
        wanted = slice(None) if split is None else table["split"] == split
        return np.stack([table[column] for column in INPUTS], 1)[wanted].astype("f4")

    training = np.concatenate([inputs(steps["catalogs"], name, 0) for name in SIZES])
    assert not run(steps, tmp_path / "known", split="train").read().extrapolated.any()
    wider = make_centrals(tmp_path / "wider", {"more": 20_000}, seed=7)
    found = run(steps | {"catalogs": wider}, tmp_path / "out", split="all").read()
    x = inputs(wider, "more")
    expected = ((x < training.min(0)) | (x > training.max(0))).any(1)
    assert 0 < expected.sum() < 1000
    assert np.array_equal(found.extrapolated, expected)


def test_the_seed_decides(steps: dict[str, Path], tmp_path: Path) -> None:
    first = run(steps, tmp_path / "first").read()
    again = run(steps, tmp_path / "again").read()
    other = run(steps, tmp_path / "other", seed=1).read()
    assert same(first, again)
    assert np.array_equal(first.point, other.point)
    assert np.isclose(first.samples, other.samples).mean() < 0.01


def test_chunks_do_not_repeat_each_other(
    steps: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples_module, "_ROWS", 64)
    found = run(steps, tmp_path, split="all").read("one")
    noise = (found.samples - found.point[:, None])[: 64 * 40].reshape(40, -1)
    assert len(np.unique(noise.round(4), axis=0)) == 40


def test_models_side_by_side(steps: dict[str, Path], tmp_path: Path) -> None:
    union = run(steps, tmp_path / "union", "color", "mass")
    assert union.targets == ("color_gi", "log_stellar_mass")
    assert len(union.checkpoints) == 2
    mass = run(steps, tmp_path / "mass", "mass").read()
    assert np.array_equal(union.read().point[:, 1], mass.point[:, 0])
    noise = (union.read().samples - union.read().point[:, None]).reshape(-1, 2)
    assert abs(np.corrcoef(noise.T)[0, 1]) < 0.05  # that of the joint model is one half
    with pytest.raises(CheckpointError, match=r"log_stellar_mass is predicted by both .*mass and .*both"):
        run(steps, tmp_path / "twice", "mass", "both")


def test_a_broken_off_run_goes_on(
    steps: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples_module, "_ROWS", 128)
    whole = run(steps, tmp_path / "whole").read()
    write_json, done = durable.write_json, []

    def fails_at_the_third(path: Path, value: Any) -> None:
        if path.name[0] == "0":
            if len(done) == 2:
                raise OSError(28, "No space left on device")
            done.append(path.name)
        write_json(path, value)

    monkeypatch.setattr(durable, "write_json", fails_at_the_third)
    with pytest.raises(durable.NotEnoughSpace, match="no room for chunk 2 of one"):
        run(steps, tmp_path / "cut")
    with pytest.raises(StoreError, match="never written"):
        open_samples(tmp_path / "cut" / "samples.zarr").read()
    monkeypatch.setattr(durable, "write_json", write_json)
    written = {name: (tmp_path / "cut" / "parts" / name).stat().st_mtime_ns for name in done}
    assert same(run(steps, tmp_path / "cut").read(), whole)
    assert {name: (tmp_path / "cut" / "parts" / name).stat().st_mtime_ns for name in done} == written


def test_chunks_of_other_settings_are_done_again(steps: dict[str, Path], tmp_path: Path) -> None:
    run(steps, tmp_path / "out", seed=1)
    assert same(run(steps, tmp_path / "out").read(), run(steps, tmp_path / "fresh").read())
    run(steps, tmp_path / "out", "pointless")
    assert open_samples(tmp_path / "out" / "samples.zarr").checkpoints == tuple(
        Union([steps["pointless"]]).checkpoints
    )


def test_halos_without_galaxies_are_enough(steps: dict[str, Path], tmp_path: Path) -> None:
    dark = make_centrals(tmp_path / "dark", SIZES, galaxies=False)
    store = run(steps | {"catalogs": dark}, tmp_path / "out", split="all")
    assert len(store.read()) == 3500
    assert {row["metric"] for row in load_metrics(tmp_path / "out")} == {
        "extrapolated_fraction",
        "rows_per_second",
    }


def test_a_parameter_of_the_simulation_is_an_input(steps: dict[str, Path], tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", steps["catalogs"], inputs=(*INPUTS, "Omega_m"))
    store = run(steps | {"both": model}, tmp_path / "out")
    assert np.abs(store.read("one").point - truth(rows(steps, "one"))[store.read("one").row]).max() < 0.1


def test_a_full_disk_is_told_of(steps: dict[str, Path], tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 8 << 20) as out:
        run(steps, out)
        (out / "parts" / "000000.json").unlink()
        with filled(out), pytest.raises(durable.NotEnoughSpace, match="no room for chunk 0 of one"):
            run(steps, out)
        run(steps, out)
        with pytest.raises(durable.NotEnoughSpace, match=r"500000 samples of .* halos needs"):
            run(steps, out, samples=500_000)


def test_what_does_not_fit_is_an_error(steps: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="linear has no quantiles of its own"):
        run(steps, tmp_path / "out", "pointless", levels=(0.5,))
    medians = build(SumOfQuantilesConfig(inputs=INPUTS, targets=TARGETS))
    save_model(tmp_path / "medians" / "model", medians, medians.state_dict(), {})
    with pytest.raises(
        ValueError, match=r"src has no quantiles of its own at 0\.5, 0\.9, only at 0\.25, 0\.5"
    ):
        run(steps | {"both": tmp_path / "medians"}, tmp_path / "out", levels=(0.5, 0.9))
    assert not (tmp_path / "out").exists()  # nothing was begun
    inputs = {"catalogs": [steps["catalogs"]] * 2, "models": [steps["both"]]}
    with pytest.raises(ValueError, match=r"'one' is in .* and .*: sample them in two steps"):
        sample(SampleConfig(), inputs, tmp_path / "twice")
    one_split = make_centrals(tmp_path / "few", {"one": 1})
    with pytest.raises(ValueError, match="no row has the split 'test'; choose another `split`"):
        run(steps | {"catalogs": one_split}, tmp_path / "none")
    grids = R2UNetClassifier(R2UNetClassifierConfig(channels=(2, 3), recurrence=0, recall=0.9))
    save_model(tmp_path / "grids" / "model", grids, grids.state_dict(), {})
    with pytest.raises(CheckpointError, match="r2unet-classifier is a model of boxes"):
        Union([tmp_path / "grids"])
    with pytest.raises(CheckpointError, match="no model is named"):
        Union([])
    model = make_model(
        tmp_path / "model", steps["catalogs"], inputs=(*INPUTS, "log_stellar_mass"), targets=["color_gi"]
    )
    dark = make_centrals(tmp_path / "dark", SIZES, galaxies=False)
    with pytest.raises(StoreError, match="column 'log_stellar_mass' is not there"):
        run(steps | {"catalogs": dark, "both": model}, tmp_path / "out")


def test_memory_does_not_grow_with_rows(steps: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A model never sees more than some thousand rows, or some ten thousand draws, at a time."""
    union = Union([steps["both"]])
    seen = []
    model = union.models[0]
    draw = model.sample
    monkeypatch.setattr(
        model,
        "sample",
        lambda batch, n, generator: seen.append(len(batch["inputs"]) * n) or draw(batch, n, generator),
    )
    inputs = np.stack([halos(20_000, 0)[name] for name in INPUTS], 1).astype("f4")
    assert union.sample(inputs, 100, 0).shape == (20_000, 100, 2)
    assert max(seen) <= 1 << 13
