"""The stage `baseline`: trees have the conditional distribution, matching keeps ranks and marginals."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError
from scipy import stats

from galdist.catalogs import samples as samples_module
from galdist.catalogs.catalog import CatalogWriter, open_catalog
from galdist.catalogs.columns import QUANTITIES
from galdist.catalogs.samples import Samples, SamplesStore, open_samples
from galdist.grids.store import SimulationAttrs, StoreError
from galdist.statistics.baselines import (
    MATCHED,
    Baseline,
    BaselineConfig,
    Boosting,
    Forest,
    Matching,
    baseline,
    fit,
)
from galdist.statistics.metrics import load_metrics

INPUTS = ("log_halo_mass", "formation_redshift", "spin")
TARGETS = ("log_stellar_mass", "color_gi")
HALOS = {"inputs": INPUTS, "targets": tuple(MATCHED)}
FOREST: dict[str, Any] = {"name": "random-forest", "trees": 30, "min_samples_leaf": 20, "max_features": 1.0}
BOOSTING: dict[str, Any] = {"name": "gradient-boosting", "iterations": 40}
CORRELATION = 0.6


def moments(x: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Mean and standard deviation of both targets at halo mass ``x`` in [11, 14]: (n, 2) each."""
    u = (x - 11) / 3
    mean = np.stack([9 + 2 * u, 0.4 + 0.6 * u**2], 1)
    return mean, np.stack([0.1 + 0.4 * u, 0.3 - 0.2 * u], 1)


def columns(n: int, seed: int) -> dict[str, NDArray[Any]]:
    """Halos whose galaxies are Gaussian in mass and color, with a width that changes with halo mass."""
    random = np.random.default_rng(seed)
    mass = random.uniform(11, 14, n)
    mean, sigma = moments(mass)
    noise = random.multivariate_normal([0, 0], [[1, CORRELATION], [CORRELATION, 1]], n)
    targets = mean + sigma * noise
    spin = random.lognormal(-3.3, 0.5, n)
    spin[-1] = 0.9  # outside the training range
    return {
        "log_halo_mass": mass,
        "formation_redshift": random.gamma(3, 0.4, n),
        "spin": spin,
        "log_stellar_mass": targets[:, 0],
        "color_gi": targets[:, 1],
        "log_ssfr": random.normal(-10, 0.4, n),
        "log_radius": random.normal(0.5, 0.2, n),
        "split": np.repeat([0, 2], [n - n // 5, n // 5]).astype(np.int8),
    }


def write(step: Path, tables: dict[str, dict[str, NDArray[Any]]]) -> Path:
    writer = CatalogWriter(step / "catalog.zarr")
    for name, table in tables.items():
        attrs = SimulationAttrs(name=name, box_size=50.0, redshift=0.0, suite="", cosmology={"Omega_m": 0.3})
        units = {column: quantity.units for column, quantity in QUANTITIES.items()}
        facts = {"centrals": {"columns": {"color_gi": {"column": "color"}}}}
        writer.add(attrs, {"centrals": table}, units, facts)
    writer.finish(list(tables))
    return step


@pytest.fixture(scope="module")
def catalogs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("baselines"), {"one": columns(8000, 1), "two": columns(2000, 2)})


def run(catalogs: Path, out: Path, method: Any, **config: Any) -> SamplesStore:
    settings = {"inputs": INPUTS, "targets": TARGETS, "samples": 3, **config}
    baseline(BaselineConfig(method=method, **settings), {"catalogs": [catalogs]}, out)
    return open_samples(out / "samples.zarr")


def fitted(catalogs: Path, method: Any, **config: Any) -> Baseline:
    return fit(BaselineConfig(method=method, **{"inputs": INPUTS, "targets": TARGETS, **config}), [catalogs])


def table(catalogs: Path, split: int, names: tuple[str, ...]) -> NDArray[np.float32]:
    store = open_catalog(catalogs / "catalog.zarr")
    parts = [store.table(name, "centrals") for name in store.names()]
    return np.concatenate(
        [np.stack([part[name][part["split"] == split] for name in names], 1) for part in parts]
    ).astype(np.float32)


def coverage(samples: NDArray[Any], truth: NDArray[Any], probability: float) -> NDArray[Any]:
    low, high = np.quantile(samples, [(1 - probability) / 2, (1 + probability) / 2], axis=1)
    return np.asarray(((truth >= low) & (truth <= high)).mean(0))


@pytest.fixture(scope="module")
def trees(catalogs: Path) -> dict[str, Baseline]:
    return {
        "forest": fitted(catalogs, FOREST, inputs=INPUTS[:1]),
        "boosting": fitted(catalogs, BOOSTING | {"iterations": 70}, inputs=INPUTS[:1]),
    }


@pytest.mark.parametrize("kind", ["forest", "boosting"])
def test_trees_have_the_conditional_distribution(trees: dict[str, Baseline], kind: str) -> None:
    x = np.linspace(11.2, 13.8, 60, dtype=np.float32)[:, None]
    mean, sigma = moments(x[:, 0].astype(float))
    model = trees[kind]
    draws = model.sample(x, 400, seed=3).astype(float)
    assert draws.shape == (60, 400, 2)
    # Means over neighboring halos: that of one halo has the noise of the few training rows about it.
    error = ((draws.mean(1) - mean) / sigma).reshape(6, 10, 2).mean(1)
    assert np.abs(error).max() < 0.2
    assert np.abs(((model.point(x) - mean) / sigma).reshape(6, 10, 2).mean(1)).max() < 0.2
    width = (draws.std(1) / sigma).reshape(6, 10, 2).mean(1)
    assert np.abs(width - 1).max() < 0.15
    scores = ((draws - mean[:, None]) / sigma[:, None]).reshape(-1, 2)
    assert max(stats.kstest(values, "norm").statistic for values in scores.T) < 0.05
    joint = np.corrcoef(scores.T)[0, 1]
    assert joint == pytest.approx(CORRELATION if kind == "forest" else 0, abs=0.05)


@pytest.mark.parametrize("kind", ["forest", "boosting"])
def test_intervals_of_trees_cover_the_truth(catalogs: Path, trees: dict[str, Baseline], kind: str) -> None:
    x, y = table(catalogs, 2, INPUTS[:1]), table(catalogs, 2, TARGETS)
    samples = trees[kind].sample(x, 100, seed=0)
    for probability in (0.5, 0.9):
        assert np.abs(coverage(samples, y, probability) - probability).max() < 0.04


@pytest.mark.parametrize("kind", ["forest", "boosting"])
def test_quantiles_are_those_of_the_draws(trees: dict[str, Baseline], kind: str) -> None:
    x = np.array([[11.5], [12.5], [13.5]], np.float32)
    levels = (0.1, 0.5, 0.77)
    quantiles = trees[kind].quantiles(x, levels)
    draws = trees[kind].sample(x, 20_000, seed=1)
    below = (draws[:, None] < quantiles[:, :, None]).mean(2)
    up_to = (draws[:, None] <= quantiles[:, :, None]).mean(2)
    assert (below <= np.array(levels)[:, None] + 0.015).all()  # those of a forest are rows with a weight
    assert (up_to >= np.array(levels)[:, None] - 0.015).all()


def test_the_point_of_a_forest_is_the_mean_of_its_draws(trees: dict[str, Baseline]) -> None:
    x = np.array([[11.5], [13.5]], np.float32)
    draws = trees["forest"].sample(x, 40_000, seed=1).astype(float)
    assert draws.mean(1) == pytest.approx(trees["forest"].point(x), abs=5 * 0.4 / 200)


def test_draws_of_a_forest_are_training_rows(catalogs: Path, trees: dict[str, Baseline]) -> None:
    found = trees["forest"].sample(table(catalogs, 2, INPUTS[:1])[:50], 10, seed=0).reshape(-1, 2)
    known = {tuple(row) for row in table(catalogs, 0, TARGETS).tolist()}
    assert all(tuple(row) in known for row in found.tolist())


def test_a_forest_has_the_neighbors_of_a_halo_with_the_weights_of_its_trees(catalogs: Path) -> None:
    """One tree that cannot split: every draw is a training row at random, the point their mean."""
    model = fitted(catalogs, FOREST | {"trees": 2, "min_samples_leaf": 8000})
    y = table(catalogs, 0, TARGETS).astype(float)
    x = table(catalogs, 2, INPUTS)[:3]
    assert model.point(x) == pytest.approx(np.tile(y.mean(0), (3, 1)), abs=1e-5)
    draws = model.sample(x, 5000, seed=0)
    assert max(stats.ks_2samp(draws[..., k].ravel(), y[:, k]).statistic for k in (0, 1)) < 0.02
    assert model.quantiles(x, [0.3])[0, 0] == pytest.approx(np.quantile(y, 0.3, axis=0), abs=2e-3)


def test_forests_of_one_target(catalogs: Path) -> None:
    model = fitted(catalogs, FOREST, inputs=INPUTS[:1], targets=TARGETS[1:])
    x = np.linspace(12.3, 12.7, 20, dtype=np.float32)[:, None]
    assert model.sample(x, 5, seed=0).shape == (20, 5, 1)
    assert model.point(x).mean() == pytest.approx(0.55, abs=0.03)


def test_quantiles_of_boosting_do_not_cross(catalogs: Path) -> None:
    x = table(catalogs, 2, INPUTS)
    model = fitted(catalogs, BOOSTING | {"levels": (0.49, 0.5, 0.51)}, targets=TARGETS[:1])
    assert isinstance(model, Boosting)
    raw = np.stack([part.predict(x) for part in model._at[0]], 1)
    assert (np.diff(raw, axis=1) < 0).any()
    assert (np.diff(model.quantiles(x, np.linspace(0.005, 0.995, 100)), axis=1) >= 0).all()
    y = table(catalogs, 0, TARGETS[:1])
    samples = model.sample(x, 50, seed=0)
    assert samples.min() == y.min()  # the outer parts of these quantile functions are wild guesses
    assert samples.max() == y.max()


def test_boosting_is_gaussian_between_and_beyond_its_levels(catalogs: Path) -> None:
    """Stumps that learn nothing leave the quantiles of all training rows: a Gaussian, if these are."""
    many = columns(40_000, 5)
    many["log_stellar_mass"] = np.random.default_rng(0).normal(10, 0.5, 40_000)
    step = write(catalogs.parent / f"{catalogs.name}-gaussian", {"one": many})
    method = BOOSTING | {"iterations": 1, "learning_rate": 1e-9, "levels": (0.1, 0.5, 0.9)}
    model = fitted(step, method, targets=TARGETS[:1])
    levels = np.array([0.01, 0.1, 0.25, 0.6, 0.9, 0.99])
    found = model.quantiles(np.zeros((1, 3), np.float32), levels)[0, :, 0]
    assert found == pytest.approx(stats.norm(10, 0.5).ppf(levels), abs=0.03)


def test_matched_masses_keep_ranks_and_distribution(catalogs: Path, tmp_path: Path) -> None:
    store = run(catalogs, tmp_path, "abundance-matching", split="train")
    found = store.read()
    x, y = table(catalogs, 0, INPUTS), table(catalogs, 0, TARGETS)
    assert stats.spearmanr(found.point[:, 0], x[:, 0]).statistic == pytest.approx(1, abs=1e-9)
    assert np.allclose(np.sort(found.point[:, 0]), np.sort(y[:, 0]), atol=2e-3)
    assert np.array_equal(found.samples, np.broadcast_to(found.point[:, None], found.samples.shape))
    assert (store.label, store.model, store.checkpoints) == ("abundance-matching", "abundance-matching", ())
    assert store.source_columns == {"log_stellar_mass": "log_stellar_mass", "color_gi": "color"}


def test_age_matching_at_fixed_mass(catalogs: Path) -> None:
    model = fitted(catalogs, {"name": "abundance-matching", "rows_per_bin": 800}, **HALOS)
    assert isinstance(model, Matching)
    x, y = table(catalogs, 0, INPUTS), table(catalogs, 0, tuple(MATCHED))
    point = model.point(x)
    mine, theirs = (np.argsort(masses, kind="stable") for masses in (point[:, 0], y[:, 0]))
    for start in range(0, 8000, 800):  # the bins: one has 800 of 8,000 training rows
        here, there = mine[start + 1 : start + 799], theirs[start : start + 800]
        for k, (source, sign) in enumerate(MATCHED.values()):
            if k:
                rank = stats.spearmanr(point[here, k], x[here, INPUTS.index(source)]).statistic
                assert rank == pytest.approx(sign, abs=1e-3)
                assert stats.ks_2samp(point[here, k], y[there, k]).statistic < 0.01


@pytest.mark.parametrize("scatter", [0.05, 0.2, 0.4])
def test_scatter_is_what_was_asked_and_the_distribution_stays(catalogs: Path, scatter: float) -> None:
    model = fitted(catalogs, {"name": "abundance-matching", "scatter": scatter}, **HALOS)
    x, y = table(catalogs, 0, INPUTS), table(catalogs, 0, tuple(MATCHED))
    draws = model.sample(x, 60, seed=0).astype(float)
    assert np.sqrt(draws[..., 0].var(1, ddof=1).mean()) == pytest.approx(scatter, rel=0.03)
    for k in range(4):
        assert stats.ks_2samp(draws[:, 0, k], y[:, k]).statistic < 0.02
    # Color at stellar mass: of the draws as of the training rows.
    for low, high in ((9, 9.5), (10, 10.5)):
        at = [(masses >= low) & (masses < high) for masses in (draws[:, 0, 0], y[:, 0])]
        assert stats.ks_2samp(draws[at[0], 0, 1], y[at[1], 1]).statistic < 0.06


def test_scatter_of_a_gaussian_mass_function(catalogs: Path) -> None:
    """Gaussian masses of width S with scatter s: a bivariate Gaussian of correlation sqrt(1 - s^2/S^2)."""
    many = columns(20_000, 6)
    many["log_stellar_mass"] = np.random.default_rng(1).normal(10, 0.5, 20_000)
    step = write(catalogs.parent / f"{catalogs.name}-mass", {"one": many | {"split": np.zeros(20_000, "i1")}})
    model = fitted(step, {"name": "abundance-matching", "scatter": 0.3}, targets=TARGETS[:1])
    x = np.stack([many[name] for name in INPUTS], 1).astype(np.float32)
    draws = model.sample(x, 1, seed=0)[:, 0, 0].astype(float)
    scores = stats.norm.ppf((stats.rankdata(x[:, 0]) - 0.5) / len(x))
    assert np.corrcoef(scores, draws)[0, 1] == pytest.approx(np.sqrt(1 - 0.36), abs=0.015)
    rest = draws - 10 - 0.5 * 0.8 * scores
    assert stats.kstest(rest / 0.3, "norm").statistic < 0.02


def test_matching_reads_what_it_matches_with(catalogs: Path) -> None:
    model = fitted(catalogs, "abundance-matching", inputs=(*INPUTS, "log_concentration"))
    assert model.inputs == INPUTS[:2]


def test_equal_masses_are_matched_to_the_middle_of_their_ranks(tmp_path: Path) -> None:
    few = columns(1000, 3)
    few["log_halo_mass"] = np.repeat([11.0, 12.0], 500)
    step = write(tmp_path, {"one": few | {"split": np.zeros(1000, "i1")}})
    model = fitted(step, {"name": "abundance-matching", "rows_per_bin": 10}, **HALOS)
    x = table(step, 0, INPUTS)
    masses = np.quantile(few["log_stellar_mass"], [0.25, 0.75])
    assert model.point(x)[[0, 999], 0] == pytest.approx(masses, abs=0.01)
    assert np.isfinite(model.point(x)).all()


def same(one: Samples, other: Samples) -> bool:
    names = ("simulation", "row", "point", "samples", "extrapolated")
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names)


@pytest.mark.parametrize(
    "method",
    [
        FOREST | {"trees": 5},
        BOOSTING | {"iterations": 3, "levels": (0.2, 0.8)},
        {"name": "abundance-matching", "scatter": 0.1},
    ],
    ids=lambda method: method["name"],
)
def test_the_seed_decides(
    catalogs: Path, tmp_path: Path, method: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples_module, "_ROWS", 512)
    first = run(catalogs, tmp_path / "first", method, seed=1).read()
    assert same(first, run(catalogs, tmp_path / "again", method, seed=1).read())
    other = run(catalogs, tmp_path / "other", method, seed=2).read()
    assert (first.samples == other.samples)[..., 0].mean() < 0.1
    store = open_samples(tmp_path / "first" / "samples.zarr")
    assert len(store.starts("one")) == 4
    noise = first.samples - first.point[:, None]
    assert not np.isclose(noise[:512], noise[512:1024]).all(axis=(1, 2)).any()


def test_any_number_of_threads_gives_the_same(catalogs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = table(catalogs, 2, INPUTS)
    found = []
    for threads in (1, 2):
        monkeypatch.setattr("torch.get_num_threads", lambda threads=threads: threads)
        model = fitted(catalogs, FOREST | {"trees": 4})
        assert isinstance(model, Forest)
        assert model._forest.n_jobs == threads
        found.append((model.point(x), model.sample(x, 4, seed=0)))
    assert all(np.array_equal(one, other) for one, other in zip(*found, strict=True))


def test_metrics_and_rows(catalogs: Path, tmp_path: Path) -> None:
    store = run(catalogs, tmp_path, FOREST | {"trees": 3}, label="Forest", levels=(0.5,))
    found = store.read()
    assert (store.label, store.model) == ("Forest", "random-forest")
    assert store.levels == (0.5,)
    assert found.row.tolist() == [*range(6400, 8000), *range(1600, 2000)]
    metrics = {row["metric"]: row for row in load_metrics(tmp_path)}
    errors = found.point - table(catalogs, 2, TARGETS)
    assert metrics["rmse_color_gi"]["value"] == pytest.approx(np.sqrt((errors[:, 1] ** 2).mean()), rel=1e-5)
    assert metrics["rmse_color_gi"]["unit"] == "mag"
    x, known = table(catalogs, 2, INPUTS), table(catalogs, 0, INPUTS)
    outside = ((x < known.min(0)) | (x > known.max(0))).any(1)
    assert outside.any()
    assert np.array_equal(found.extrapolated, outside)


def test_a_parameter_of_the_simulation_is_an_input(catalogs: Path) -> None:
    model = fitted(catalogs, FOREST | {"trees": 2}, inputs=("log_halo_mass", "Omega_m"))
    assert model.low[1] == model.high[1] == np.float32(0.3)


def test_what_does_not_fit_is_an_error(catalogs: Path, tmp_path: Path) -> None:
    matching = "abundance-matching"
    with pytest.raises(ValidationError, match=r"target 'log_gas_mass' is not there"):
        BaselineConfig(method=matching, targets=("log_gas_mass",))
    with pytest.raises(ValidationError, match="log_radius needs spin, which is not among the inputs"):
        BaselineConfig(method=matching, inputs=INPUTS[:2], targets=("log_radius",))
    with pytest.raises(ValidationError, match="color_gi is named twice"):
        BaselineConfig(method="random-forest", inputs=("color_gi",), targets=("color_gi",))
    with pytest.raises(ValidationError, match="levels must rise"):
        BaselineConfig(method={"name": "gradient-boosting", "levels": (0.5, 0.5)})
    with pytest.raises(ValidationError, match="random-forest"):
        BaselineConfig(method="random-forrest")
    with pytest.raises(ValueError, match=r"scatter of 3 dex .* cannot be: all stellar masses .* by 0\.6"):
        run(catalogs, tmp_path / "out", {"name": matching, "scatter": 3})
    with pytest.raises(ValueError, match="abundance-matching has no quantiles of its own"):
        run(catalogs, tmp_path / "out", matching, levels=(0.5,))
    with pytest.raises(StoreError, match="column 'log_concentration' is not there"):
        run(catalogs, tmp_path / "out", "random-forest", inputs=("log_concentration",))
    test = write(tmp_path / "test", {"one": columns(50, 0) | {"split": np.full(50, 2, "i1")}})
    with pytest.raises(ValueError, match="0 training rows; at least 2 were expected"):
        run(test, tmp_path / "out", "random-forest")
