import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.integrate import quad

from galdist.catalogs.catalog import CatalogWriter, open_catalog
from galdist.constants import GRAVITY
from galdist.grids.mass_assignment import assign
from galdist.grids.store import Field, SimulationAttrs, create_store, open_store
from galdist.statistics.hod import (
    Halos,
    HodConfig,
    concentration,
    expected_points,
    hod,
    nfw_dispersion,
    nfw_radius,
    paint,
)
from galdist.statistics.metrics import load_metrics
from galdist.statistics.occupation import PowerLaw, fit_power_law
from hpc import durable

TRUTH = PowerLaw(M_min=3e11, M_1=2e12, alpha=0.9)


def halo_masses(n, seed=0):
    """Masses with roughly the slope of the mass function, 1e11 to 3e14 Msun/h."""
    u = np.random.default_rng(seed).random(n)
    low, high = 1e11**-0.9, 3e14**-0.9
    return (low + u * (high - low)) ** (-1 / 0.9)


def halos(n=300, seed=0, box_size=25.0):
    rng = np.random.default_rng(seed)
    mass = halo_masses(n, seed) * 3
    radius = 0.16 * (mass / 1e12) ** (1 / 3)
    position = rng.uniform(0, box_size, (n, 3))
    velocity, circular = rng.normal(0, 200, (n, 3)), np.sqrt(GRAVITY * mass / radius)
    return Halos(mass, radius, concentration(mass, 0.0, "200c"), position, velocity, circular, box_size)


def test_parameters_are_recovered_within_their_errors():
    pulls, covered = [], 0
    for seed in range(40):
        mass = halo_masses(8000, seed)
        number = np.random.default_rng(seed + 100).poisson(TRUTH.mean(mass))
        found = fit_power_law(mass, number)
        pulls.append(
            [(found.M_1 - TRUTH.M_1) / found.M_1_error, (found.alpha - TRUTH.alpha) / found.alpha_error]
        )
        assert 0.97 * TRUTH.M_min < found.M_min_low < found.M_min <= found.M_min_high < 1.03 * TRUTH.M_min
        covered += found.M_min_low <= TRUTH.M_min <= found.M_min_high
    pulls = np.array(pulls)
    assert np.abs(pulls).max() < 4
    assert np.all(np.abs((pulls**2).mean(axis=0) - 1) < 5 * np.sqrt(2 / 40))
    assert covered == pytest.approx(0.683 * 40, abs=4 * np.sqrt(40 * 0.683 * 0.317))


def test_fit_is_the_maximum_of_the_likelihood():
    mass = halo_masses(3000, 5)
    number = np.random.default_rng(6).poisson(TRUTH.mean(mass))
    found = fit_power_law(mass, number, outliers=0.0)

    def log_likelihood(occupation):
        mean = occupation.mean(mass)
        if np.any(number[mean == 0] > 0):
            return -np.inf
        return stats.poisson.logpmf(number[mean > 0], mean[mean > 0]).sum()

    best = log_likelihood(found)
    assert found.log_likelihood == pytest.approx(best, rel=1e-10)
    for factor in (0.99, 1.01):
        assert log_likelihood(PowerLaw(found.M_min * factor, found.M_1, found.alpha)) < best
        assert log_likelihood(PowerLaw(found.M_min, found.M_1 * factor, found.alpha)) < best
        assert log_likelihood(PowerLaw(found.M_min, found.M_1, found.alpha * factor)) < best
    # A step of one error in one parameter, the other refitted, costs one half: check M_1 with alpha's Fisher.
    step = PowerLaw(found.M_min, found.M_1, found.alpha + found.alpha_error)
    assert best - log_likelihood(step) >= 0.45


def test_halos_of_equal_mass_are_on_one_side():
    """Masses of few particles come in steps: M_min cannot divide halos of one mass."""
    rng = np.random.default_rng(2)
    mass = np.round(halo_masses(5000, 2) / 2e10) * 2e10
    number = rng.poisson(TRUTH.mean(mass))
    found = fit_power_law(mass, number)
    assert found.M_min == pytest.approx(3e11)
    assert number[mass < found.M_min].sum() == 0


def test_a_few_galaxies_in_tiny_halos_do_not_move_the_fit():
    mass = halo_masses(8000, 3)
    number = np.random.default_rng(4).poisson(TRUTH.mean(mass))
    clean = fit_power_law(mass, number)
    number[np.argsort(mass)[:3]] = 1
    robust, literal = fit_power_law(mass, number), fit_power_law(mass, number, outliers=0.0)
    assert robust.M_min == clean.M_min
    assert robust.alpha == pytest.approx(clean.alpha)
    assert robust.outlier_fraction == pytest.approx(3 / number.sum())
    assert literal.M_min == mass.min()


def test_the_number_of_galaxies_is_kept():
    """The likelihood's derivative by M_1 vanishes where the expected number is the observed one."""
    mass = halo_masses(5000, 8)
    number = np.random.default_rng(9).poisson(TRUTH.mean(mass))
    assert fit_power_law(mass, number, outliers=0.0).mean(mass).sum() == pytest.approx(number.sum(), rel=1e-9)


@settings(deadline=None, max_examples=25)
@given(st.floats(0.5, 1.5), st.floats(11.0, 12.0), st.floats(11.8, 13.0), st.integers(0, 1000))
def test_fit_does_not_depend_on_the_unit_or_order_of_masses(alpha, log_m_min, log_m_1, seed):
    mass = halo_masses(2000, seed)
    number = np.random.default_rng(seed).poisson(PowerLaw(10**log_m_min, 10**log_m_1, alpha).mean(mass))
    if np.count_nonzero(number) < 10:
        return
    first, second = fit_power_law(mass, number), fit_power_law(mass[::-1] * 1e-10, number[::-1])
    assert second.M_min * 1e10 == pytest.approx(first.M_min)
    assert pytest.approx(first.M_1, rel=1e-6) == second.M_1 * 1e10
    assert second.alpha == pytest.approx(first.alpha, rel=1e-6)


def test_mean_occupation_equals_halotools():
    occupation_models = pytest.importorskip("halotools.empirical_models")
    model = occupation_models.Zheng07Sats(modulate_with_cenocc=False)
    model.param_dict.update(logM0=0.0, logM1=np.log10(TRUTH.M_1), alpha=TRUTH.alpha)
    mass = np.geomspace(TRUTH.M_min, 1e15, 50)
    np.testing.assert_allclose(TRUTH.mean(mass), model.mean_occupation(prim_haloprop=mass), rtol=1e-9)
    assert np.all(TRUTH.mean(mass[:1] * 0.999) == 0)


@pytest.mark.parametrize("c", [3.0, 10.0, 25.0])
def test_radii_follow_the_nfw_profile(c):
    u = np.linspace(0, 1, 1001)
    q = nfw_radius(u, c)
    enclosed = np.log1p(c * q) - c * q / (1 + c * q)
    np.testing.assert_allclose(enclosed / enclosed[-1], u, atol=1e-8)
    assert (q[0], q[-1]) == (0, pytest.approx(1))
    assert np.all(np.diff(q) > 0)


def test_satellites_are_distributed_as_in_halotools():
    models = pytest.importorskip("halotools.empirical_models")
    n, c = 20_000, 8.0
    one = Halos(
        np.array([1e13]),
        np.array([0.3]),
        np.array([c]),
        np.full((1, 3), 12.0),
        np.zeros((1, 3)),
        np.ones(1),
        box_size=25.0,
    )
    rng = np.random.default_rng(0)
    offset = one.place(np.zeros(n, int), rng.random((n, 3))) - 12.0
    ours = np.sqrt((offset**2).sum(axis=1)) / 0.3
    theirs = models.NFWProfile().mc_generate_nfw_radial_positions(num_pts=n, conc=c, halo_radius=1.0, seed=1)
    assert stats.ks_2samp(ours, theirs).pvalue > 1e-3
    assert ours.max() <= 1
    for axis in range(3):  # isotropic: each direction cosine is uniform
        cosine = offset[:, axis] / np.sqrt((offset**2).sum(axis=1))
        assert stats.kstest(cosine, "uniform", (-1, 2)).pvalue > 1e-3


def test_dispersion_solves_the_equation_of_jeans():
    """Isotropic: rho sigma^2 = integral of rho G M / r^2 from r on, here in units of the halo."""
    for c in (2.0, 5.0, 15.0):

        def enclosed(q, c=c):
            return (np.log1p(c * q) - c * q / (1 + c * q)) / (np.log1p(c) - c / (1 + c))

        def density(q, c=c):
            return 1 / (q * (1 + c * q) ** 2)

        q = np.array([0.01, 0.1, 0.3, 1.0])
        pressure = [
            quad(lambda s: density(s) * enclosed(s) / s**2, one, np.inf, epsrel=1e-10)[0] for one in q
        ]
        np.testing.assert_allclose(nfw_dispersion(q, c), np.sqrt(pressure / density(q)), rtol=1e-6)
    assert (np.diff(nfw_dispersion([0.0, 1e-8, 1e-5, 1e-3, 0.02], 5.0)) >= 0).all()


def test_velocities_are_those_of_halotools():
    models = pytest.importorskip("halotools.empirical_models")
    n, c = 20_000, 8.0
    sample = halos(1)
    one = dataclasses.replace(sample, concentration=np.array([c]))
    occupation = PowerLaw(M_min=1e9, M_1=float(one.mass[0]) / n, alpha=1.0)
    galaxies = paint(occupation, one, np.random.default_rng(0))
    central = galaxies["is_central"]
    assert (galaxies["velocity"][central] == one.velocity).all()
    orbits = (galaxies["velocity"][~central] - one.velocity[0]) / one.circular_velocity[0]
    offset = (galaxies["position"][~central] - one.position[0] + 12.5) % 25.0 - 12.5
    radius = np.linalg.norm(offset, axis=1) / one.radius[0]
    theirs = models.NFWPhaseSpace(conc_mass_model="direct_from_halo_catalog")
    for low, high in ((0.05, 0.1), (0.3, 0.35), (0.8, 0.85)):
        shell = (radius > low) & (radius < high)
        expected = theirs.dimensionless_radial_velocity_dispersion(np.array([(low + high) / 2]), c)[0]
        for axis in range(3):
            found = orbits[shell, axis]
            assert found.std() == pytest.approx(expected, rel=5 / np.sqrt(2 * shell.sum())), (low, axis)
            assert stats.kstest(found / found.std(), "norm").pvalue > 1e-3


@pytest.mark.parametrize("definition", ["200c", "200m"])
def test_concentration_is_that_of_duffy_2008(definition):
    cosmology = pytest.importorskip("colossus.cosmology.cosmology")
    from colossus.halo.concentration import concentration as theirs

    cosmology.setCosmology("WMAP5")
    mass = np.geomspace(1e11, 1e15, 9)
    for redshift in (0.0, 1.0):
        ours = concentration(mass, redshift, definition)
        np.testing.assert_allclose(ours, theirs(mass, definition, redshift, "duffy08"), rtol=1e-3)


def test_painted_galaxies_are_poisson_central_first_and_inside():
    sample = halos()
    numbers = []
    for seed in range(200):
        galaxies = paint(TRUTH, sample, np.random.default_rng(seed))
        halo, central = galaxies["halo"], galaxies["is_central"]
        numbers.append(np.bincount(halo, minlength=sample.mass.size))
        assert np.array_equal(np.unique(halo), halo[central])  # one central in each halo with a galaxy
        np.testing.assert_array_equal(galaxies["position"][central], sample.position[halo[central]])
        assert galaxies["position"].min() >= 0
        assert galaxies["position"].max() < sample.box_size
        offset = galaxies["position"] - sample.position[halo]
        offset -= sample.box_size * np.round(offset / sample.box_size)
        assert np.all(np.linalg.norm(offset, axis=1) <= sample.radius[halo] * (1 + 1e-12))
    numbers = np.array(numbers)
    mean = TRUTH.mean(sample.mass)
    occupied = mean > 0
    assert np.all(numbers[:, ~occupied] == 0)
    pull = (numbers.mean(axis=0) - mean)[occupied] / np.sqrt(mean[occupied] / len(numbers))
    assert np.abs(pull).max() < 4.5
    variance = numbers[:, mean > 1].var(axis=0) / mean[mean > 1]
    assert variance.mean() == pytest.approx(1, abs=0.05)


def test_painting_is_seeded():
    first, second, third = (paint(TRUTH, halos(), np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert all(np.array_equal(first[key], second[key]) for key in first)
    assert first["position"].shape != third["position"].shape or np.any(
        first["position"] != third["position"]
    )


def cells(points, weights=None, n=16, box_size=25.0):
    return np.histogramdd(points, bins=n, range=[(0, box_size)] * 3, weights=weights)[0]


def test_expected_counts_are_the_mean_of_realizations():
    sample = halos(n=60)
    expected, total = np.zeros((16,) * 3), 0.0
    for points, weights in expected_points(TRUTH, sample):
        assert points.min() >= 0
        assert points.max() < sample.box_size
        expected += cells(points, weights)
        total += weights.sum()
    assert total == pytest.approx(TRUTH.mean(sample.mass).sum(), rel=1e-12)
    n = 300
    mean = sum(cells(paint(TRUTH, sample, np.random.default_rng(seed))["position"]) for seed in range(n)) / n
    full = expected > 1e-3
    assert mean[~full].sum() < 0.01 * mean.sum()
    chi2 = ((mean - expected) ** 2)[full] / (expected[full] / n)
    assert chi2.mean() == pytest.approx(1, abs=5 * np.sqrt(2 / full.sum()))


def test_hopeless_catalogs_are_refused():
    with pytest.raises(ValueError, match="no halo with a mass"):
        fit_power_law([], [])
    with pytest.raises(ValueError, match="no halo with a mass"):
        fit_power_law([0.0, 0.0], [0, 0])
    with pytest.raises(ValueError, match="do not determine M_min"):
        fit_power_law([1e12, 1e13], [0, 0])
    with pytest.raises(ValueError, match="do not determine M_min"):
        fit_power_law([1e12, 1e13], [0, 30])
    with pytest.raises(ValueError, match="without a mass"):
        fit_power_law([0.0, 1e12, 1e13], [10, 10, 30])
    with pytest.raises(ValueError, match="two columns"):
        fit_power_law([1e12], [1, 2])


# The stage


def universe(path, n_boxes=4, n_mesh=32, suite="MockA", prefix="A"):
    """Catalogs and grids of boxes whose galaxies follow the model exactly."""
    names = [f"{prefix}_CV_{i}" for i in range(n_boxes)]
    split = ["train"] * (n_boxes - 1) + ["test"]
    attrs = [
        SimulationAttrs(
            name=name,
            box_size=25.0,
            redshift=0.0,
            suite=suite,
            split=where,
            cosmology={"Omega_m": 0.3},
        )
        for name, where in zip(names, split, strict=True)
    ]
    fields = [Field(name="galaxy_counts", assignment="ngp"), Field(name="stellar_mass", assignment="ngp")]
    grids = create_store(path / "grids" / "grids.zarr", attrs, fields, n_mesh)
    writer = CatalogWriter(path / "catalog" / "catalog.zarr")
    for i, simulation in enumerate(attrs):
        sample = halos(2500, seed=10 * len(prefix) + i)
        galaxies = paint(TRUTH, sample, np.random.default_rng(i))
        table = {
            "mass": sample.mass,
            "mass_200c": np.where(np.arange(sample.mass.size) % 10 == 0, 0.0, sample.mass),
            "radius_200c": sample.radius,
            "position": sample.position,
            "velocity": sample.velocity,
        }
        number = np.bincount(galaxies["halo"], minlength=sample.mass.size)
        writer.add(
            simulation, {"halos": {**table, "n_galaxies": number}, "galaxies": galaxies, "nbody_halos": table}
        )
        grids[simulation.name].write(
            "galaxy_counts", assign(galaxies["position"], 25.0, n_mesh, "ngp").astype("f4")
        )
    writer.finish(names)
    return {"catalogs": [path / "catalog"], "grids": [path / "grids"]}


@pytest.fixture(scope="module")
def model_universe(tmp_path_factory):
    return universe(tmp_path_factory.mktemp("universe"))


def test_stage_paints_the_test_boxes_with_what_the_training_boxes_say(model_universe, tmp_path):
    hod(HodConfig(seed=1), model_universe, tmp_path)
    found = json.loads((tmp_path / "hod.json").read_text())
    assert found["alpha"] == pytest.approx(TRUTH.alpha, abs=5 * found["alpha_error"])
    assert found["M_1"] == pytest.approx(TRUTH.M_1, abs=5 * found["M_1_error"])
    assert found["M_min"] == pytest.approx(TRUTH.M_min, rel=0.02)
    assert found["training"] == ["A_CV_0", "A_CV_1", "A_CV_2"]
    occupation = {key: np.array(values) for key, values in found["occupation"].items()}
    enough = occupation["n_halos"] > 50
    pull = (occupation["measured"] - occupation["model"])[enough] / (occupation["error"] + 1e-9)[enough]
    assert np.abs(pull).max() < 5

    store, truth = (
        open_store(tmp_path / "prediction.zarr"),
        open_store(model_universe["grids"][0] / "grids.zarr"),
    )
    assert list(store) == ["A_CV_3"]
    box = store["A_CV_3"]
    assert box.attrs == truth["A_CV_3"].attrs
    assert box.field("galaxy_counts") == truth["A_CV_3"].field("galaxy_counts")
    assert box.field("expected_galaxy_counts").assignment == "ngp"
    assert store.attrs["model"] == "hod"
    assert len(store.attrs["checkpoint"]) == 64
    counts, expected = box.read("galaxy_counts"), box.read("expected_galaxy_counts")
    np.testing.assert_array_equal(counts, np.rint(counts))
    assert expected.sum() == pytest.approx(counts.sum(), abs=5 * float(counts.sum()) ** 0.5)
    # Galaxies are where the truth has them: the mean field explains much of it, the realization less.
    true = truth["A_CV_3"].read("galaxy_counts")
    r_mean, r_counts = (np.corrcoef(field.ravel(), true.ravel())[0, 1] for field in (expected, counts))
    assert r_mean > r_counts > 0.3

    galaxies = open_catalog(tmp_path / "galaxies.zarr").table("A_CV_3", "galaxies")
    np.testing.assert_array_equal(assign(galaxies["position"], 25.0, 32, "ngp"), counts)
    rows = {(row["metric"], row["sample"]): row["value"] for row in load_metrics(tmp_path)}
    assert rows["n_galaxies/predicted", "A_CV_3"] == counts.sum()
    assert rows["n_galaxies/truth", "A_CV_3"] == true.sum()
    assert rows["n_galaxies/expected", "A_CV_3"] == pytest.approx(expected.sum(), rel=1e-6)


def test_catalogs_that_are_fitted_may_be_others_of_the_same_names(model_universe, tmp_path):
    """As of another redshift: what is fitted depends on them alone, what is painted on the others' halos."""
    early = universe(tmp_path / "early", n_boxes=3, prefix="A")
    inputs = {**model_universe, "training": early["catalogs"]}
    hod(HodConfig(seed=1), inputs, tmp_path / "crossed")
    hod(HodConfig(seed=1), early, tmp_path / "own")
    crossed, own = (json.loads((tmp_path / out / "hod.json").read_text()) for out in ("crossed", "own"))
    assert crossed == own
    assert list(open_store(tmp_path / "crossed" / "prediction.zarr")) == ["A_CV_3"]


def test_stage_is_seeded_and_can_be_called_again(model_universe, tmp_path):
    fields = []
    for seed, out in ((1, "a"), (1, "a"), (1, "b"), (2, "c")):
        hod(HodConfig(seed=seed), model_universe, tmp_path / out)
        fields.append(open_store(tmp_path / out / "prediction.zarr")["A_CV_3"].read("galaxy_counts"))
    assert np.array_equal(fields[0], fields[1])
    assert np.array_equal(fields[0], fields[2])
    assert not np.array_equal(fields[0], fields[3])
    same = [json.loads((tmp_path / out / "hod.json").read_text()) for out in "abc"]
    assert same[0] == same[1] == same[2]


def test_one_suite_is_fitted_and_the_other_predicted(model_universe, tmp_path):
    other = universe(tmp_path / "b", n_boxes=2, suite="MockB", prefix="B")
    inputs = {
        "catalogs": model_universe["catalogs"] + other["catalogs"],
        "grids": other["grids"],
    }
    hod(HodConfig(seed=1, training_suites=("MockA",)), inputs, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "hod.json").read_text())["training"] == [
        "A_CV_0",
        "A_CV_1",
        "A_CV_2",
    ]
    assert list(open_store(tmp_path / "out" / "prediction.zarr")) == ["B_CV_1"]


def test_wrong_inputs_are_refused_before_anything_is_written(model_universe, tmp_path):
    def check(match, inputs=None, **config):
        with pytest.raises(ValueError, match=match):
            hod(HodConfig(seed=1, **config), inputs or model_universe, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    catalogs, grids = model_universe["catalogs"], model_universe["grids"]
    check("training_suites: 'MockC' is not in the catalogs", training_suites=("MockC",))
    check("is in two of the grids", {"catalogs": catalogs, "grids": grids * 2})
    check("simulation 'A_CV_0' is in .* and in", {"catalogs": catalogs * 2, "grids": grids})
    check("no simulation of the grids is in the validation split", split="validation")
    check("field 'galaxies'", field="galaxies")
    other = universe(tmp_path / "b", n_boxes=2, suite="MockB", prefix="B")
    check(
        "B_CV_1 is in the grids but in none of the catalogs", {"catalogs": catalogs, "grids": other["grids"]}
    )
    alone = universe(tmp_path / "c", n_boxes=1, prefix="C")
    check("no training simulation", alone)
    store = open_store(other["grids"][0] / "grids.zarr", mode="r+")["B_CV_1"]
    store.write("galaxy_counts", store.read("galaxy_counts") * 2)
    check("same `min_stellar_mass`", other)


def test_radii_of_halos_are_those_of_their_mass_definition(model_universe, tmp_path):
    """Satellites reach to R_200m of the linked mass; M_200c, which some halos lack, has its own radius."""
    hod(HodConfig(seed=1), model_universe, tmp_path / "a")
    halos = open_catalog(model_universe["catalogs"][0] / "catalog.zarr").table("A_CV_3", "nbody_halos")
    galaxies = open_catalog(tmp_path / "a" / "galaxies.zarr").table("A_CV_3", "galaxies")
    offset = galaxies["position"] - halos["position"][galaxies["halo"]]
    distance = np.linalg.norm(offset - 25.0 * np.round(offset / 25.0), axis=1)
    colossus = pytest.importorskip("colossus.halo.mass_so")
    from colossus.cosmology import cosmology

    cosmology.setCosmology("custom", flat=True, H0=70, Om0=0.3, Ob0=0.05, sigma8=0.8, ns=0.96)
    reach = colossus.M_to_R(halos["mass"], 0.0, "200m")[galaxies["halo"]] / 1000
    assert 0.97 < (distance / reach).max() <= 1.001
    with pytest.raises(ValueError, match="galaxies are in halos without a mass"):
        hod(HodConfig(seed=1, mass="mass_200c"), model_universe, tmp_path / "b")
    hod(HodConfig(seed=1, mass="mass_200c", outliers=0.2), model_universe, tmp_path / "c")
    galaxies = open_catalog(tmp_path / "c" / "galaxies.zarr").table("A_CV_3", "galaxies")
    assert np.all(halos["mass_200c"][galaxies["halo"]] > 0)


def test_a_box_without_halos_is_an_error(tmp_path):
    inputs = universe(tmp_path / "a", n_boxes=2)
    writer = CatalogWriter(tmp_path / "a" / "catalog" / "catalog.zarr")
    store = open_catalog(tmp_path / "a" / "catalog" / "catalog.zarr")
    nothing = {key: values[:0] for key, values in store.table("A_CV_1", "nbody_halos").items()}
    tables = {"halos": store.table("A_CV_1", "halos"), "nbody_halos": nothing}
    writer.add(store.attrs("A_CV_1"), tables)
    writer.finish(store.names())
    with pytest.raises(ValueError, match="A_CV_1 has no nbody_halos"):
        hod(HodConfig(seed=1), inputs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_room_is_asked_for_first(model_universe, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(durable.NotEnoughSpace, match="predictions of 1 boxes"):
        hod(HodConfig(seed=1), model_universe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
