"""Whether a model's samples say truly how uncertain they are: TARP (Lemos et al. 2023, arXiv:2302.03026).

For truths of any number of dimensions: a ball around a random reference point reaches to the truth. How many
of the samples lie in it is a rank, and where samples are drawn from the right posterior each rank is equally
likely: a region of credibility c then holds a fraction c of the truths. Ranks of single numbers are in
`galdist.statistics.distributions`.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def ball_ranks(samples: ArrayLike, truth: ArrayLike, rng: np.random.Generator) -> NDArray[np.int64]:
    """Number (n,), 0 to S, of the samples that lie nearer to a random point than their truth does.

    Distances are Euclidean, in units of each dimension's range between truths, over which the points are
    uniform. Where a sample is as far as the truth (counts), chance decides.

    Parameters
    ----------
    samples : (n, S, d)
    truth : (n, d)

    Raises
    ------
    ValueError
        for shapes that do not belong together, or numbers that are not finite.
    """
    samples, truth = np.asarray(samples, float), np.asarray(truth, float)
    if samples.ndim != 3 or truth.ndim != 2 or samples.shape[::2] != truth.shape or samples.shape[1] < 1:
        raise ValueError(f"samples are (n, S, d) and truths (n, d), not {samples.shape} and {truth.shape}")
    if not (np.isfinite(samples).all() and np.isfinite(truth).all()):
        raise ValueError("samples and truths must be finite")
    low, high = truth.min(axis=0), truth.max(axis=0)
    spread = np.where(high > low, high - low, 1.0)
    reference = rng.random(truth.shape)
    each = (((samples - low) / spread - reference[:, None]) ** 2).sum(axis=2)
    reach = (((truth - low) / spread - reference) ** 2).sum(axis=1)[:, None]
    nearer, ties = (each < reach).sum(axis=1), (each == reach).sum(axis=1)
    ranks: NDArray[np.int64] = nearer + rng.integers(0, ties + 1)
    return ranks


def expected_coverage(histogram: ArrayLike, levels: ArrayLike) -> Array:
    """Fraction of the truths in regions of credibility ``levels`` (l,), 0 to 1.

    ``histogram`` (S + 1,) says how often each rank of `ball_ranks` occurred; each stands for an equal share
    of the credibilities. The answer equals ``levels`` for the right posterior. For one that is too narrow it
    is above them at low and below them at high levels, for one that is too wide the other way round.
    """
    histogram = np.asarray(histogram, float)
    cumulative = np.concatenate([[0.0], np.cumsum(histogram)]) / histogram.sum()
    shares = np.linspace(0, 1, cumulative.size)
    return np.asarray(np.interp(np.asarray(levels, float), shares, cumulative))
