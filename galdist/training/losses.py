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


def focal(logits: Tensor, labels: Tensor, positive_weight: float, focusing: float) -> Tensor:
    """Focal loss: `weighted_cross_entropy` times (1 - p)^g, with p the probability that the logits give the
    label (Lin et al. 2017, arXiv:1708.02002, eq. 5, with w/(1 + w) as their alpha), per voxel.

    Its minimum is where `focal_log_odds` are those of the labels plus ln w.
    """
    wrong = torch.where(labels > 0, -logits, logits)  # log-odds of the other label
    return torch.exp(focusing * F.logsigmoid(wrong)) * weighted_cross_entropy(logits, labels, positive_weight)


def focal_log_odds(logits: Tensor, focusing: float) -> Tensor:
    """Log-odds of the labels (plus ln w) at which the focal loss is least at ``logits``, any shape.

    From where its derivative vanishes, (1 - q) L0' + w q L1' = 0, as Charoenphakdee et al. 2021
    (arXiv:2011.09172) have it for w = 1.
    """

    def term(s: Tensor) -> Tensor:
        s = s.clamp(min=-30)  # where it is 1 already
        return torch.log1p(focusing * torch.exp(-s) * F.softplus(s))

    return (1 + focusing) * logits + term(logits) - term(-logits)


def focal_logit(log_odds: float, focusing: float) -> float:
    """The logit whose `focal_log_odds` are given, by bisection."""
    low, high = sorted((0.0, log_odds))
    for _ in range(60):
        middle = 0.5 * (low + high)
        below = focal_log_odds(torch.tensor(middle, dtype=torch.float64), focusing).item() < log_odds
        low, high = (middle, high) if below else (low, middle)
    return low


def dice_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """Sums over the voxels of each sample, ``(batch, 3)``, that `dice` is made of: of p y, p^2 and y."""
    p = torch.sigmoid(logits)
    return torch.stack([values.flatten(1).sum(1) for values in (p * labels, p.square(), labels)], 1)


def dice(sums: Tensor) -> Tensor:
    """1 - (2 sum p y + 1) / (sum p^2 + sum y + 1), from `dice_sums` ``(..., 3)`` (Milletari et al. 2016,
    arXiv:1606.04797, section 3, with a one that keeps empty samples finite).

    For a sample of many voxels it is least at p = min(1, q / D), with q the probability of a label and D the
    Dice coefficient (one minus the loss): a score that ranks voxels as the probability does.
    """
    overlap, squares, labels = sums.unbind(-1)
    return 1 - (2 * overlap + 1) / (squares + labels + 1)


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
