"""What the stage `tracers` checks and concludes; what it measures is tested on ranks (tests/parallel)."""

import json
import math
import sys

import numpy as np
import pytest
from pydantic import ValidationError
from tracer_run import BOX, attrs, write_centrals, write_samples

from galdist import statistics
from galdist.grids.store import StoreError
from galdist.statistics.metrics import load_metrics, save_metrics
from galdist.statistics.spectra import arrays, gaussian_variance, jackknife, plain
from galdist.statistics.tracer_spectra import (
    TracersConfig,
    _Box,
    _boxes,
    _compared,
    _correlation,
    _Prediction,
    _rows,
    load_tracers,
    tracers,
)
from hpc import durable


@pytest.fixture(autouse=True)
def no_nbodykit_here(monkeypatch):
    """Every check comes before nbodykit is loaded, which would change this process (Dask's scheduler)."""
    monkeypatch.setitem(sys.modules, "nbodykit", None)
    monkeypatch.setattr(statistics, "find_spec", lambda package: object())


@pytest.fixture
def catalog(tmp_path):
    """60 halos, every third of them in the test split."""
    rng = np.random.default_rng(0)
    split = np.where(np.arange(60) % 3 == 0, 2, 0)
    return write_centrals(tmp_path / "centrals", rng.uniform(0, BOX, (60, 3)), np.arange(60) % 8, split)


def check(tmp_path, catalog, match, predictions, error=ValueError, **config):
    with pytest.raises(error, match=match):
        tracers(
            TracersConfig(**config),
            {"catalogs": [catalog], "predictions": list(predictions)},
            tmp_path / "out",
        )
    assert not (tmp_path / "out").exists()


def test_wrong_inputs_are_refused_before_anything_is_measured(tmp_path, catalog):
    draws = (np.arange(20) * 3 % 8)[:, None]
    right = write_samples(tmp_path / "right", draws, np.arange(0, 60, 3))
    other = write_samples(tmp_path / "other", draws, np.arange(20))
    check(tmp_path, catalog, "13 of the 20 halos of box were not predicted", [other])
    check(tmp_path, catalog, "no halo of the validation split", [right], split="validation")
    check(tmp_path, catalog, "has 1 draws a halo, but `draws` asks for 5", [right], draws=5)
    check(
        tmp_path, catalog, r"32\^3 cells have bins up to .* k_max 3 needs n_mesh", [right], n_mesh=32, k_max=3
    )
    check(tmp_path, catalog, "band 0.1-0.12 h/Mpc has no bin", [right], band=(0.1, 0.12))
    named = write_samples(tmp_path / "truth", draws, np.arange(0, 60, 3))
    check(tmp_path, catalog, "has a name of its own", [named])
    half = write_samples(tmp_path / "half", draws, np.arange(0, 60, 3), targets=("log_stellar_mass",))
    check(tmp_path, catalog, "none of the predictions .half. has both", [half])
    check(tmp_path, catalog, "no samples store here", [tmp_path], error=StoreError)


def test_predictions_of_one_property_are_left_out_and_said(tmp_path, catalog, caplog):
    draws = (np.arange(20) * 3 % 8)[:, None]
    rows = np.arange(0, 60, 3)
    steps = [
        write_samples(tmp_path / "both", draws, rows),
        write_samples(tmp_path / "half", draws, rows, targets=("log_stellar_mass",)),
    ]
    with caplog.at_level("INFO"):
        (box,) = _boxes(TracersConfig(), {"catalogs": [catalog], "predictions": steps})
    assert list(box.predictions) == ["both"]
    assert "half (model) is left out: it does not predict color_gi" in caplog.text


def test_rows_of_a_prediction_are_matched_to_those_of_the_catalog(tmp_path, catalog):
    """In any order, with others among them, and by the names of the columns."""
    rng = np.random.default_rng(1)
    row = rng.permutation(60)
    draws = np.stack([row % 8, (row + 1) % 8], axis=1)
    step = write_samples(tmp_path / "model", draws, row)
    (box,) = _boxes(TracersConfig(draws=2), {"catalogs": [catalog], "predictions": [step]})
    here = np.arange(0, 60, 3)
    assert box.tracers.tolist() == (here % 8).tolist()
    np.testing.assert_array_equal(box.predictions["model"].draws, [here % 8, (here + 1) % 8])
    (box,) = _boxes(TracersConfig(draws=1), {"catalogs": [catalog], "predictions": [step]})
    assert box.predictions["model"].draws.shape == (1, 20)


def test_configurations_that_mean_nothing():
    with pytest.raises(ValidationError, match="from low to high"):
        TracersConfig(band=(0.4, 0.1))
    with pytest.raises(ValidationError, match="2 or more cubes"):
        TracersConfig(jackknife=1)
    with pytest.raises(ValidationError):
        TracersConfig(draws=0)


def test_variance_is_the_published_formula():
    k, power, number, dk = np.array([0.1, 0.3]), np.array([4000.0, 900.0]), 1500, 0.03
    n = number / 205**3
    volume_of_modes = 4 * math.pi * k**2 * dk / (2 * math.pi) ** 3
    expected = power**2 * 2 / (205**3 * volume_of_modes) * ((1 + n * power) / (n * power)) ** 2
    np.testing.assert_allclose(gaussian_variance(power, k, dk, number, 205), expected)
    # Without power it is that of shot noise alone, not infinite.
    alone = gaussian_variance([0.0, 0.0], k, dk, number, 205)
    np.testing.assert_allclose(alone, 2 / (205**3 * volume_of_modes) / n**2)


def test_what_is_not_finite_goes_through_json():
    value = {
        "a": np.array([1.0, np.nan]),
        "b": [{"c": np.float64("inf")}],
        "names": ["x", "y"],
        1: np.int64(3),
    }
    back = arrays(json.loads(json.dumps(plain(value), allow_nan=False)))
    np.testing.assert_array_equal(back["a"], [1, np.nan])
    assert back["b"] == [{"c": None}]
    assert back["names"] == ["x", "y"]
    assert back["1"] == 3


def entries(**powers):
    """Each tracer's measurement; those not given have no galaxies."""
    unknown = {"n": 0, "shot_noise": None, "power": [None, None, None]}
    return {str(t): dict(powers.get(f"t{t}", unknown)) for t in range(1, 8)}


def galaxies(n, *power):
    return {"n": n, "shot_noise": BOX**3 / n, "power": list(power)}


def compared(predictions, truth=None, cross="none", band=(0.1, 0.2)):
    """The result for predictions: step -> (label, part)."""
    config = TracersConfig(band=band, k_max=0.2, cross=cross, jackknife=0)
    truth = {
        "counts": [0, 5000, 800, 0, 0, 0, 0, 0],
        "k": [0.07, 0.13, 0.19],
        "k_min": [0.03, 0.09, 0.15],
        "modes": [18, 60, 90],
        "tracers": entries(t1=galaxies(5000, 900.0, 400.0, 100.0), t2=galaxies(800, 2000.0, 0.0, -50.0)),
    } | (truth or {})
    steps = {step: _Prediction(label, np.zeros((1, 9), np.int8)) for step, (label, _) in predictions.items()}
    box = _Box(attrs(), np.zeros((9, 3)), np.zeros(9, np.int8), steps)
    found = {"truth": truth} | {step: part for step, (_, part) in predictions.items()}
    return config, _compared(config, box, json.loads(json.dumps(found)))


def prediction(*draws, confusion=None, **more):
    pairs = np.zeros((8, 8)) if confusion is None else np.asarray(confusion, float)
    return {"draws": list(draws), "confusion": pairs.tolist(), **more}


def test_chi2_is_summed_over_bins_and_averaged_over_draws_and_seeds():
    a = prediction(
        entries(t1=galaxies(4000, 1000.0, 500.0, 100.0)), entries(t1=galaxies(6000, 800.0, 400.0, 300.0))
    )
    b = prediction(*[entries(t1=galaxies(4500, 900.0, 400.0, 200.0))] * 2)
    _, result = compared({"a": ("net", a), "b": ("net", b)})
    entry = result["tracers"]["1"]
    sigma = entry["truth"]["error"]
    dk = 2 * math.pi / BOX
    np.testing.assert_allclose(
        sigma**2, gaussian_variance([900, 400, 100], [0.07, 0.13, 0.19], dk, 5000, BOX)
    )
    found = entry["labels"]["net"]
    first = np.array([[100, 100, 0], [-100, 0, 200]]) ** 2 / sigma**2
    second = np.array([0, 0, 100]) ** 2 / sigma**2
    np.testing.assert_allclose(found["residual"], (first.mean(axis=0) + second) / 2)
    seeds = [first.sum(axis=1).mean(), second.sum()]
    np.testing.assert_allclose(found["chi2"]["seeds"], seeds)
    assert found["chi2"]["value"] == pytest.approx(np.mean(seeds))
    assert found["chi2"]["std"] == pytest.approx(np.std(seeds, ddof=1))
    assert found["chi2"]["error"] == pytest.approx(np.std(seeds, ddof=1) / math.sqrt(2))
    assert result["in_band"].tolist() == [0, 1, 1]
    in_band = [first[:, 1:].sum(axis=1).mean(), second[1:].sum()]
    assert found["chi2_band"]["value"] == pytest.approx(np.mean(in_band))
    between = np.array([200, 100, 200]) ** 2 / sigma**2  # the draws of the first step; the others are alike
    assert found["chi2"]["self_floor"] == pytest.approx(between.sum() / 2)
    assert found["chi2_band"]["self_floor"] == pytest.approx(between[1:].sum() / 2)
    of_mean = np.array([0, 50, 100]) ** 2 / sigma**2  # of the mean of the two draws
    expected = (of_mean - between / 4 + second) / 2  # a sample variance is half a squared difference
    assert found["chi2_expected"]["value"] == pytest.approx(expected.sum())
    assert found["chi2_expected"]["self_floor"] == pytest.approx(between.sum() / 4)
    assert found["chi2_expected_band"]["value"] == pytest.approx(expected[1:].sum())
    mean = np.array([900, 425, 200])
    np.testing.assert_allclose(found["power"], mean)
    np.testing.assert_allclose(found["relative_error"], mean / [900, 400, 100] - 1)
    assert (found["n"], found["n_std"]) == (4750, pytest.approx(np.std([5000, 4500], ddof=1)))


def test_a_band_that_is_accepted_has_the_bins_that_were_checked(tmp_path, catalog):
    """The center of the second bin, 0.1257 h/Mpc, is in the band, the mean k of its modes is not."""
    part = prediction(entries(t1=galaxies(4000, 1000.0, 500.0, 100.0)))
    _, result = compared({"a": ("net", part)}, band=(0.12, 0.128))
    assert result["in_band"].tolist() == [0, 1, 0]
    right = write_samples(tmp_path / "right", (np.arange(20) * 3 % 8)[:, None], np.arange(0, 60, 3))
    check(tmp_path, catalog, "band 0.127-0.14 h/Mpc has no bin", [right], band=(0.127, 0.14))


def test_undefined_values_are_left_out():
    """No galaxy in a prediction, in one of its draws, in the truth; powers that shot noise has eaten."""
    never = prediction(entries(t1=galaxies(10, 1.0, 1.0, 1.0), t3=galaxies(50, 7.0, 7.0, 7.0)))
    once = prediction(entries(t2=galaxies(900, 2000.0, 100.0, 100.0)))
    config, result = compared({"a": ("net", never), "b": ("net", once), "c": ("other", never)})
    second = result["tracers"]["2"]["labels"]
    assert second["net"]["empty"] == 1
    assert second["net"]["n"] == 450
    assert math.isnan(second["net"]["chi2"]["seeds"][0])
    assert second["net"]["chi2"]["value"] == second["net"]["chi2"]["seeds"][1] > 0
    assert second["net"]["chi2"]["error"] is None
    assert second["net"]["chi2"]["self_floor"] is None  # of one draw
    assert second["other"]["n"] == 0
    assert second["other"]["chi2"]["value"] is None
    np.testing.assert_allclose(second["net"]["relative_error"], [0, np.nan, np.nan])  # truth is not positive
    absent = result["tracers"]["3"]
    assert absent["truth"]["n"] == 0
    assert absent["labels"]["net"]["n"] == 25
    assert absent["labels"]["net"]["chi2"]["value"] is None
    rows = _rows(config, {"box": result})
    metrics = {row["metric"]: row["value"] for row in rows}
    assert metrics["n/tracer2/other"] == 0
    assert "chi2/tracer2/net/k0.1-0.2" in metrics
    assert "chi2/tracer2/other/k0.1-0.2" not in metrics
    assert "NaN" not in json.dumps(plain(result))


def test_results_are_saved_and_loaded(tmp_path):
    part = prediction(entries(t1=galaxies(4000, 1000.0, 500.0, 100.0)), confusion=np.eye(8) * 3)
    config, result = compared({"a": ("net", part)})
    durable.write_json(
        tmp_path / "tracers.json", plain({"band": config.band, "simulations": {"box": result}})
    )
    save_metrics(tmp_path, _rows(config, {"box": result}))
    loaded = load_tracers(tmp_path)["simulations"]["box"]
    assert loaded["labels"] == {"net": ["a"]}
    np.testing.assert_array_equal(loaded["confusion"]["net"]["rates"], np.eye(8))
    np.testing.assert_array_equal(loaded["counts"]["net"], np.full(8, 3))
    np.testing.assert_array_equal(loaded["tracers"]["1"]["labels"]["net"]["steps"]["a"]["n"], [4000])
    assert np.isnan(loaded["tracers"]["5"]["truth"]["power"]).all()
    assert loaded["tracers"]["1"]["labels"]["net"]["chi2_band"]["error"] is None
    assert {row["sample"] for row in load_metrics(tmp_path)} == {"box"}


def test_stochasticity_takes_shot_noise_out_and_skips_what_is_left_negative():
    auto = entries(t1=galaxies(4000, 900.0, 400.0, 100.0), t2=galaxies(900, 400.0, 100.0, -100.0))
    part = prediction(
        auto,
        cross={"1x2": [300.0, 100.0, 50.0]},
        with_truth={"1": {"power": [450.0, 400.0, 120.0], "shot_noise": 30.0}},
    )
    truth = {"cross": {"1x2": [500.0, 0.0, 10.0]}}
    _, result = compared({"a": ("net", part), "b": ("net", part)}, truth, cross="all")
    of_truth, of_net = result["cross"]["truth"]["1x2"], result["cross"]["net"]["1x2"]
    np.testing.assert_allclose(of_truth["r"], [500 / math.sqrt(900 * 2000), np.nan, np.nan])
    assert of_truth["r_mean"] is None  # not defined anywhere in the band
    np.testing.assert_allclose(of_net["r"], [0.5, 0.5, np.nan])
    np.testing.assert_allclose(of_net["r_std"], [0, 0, np.nan])
    assert of_net["r_mean"] == pytest.approx(0.5)
    both = result["with_truth"]["net"]["1"]
    np.testing.assert_allclose(both["r"], [0.5, 1, 1.2])
    assert both["shot_noise"] == pytest.approx(30)
    assert list(result["with_truth"]["net"]) == ["1"]


def test_correlations_over_the_band_have_the_error_of_the_mean_over_seeds():
    one = np.ones(4)
    in_band = np.array([False, True, True, True])
    seeds = [(np.array([9.0, 0.4, 0.6, 9.0]), one, np.array([1, 1, 1, -1.0])), (0.7 * one, one, one)]
    found = _correlation(seeds, in_band)
    assert found["r_mean"] == pytest.approx(0.6)
    assert found["r_mean_error"] == pytest.approx(0.1)
    assert _correlation(seeds[:1], in_band)["r_mean_error"] is None


def lognormal(rng, n, amplitude, n_mesh=32):
    """Points whose density is the exponential of a Gaussian field with P ~ k^-1.5, Poisson sampled."""
    wave = np.fft.fftfreq(n_mesh, BOX / n_mesh / (2 * np.pi))
    k = np.sqrt(wave[:, None, None] ** 2 + wave[:, None] ** 2 + wave**2)
    k[0, 0, 0] = np.inf
    white = np.fft.fftn(rng.normal(size=k.shape))
    field = np.fft.ifftn(white * np.sqrt(amplitude * k**-1.5 * (n_mesh / BOX) ** 3)).real
    mean = np.exp(field)
    number = rng.poisson(mean * n / mean.sum())
    cells = np.argwhere(number).repeat(number[number > 0], axis=0)
    return (cells + rng.random(cells.shape)) * BOX / n_mesh


@pytest.mark.parametrize(("name", "amplitude"), [("poisson", 0), ("lognormal", 20)])
def test_errors_are_the_scatter_between_realizations(name, amplitude):
    """The formula and the jackknife, for points without and with clustering that is nearly Gaussian."""
    rng = np.random.default_rng(2)
    n, n_bins = 1000, 10
    found = np.array(
        [jackknife(lognormal(rng, n, amplitude), BOX, n_bins, n_side=2) for _ in range(150)]
    )  # (realizations, power or error, bins)
    mean, scatter = found[:, 0].mean(axis=0), found[:, 0].std(axis=0)
    width = 2 * np.pi / BOX
    k = width * np.arange(1, n_bins + 1)
    clustered = mean[0] * n / BOX**3
    assert clustered > 0.8 if amplitude else abs(clustered) < 0.1
    beyond = slice(2, None)  # with few modes the volume of a shell is a bad guess of their number
    sigma = np.sqrt(gaussian_variance(mean, k, width, n, BOX))
    assert np.mean((scatter / sigma)[beyond]) == pytest.approx(1, abs=0.06)
    assert np.abs(scatter / sigma - 1)[beyond].max() < 0.25
    errors = np.sqrt((found[:, 1] ** 2).mean(axis=0))
    assert np.mean(errors / scatter) == pytest.approx(1, abs=0.06)


def test_the_jackknife_sees_what_the_formula_does_not():
    """Strongly clustered points scatter several times more than Gaussian modes would."""
    rng = np.random.default_rng(3)
    found = np.array([jackknife(lognormal(rng, 1000, 100), BOX, 10, n_side=2) for _ in range(60)])
    mean, scatter = found[:, 0].mean(axis=0), found[:, 0].std(axis=0)
    width = 2 * np.pi / BOX
    sigma = np.sqrt(gaussian_variance(mean, width * np.arange(1, 11), width, 1000, BOX))
    assert np.mean(scatter / sigma) > 2
    errors = np.sqrt((found[:, 1] ** 2).mean(axis=0))
    assert np.mean(errors / scatter) == pytest.approx(1, abs=0.25)


def test_a_jackknife_needs_points_and_cubes():
    with pytest.raises(ValueError, match="not 0 and 3"):
        jackknife(np.zeros((0, 3)), BOX, 5, 3)
    with pytest.raises(ValueError, match="not 1 and 1"):
        jackknife(np.zeros((1, 3)), BOX, 5, 1)


def test_direct_sums_are_fourier_transforms():
    """Points on a mesh, where an FFT is exact: an estimator that shares nothing with the other."""
    rng = np.random.default_rng(4)
    cells = rng.integers(0, 32, (500, 3))
    n_bins = 6
    found, _ = jackknife(cells * BOX / 32, BOX, n_bins, 3)
    grid = np.zeros((32, 32, 32))
    np.add.at(grid, tuple(cells.T), 1)
    modes = np.abs(np.fft.fftn(grid / 500)) ** 2 * BOX**3
    m = np.fft.fftfreq(32, 1 / 32)
    shell = np.rint(np.sqrt(m[:, None, None] ** 2 + m[:, None] ** 2 + m**2))
    expected = [modes[shell == n].mean() - BOX**3 / 500 for n in range(1, n_bins + 1)]
    np.testing.assert_allclose(found, expected, rtol=1e-10)
