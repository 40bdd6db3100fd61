"""Losses of sparse targets, per voxel, and of quantiles, per value.

None of them is normalized by what a batch happens to hold (the sum of its weights, its number of galaxies):
means over ranks then equal the mean over the whole batch, so that 2 ranks train as 1 does.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def weighted_cross_entropy(logits: Tensor, labels: Tensor, positive_weight: float) -> Tensor:
    """Binary cross-entropy with class weights [1, w]/(1 + w) (Zhang et al. 2019, arXiv:1902.05965), per
    voxel.

    Parameters
    ----------
    logits
        log-odds of the positive class, any shape.
    labels
        0 or 1, as floats of the same shape.
    positive_weight
        w; 80 in the paper.

    Returns
    -------
    Tensor of the same shape; its minimum is where the log-odds are those of the labels plus ln w.
    """
    weights = (1 + (positive_weight - 1) * labels) / (1 + positive_weight)
    return weights * F.binary_cross_entropy_with_logits(logits, labels, reduction="none")


def weighted_squared_error(predicted: Tensor, counts: Tensor, nonempty_weight: float) -> Tensor:
    """Squared error with weight w on voxels that hold something and 1 elsewhere, per voxel."""
    weights = 1 + (nonempty_weight - 1) * (counts > 0).to(predicted.dtype)
    return weights * (predicted - counts).square()


def unweighted_mean(mean: Tensor, occupied: Tensor, nonempty_weight: float) -> Tensor:
    """Mean count, from the mean f that the weighted squared error teaches.

    That error is least at f = w m / (1 - q + w q), with m the mean count and q the probability that the voxel
    holds anything: voxels with galaxies are counted w times.
    """
    return mean * (1 + (nonempty_weight - 1) * occupied) / nonempty_weight


def pinball(predicted: Tensor, true: Tensor, levels: Tensor) -> Tensor:
    """Pinball (quantile) loss max(l e, (l - 1) e) with e = true - predicted (Koenker & Bassett 1978).

    Parameters
    ----------
    predicted, true
        values, of shapes that broadcast.
    levels
        l in (0, 1), of a shape that broadcasts with theirs.

    Returns
    -------
    Tensor of the broadcast shape. Its mean is least where ``predicted`` is the quantile at level l; twice its
    mean over l ~ U(0, 1) is the continuous ranked probability score.
    """
    error = true - predicted
    return torch.maximum(levels * error, (levels - 1) * error)
