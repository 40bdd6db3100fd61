"""Halo occupations with five parameters and assembly bias; the power law's fit is tested in test_hod."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from galdist.catalogs.catalog import CatalogWriter
from galdist.grids.mass_assignment import assign
from galdist.grids.store import Field, SimulationAttrs, StoreError, create_store, open_store
from galdist.statistics.hod import Halos, HodConfig, concentration, expected_points, hod, paint
from galdist.statistics.metrics import load_metrics
from galdist.statistics.occupation import Zheng, fit_zheng, upper_half

TRUTH = Zheng(M_min=4e11, sigma_logM=0.25, M_0=5e11, M_1=5e12, alpha=1.0)
DECORATED = replace(TRUTH, A_cen=0.5, A_sat=-0.3)
NAMES = ("M_min", "sigma_logM", "M_0", "M_1", "alpha")


def halo_masses(n, seed=0):
    """Masses with roughly the slope of the mass function, 1e11 to 3e14 Msun/h."""
    low, high = 1e11**-0.9, 3e14**-0.9
    return (low + np.random.default_rng(seed).random(n) * (high - low)) ** (-1 / 0.9)


def draw(occupation, mass, upper=None, seed=0):
    central, satellites = occupation.draw(mass, upper, np.random.default_rng(seed))
    return central + satellites


def test_mean_occupations_equal_halotools():
    models = pytest.importorskip("halotools.empirical_models")
    parameters = {
        "logMmin": np.log10(TRUTH.M_min),
        "sigma_logM": TRUTH.sigma_logM,
        "logM0": np.log10(TRUTH.M_0),
        "logM1": np.log10(TRUTH.M_1),
        "alpha": TRUTH.alpha,
    }
    mass = np.geomspace(1e11, 1e15, 60)
    found = TRUTH.means(mass)
    for model, mean in zip(
        (models.Zheng07Cens(), models.Zheng07Sats(modulate_with_cenocc=True)), found, strict=True
    ):
        model.param_dict.update(parameters)
        np.testing.assert_allclose(mean, model.mean_occupation(prim_haloprop=mass), rtol=1e-9)
    for upper in (False, True):
        for name, strength, mean in zip(
            ("AssembiasZheng07Cens", "AssembiasZheng07Sats"),
            (DECORATED.A_cen, DECORATED.A_sat),
            DECORATED.means(mass, np.full(60, upper)),
            strict=True,
        ):
            options = {"modulate_with_cenocc": True} if name.endswith("Sats") else {}
            model = getattr(models, name)(sec_haloprop_key="second", split=0.5, **options)
            strengths = {key: strength for key in model.param_dict if "assembias" in key}
            model.param_dict.update(parameters | strengths)
            theirs = model.mean_occupation(
                prim_haloprop=mass, sec_haloprop_percentile=np.full(60, 0.25 + 0.5 * upper)
            )
            np.testing.assert_allclose(mean, theirs, rtol=1e-9, atol=1e-12)


@settings(deadline=None, max_examples=50)
@given(st.floats(-1, 1), st.floats(-1, 1), st.floats(0.05, 1), st.floats(0.3, 2))
def test_assembly_bias_leaves_the_mean_at_each_mass(a_cen, a_sat, sigma, alpha):
    occupation = Zheng(3e11, sigma, 2e11, 4e12, alpha, a_cen, a_sat)
    mass = np.geomspace(1e10, 1e15, 40)
    halves = [occupation.means(mass, np.full(40, upper)) for upper in (True, False)]
    for upper, lower, mean in zip(*halves, occupation.means(mass), strict=True):
        np.testing.assert_allclose((upper + lower) / 2, mean, rtol=1e-12, atol=1e-15)
        assert min(upper.min(), lower.min()) >= 0
    assert max(central.max() for central, _ in halves) <= 1 + 1e-12


def test_likelihood_is_that_of_a_bernoulli_and_a_poisson_number():
    mass = halo_masses(3000, 1)
    upper = np.random.default_rng(2).random(3000) < 0.5
    number = draw(DECORATED, mass, upper)
    found = fit_zheng(mass, number, 0.0, upper)

    def log_likelihood(occupation):
        central, satellites = occupation.means(mass, upper)
        without = (1 - central) * stats.poisson.pmf(number, satellites)
        return np.log(without + central * stats.poisson.pmf(number - 1, satellites)).sum()

    best = log_likelihood(found)
    assert found.log_likelihood == pytest.approx(best, abs=1e-3)
    assert best >= log_likelihood(DECORATED)
    for name in (*NAMES, "A_cen", "A_sat"):
        for step in (-1e-3, 1e-3):
            moved = replace(found, **{name: getattr(found, name) * (1 + step)})
            assert log_likelihood(moved) < best + 1e-3, name


@pytest.mark.parametrize("decorated", [False, True])
def test_parameters_are_recovered_within_their_errors(decorated):
    truth, names = (DECORATED, (*NAMES, "A_cen", "A_sat")) if decorated else (TRUTH, NAMES)
    pulls = []
    for seed in range(6):
        mass = halo_masses(8000, seed)
        upper = np.random.default_rng(seed + 50).random(mass.size) < 0.5 if decorated else None
        found = fit_zheng(mass, draw(truth, mass, upper, seed + 100), upper=upper)
        errors = [getattr(found, f"{name}_error") for name in names]
        values = [getattr(found, name) - getattr(truth, name) for name in names]
        pulls.append([v / e if e else np.nan for v, e in zip(values, errors, strict=True)])
    pulls = np.array(pulls)
    assert np.isfinite(pulls).mean() > 0.9  # M_0 may end at its bound, where it has no error
    assert np.nanmax(np.abs(pulls)) < 4.5
    scatter = np.nanmean(pulls**2, axis=0)
    assert np.all((scatter > 0.2) & (scatter < 3.5))


def test_a_second_property_of_no_account_has_no_assembly_bias():
    mass = halo_masses(20_000, 3)
    found = fit_zheng(mass, draw(TRUTH, mass), upper=np.random.default_rng(4).random(mass.size) < 0.5)
    assert abs(found.A_cen) < 4 * found.A_cen_error
    assert abs(found.A_sat) < 4 * found.A_sat_error
    assert (found.A_cen_error, found.A_sat_error) < (0.2, 0.2)


def test_galaxies_in_tiny_halos_do_not_widen_the_step():
    mass = halo_masses(20_000, 5)
    number = draw(replace(TRUTH, sigma_logM=0.15), mass)
    clean = fit_zheng(mass, number)
    number[np.argsort(mass)[:40]] += 1
    robust, literal = fit_zheng(mass, number), fit_zheng(mass, number, outliers=0.0)
    assert robust.sigma_logM == pytest.approx(clean.sigma_logM, abs=0.03)
    assert literal.sigma_logM > robust.sigma_logM + 0.02
    assert 20 / number.sum() < robust.outlier_fraction <= 0.01


def test_halves_are_equal_at_every_mass_and_those_of_halotools():
    rng = np.random.default_rng(0)
    mass = halo_masses(5000, 6)
    compactness = rng.normal(size=5000) - 0.3 * np.log10(mass)
    upper = upper_half(mass, compactness)
    heaviest_first = upper[np.argsort(-mass)]
    assert np.all(heaviest_first.reshape(-1, 50).sum(axis=1) == 25)
    assert np.all(upper_half(mass, compactness**3) == upper)
    utils = pytest.importorskip("halotools.utils")
    order = np.argsort(mass)
    percentile = utils.sliding_conditional_percentile(mass[order], compactness[order], 101)
    assert np.mean((percentile > 0.5) == upper[order]) > 0.9


def cells(points, weights=None):
    return np.histogramdd(points, bins=12, range=[(0, 25.0)] * 3, weights=weights)[0]


def test_expected_counts_are_the_mean_of_realizations():
    rng = np.random.default_rng(17)
    mass = halo_masses(80, 7) * 10
    halos = Halos(
        mass,
        0.16 * np.cbrt(mass / 1e12),
        concentration(mass, 0.0, "200c"),
        rng.uniform(0, 25, (80, 3)),
        np.zeros((80, 3)),
        np.ones(80),
        box_size=25.0,
        upper=rng.random(80) < 0.5,
    )
    expected, total = np.zeros((12,) * 3), 0.0
    for points, weights in expected_points(DECORATED, halos):
        expected += cells(points, weights)
        total += weights.sum()
    assert total == pytest.approx(DECORATED.mean(mass, halos.upper).sum(), rel=1e-12)
    n, mean, centrals = 300, np.zeros((12,) * 3), 0
    for seed in range(n):
        galaxies = paint(DECORATED, halos, np.random.default_rng(seed))
        mean += cells(galaxies["position"]) / n
        central = galaxies["is_central"]
        centrals += central.sum()
        np.testing.assert_array_equal(
            galaxies["position"][central], halos.position[galaxies["halo"][central]]
        )
        assert np.unique(galaxies["halo"][central]).size == central.sum()
    means = DECORATED.means(mass, halos.upper)[0]
    scatter = np.sqrt((means * (1 - means)).sum() / n)
    assert centrals / n == pytest.approx(means.sum(), abs=4 * scatter)
    full = expected > 0.02
    pull = (mean - expected)[full] / np.sqrt(expected[full] / n)
    assert np.mean(pull**2) < 1 + 5 * np.sqrt(2 / full.sum())  # centrals scatter less than Poisson numbers
    assert abs(pull.mean()) < 4 / np.sqrt(full.sum())


# The stage


def universe(path, columns=("v_max",)):
    """Boxes whose halos hold galaxies by mass and, at given mass, by v_max."""
    names = ["A_CV_0", "A_CV_1"]
    attrs = [
        SimulationAttrs(
            name=name,
            box_size=25.0,
            redshift=0.0,
            suite="MockA",
            split=split,
            cosmology={"Omega_m": 0.3},
        )
        for name, split in zip(names, ("train", "test"), strict=True)
    ]
    grids = create_store(
        path / "grids" / "grids.zarr", attrs, [Field(name="galaxy_counts", assignment="ngp")], 16
    )
    writer = CatalogWriter(path / "catalog" / "catalog.zarr")
    for i, simulation in enumerate(attrs):
        rng = np.random.default_rng(i + 10)
        mass = halo_masses(6000, i)
        table = {
            "mass": mass,
            "position": rng.uniform(0, 25, (mass.size, 3)),
            "velocity": np.zeros((mass.size, 3)),
            "v_max": np.cbrt(mass) * np.exp(0.1 * rng.normal(size=mass.size)),
        }
        upper = upper_half(mass, table["v_max"] / np.cbrt(mass))
        halos = Halos(
            mass,
            np.full(mass.size, 0.2),
            np.full(mass.size, 8.0),
            table["position"],
            table["velocity"],
            np.ones(mass.size),
            box_size=25.0,
            upper=upper,
        )
        galaxies = paint(DECORATED, halos, rng)
        number = np.bincount(galaxies["halo"], minlength=mass.size)
        table = {key: table[key] for key in ("mass", "position", "velocity", *columns)}
        writer.add(simulation, {"halos": {**table, "n_galaxies": number}, "nbody_halos": table})
        grids[simulation.name].write(
            "galaxy_counts", assign(galaxies["position"], 25.0, 16, "ngp").astype("f4")
        )
    writer.finish(names)
    return {"catalogs": [path / "catalog"], "grids": [path / "grids"]}


def test_stage_fits_the_form_that_is_asked_for(tmp_path):
    inputs = universe(tmp_path)
    likelihoods = []
    for number, form in enumerate(
        (
            {"kind": "power-law"},
            {"kind": "zheng"},
            {"kind": "zheng", "assembly_bias": "overdensity"},
            {"kind": "zheng", "assembly_bias": "concentration"},
        )
    ):
        out = tmp_path / str(number)
        hod(HodConfig(seed=1, form=form), inputs, out)
        found = json.loads((out / "hod.json").read_text())
        assert found["form"] == HodConfig(seed=1, form=form).form.model_dump()
        likelihoods.append(found["log_likelihood"])
        rows = {(row["metric"], row["sample"]): row for row in load_metrics(out)}
        assert ("A_cen", "train") in rows or number < 2
        truth = rows["n_galaxies/truth", "A_CV_1"]["value"]
        assert rows["n_galaxies/expected", "A_CV_1"]["value"] == pytest.approx(truth, rel=0.15)
        counts = open_store(out / "prediction.zarr")["A_CV_1"].read("galaxy_counts")
        assert counts.sum() == rows["n_galaxies/predicted", "A_CV_1"]["value"]
    power_law, plain, around, compact = likelihoods
    assert power_law < plain < compact - 20
    assert around < plain + 10  # the density around halos has nothing to do with these galaxies
    assert found["A_cen"] == pytest.approx(DECORATED.A_cen, abs=5 * found["A_cen_error"])
    assert found["A_sat"] == pytest.approx(DECORATED.A_sat, abs=5 * found["A_sat_error"])


def test_halos_without_the_second_property_are_refused_first(tmp_path):
    inputs = universe(tmp_path, columns=())
    form = {"kind": "zheng", "assembly_bias": "concentration"}
    with pytest.raises(StoreError, match="column 'v_max' is not there"):
        hod(HodConfig(seed=1, form=form), inputs, tmp_path / "out")
    assert not (tmp_path / "out").exists()
