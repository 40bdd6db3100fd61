"""The table of results, and binary-classification metrics that merge exactly over batches and ranks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hpc import durable

FILE = "metrics.json"


class MetricRow(TypedDict):
    """One line of the table of results."""

    metric: str
    sample: str
    """What was measured: a simulation, or all of a split (`test`), as `over_domains` calls them."""
    value: float
    error: float | None
    """One standard deviation, where one is known."""
    unit: str


def metric_row(
    metric: str, sample: str, value: float, error: float | None = None, unit: str = ""
) -> MetricRow:
    """A row of plain Python numbers, whatever numeric types came in."""
    return MetricRow(
        metric=metric,
        sample=sample,
        value=float(value),
        error=None if error is None else float(error),
        unit=unit,
    )


def over_domains(whole: str, domains: Mapping[str, str]) -> dict[str, list[str]]:
    """What averages over boxes are called, and of which boxes each is: of unlike boxes there is none.

    Parameters
    ----------
    whole
        what all boxes are called, such as ``test``.
    domains
        of each box, what it is alike to: the step that made its grids.

    Returns
    -------
    ``{whole: boxes}``, or ``{"<whole> of <domain>": boxes}`` where there is more than one domain.
    """
    groups: dict[str, list[str]] = {}
    for box, domain in domains.items():
        groups.setdefault(domain, []).append(box)
    return {whole if len(groups) == 1 else f"{whole} of {domain}": boxes for domain, boxes in groups.items()}


def save_metrics(out: str | Path, rows: Sequence[MetricRow]) -> None:
    """Write ``out/metrics.json``, atomically.

    Raises
    ------
    ValueError
        where a value or an error is not finite, or a metric appears twice for one sample: leave out what
        could not be measured.
    """
    seen = set()
    for row in rows:
        key = (row["metric"], row["sample"])
        if key in seen:
            raise ValueError(f"metric {key[0]!r} of {key[1]!r} is given twice in {Path(out) / FILE}")
        seen.add(key)
        if not math.isfinite(row["value"]) or not math.isfinite(row["error"] or 0.0):
            raise ValueError(
                f"metric {key[0]!r} of {key[1]!r} is {row['value']} +- {row['error']}: only finite numbers "
                f"go into {Path(out) / FILE}; leave out what could not be measured"
            )
    durable.write_json(Path(out) / FILE, list(rows))


def load_metrics(step: str | Path) -> list[MetricRow]:
    """The rows of a step folder; none where the step wrote none."""
    path = Path(step) / FILE
    return durable.read_json(path) if path.exists() else []


@dataclass(frozen=True)
class Confusion:
    """Counts of a binary classification. They add: ``a + b`` is the confusion of both samples together.

    A ratio with nothing to count (recall without positives) is 0, as in scikit-learn.
    """

    true_positives: int = 0
    false_positives: int = 0
    true_negatives: int = 0
    false_negatives: int = 0

    @classmethod
    def of(cls, predicted: ArrayLike, labels: ArrayLike) -> "Confusion":
        """Confusion of two boolean arrays of one shape."""
        predicted, labels = np.asarray(predicted, bool), np.asarray(labels, bool)
        if predicted.shape != labels.shape:
            raise ValueError(f"predictions have shape {predicted.shape} and labels {labels.shape}")
        both = int(np.count_nonzero(predicted & labels))
        positives, called = int(np.count_nonzero(labels)), int(np.count_nonzero(predicted))
        return cls(both, called - both, labels.size - called - positives + both, positives - both)

    def __add__(self, other: "Confusion") -> "Confusion":
        return Confusion(
            self.true_positives + other.true_positives,
            self.false_positives + other.false_positives,
            self.true_negatives + other.true_negatives,
            self.false_negatives + other.false_negatives,
        )

    @property
    def total(self) -> int:
        return self.true_positives + self.false_positives + self.true_negatives + self.false_negatives

    @property
    def accuracy(self) -> float:
        return _ratio(self.true_positives + self.true_negatives, self.total)

    @property
    def recall(self) -> float:
        return _ratio(self.true_positives, self.true_positives + self.false_negatives)

    @property
    def precision(self) -> float:
        return _ratio(self.true_positives, self.true_positives + self.false_positives)

    def rows(self, sample: str) -> list[MetricRow]:
        """Counts and ratios as rows of the table of results."""
        return [
            metric_row(name, sample, getattr(self, name))
            for name in (
                "true_positives",
                "false_positives",
                "true_negatives",
                "false_negatives",
                "accuracy",
                "recall",
                "precision",
            )
        ]


# Bin edges are uniform in log-odds, so that bins resolve scores near 0 and near 1 as well as around one
# half, and are float32 numbers, so that `score >= threshold` means the same in float32 and float64. One
# half is one.
_LOG_ODDS, _N_BINS = 20.0, 4096
_EDGES: NDArray[np.float64] = np.unique(
    (1 / (1 + np.exp(-np.linspace(-_LOG_ODDS, _LOG_ODDS, _N_BINS + 1)))).astype(np.float32).astype(np.float64)
)
_EDGES = np.concatenate([[0.0], _EDGES[_EDGES < 1.0]])


class ScoreHistogram:
    """Scores in [0, 1] of positives and negatives, counted in narrow bins (1% in odds).

    Everything below is exact for scores rounded down to their bin's edge, whatever the order and partition of
    the sample: add batches, then add histograms, or sum ``counts`` over ranks. Confusions at thresholds on an
    edge (one half and every threshold that `threshold_for_recall` gives) are exact for the scores themselves.

    Attributes
    ----------
    counts : (2, n_bins) int64; negatives, then positives.
    """

    def __init__(self, counts: ArrayLike | None = None) -> None:
        shape = (2, _EDGES.size)
        self.counts: NDArray[np.int64] = np.zeros(shape, np.int64)
        if counts is not None:
            counts = np.asarray(counts)
            if counts.shape != shape:
                raise ValueError(f"a histogram of scores has counts of shape {shape}, not {counts.shape}")
            self.counts += counts.astype(np.int64)

    def add(self, scores: ArrayLike, labels: ArrayLike) -> None:
        """Count a batch: ``scores`` in [0, 1] and boolean ``labels`` of the same shape.

        Raises
        ------
        ValueError
            for scores that are not probabilities (logits, NaN), or shapes that differ.
        """
        scores, labels = np.asarray(scores), np.asarray(labels, bool)
        if scores.shape != labels.shape:
            raise ValueError(f"scores have shape {scores.shape} and labels {labels.shape}")
        if scores.size and not (scores.min() >= 0 and scores.max() <= 1):
            raise ValueError(
                f"scores lie in [{scores.min()}, {scores.max()}]: probabilities in [0, 1] were expected"
            )
        bins = np.searchsorted(_EDGES, scores.ravel(), side="right") - 1
        flat = bins + labels.ravel() * _EDGES.size
        self.counts += np.bincount(flat, minlength=2 * _EDGES.size).reshape(2, -1)

    def __add__(self, other: "ScoreHistogram") -> "ScoreHistogram":
        return ScoreHistogram(self.counts + other.counts)

    def confusion(self, threshold: float = 0.5) -> Confusion:
        """Confusion of ``score >= threshold``.

        Raises
        ------
        ValueError
            where ``threshold`` is not on an edge: it would not be exact; count with `Confusion.of` instead.
        """
        first = int(np.searchsorted(_EDGES, threshold))
        if first == _EDGES.size or _EDGES[first] != threshold:
            raise ValueError(f"threshold {threshold} is not an edge of the histogram; use Confusion.of")
        negatives, positives = self.counts
        return Confusion(
            true_positives=int(positives[first:].sum()),
            false_positives=int(negatives[first:].sum()),
            true_negatives=int(negatives[:first].sum()),
            false_negatives=int(positives[:first].sum()),
        )

    def pr_auc(self) -> float:
        """Area under the precision-recall curve: average precision, the sum of (R_n - R_{n-1}) P_n.

        0 where there are no positives.
        """
        negatives, positives = self.counts[:, ::-1].cumsum(axis=1)
        if positives[-1] == 0:
            return 0.0
        gained = np.diff(positives, prepend=0)
        precision = positives / np.maximum(positives + negatives, 1)
        return float((gained * precision).sum() / positives[-1])

    def platt_line(self) -> tuple[float, float]:
        """Slope and offset of the line that takes the scores' log-odds to those of the labels: the most
        likely one (Platt 1999), with his targets, which keep it finite where a score separates all."""
        from scipy.optimize import minimize

        log_odds = np.append(-_LOG_ODDS, np.log(_EDGES[1:] / (1 - _EDGES[1:])))
        negatives, positives = self.counts.astype(np.float64)
        high, low = (positives.sum() + 1) / (positives.sum() + 2), 1 / (negatives.sum() + 2)
        ones = high * positives + low * negatives
        zeros = (1 - high) * positives + (1 - low) * negatives

        def loss(line: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            z = line[0] * log_odds + line[1]
            value = (ones * np.logaddexp(0, -z) + zeros * np.logaddexp(0, z)).sum()
            slope = (ones + zeros) / (1 + np.exp(-z)) - ones
            total = ones.sum() + zeros.sum()
            return value / total, np.array([(slope * log_odds).sum(), slope.sum()]) / total

        slope, offset = minimize(loss, [1.0, 0.0], jac=True, method="BFGS").x
        return float(slope), float(offset)

    def threshold_for_recall(self, recall: float) -> float:
        """The highest edge at which recall is at least ``recall``.

        Raises
        ------
        ValueError
            where ``recall`` is outside (0, 1] or the sample has no positives.
        """
        if not 0 < recall <= 1:
            raise ValueError(f"a recall of {recall} was asked for: it lies in (0, 1]")
        positives = self.counts[1]
        total = int(positives.sum())
        if total == 0:
            raise ValueError(
                "no threshold can be chosen: the sample has no positives (no voxel with a galaxy); validate "
                "on boxes that have some"
            )
        kept = positives[::-1].cumsum()[::-1]
        return float(_EDGES[np.flatnonzero(kept >= recall * total)[-1]])


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
