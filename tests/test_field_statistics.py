"""Counts in cells, voids and coverage against what is known of them; ranks are in tests/parallel."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from galdist.statistics.counts import EDGES, counts_in_cells, in_cells
from galdist.statistics.coverage import ball_ranks, expected_coverage
from galdist.statistics.voids import find_voids, void_sizes


def test_poisson_counts_have_the_distribution_and_variance_of_poisson_counts():
    field = np.random.default_rng(0).poisson(0.5, (64,) * 3)
    found = counts_in_cells(field, (1, 2, 4))
    np.testing.assert_allclose(found["mean"], [0.5, 4, 32], rtol=0.01)
    n_cells = (64 / np.array([1, 2, 4])) ** 3
    pull = (found["variance"] / found["poisson"] - 1) / np.sqrt(2 / n_cells)
    assert np.abs(pull).max() < 4
    expected = stats.poisson.pmf(np.arange(8), 0.5)
    error = np.sqrt(expected / 64**3)
    assert np.all(np.abs(found["distribution"][0, :8] - expected) < 4.5 * error + 1e-9)
    np.testing.assert_allclose(found["distribution"].sum(axis=1), 1)


def test_clustering_is_what_poisson_does_not_explain():
    """Poisson draws of a mean field that is even in cubes of 4 cells have its variance beyond their own."""
    rng = np.random.default_rng(1)
    coarse = rng.gamma(4.0, 1.0, (16,) * 3)  # variance of 1 / 4
    mean = coarse.repeat(4, 0).repeat(4, 1).repeat(4, 2)
    found = counts_in_cells(rng.poisson(mean), (1, 2, 4))
    sigma2 = found["variance"] - found["poisson"]
    np.testing.assert_allclose(sigma2, coarse.var() / coarse.mean() ** 2, rtol=0.03)
    assert np.all(counts_in_cells(mean, (1, 4))["poisson"] == 0)
    assert np.isnan(counts_in_cells(np.zeros((4, 4, 4)), (1,))["variance"][0])


@settings(deadline=None, max_examples=25)
@given(arrays(np.int64, (8, 8, 8), elements=st.integers(0, 5)), st.sampled_from([1, 2, 4, 8]))
def test_cubes_hold_everything(field, side):
    assert in_cells(field, side).sum() == field.sum()
    corner = field[:side, side * (8 // side - 1) :, :side].sum()
    assert in_cells(field, side)[0, -1, 0] == corner


def test_cubes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="cubes of 3 cells do not tile a mesh of 8"):
        in_cells(np.ones((8, 8, 8)), 3)
    assert EDGES[0] == -0.5


def hollow(n_mesh, holes):
    """One everywhere but in spheres (center, radius) [cells]."""
    field = np.ones((n_mesh,) * 3)
    index = np.indices(field.shape)
    for center, radius in holes:
        away = np.abs(index - np.array(center)[:, None, None, None])
        away = np.minimum(away, n_mesh - away)
        field[(away**2).sum(axis=0) <= radius**2] = 0
    return field


def test_holes_are_found_where_they_are_and_as_large_as_they_are():
    holes = [((20, 20, 20), 9), ((45, 45, 10), 6), ((1, 60, 40), 4), ((30, 50, 50), 6)]
    # One cell is half a Mpc/h; radii that are 0.7^(-1/3) = 1.13 times that of a hole would still be voids.
    radii = np.array([3, 4, 6, 9, 12]) / 2
    voids = find_voids(hollow(64, holes), 32.0, radii)
    biggest = {tuple(c): r for c, r in zip(voids.center.tolist(), voids.radius, strict=True) if r >= 2}
    assert biggest == {center: radius / 2 for center, radius in holes}
    density = void_sizes(voids, 32.0, radii)
    np.testing.assert_allclose(density[1:] * 32**3, [1, 2, 1, 0])


def test_voids_are_those_of_a_plain_search():
    """The definition, cell by cell, on a small mesh."""
    n, radii, threshold = 12, (1.0, 2.0, 3.0), -0.5
    field = np.random.default_rng(3).poisson(hollow(n, [((3, 3, 3), 3), ((8, 8, 11), 2)]) * 1.5)
    index = np.indices(field.shape).reshape(3, -1).T
    away = np.abs(index[:, None] - index[None])
    distance = np.sqrt((np.minimum(away, n - away) ** 2).sum(axis=2))
    expected = []
    for radius in sorted(radii, reverse=True):
        contrast = [field.ravel()[near].mean() / field.mean() - 1 for near in distance <= radius]
        for cell in np.argsort(np.round(contrast, 9), kind="stable"):
            if contrast[cell] < threshold and all(
                distance[cell, other] >= radius + size for other, size in expected
            ):
                expected.append((cell, radius))
    voids = find_voids(field, float(n), radii, threshold)
    assert len(expected) > 4
    np.testing.assert_array_equal(voids.center, index[[cell for cell, _ in expected]])
    np.testing.assert_array_equal(voids.radius, [radius for _, radius in expected])


def test_voids_move_with_the_field():
    field = hollow(32, [((5, 5, 5), 5), ((20, 16, 20), 4)])
    voids = find_voids(field, 32.0, (4.0, 5.0))
    moved = find_voids(np.roll(field, (7, -9, 20), (0, 1, 2)), 32.0, (4.0, 5.0))
    np.testing.assert_array_equal((voids.center + np.array([7, -9, 20])) % 32, moved.center)
    assert find_voids(np.ones((16,) * 3), 16.0, (2.0,)).radius.size == 0
    assert find_voids(np.zeros((16,) * 3), 16.0, (2.0,)).radius.size == 0


def test_wrong_voids_are_refused():
    for radii in ((5.0,), (0.5,), ()):
        with pytest.raises(ValueError, match="between one cell"):
            find_voids(np.ones((16,) * 3), 16.0, radii)
    with pytest.raises(ValueError, match="contrast of a void"):
        find_voids(np.ones((16,) * 3), 16.0, (2.0,), 0.2)


def gaussian_posteriors(width, bias, n=4000, size=60, d=3, seed=0):
    """Means with a prior of width 2, seen with noise of width 1: samples of a posterior, right or wrong."""
    rng = np.random.default_rng(seed)
    truth = 2 * rng.normal(size=(n, d))
    data = truth + rng.normal(size=(n, d))
    mean, sigma = data * 4 / 5 + bias, width * np.sqrt(4 / 5)
    return mean[:, None] + sigma * rng.normal(size=(n, size, d)), truth


def coverage_of(width, bias):
    samples, truth = gaussian_posteriors(width, bias)
    found = ball_ranks(samples, truth, np.random.default_rng(1))
    return np.bincount(found, minlength=61)


LEVELS = np.linspace(0.05, 0.95, 19)


def test_the_right_posterior_covers():
    histogram = coverage_of(1.0, 0.0)
    assert stats.chisquare(histogram).pvalue > 1e-3
    error = np.sqrt(LEVELS * (1 - LEVELS) / 4000)
    assert np.all(np.abs(expected_coverage(histogram, LEVELS) - LEVELS) < 4 * error)


def test_wrong_widths_and_biases_are_seen():
    narrow, wide, biased = (
        expected_coverage(coverage_of(*case), LEVELS) - LEVELS for case in ((0.5, 0.0), (2.0, 0.0), (1, 1.5))
    )
    assert narrow[3] > 0.05 > -0.05 > narrow[-4]
    assert wide[3] < -0.05 < 0.05 < wide[-4]
    assert np.abs(biased).max() > 0.05


def test_counts_with_ties_cover():
    rng = np.random.default_rng(2)
    rate = rng.gamma(2.0, 0.5, (3000, 2))
    samples, truth = rng.poisson(rate[:, None], (3000, 40, 2)), rng.poisson(rate)
    histogram = np.bincount(ball_ranks(samples, truth, rng), minlength=41)
    assert stats.chisquare(histogram).pvalue > 1e-3


def test_wrong_samples_are_refused():
    with pytest.raises(ValueError, match=r"samples are \(n, S, d\)"):
        ball_ranks(np.ones((3, 2)), np.ones((3, 2)), np.random.default_rng())
    with pytest.raises(ValueError, match="finite"):
        ball_ranks(np.full((3, 2, 1), np.nan), np.ones((3, 1)), np.random.default_rng())
