import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.spatial.distance import cdist
from sklearn import metrics as sk

from galdist.statistics import distributions as d

seeds = st.integers(0, 2**32 - 1)


def brute_energy(x, y):
    return 2 * cdist(x, y).mean() - cdist(x, x).mean() - cdist(y, y).mean()


def quadrants(points, origin):
    """Fraction of points in each quadrant around an origin."""
    right, above = points[:, 0] > origin[0], points[:, 1] > origin[1]
    return np.array([(a & b).mean() for a in (right, ~right) for b in (above, ~above)])


def difference(x, y, origins):
    return max(np.abs(quadrants(x, origin) - quadrants(y, origin)).max() for origin in origins)


def samples_2d(seed, rounded):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(rng.integers(1, 13), 2)), rng.normal(0.3, 1, (rng.integers(1, 13), 2))
    return (np.round(x), np.round(y)) if rounded else (x, y)


@given(seeds, st.booleans())
@settings(max_examples=50, deadline=None)
def test_distances_of_one_column_equal_scipy(seed, rounded):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=rng.integers(1, 60)), rng.normal(0.2, 2, rng.integers(1, 60))
    if rounded:  # ties within and between the samples
        x, y = np.round(x), np.round(y)
    found = d.distances(x, y)
    assert found["ks"][0] == pytest.approx(stats.ks_2samp(x, y).statistic, abs=1e-12)
    assert found["wasserstein"][0] == pytest.approx(stats.wasserstein_distance(x, y), abs=1e-12)
    assert found["energy_distance"][0] == pytest.approx(stats.energy_distance(x, y) ** 2, abs=1e-12)


@given(seeds, st.booleans())
@settings(max_examples=50, deadline=None)
def test_two_dimensional_ks_equals_the_definitions(seed, rounded):
    x, y = samples_2d(seed, rounded)
    both = np.concatenate([x, y])
    found = d.distances(x, y)
    everywhere = list(itertools.product(both[:, 0], both[:, 1]))
    assert found["ks_peacock"][0] == pytest.approx(difference(x, y, everywhere), abs=1e-12)
    fasano = (difference(x, y, x) + difference(x, y, y)) / 2
    assert found["ks_fasano_franceschini"][0] == pytest.approx(fasano, abs=1e-12)


@given(seeds, st.booleans(), st.integers(2, 3))
@settings(max_examples=30, deadline=None)
def test_weights_are_rows_given_several_times(seed, rounded, columns):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 30))
    x, y = rng.normal(size=(n, columns)), rng.normal(0.5, 1, (n, columns))
    if rounded:
        x, y = np.round(x), np.round(y)
    weights = d.resamplings(n, 2, rng)
    assert (weights.sum(axis=0) == n).all()
    assert (weights[:, 0] == 1).all()
    found = d.distances(x, y, weights, weights)
    single = d.distances(x[:, 0], y[:, 0], weights, weights)
    points = d.point_metrics(y, x, weights)
    for b in range(3):
        rows = np.repeat(np.arange(n), weights[:, b])
        for key, value in d.distances(x[rows], y[rows]).items():
            assert found[key][b] == pytest.approx(value[0], abs=1e-12)
        for key, value in d.distances(x[rows, 0], y[rows, 0]).items():
            assert single[key][b] == pytest.approx(value[0], abs=1e-12)
        if len(set(rows)) > 1 and np.ptp(x[rows], axis=0).min() > 0 and np.ptp(y[rows], axis=0).min() > 0:
            for key, value in d.point_metrics(y[rows], x[rows]).items():
                assert points[key][b] == pytest.approx(value[0], rel=1e-9, abs=1e-9), key


def test_flat_and_mean_ks():
    rng = np.random.default_rng(0)
    x = np.stack([rng.normal(10, 0.5, 500), rng.random(500)], axis=1)
    y = np.stack([rng.normal(10.1, 0.5, 400), rng.random(400) * 0.9], axis=1)
    found = d.distances(x, y)
    assert found["ks_flat"][0] == pytest.approx(stats.ks_2samp(x.ravel(), y.ravel()).statistic, abs=1e-12)
    each = [stats.ks_2samp(x[:, i], y[:, i]).statistic for i in range(2)]
    assert found["ks_mean"][0] == pytest.approx(np.mean(each), abs=1e-12)
    # Columns that do not overlap, as mass and color: the published union is half the larger of the singles.
    assert found["ks_flat"][0] == pytest.approx(max(each) / 2, abs=1e-12)


@pytest.mark.parametrize(("columns", "tolerance"), [(2, 2e-3), (3, 0.05), (4, 0.08)])
def test_energy_distance_equals_the_sum_over_all_pairs(columns, tolerance):
    rng = np.random.default_rng(columns)
    x = rng.normal(size=(700, columns))
    correlated = rng.multivariate_normal(np.zeros(columns), 0.5 + 0.5 * np.eye(columns), 600)
    shifted = rng.normal(size=(600, columns)) + np.eye(columns)[0] * 0.4
    for y in (correlated, shifted):
        expected = brute_energy(x, y)
        assert d.distances(x, y)["energy_distance"][0] == pytest.approx(expected, rel=tolerance)
    scale = np.arange(1, columns + 1)
    scaled = d.distances(x * scale, y * scale, scale=scale)
    assert scaled["energy_distance"][0] == pytest.approx(expected, rel=tolerance)


def test_sliced_wasserstein_of_a_shift():
    """A shift by s moves the projection on a direction by s . direction: 2 |s| / pi on average in a plane."""
    x = np.random.default_rng(0).normal(size=(300, 2))
    assert d.distances(x, x + np.array([0.6, 0.8]))["wasserstein"][0] == pytest.approx(2 / np.pi, rel=1e-3)


@given(seeds, st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_distances_are_distances(seed, columns):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(20, columns)), rng.normal(size=(30, columns))
    here, there, same = d.distances(x, y), d.distances(y, x), d.distances(x, x[::-1])
    for key in here:
        assert here[key][0] == pytest.approx(there[key][0], abs=1e-12)
        assert here[key][0] > 0
        assert same[key][0] == pytest.approx(0, abs=1e-12)


def test_floor_of_ks_is_kolmogorovs():
    rng = np.random.default_rng(3)
    n = 800
    for pool in (rng.normal(size=2 * n), rng.normal(size=20 * n), rng.normal(size=n)):  # the last is scaled
        floor = d.noise_floor(pool, n, 300, rng)["ks"]
        assert floor.shape == (300,)
        mean, std = d.KOLMOGOROV_MEAN * math.sqrt(2 / n), d.KOLMOGOROV_STD * math.sqrt(2 / n)
        # Steps of the two functions coincide less often than the continuous limit says: -0.4/sqrt(n) of it.
        assert floor.mean() == pytest.approx(mean, abs=4 * std / math.sqrt(300) + 0.02 * mean)
        assert floor.std() == pytest.approx(std, rel=0.2)


def test_kolmogorovs_numbers():
    assert stats.kstwobign.mean() == pytest.approx(d.KOLMOGOROV_MEAN, abs=1e-6)
    assert stats.kstwobign.std() == pytest.approx(d.KOLMOGOROV_STD, abs=1e-6)


def test_halves_of_a_pool_give_the_floor_of_whole_samples():
    rng = np.random.default_rng(5)
    parent = rng.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], 40_000)
    n = 1000
    direct = d.noise_floor(parent, n, 200, rng)
    # Several pools: one pool has a fluctuation of its own.
    halves = [d.noise_floor(parent[i * n : (i + 1) * n], n, 10, rng) for i in range(20)]
    for key, values in direct.items():
        scaled = np.concatenate([half[key] for half in halves])
        error = math.hypot(values.std(), scaled.std()) / math.sqrt(200)
        assert scaled.mean() == pytest.approx(values.mean(), abs=4 * error + 0.05 * values.mean()), key


def test_a_model_below_the_floor_is_the_truth_and_one_above_is_not():
    rng = np.random.default_rng(8)
    truth, pool = rng.normal(size=(3000, 2)), rng.normal(size=(6000, 2))
    floor = d.noise_floor(pool, 3000, 30, rng)
    good = d.distances(truth, rng.normal(size=(3000, 2)))
    bad = d.distances(truth, rng.normal(size=(3000, 2)) * 1.3)
    for key, values in floor.items():
        assert good[key][0] < values.mean() + 4 * values.std()
        assert bad[key][0] > values.mean() + 4 * values.std()


def test_crps_of_gaussian_ensembles():
    """Gneiting & Raftery 2007, eq. 21; the fair score is the same for any size of the ensemble."""
    rng = np.random.default_rng(0)
    y = np.linspace(-2, 2, 5)
    exact = y * (2 * stats.norm.cdf(y) - 1) + 2 * stats.norm.pdf(y) - 1 / np.sqrt(np.pi)
    for size, n in ((2, 200_000), (10, 40_000)):
        samples = rng.normal(size=(n, 5, size))
        scores = np.stack([d.crps(samples[:, i], np.full(n, y[i])) for i in range(5)])
        np.testing.assert_allclose(scores.mean(axis=1), exact, atol=5 * scores.std() / math.sqrt(n))


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_scores_of_ensembles_equal_sums_over_pairs(seed):
    rng = np.random.default_rng(seed)
    n, size, columns = 4, int(rng.integers(2, 9)), 3
    samples, truth = rng.normal(size=(n, size, columns)), rng.normal(size=(n, columns))
    scale = rng.uniform(0.5, 2, columns)
    for scaled, units in ((samples / scale, scale), (samples, None)):
        target = truth if units is None else truth / scale
        expected = [
            cdist(one, y[None]).mean() - cdist(one, one).sum() / (2 * size * (size - 1))
            for one, y in zip(scaled, target, strict=True)
        ]
        np.testing.assert_allclose(d.energy_score(samples, truth, units), expected, atol=1e-12)
    one = d.energy_score(samples[..., :1], truth[:, :1])
    np.testing.assert_allclose(d.crps(samples[..., 0], truth[:, 0]), one, atol=1e-12)


@pytest.mark.parametrize("wrong", ["shifted", "narrow", "wide", "uncorrelated"])
def test_scores_are_proper(wrong):
    rng = np.random.default_rng(1)
    n, size = 20_000, 20
    mixing = np.array([[1, 0], [0.9, math.sqrt(1 - 0.81)]])
    truth = rng.normal(size=(n, 2)) @ mixing.T
    right = rng.normal(size=(n, size, 2)) @ mixing.T
    other = {
        "shifted": right + 0.3,
        "narrow": right * 0.7,
        "wide": right * 1.4,
        "uncorrelated": rng.normal(size=(n, size, 2)),
    }[wrong]
    gain = d.energy_score(other, truth) - d.energy_score(right, truth)
    assert gain.mean() > 3 * gain.std() / math.sqrt(n)
    gain = d.crps(other[..., 0], truth[:, 0]) - d.crps(right[..., 0], truth[:, 0])
    if wrong == "uncorrelated":  # which no score of one property sees
        assert abs(gain.mean()) < 4 * gain.std() / math.sqrt(n)
    else:
        assert gain.mean() > 3 * gain.std() / math.sqrt(n)


def test_pinball_equals_scikit_learn_and_is_least_at_the_quantile():
    rng = np.random.default_rng(2)
    truth = rng.exponential(size=5000)
    for level in (0.1, 0.5, 0.9):
        predicted = rng.normal(size=5000)
        expected = sk.mean_pinball_loss(truth, predicted, alpha=level)
        assert d.pinball(predicted, truth, level).mean() == pytest.approx(expected)
        best = np.quantile(truth, level)
        for other in (best - 0.1, best + 0.1):
            losses = [d.pinball(np.full(5000, q), truth, level).mean() for q in (best, other)]
            assert losses[0] < losses[1]


@given(seeds, st.sampled_from([1, 3, 10, 50]), st.booleans())
@settings(max_examples=25, deadline=None)
def test_calibrated_ensembles_cover_what_they_say_at_any_size(seed, size, rounded):
    """Truth and members exchangeable: coverage is nominal, ranks are flat, the PIT uniform, ties or not."""
    rng = np.random.default_rng(seed)
    n = 4000
    center = rng.normal(size=n)
    everything = center[:, None] + rng.normal(size=(n, size + 1))
    if rounded:
        everything = np.round(2 * everything) / 2
    low, high = d.ranks(everything[:, 1:], everything[:, 0])
    for level in (0.5, 0.9):
        covered = d.coverage(low, high, size, level)
        assert covered.mean() == pytest.approx(level, abs=5 * math.sqrt(level * (1 - level) / n))
    histogram = d.rank_histogram(low, high, size)
    assert histogram.sum() == pytest.approx(n)
    # Shared ties only make the histogram flatter.
    assert d.flatness(histogram)[0] < stats.chi2.ppf(1 - 1e-6, size)
    assert stats.kstest(d.pit(low, high, size, rng), "uniform").pvalue > 1e-6


@pytest.mark.parametrize(("width", "sign"), [(0.8, -1), (1.25, 1)])
def test_wrong_widths_show(width, sign):
    rng = np.random.default_rng(4)
    n, size = 20_000, 50
    low, high = d.ranks(width * rng.normal(size=(n, size)), rng.normal(size=n))
    for level in (0.5, 0.9):
        covered = d.coverage(low, high, size, level).mean()
        exact = 2 * stats.norm.cdf(width * stats.norm.ppf((1 + level) / 2)) - 1
        assert covered == pytest.approx(exact, abs=0.015)
        assert sign * (covered - level) > 0.02
    assert d.flatness(d.rank_histogram(low, high, size))[0] > 5 * size


def test_weighted_rank_histograms():
    rng = np.random.default_rng(0)
    low, high = d.ranks(rng.integers(0, 4, (30, 5)), rng.integers(0, 4, 30))
    weights = d.resamplings(30, 3, rng)
    found = d.rank_histogram(low, high, 5, weights)
    for b in range(4):
        rows = np.repeat(np.arange(30), weights[:, b])
        np.testing.assert_allclose(found[:, b], d.rank_histogram(low[rows], high[rows], 5)[:, 0])


def test_point_metrics_equal_scikit_learn():
    rng = np.random.default_rng(6)
    truth = rng.normal([10, 0.7], [0.6, 0.25], (1001, 2))
    predicted = truth + rng.normal(0, [0.2, 0.3], (1001, 2))
    for columns in (slice(0, 1), slice(0, 2)):
        y, p = truth[:, columns], predicted[:, columns]
        found = {key: value[0] for key, value in d.point_metrics(p, y).items()}
        assert found == pytest.approx(
            {
                "mse": sk.mean_squared_error(y, p),
                "mae": sk.mean_absolute_error(y, p),
                "rmse": math.sqrt(sk.mean_squared_error(y, p)),
                "r2": sk.r2_score(y, p),
                "mad": sk.median_absolute_error(y, p),
                "mape": 100 * sk.mean_absolute_percentage_error(y, p),
                "pearson": np.mean([stats.pearsonr(a, b)[0] for a, b in zip(y.T, p.T, strict=True)]),
            }
        )


def test_metrics_of_constants_are_undefined():
    found = d.point_metrics(np.full(10, 0.1), np.arange(10.0))
    assert np.isnan(found["pearson"][0])
    assert np.isfinite(found["r2"][0])
    assert np.isnan(d.point_metrics(np.arange(10.0), np.full(10, 0.1))["r2"][0])


def test_bootstrap_errors_are_the_scatter_between_samples():
    rng = np.random.default_rng(9)
    n = 600

    def draw():
        truth = rng.normal(size=(n, 2))
        return truth, 0.6 * truth + 0.8 * rng.normal(size=(n, 2)) + 0.15

    def measured(truth, predicted, weights=None):
        return {
            **d.distances(truth, predicted, weights, weights),
            **d.point_metrics(predicted, truth, weights),
        }

    many = [measured(*draw()) for _ in range(200)]
    errors = [measured(*draw(), d.resamplings(n, 60, rng)) for _ in range(8)]
    for key in many[0]:
        if key == "mape":  # has no variance where the truth may be near zero
            continue
        scatter = np.std([one[key][0] for one in many])
        assert np.mean([one[key][1:].std() for one in errors]) == pytest.approx(scatter, rel=0.3), key


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.ones((3, 2)), np.ones(3), "2 and 1 columns"),
        (np.ones(0), np.ones(3), "x has shape"),
        (np.ones(3), np.array([1, np.nan, np.inf]), "y has 2 values that are not finite"),
    ],
)
def test_samples_that_cannot_be_compared(x, y, message):
    with pytest.raises(ValueError, match=message):
        d.distances(x, y)


def test_weights_and_ensembles_that_do_not_fit():
    with pytest.raises(ValueError, match="of both samples or of neither"):
        d.distances(np.ones(3), np.ones(3), np.ones((3, 1), np.uint8))
    with pytest.raises(ValueError, match="weights of y have shape"):
        d.distances(np.ones(3), np.ones(3), np.ones((3, 1), np.uint8), np.ones((4, 1), np.uint8))
    with pytest.raises(ValueError, match="no ensembles"):
        d.crps(np.ones((3, 4)), np.ones(4))
    with pytest.raises(ValueError, match="two members or more"):
        d.crps(np.ones((3, 1)), np.ones(3))
    with pytest.raises(ValueError, match="have shape"):
        d.point_metrics(np.ones((3, 2)), np.ones(3))
    with pytest.raises(ValueError, match="two rows"):
        d.noise_floor(np.ones(1), 5, 2, np.random.default_rng(0))
