"""Distances between samples, proper scores of ensembles, calibration, and metrics of single values.

Two kinds of question are asked of a model that draws galaxies for halos. Do its galaxies as a population look
like the true ones? *Distances* compare two samples and know nothing of halos: KS in one and two dimensions,
Wasserstein, energy. Is each halo's distribution right? *Proper scores* (CRPS, energy score, pinball) and
*calibration* (ranks, coverage) compare an ensemble of draws for a halo with its one true galaxy.

Bootstrap
---------
What is a statistic of the whole sample is computed for many weightings of the rows at once: ``weights``
(n, B) says how often each row counts in each of B resamplings, and the result has shape (B,). `resamplings`
makes them; its first column is the sample itself. Without weights B is 1.

Noise floor
-----------
Two samples of n rows of one parent are a distance apart too: no model can be told from the truth by a
distance below that. `noise_floor` measures it. Proper scores have no floor of this kind: their least value is
a property of nature.
"""

import math

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri
from scipy.stats import qmc

Array = NDArray[np.float64]
Weights = NDArray[np.uint8]
Distances = dict[str, Array]

KOLMOGOROV_MEAN = math.sqrt(math.pi / 2) * math.log(2)
"""Mean of sqrt(n) D for one sample of n, and of sqrt(n m / (n + m)) D for two (Kolmogorov 1933)."""
KOLMOGOROV_STD = math.sqrt(math.pi**2 / 12 - KOLMOGOROV_MEAN**2)
"""Standard deviation of the same."""

_DIRECTIONS = {1: 1, 2: 64}  # of a sliced distance; more dimensions need more
_MANY_DIRECTIONS = 128
_ROWS = 1 << 16  # at a time, where a temporary array is made of rows
_POWERS = {"energy_distance": 1.0}
"""A distance falls as n^-p between samples of one parent; p is 1/2 for all others."""


def resamplings(n: int, replicates: int, rng: np.random.Generator) -> Weights:
    """Weights (n, 1 + replicates) of the bootstrap (Efron 1979): first once each, then multinomial counts.

    Rows are drawn as if independent: scatter that neighboring halos share is not in the errors.
    """
    weights = np.ones((n, 1 + replicates), np.uint8)
    for b in range(1, 1 + replicates):
        weights[:, b] = np.bincount(rng.integers(n, size=n), minlength=n)
    return weights


def means(values: Array, weights: Weights | None = None) -> Array:
    """Mean (B, ...) over rows of ``values`` (n, ...) in each resampling."""
    weights = _ones(len(values)) if weights is None else weights
    flat = values.reshape(len(values), -1)
    total = np.zeros((weights.shape[1], flat.shape[1]))
    for start in range(0, len(flat), _ROWS):
        part = slice(start, start + _ROWS)
        total += weights[part].T.astype(float) @ flat[part]
    return (total / len(values)).reshape(-1, *values.shape[1:])


def distances(
    x: ArrayLike,
    y: ArrayLike,
    x_weights: Weights | None = None,
    y_weights: Weights | None = None,
    scale: ArrayLike | None = None,
) -> Distances:
    """Every distance between two samples that their dimension allows.

    Parameters
    ----------
    x : (n,) or (n, d); y : (m,) or (m, d).
    x_weights, y_weights : (n, B) and (m, B); each column sums to n, m. The same weights given twice resample
        pairs of rows.
    scale
        (d,) standard deviations that make columns of different units comparable; ones by default. Wasserstein
        and energy distances are in units of it, KS distances do not depend on it.

    Returns
    -------
    Of one column: ``ks``, ``wasserstein`` and ``energy_distance``. Of several: ``ks_flat`` (all columns, in
    their own units, pooled into one), ``ks_mean`` (the mean over columns), ``wasserstein`` (sliced),
    ``energy_distance``; of two also ``ks_peacock`` and ``ks_fasano_franceschini``. Each (B,).

    - Wasserstein is of order 1. Sliced: the mean over directions of that of the projections (Bonneel et al.
      2015).
    - Energy distance is 2 E|x - y| - E|x - x'| - E|y - y'| (Szekely & Rizzo 2013), with all pairs in the
      means, so that it is never negative; `scipy.stats.energy_distance` is its square root. In d dimensions
      |x| is c_d times the mean of |x . direction| over directions, so it is c_d times the mean of the energy
      distances of the projections: n log n operations in place of n^2. 64 directions give it to 0.1% in two
      dimensions, 128 to a few percent in more, and the same ones are used for every sample.

    Raises
    ------
    ValueError
        for samples of different dimension, empty ones, or values that are not finite.
    """
    x, y = _matrix("x", x), _matrix("y", y)
    d = x.shape[1]
    if y.shape[1] != d:
        raise ValueError(f"samples of {d} and {y.shape[1]} columns cannot be compared")
    if (x_weights is None) != (y_weights is None):
        raise ValueError("weights are of both samples or of neither")
    wx = _ones(len(x)) if x_weights is None else x_weights
    wy = _ones(len(y)) if y_weights is None else y_weights
    for name, sample, weights in (("x", x, wx), ("y", y, wy)):
        if len(weights) != len(sample) or weights.shape[1] != wx.shape[1]:
            raise ValueError(f"weights of {name} have shape {weights.shape} for {len(sample)} rows")
    if d == 1:
        ks, wasserstein, energy = _distances_1d(x[:, 0], y[:, 0], wx, wy)
        return {"ks": ks, "wasserstein": wasserstein, "energy_distance": energy}
    result = {
        "ks_flat": _distances_1d(x.ravel(), y.ravel(), wx, wy)[0],
        "ks_mean": np.mean([_distances_1d(x[:, i], y[:, i], wx, wy)[0] for i in range(d)], axis=0),
    }
    scale = np.ones(d) if scale is None else np.asarray(scale, float)
    directions = _directions(d)
    sliced = np.zeros((2, wx.shape[1]))
    for direction in directions / scale:
        sliced += _distances_1d(x @ direction, y @ direction, wx, wy)[1:]
    result["wasserstein"], result["energy_distance"] = sliced / len(directions)
    result["energy_distance"] *= math.sqrt(math.pi) * math.gamma((d + 1) / 2) / math.gamma(d / 2)
    if d == 2:
        result["ks_peacock"], result["ks_fasano_franceschini"] = _distances_2d(x, y, wx, wy)
    return result


def noise_floor(
    pool: ArrayLike,
    n: int,
    draws: int,
    rng: np.random.Generator,
    scale: ArrayLike | None = None,
) -> Distances:
    """`distances` (draws,) between two samples of ``n`` rows of the parent of ``pool``, (N,) or (N, d).

    Each draw takes two disjoint random sets of rows, of ``n`` each. Where the pool is too small for that they
    are its halves, of m rows, and the distance is scaled by what sampling noise falls with: (m/n)^(1/2), for
    energy distances m/n. KS distances of continuous columns agree with Kolmogorov's distribution:
    `KOLMOGOROV_MEAN` sqrt(2/n) on average.

    Raises
    ------
    ValueError
        for pools of fewer than two rows.
    """
    pool = _matrix("the pool", pool)
    m = min(n, len(pool) // 2)
    if m == 0:
        raise ValueError("a noise floor needs two rows or more")
    found: list[Distances] = []
    for _ in range(draws):
        rows = rng.permutation(len(pool))[: 2 * m]
        found.append(distances(pool[rows[:m]], pool[rows[m:]], scale=scale))
    return {
        name: np.concatenate([one[name] for one in found]) * (m / n) ** _POWERS.get(name, 0.5)
        for name in found[0]
    }


def crps(samples: ArrayLike, truth: ArrayLike) -> Array:
    """Continuous ranked probability score of each row, in the units of ``truth``; less is better.

    E|X - y| - E|X - X'|/2 with the expectations over ensemble members, without the pairs of a member with
    itself: the "fair" score (Ferro 2014), whose mean does not depend on the ensemble's size.

    Parameters
    ----------
    samples : (n, S) with S > 1; truth : (n,).

    Returns
    -------
    (n,)
    """
    samples, truth = _ensemble(samples, truth)
    size = samples.shape[1]
    ordered = np.sort(samples, axis=1)
    spread = ordered @ (2 * np.arange(size) - size + 1.0) / (size * (size - 1))
    return np.asarray(np.abs(samples - truth[:, None]).mean(axis=1) - spread)


def energy_score(samples: ArrayLike, truth: ArrayLike, scale: ArrayLike | None = None) -> Array:
    """Energy score of each row (Gneiting & Raftery 2007, eq. 22 with beta = 1), fair as `crps` is.

    Parameters
    ----------
    samples : (n, S, d) with S > 1; truth : (n, d).
    scale
        (d,) units of the columns; ones by default.

    Returns
    -------
    (n,)
    """
    samples, truth = _ensemble(samples, truth)
    unit = np.ones(truth.shape[1]) if scale is None else np.asarray(scale, float)
    return np.asarray(_energy_scores(samples, truth, 1 / unit))


def pinball(quantile: ArrayLike, truth: ArrayLike, level: float) -> Array:
    """Pinball loss of each row's predicted quantile at ``level`` (Koenker & Bassett 1978)."""
    residual = np.asarray(truth, float) - np.asarray(quantile, float)
    return np.maximum(level * residual, (level - 1) * residual)


def ranks(samples: ArrayLike, truth: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Lowest and highest rank (n,), (n,) of ``truth`` (n,) among ``samples`` (n, S): 0 to S, the same without
    ties.

    In a calibrated ensemble the truth is one more member, and every rank between these equally likely.
    """
    samples, truth = np.asarray(samples), np.asarray(truth)[:, None]
    return (samples < truth).sum(axis=1), (samples <= truth).sum(axis=1)


def pit(low: ArrayLike, high: ArrayLike, size: int, rng: np.random.Generator) -> Array:
    """Randomized probability integral transform (n,) of `ranks` in ensembles of ``size`` members.

    Uniform in [0, 1] where ensembles are calibrated, for any size and with ties (Czado et al. 2009).
    """
    low, high = np.asarray(low), np.asarray(high)
    return np.asarray((low + rng.random(len(low)) * (high - low + 1)) / (size + 1))


def coverage(low: ArrayLike, high: ArrayLike, size: int, level: float) -> Array:
    """Probability (n,) that the `pit` of each row lies in the central interval of probability ``level``.

    Its mean is the coverage of central intervals, and is ``level`` for a calibrated ensemble of any size:
    intervals between an ensemble's quantiles would cover less, by about 1/size.
    """
    low, high = np.asarray(low) / (size + 1), (np.asarray(high) + 1) / (size + 1)
    inside = np.minimum(high, (1 + level) / 2) - np.maximum(low, (1 - level) / 2)
    return np.asarray(np.maximum(inside, 0) / (high - low))


def rank_histogram(low: ArrayLike, high: ArrayLike, size: int, weights: Weights | None = None) -> Array:
    """How often each rank occurs: (size + 1, B). A row with ties is shared among its ranks."""
    low, high = np.asarray(low), np.asarray(high)
    return np.asarray(_histogram(low, high, size, _ones(len(low)) if weights is None else weights))


def flatness(histogram: Array) -> Array:
    """Chi-squared (B,) of `rank_histogram` (size + 1, B) against a flat one; its mean is ``size`` for
    calibrated ensembles, its variance twice that (Hamill 2001)."""
    expected = histogram.mean(axis=0)
    return np.asarray(((histogram - expected) ** 2 / expected).sum(axis=0))


def point_metrics(predicted: ArrayLike, truth: ArrayLike, weights: Weights | None = None) -> dict[str, Array]:
    """Metrics (B,) of single values, (n,) or (n, d); of several columns the mean over them.

    ``mse``, ``mae``, ``rmse`` (the root of ``mse``, after the mean over columns), ``r2`` (1 - residual over
    total sum of squares), ``mad`` (median absolute residual), ``mape`` (mean of the absolute residual in
    percent of the truth's absolute value) and ``pearson``. NaN where undefined: ``r2`` and ``pearson`` of a
    constant.
    """
    predicted, truth = _matrix("predicted", predicted), _matrix("truth", truth)
    if predicted.shape != truth.shape:
        raise ValueError(f"predictions have shape {predicted.shape} and truths {truth.shape}")
    weights = _ones(len(truth)) if weights is None else weights
    residual = np.abs(predicted - truth)
    p, t = predicted - predicted.mean(axis=0), truth - truth.mean(axis=0)
    moments = np.stack(
        [
            residual**2,
            residual,
            100 * residual / np.maximum(np.abs(truth), np.finfo(float).eps),
            p,
            t,
            p * p,
            t * t,
            p * t,
        ],
        axis=1,
    )
    mse, mae, mape, p, t, pp, tt, pt = np.moveaxis(means(moments, weights), 1, 0)
    variance_p, variance_t = _variance(pp, p), _variance(tt, t)
    order = np.argsort(residual, axis=0)
    mad = [_median(residual[order[:, i], i], order[:, i], weights) for i in range(residual.shape[1])]
    return {
        "mse": mse.mean(axis=1),
        "mae": mae.mean(axis=1),
        "rmse": np.sqrt(mse.mean(axis=1)),
        "r2": (1 - mse / variance_t).mean(axis=1),
        "mad": np.mean(mad, axis=0),
        "mape": mape.mean(axis=1),
        "pearson": ((pt - p * t) / np.sqrt(variance_p * variance_t)).mean(axis=1),
    }


def _variance(second_moment: Array, mean: Array) -> Array:
    """NaN for constants, of which rounding leaves a little."""
    variance = second_moment - mean**2
    return np.where(variance > 1e-12 * second_moment, variance, np.nan)


def _ones(n: int) -> Weights:
    return np.ones((n, 1), np.uint8)


def _matrix(name: str, values: ArrayLike) -> Array:
    values = np.asarray(values, float)
    if values.ndim == 1:
        values = values[:, None]
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"{name} has shape {values.shape}: rows, or rows of columns, were expected")
    if not np.isfinite(values).all():
        raise ValueError(f"{name} has {np.count_nonzero(~np.isfinite(values))} values that are not finite")
    return values


def _ensemble(samples: ArrayLike, truth: ArrayLike) -> tuple[Array, Array]:
    samples, truth = np.asarray(samples, float), np.asarray(truth, float)
    if samples.ndim != truth.ndim + 1 or (samples.shape[0], *samples.shape[2:]) != truth.shape:
        raise ValueError(f"samples of shape {samples.shape} are no ensembles for truths of {truth.shape}")
    if samples.shape[1] < 2:
        raise ValueError("a score of an ensemble needs two members or more")
    return samples, truth


def _directions(d: int) -> Array:
    """Unit vectors (K, d) spread evenly over the half sphere; always the same ones."""
    n = _DIRECTIONS.get(d, _MANY_DIRECTIONS)
    if d <= 2:
        angles = (np.arange(n) + 0.5) * np.pi / n if d == 2 else np.zeros(1)
        return np.stack([np.cos(angles), np.sin(angles)][:d], axis=1)
    normal = ndtri(qmc.Sobol(d, rng=np.random.default_rng(0)).random(n))
    return np.asarray(normal / np.linalg.norm(normal, axis=1, keepdims=True))


def _distances_1d(x: Array, y: Array, x_weights: Weights, y_weights: Weights) -> Array:
    """KS, Wasserstein and energy distance (3, B); ``x`` may hold several values of each weighted row."""
    values = np.concatenate([x, y])
    order = np.argsort(values)
    per_row = x.size // len(x_weights)
    return np.asarray(_walk(np.diff(values[order]), order, x.size, per_row, x_weights, y_weights))


@njit(nogil=True, cache=True, error_model="numpy")
def _walk(gaps, order, n_x, per_row, x_weights, y_weights):  # type: ignore[no-untyped-def]
    """Walk up the pooled values with the difference of the two distribution functions, F_x - F_y.

    KS is its greatest absolute value, Wasserstein the integral of that (Vallender 1974), the energy distance
    twice the integral of its square (Szekely & Rizzo 2013). Equal values are one step: where there is no gap
    nothing is looked at.
    """
    n_b = x_weights.shape[1]
    difference, result = np.zeros(n_b), np.zeros((3, n_b))
    step_x, step_y = 1.0 / n_x, 1.0 / (order.size - n_x)
    ks, wasserstein, energy = result[0], result[1], result[2]
    for k in range(gaps.size):
        i = order[k]
        if i < n_x:
            weights, step = x_weights[i // per_row], step_x
        else:
            weights, step = y_weights[(i - n_x) // per_row], -step_y
        gap = gaps[k]
        if gap > 0:
            for b in range(n_b):
                here = difference[b] + step * weights[b]
                difference[b] = here
                size = abs(here)
                ks[b] = max(ks[b], size)
                wasserstein[b] += size * gap
                energy[b] += 2 * here * here * gap
        else:
            for b in range(n_b):
                difference[b] += step * weights[b]
    return result


def _distances_2d(x: Array, y: Array, x_weights: Weights, y_weights: Weights) -> tuple[Array, Array]:
    """The distances of Peacock and of Fasano & Franceschini, each (B,)."""
    both = np.concatenate([x, y])
    order = np.argsort(both[:, 0])
    first = np.unique(both[order, 0], return_index=True)[1]
    rank = np.unique(both[:, 1], return_inverse=True)[1]
    n_b = x_weights.shape[1]
    peacock, fasano = np.empty(n_b), np.empty(n_b)
    for b in range(n_b):
        mass = np.concatenate([x_weights[:, b] / len(x), y_weights[:, b] / -len(y)])
        peacock[b], fasano[b] = _sweep(order, np.append(first, order.size), rank, mass, len(x))
    return peacock, fasano


@njit(nogil=True, cache=True)
def _sweep(order, first, rank, mass, n_x):  # type: ignore[no-untyped-def]
    """Two-dimensional KS distances in n log n operations.

    A line sweeps along the first axis. Two trees hold, over the ranks of the second axis, the signed mass of
    points passed and of points to come; each node knows its sum and the least and greatest of its prefix
    sums, so that the top knows the greatest differences in all quadrants around (the line, any height). The
    trees are side by side in one array, as they change together.

    Peacock (1983): the greatest over origins at every pair of coordinates. Fasano & Franceschini (1987): the
    greatest over origins at points of one sample, averaged over the two samples. Quadrants are <= or > in
    either coordinate.
    """
    n_leaves = 1
    while n_leaves < rank.max() + 1:
        n_leaves *= 2
    tree = np.zeros((2 * n_leaves, 6))
    for i in range(rank.size):
        tree[n_leaves + rank[i], 3:] += mass[i]
    for node in range(n_leaves - 1, 0, -1):
        _merge(tree, node)
    peacock, of_x, of_y = 0.0, 0.0, 0.0
    for group in range(first.size - 1):
        for k in range(first[group], first[group + 1]):
            i = order[k]
            if mass[i] != 0:  # else it is not in this resampling
                node = n_leaves + rank[i]
                tree[node, :3] += mass[i]
                tree[node, 3:] -= mass[i]
                while node > 1:
                    node //= 2
                    _merge(tree, node)
        left, right = tree[1, 0], tree[1, 3]
        peacock = max(peacock, tree[1, 2], -tree[1, 1], left - tree[1, 1], tree[1, 2] - left)
        peacock = max(peacock, tree[1, 5], -tree[1, 4], right - tree[1, 4], tree[1, 5] - right)
        for k in range(first[group], first[group + 1]):
            i = order[k]
            if mass[i] == 0:
                continue
            node = n_leaves + rank[i]
            left_below, right_below = tree[node, 0], tree[node, 3]
            while node > 1:
                if node % 2:
                    left_below += tree[node - 1, 0]
                    right_below += tree[node - 1, 3]
                node //= 2
            here = max(abs(left_below), abs(left - left_below), abs(right_below), abs(right - right_below))
            if i < n_x:
                of_x = max(of_x, here)
            else:
                of_y = max(of_y, here)
    return peacock, 0.5 * (of_x + of_y)


@njit(nogil=True, cache=True, inline="always")
def _merge(tree, node):  # type: ignore[no-untyped-def]
    """Sum, least and greatest prefix sum of a node, from its children; of both trees."""
    left, right = 2 * node, 2 * node + 1
    for t in (0, 3):
        tree[node, t] = tree[left, t] + tree[right, t]
        tree[node, t + 1] = min(tree[left, t + 1], tree[left, t] + tree[right, t + 1])
        tree[node, t + 2] = max(tree[left, t + 2], tree[left, t] + tree[right, t + 2])


@njit(nogil=True, cache=True)
def _energy_scores(samples, truth, inverse):  # type: ignore[no-untyped-def]
    n, size, d = samples.shape
    scores, members = np.empty(n), np.empty((d, size))
    for row in range(n):
        for s in range(size):
            for c in range(d):
                members[c, s] = samples[row, s, c] * inverse[c]
        error, spread = 0.0, 0.0
        for s in range(size):
            squared = 0.0
            for c in range(d):
                squared += (members[c, s] - truth[row, c] * inverse[c]) ** 2
            error += math.sqrt(squared)
            for other in range(s):
                squared = 0.0
                for c in range(d):
                    squared += (members[c, s] - members[c, other]) ** 2
                spread += math.sqrt(squared)
        scores[row] = error / size - spread / (size * (size - 1))
    return scores


@njit(nogil=True, cache=True)
def _histogram(low, high, size, weights):  # type: ignore[no-untyped-def]
    counts = np.zeros((size + 1, weights.shape[1]))
    for row in range(low.size):
        share = 1 / (high[row] - low[row] + 1)
        for rank in range(low[row], high[row] + 1):
            for b in range(weights.shape[1]):
                counts[rank, b] += share * weights[row, b]
    return counts


@njit(nogil=True, cache=True)
def _median(values, order, weights):  # type: ignore[no-untyped-def]
    """Weighted medians (B,) of sorted values: the middle one, or the mean of the middle two."""
    n, n_b = weights.shape
    passed, result, found = np.zeros(n_b, np.int64), np.zeros(n_b), np.zeros(n_b, np.int64)
    for k in range(n):
        for b in range(n_b):
            passed[b] += weights[order[k], b]
            if found[b] == 0 and 2 * passed[b] >= n:
                result[b] += 0.5 * values[k]
                found[b] = 1
            if found[b] == 1 and 2 * passed[b] > n:
                result[b] += 0.5 * values[k]
                found[b] = 2
    return result
