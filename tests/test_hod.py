import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from galdist.statistics.hod import (
    Halos,
    Occupation,
    concentration,
    expected_points,
    fit,
    nfw_radius,
    paint,
)

TRUTH = Occupation(M_min=3e11, M_1=2e12, alpha=0.9)


def halo_masses(n, seed=0):
    """Masses with roughly the slope of the mass function, 1e11 to 3e14 Msun/h."""
    u = np.random.default_rng(seed).random(n)
    low, high = 1e11**-0.9, 3e14**-0.9
    return (low + u * (high - low)) ** (-1 / 0.9)


def halos(n=300, seed=0, box_size=25.0):
    rng = np.random.default_rng(seed)
    mass = halo_masses(n, seed) * 3
    radius = 0.16 * (mass / 1e12) ** (1 / 3)
    return Halos(mass, mass, radius, rng.uniform(0, box_size, (n, 3)), box_size, 0.0)


def test_parameters_are_recovered_within_their_errors():
    pulls, covered = [], 0
    for seed in range(40):
        mass = halo_masses(8000, seed)
        number = np.random.default_rng(seed + 100).poisson(TRUTH.mean(mass))
        found = fit(mass, number)
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
    found = fit(mass, number, outliers=0.0)

    def log_likelihood(occupation):
        mean = occupation.mean(mass)
        if np.any(number[mean == 0] > 0):
            return -np.inf
        return stats.poisson.logpmf(number[mean > 0], mean[mean > 0]).sum()

    best = log_likelihood(found)
    assert found.log_likelihood == pytest.approx(best, rel=1e-10)
    for factor in (0.99, 1.01):
        assert log_likelihood(Occupation(found.M_min * factor, found.M_1, found.alpha)) < best
        assert log_likelihood(Occupation(found.M_min, found.M_1 * factor, found.alpha)) < best
        assert log_likelihood(Occupation(found.M_min, found.M_1, found.alpha * factor)) < best
    # A step of one error in one parameter, the other refitted, costs one half: check M_1 with alpha's Fisher.
    step = Occupation(found.M_min, found.M_1, found.alpha + found.alpha_error)
    assert best - log_likelihood(step) >= 0.45


def test_halos_of_equal_mass_are_on_one_side():
    """Masses of few particles come in steps: M_min cannot divide halos of one mass."""
    rng = np.random.default_rng(2)
    mass = np.round(halo_masses(5000, 2) / 2e10) * 2e10
    number = rng.poisson(TRUTH.mean(mass))
    found = fit(mass, number)
    assert found.M_min == pytest.approx(3e11)
    assert number[mass < found.M_min].sum() == 0


def test_a_few_galaxies_in_tiny_halos_do_not_move_the_fit():
    mass = halo_masses(8000, 3)
    number = np.random.default_rng(4).poisson(TRUTH.mean(mass))
    clean = fit(mass, number)
    number[np.argsort(mass)[:3]] = 1
    robust, literal = fit(mass, number), fit(mass, number, outliers=0.0)
    assert robust.M_min == clean.M_min
    assert robust.alpha == pytest.approx(clean.alpha)
    assert robust.outlier_fraction == pytest.approx(3 / number.sum())
    assert literal.M_min == mass.min()


def test_the_number_of_galaxies_is_kept():
    """The likelihood's derivative by M_1 vanishes where the expected number is the observed one."""
    mass = halo_masses(5000, 8)
    number = np.random.default_rng(9).poisson(TRUTH.mean(mass))
    assert fit(mass, number, outliers=0.0).mean(mass).sum() == pytest.approx(number.sum(), rel=1e-9)


@settings(deadline=None, max_examples=25)
@given(st.floats(0.5, 1.5), st.floats(11.0, 12.0), st.floats(11.8, 13.0), st.integers(0, 1000))
def test_fit_does_not_depend_on_the_unit_or_order_of_masses(alpha, log_m_min, log_m_1, seed):
    mass = halo_masses(2000, seed)
    number = np.random.default_rng(seed).poisson(Occupation(10**log_m_min, 10**log_m_1, alpha).mean(mass))
    if np.count_nonzero(number) < 10:
        return
    first, second = fit(mass, number), fit(mass[::-1] * 1e-10, number[::-1])
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
    mass_of_c = 2e12 * (c / 5.71) ** (-1 / 0.084)
    one = Halos(
        *(np.array([v]) for v in (mass_of_c, mass_of_c, 0.3)), np.array([[12.0, 12.0, 12.0]]), 25.0, 0.0
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


def test_concentration_is_that_of_duffy_2008():
    cosmology = pytest.importorskip("colossus.cosmology.cosmology")
    from colossus.halo.concentration import concentration as theirs

    cosmology.setCosmology("WMAP5")
    mass = np.geomspace(1e11, 1e15, 9)
    for redshift in (0.0, 1.0):
        np.testing.assert_allclose(
            concentration(mass, redshift), theirs(mass, "200c", redshift, "duffy08"), rtol=1e-3
        )


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
        assert np.all(np.linalg.norm(offset, axis=1) <= sample.radius_200c[halo] * (1 + 1e-12))
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


def test_halos_without_a_radius_hold_their_galaxies_at_the_center():
    point = Halos(*(np.array([v]) for v in (1e14, 0.0, 0.0)), np.array([[24.99, 0.0, 5.0]]), 25.0, 0.0)
    galaxies = paint(TRUTH, point, np.random.default_rng(0))
    assert galaxies["halo"].size > 5
    np.testing.assert_allclose(
        galaxies["position"], np.broadcast_to(point.position, galaxies["position"].shape)
    )


def test_hopeless_catalogs_are_refused():
    with pytest.raises(ValueError, match="no halo with a mass"):
        fit([], [])
    with pytest.raises(ValueError, match="no halo with a mass"):
        fit([0.0, 0.0], [0, 0])
    with pytest.raises(ValueError, match="do not determine M_min"):
        fit([1e12, 1e13], [0, 0])
    with pytest.raises(ValueError, match="do not determine M_min"):
        fit([1e12, 1e13], [0, 30])
    with pytest.raises(ValueError, match="without a mass"):
        fit([0.0, 1e12, 1e13], [10, 10, 30])
    with pytest.raises(ValueError, match="two columns"):
        fit([1e12], [1, 2])
