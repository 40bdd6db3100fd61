"""The stage that scores predictions: a model that is right scores what a right model must."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from scipy import stats
from sklearn import metrics as sk

from galdist import stages
from galdist.catalogs.catalog import CatalogWriter
from galdist.catalogs.centrals import SPLITS, TABLE
from galdist.catalogs.samples import create_samples
from galdist.grids.store import SimulationAttrs, Split, StoreError
from galdist.statistics import distributions
from galdist.statistics.metrics import load_metrics
from galdist.statistics.scores import ScoresConfig, load_scores, scores

TARGETS = ("log_stellar_mass", "color_gi", "log_ssfr")
MIXING = np.array([[0.15, 0, 0], [0.1, 0.15, 0], [-0.3, 0.4, 0.6]])
TEST = SPLITS.index("test")
FAST: dict[str, Any] = {"bootstrap": 20, "floor_draws": 20}


def attrs(name: str, split: Split = "train") -> SimulationAttrs:
    return SimulationAttrs(name=name, box_size=205.0, redshift=0.0, suite="mock", split=split)


def center(mass: np.ndarray) -> np.ndarray:
    """Mean properties (n, 3) of halos of log10 mass."""
    return np.stack([9.5 + 1.3 * (mass - 11.5), 0.7 + 0.2 * (mass - 11.5), -10 - 0.5 * (mass - 11.5)], axis=1)


class Universe:
    """Halos whose galaxies are drawn from a known distribution, in a catalog."""

    def __init__(self, path: Path, sizes: dict[str, int], splits: dict[str, Split] | None = None) -> None:
        rng = np.random.default_rng(11)
        self.path = path
        self.mass, self.truth, self.rows = {}, {}, {}
        writer = CatalogWriter(path / "catalog.zarr")
        for name, n in sizes.items():
            mass = 11.5 + 0.45 * rng.normal(size=n)
            truth = center(mass) + rng.normal(size=(n, 3)) @ MIXING.T
            split = rng.choice([0, 1, 2], size=n, p=[0.4, 0.3, 0.3]).astype(np.int8)
            if splits is not None:
                split[:] = SPLITS.index(splits[name])
            columns = {"log_halo_mass": mass, "split": split}
            columns |= {target: truth[:, i].copy() for i, target in enumerate(TARGETS)}
            for target in TARGETS:  # training rows that are of another parent, as balanced ones are
                columns[target][split == 0] += 5
            writer.add(attrs(name), {TABLE: columns}, {"color_gi": "mag"}, {TABLE: {}})
            self.rows[name] = np.flatnonzero(split == TEST)
            self.mass[name], self.truth[name] = mass[self.rows[name]], truth[self.rows[name]]
        writer.finish(list(sizes))

    def all(self) -> np.ndarray:
        return np.concatenate([self.truth[name] for name in self.truth])

    def draws(self, name: str, size: int, seed: int, width: float = 1.0) -> np.ndarray:
        rng = np.random.default_rng([seed, *name.encode()])
        mass = self.mass[name]
        return center(mass)[:, None] + width * rng.normal(size=(len(mass), size, 3)) @ MIXING.T

    def predict(
        self,
        step: str,
        label: str = "right",
        targets: tuple[str, ...] = TARGETS,
        size: int = 10,
        seed: int = 0,
        width: float = 1.0,
        checkpoints: tuple[str, ...] | None = None,
        levels: tuple[float, ...] = (),
        rows: dict[str, np.ndarray] | None = None,
        beyond: float = math.inf,
    ) -> Path:
        """A step with predictions, rows in random order; of the right model, but for its width. Halos of a
        log mass above ``beyond`` are marked as extrapolated."""
        given = self.rows if rows is None else rows
        columns = [TARGETS.index(target) if target in TARGETS else 0 for target in targets]
        store = create_samples(
            self.path / step / "samples.zarr",
            [(attrs(name), len(where)) for name, where in given.items()],
            targets,
            size,
            label,
            "mock",
            (step,) if checkpoints is None else checkpoints,
            levels,
        )
        for name, where in given.items():
            samples = self.draws(name, size, seed, width)[: len(where), :, columns]
            point = center(self.mass[name])[: len(where), columns]
            quantiles = point[:, None] + np.array(levels)[:, None] if levels else None
            order = np.random.default_rng(seed).permutation(len(where))
            for start in store.starts(name):
                part = order[start : start + store.chunk]
                store.write(
                    name,
                    start,
                    where[part],
                    point[part].astype("f4"),
                    samples[part].astype("f4"),
                    self.mass[name][: len(where)][part] > beyond,
                    None if quantiles is None else quantiles[part].astype("f4"),
                )
        return self.path / step


def score(universe: Universe, steps: list[Path], **config: Any) -> dict[tuple[str, str, str], Any]:
    """Rows by label, metric and what they are of."""
    out = universe.path / "scores"
    out.mkdir(exist_ok=True)
    settings = ScoresConfig(**{**FAST, **config})
    scores(settings, {"catalogs": [universe.path], "predictions": steps}, out)
    rows = load_scores(out)["rows"]
    found = {(row["label"], row["metric"], row["of"]): row for row in rows}
    assert len(found) == len(rows)
    return found


@pytest.fixture(scope="module")
def universe(tmp_path_factory: pytest.TempPathFactory) -> Universe:
    return Universe(tmp_path_factory.mktemp("universe"), {"a": 6000, "b": 3000})


@pytest.fixture(scope="module")
def scored(universe: Universe) -> dict[tuple[str, str, str], Any]:
    """Of two seeds of the right model, and of one that is too narrow."""
    steps = [universe.predict(f"right{seed}", seed=seed) for seed in range(3)]
    steps.append(universe.predict("narrow", "narrow", width=0.7))
    return score(universe, steps)


def test_a_right_model_is_at_the_floors(scored: dict[tuple[str, str, str], Any]) -> None:
    with_floor = [row for row in scored.values() if row["floor"] is not None and row["label"] == "right"]
    # Three of one property and its calibration (four); six of two properties and four of three.
    assert len(with_floor) == 3 * (3 + 4) + 6 + 4
    for row in with_floor:
        assert row["seeds"] == 3
        assert row["floor_error"] > 0
        excess = row["value"] - row["floor"]
        if row["metric"].startswith("coverage"):
            assert abs(excess) < 4 * row["floor_error"]
        else:
            assert excess < 4 * row["floor_error"], row


def test_what_halos_share_is_no_noise(scored: dict[tuple[str, str, str], Any]) -> None:
    """Two draws for the same halos are nearer than two samples of different halos; a right model is there."""
    distances = [row for row in scored.values() if row["self_floor"] is not None and row["label"] == "right"]
    assert {row["metric"] for row in distances} >= {
        "ks",
        "ks_flat",
        "ks_mean",
        "ks_peacock",
        "energy_distance",
    }
    for row in distances:
        assert abs(row["value"] - row["self_floor"]) < 4 * row["self_floor_error"], row
    mass = scored["right", "wasserstein", "log_stellar_mass"]
    assert mass["self_floor"] < 0.7 * mass["floor"]


def test_a_wrong_width_shows(scored: dict[tuple[str, str, str], Any]) -> None:
    for metric, of in (
        ("crps", "log_stellar_mass"),
        ("crps", "color_gi"),
        ("energy_score", "joint"),
        ("energy_score", "log_stellar_mass+color_gi"),
        ("rank_chi2", "log_ssfr"),
        ("pit_ks", "color_gi"),
        ("ks", "log_ssfr"),
        ("energy_distance", "joint"),
    ):
        right, narrow = scored["right", metric, of], scored["narrow", metric, of]
        # Both are of the same halos: the difference is known better than either.
        assert narrow["value"] > right["value"] + narrow["bootstrap"], (metric, of)
    half = 2 * stats.norm.cdf(0.7 * stats.norm.ppf(0.75)) - 1
    assert scored["narrow", "coverage_0.5", "color_gi"]["value"] == pytest.approx(half, abs=0.05)
    assert scored["narrow", "coverage_0.9", "color_gi"]["value"] < 0.85


def test_values_are_those_of_the_aligned_rows(universe: Universe, scored: dict[Any, Any]) -> None:
    draws = np.concatenate([universe.draws(name, 10, 0, 0.7) for name in universe.truth])
    truth = universe.all()
    point = np.concatenate([center(universe.mass[name]) for name in universe.truth])
    for i, of in enumerate(TARGETS):
        expected = {
            "ks": stats.ks_2samp(draws[:, 0, i], truth[:, i]).statistic,
            "wasserstein": stats.wasserstein_distance(draws[:, 0, i], truth[:, i]),
            "crps": distributions.crps(draws[:, :, i], truth[:, i]).mean(),
            "rmse": math.sqrt(sk.mean_squared_error(truth[:, i], point[:, i])),
            "rmse_draw": math.sqrt(sk.mean_squared_error(truth[:, i], draws[:, 0, i])),
            "mad": sk.median_absolute_error(truth[:, i], point[:, i]),
            "r2_draw": sk.r2_score(truth[:, i], draws[:, 0, i]),
            "pinball_0.5": sk.mean_pinball_loss(truth[:, i], np.median(draws[:, :, i], axis=1)),
        }
        for metric, value in expected.items():
            assert scored["narrow", metric, of]["value"] == pytest.approx(value, rel=1e-4, abs=1e-5), metric
    # A right model's single draws have twice the mean squared error of its means.
    right = scored["right", "mse_draw", "color_gi"]["value"] / scored["right", "mse", "color_gi"]["value"]
    assert right == pytest.approx(2, rel=0.1)
    scaled = draws / truth.std(axis=0), truth / truth.std(axis=0)
    expected_score = distributions.energy_score(*scaled).mean()
    assert scored["narrow", "energy_score", "joint"]["value"] == pytest.approx(expected_score, rel=1e-5)


def test_errors_are_of_seeds_and_of_rows(universe: Universe, scored: dict[Any, Any]) -> None:
    row = scored["right", "crps", "color_gi"]
    each = [
        np.concatenate(
            [
                distributions.crps(universe.draws(name, 10, seed)[:, :, 1], universe.truth[name][:, 1])
                for name in universe.truth
            ]
        )
        for seed in range(3)
    ]
    means = [one.mean() for one in each]
    assert row["value"] == pytest.approx(np.mean(means), rel=1e-4)
    assert row["error"] == pytest.approx(np.std(means, ddof=1) / math.sqrt(3), rel=0.01)
    of_rows = np.mean(each, axis=0)
    assert row["bootstrap"] == pytest.approx(of_rows.std() / math.sqrt(len(of_rows)), rel=0.5)
    assert scored["narrow", "crps", "color_gi"]["error"] is None
    assert row["floor"] is None
    assert row["self_floor"] is None


def test_files(universe: Universe, scored: dict[Any, Any]) -> None:
    found = load_scores(universe.path / "scores")
    truth = universe.all()
    assert (found["split"], found["n_rows"]) == ("test", len(truth))
    assert found["scales"] == pytest.approx(dict(zip(TARGETS, truth.std(axis=0), strict=True)))
    assert {(one["label"], one["of"]) for one in found["ranks"]} == {
        (label, of) for label in ("right", "narrow") for of in TARGETS
    }
    for one in found["ranks"]:
        assert len(one["counts"]) == 11
        assert sum(one["counts"]) == pytest.approx(len(truth))
    headlines = {(row["metric"], row["sample"]): row for row in load_metrics(universe.path / "scores")}
    crps = headlines["crps/color_gi", "right"]
    assert (crps["value"], crps["unit"]) == (scored["right", "crps", "color_gi"]["value"], "mag")
    assert crps["error"] == scored["right", "crps", "color_gi"]["error"]
    narrow = headlines["energy_score/joint", "narrow"]
    assert (narrow["error"], narrow["unit"]) == (scored["narrow", "energy_score", "joint"]["bootstrap"], "")


def test_scores_of_simulations_and_of_the_training_range(tmp_path: Path) -> None:
    """Means over the rows of each group, their bootstrap errors those of so many rows."""
    universe = Universe(tmp_path, {"box_0": 3000, "box_1": 1500, "tiny": 40})
    steps = [universe.predict(f"right-{seed}", seed=seed, beyond=12.0) for seed in range(2)]
    steps.append(universe.predict("one-box", "everywhere", beyond=-math.inf))
    scores(ScoresConfig(**FAST), {"catalogs": [tmp_path], "predictions": steps}, tmp_path)
    found = load_scores(tmp_path)
    groups = {(r["label"], r["kind"], r["group"], r["metric"], r["of"]): r for r in found["groups"]}
    names = {key[1:3] for key in groups if key[0] == "right"}
    boxes = {("simulation", "box_0"), ("simulation", "box_1")}  # the tiny one has too few rows
    assert names == boxes | {("range", "inside"), ("range", "outside")}
    assert {key[1:3] for key in groups if key[0] == "everywhere"} == boxes
    assert {key[3] for key in groups} == {"crps", "energy_score", "coverage_0.5", "coverage_0.9"}
    # Of one box against scores that know no groups.
    truth = universe.truth["box_1"]
    expected = [
        distributions.crps(universe.draws("box_1", 10, seed)[:, :, 0].astype("f4"), truth[:, 0].astype("f4"))
        for seed in range(2)
    ]
    row = groups["right", "simulation", "box_1", "crps", "log_stellar_mass"]
    assert row["n_rows"] == len(truth)
    assert row["value"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert row["bootstrap"] == pytest.approx(np.mean(expected, axis=0).std() / math.sqrt(len(truth)), rel=0.5)
    assert row["error"] == pytest.approx(abs(expected[0].mean() - expected[1].mean()) / 2, rel=1e-4)
    # The parts make up the whole.
    whole = {(r["label"], r["metric"], r["of"]): r["value"] for r in found["rows"]}
    for metric, of in (("coverage_0.9", "color_gi"), ("energy_score", "joint")):
        parts = [groups["right", "range", group, metric, of] for group in ("inside", "outside")]
        numbers = [part["n_rows"] for part in parts]
        assert sum(numbers) == found["n_rows"]
        mean = np.average([part["value"] for part in parts], weights=numbers)
        assert mean == pytest.approx(whole["right", metric, of])


def test_who_is_best_and_by_how_much(universe: Universe, scored: dict[Any, Any]) -> None:
    found = {(one["metric"], one["of"]): one for one in load_scores(universe.path / "scores")["comparisons"]}
    pair = "+".join(TARGETS[:2])
    assert {of for _, of in found} == {*TARGETS, pair, "all"}
    difference, error = found["crps", "color_gi"]["worse"]["narrow"]
    row = {label: scored[label, "crps", "color_gi"] for label in ("right", "narrow")}
    assert difference == pytest.approx(row["narrow"]["value"] - row["right"]["value"])
    # Halos are the same, so that the difference is known better than each: as a mean over halos.
    each = [
        np.concatenate(
            [
                distributions.crps(universe.draws(name, 10, seed, width)[:, :, 1], universe.truth[name][:, 1])
                for name in universe.truth
            ]
        )
        for seed, width in ((0, 1.0), (1, 1.0), (2, 1.0), (0, 0.7))
    ]
    paired = each[3] - np.mean(each[:3], axis=0)
    expected = math.hypot(paired.std() / math.sqrt(len(paired)), row["right"]["error"])
    assert error == pytest.approx(expected, rel=0.5)
    assert error < 0.7 * row["narrow"]["bootstrap"]
    for metric in ("energy_score", "coverage_0.9", "rank_chi2"):
        one = found[metric, "all" if metric == "energy_score" else "color_gi"]
        assert one["best"] == "right"
        difference, error = one["worse"]["narrow"]
        assert difference > 3 * error
    best = max(("right", "narrow"), key=lambda label: scored[label, "r2_draw", "color_gi"]["value"])
    assert found["r2_draw", "color_gi"]["best"] == best


def test_floor_is_kolmogorovs_and_knows_no_training_rows(universe: Universe, scored: dict[Any, Any]) -> None:
    n = len(universe.all())
    for of in TARGETS:
        row = scored["right", "ks", of]
        mean, std = np.array([distributions.KOLMOGOROV_MEAN, distributions.KOLMOGOROV_STD]) * math.sqrt(2 / n)
        assert row["floor"] == pytest.approx(mean, abs=4 * std / math.sqrt(20))
        assert row["floor_error"] == pytest.approx(std, rel=0.6)
    rng = np.random.default_rng(0)
    alone = distributions.noise_floor(universe.all()[:, 1], n, 40, rng)["wasserstein"].mean()
    assert scored["right", "wasserstein", "color_gi"]["floor"] == pytest.approx(alone, rel=0.4)


def test_models_side_by_side_are_a_union_and_score_what_they_have(universe: Universe) -> None:
    pair = TARGETS[:2]
    found = score(
        universe,
        [
            universe.predict("side", "two", pair, checkpoints=("x", "y")),
            universe.predict("one", "single", ("log_ssfr",)),
            universe.predict("turned", "turned", pair[::-1]),
        ],
    )
    sets = {label: {of for other, _, of in found if other == label} for label in ("two", "single", "turned")}
    assert sets == {
        "two": {*pair, "union", "+".join(pair)},
        "single": {"log_ssfr"},
        "turned": {*pair, "joint", "+".join(pair)},
    }
    for metric in ("ks_flat", "ks_peacock", "energy_distance", "energy_score", "rmse"):
        whole = found["two", metric, "union"]
        assert {**whole, "of": "+".join(pair)} == found["two", metric, "+".join(pair)]
        assert found["turned", metric, "joint"]["value"] == pytest.approx(whole["value"], rel=1e-3)


def test_one_draw_has_no_scores_of_ensembles(universe: Universe) -> None:
    found = score(universe, [universe.predict("single_draw", size=1)])
    metrics = {metric for _, metric, _ in found}
    assert {"ks", "ks_mean", "rmse_draw"} <= metrics
    assert not metrics & {"crps", "energy_score", "rank_chi2", "coverage_0.5"}
    assert all(row["self_floor"] is None for row in found.values())


def test_constant_predictions_leave_out_what_is_undefined(universe: Universe) -> None:
    step = universe.predict("constant")
    group = zarr.open_group(step / "samples.zarr", mode="r+")
    for name in universe.rows:
        point = group[name]["point"]
        point[...] = np.ones(point.shape, "f4")
    found = score(universe, [step])
    assert ("right", "pearson", "color_gi") not in found
    assert ("right", "r2", "color_gi") in found


def test_quantiles_of_the_prediction_are_scored(universe: Universe) -> None:
    found = score(universe, [universe.predict("quantiles", levels=(0.25, 0.5))], levels=(0.25, 0.9))
    point = np.concatenate([center(universe.mass[name]) for name in universe.truth])[:, 0]
    truth = universe.all()[:, 0]
    held = sk.mean_pinball_loss(truth, point + 0.25, alpha=0.25)  # a store's quantiles are point + level here
    assert found["right", "pinball_0.25", TARGETS[0]]["value"] == pytest.approx(held, rel=1e-5)
    best = sk.mean_pinball_loss(truth, point + 0.15 * stats.norm.ppf(0.9), alpha=0.9)
    # From ten draws, so a little worse than the best.
    assert best < found["right", "pinball_0.9", TARGETS[0]]["value"] < 1.2 * best


def test_whole_simulations_as_the_test_set(tmp_path: Path) -> None:
    """The parent of the test rows is in the test simulations only: the floor is that of their halves."""
    universe = Universe(
        tmp_path, {"a": 500, "b": 900, "c": 900}, {"a": "train", "b": "validation", "c": "test"}
    )
    step = universe.predict("whole", rows={"c": universe.rows["c"]})
    row = score(universe, [step])["right", "ks", "color_gi"]
    assert row["floor"] == pytest.approx(distributions.KOLMOGOROV_MEAN * math.sqrt(2 / 900), rel=0.25)


def test_runs_as_a_stage(universe: Universe, tmp_path: Path) -> None:
    step = universe.predict("staged", size=2)
    config = {**FAST, "joints": [], "split": "test"}
    inputs = {"catalogs": [str(universe.path)], "predictions": [str(step)]}
    stages.call(stages.STAGES["scores"].function, config, inputs, str(tmp_path))
    assert {row["of"] for row in load_scores(tmp_path)["rows"]} == {*TARGETS, "joint"}
    assert stages.STAGES["scores"].roles == {"catalogs": "+", "predictions": "+"}


def test_predictions_of_other_rows(universe: Universe) -> None:
    fewer = {name: rows[:-3] for name, rows in universe.rows.items()}
    n = len(universe.rows["a"])
    with pytest.raises(
        ValueError, match=rf"fewer.*: 3 of the {n} halos of a were not predicted: predict them"
    ):
        score(universe, [universe.predict("fewer", rows=fewer)])
    other = {name: np.arange(len(rows)) for name, rows in universe.rows.items()}
    with pytest.raises(ValueError, match="were not predicted"):
        score(universe, [universe.predict("other", rows=other)])
    n = len(universe.rows["b"])
    with pytest.raises(ValueError, match=rf"{n} of the {n} halos of b were not predicted"):
        score(universe, [universe.predict("without", rows={"a": universe.rows["a"]})])


def test_sets_that_no_model_has_are_refused(universe: Universe) -> None:
    steps = [
        universe.predict("pair", "pair", TARGETS[:2], size=2),
        universe.predict("rate", "rate", TARGETS[2:], size=2),
    ]
    with pytest.raises(ValueError, match=r"joints: no prediction has 'colour_gi'; did you mean 'color_gi'\?"):
        score(universe, steps, joints=[("log_stellar_mass", "colour_gi")])
    with pytest.raises(ValueError, match="joints: no prediction has all of color_gi, log_ssfr"):
        score(universe, steps, joints=[("color_gi", "log_ssfr")])
    assert {of for _, _, of in score(universe, steps[1:])} == {"log_ssfr"}  # the default asks of no model


def test_predictions_of_another_simulation(universe: Universe, tmp_path: Path) -> None:
    other = Universe(tmp_path, {"a": 6000, "b": 3000, "z": 90})
    with pytest.raises(ValueError, match="simulation 'z', which the catalogue has not"):
        score(universe, [other.predict("foreign")])


def test_properties_that_the_catalog_has_not(universe: Universe) -> None:
    with pytest.raises(StoreError, match="color_gr"):
        score(universe, [universe.predict("unknown", targets=("color_gr", "log_ssfr"))])


def test_one_label_is_one_model(universe: Universe) -> None:
    first = universe.predict("first")
    with pytest.raises(ValueError, match=r"both labelled 'right', but predict .*give one of them another"):
        score(universe, [first, universe.predict("second", targets=TARGETS[:1])])
    with pytest.raises(ValueError, match=r"both labelled 'right', but have 10 and 4 draws a halo"):
        score(universe, [first, universe.predict("fewer_draws", size=4)])
    with pytest.raises(ValueError, match=r"but one is of several models side by side"):
        score(universe, [first, universe.predict("several", checkpoints=("x", "y"))])
    with pytest.raises(ValueError, match=r"the label 'truth' is that of the true galaxies"):
        score(universe, [universe.predict("named_truth", "truth")])
    with pytest.raises(ValueError, match="of the same model"):
        score(universe, [first, universe.predict("again", "other", checkpoints=("first",))])


def test_baselines_have_no_weights_to_be_told_apart_by(universe: Universe) -> None:
    steps = [universe.predict(f"forest{i}", size=2, seed=i, checkpoints=()) for i in range(2)]
    assert score(universe, steps)["right", "ks", "color_gi"]["seeds"] == 2


@pytest.mark.parametrize("array", ["point", "samples", "quantiles"])
def test_predictions_that_are_not_finite(universe: Universe, array: str) -> None:
    step = universe.predict(f"nan_{array}", levels=(0.5,))
    values = zarr.open_group(step / "samples.zarr", mode="r+")["b"][array]
    changed = values[:]
    changed[(5,) + (-1,) * (changed.ndim - 1)] = np.inf
    values[...] = changed
    with pytest.raises(ValueError, match=f"{array} are not all finite"):
        score(universe, [step])


def test_a_split_without_rows_or_a_property_with_one_value(tmp_path: Path) -> None:
    universe = Universe(tmp_path, {"a": 300}, {"a": "test"})
    step = universe.predict("some")
    with pytest.raises(ValueError, match="no row in the validation split"):
        score(universe, [step], split="validation")
    column = zarr.open_group(tmp_path / "catalog.zarr", mode="r+")["a"][TABLE]["color_gi"]
    column[...] = np.ones(300)
    with pytest.raises(ValueError, match="column color_gi of the test split has one value in all 300 rows"):
        score(universe, [step])
