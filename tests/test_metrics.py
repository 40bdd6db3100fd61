import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from galdist.statistics.metrics import (
    Confusion,
    ScoreHistogram,
    load_metrics,
    metric_row,
    save_metrics,
)


def sample(n=20_000, seed=0):
    """Rare positives with better scores, as voxels with galaxies have: probabilities very near 0 and 1."""
    rng = np.random.default_rng(seed)
    labels = rng.random(n) < 0.03
    scores = 1 / (1 + np.exp(-(rng.normal(-4, 3, n) + 5 * labels)))
    return scores.astype(np.float32), labels


def histogram(scores, labels):
    result = ScoreHistogram()
    result.add(scores, labels)
    return result


def test_confusion_equals_scikit_learn():
    scores, labels = sample()
    predicted = scores >= 0.3
    confusion = Confusion.of(predicted, labels)
    (tn, fp), (fn, tp) = sk.confusion_matrix(labels, predicted)
    assert confusion == Confusion(tp, fp, tn, fn)
    assert confusion.accuracy == pytest.approx(sk.accuracy_score(labels, predicted))
    assert confusion.recall == pytest.approx(sk.recall_score(labels, predicted))
    assert confusion.precision == pytest.approx(sk.precision_score(labels, predicted))


def test_histogram_equals_scikit_learn():
    scores, labels = sample()
    counted = histogram(scores, labels)
    assert counted.confusion(0.5) == Confusion.of(scores >= 0.5, labels)
    # Bins of 1% in odds change average precision by less than 1e-3; scores on the edges: see below.
    assert counted.pr_auc() == pytest.approx(sk.average_precision_score(labels, scores), abs=1e-3)


def test_average_precision_is_exact_with_ties():
    rng = np.random.default_rng(1)
    labels = rng.random(500) < 0.2
    scores = rng.choice([0.1, 0.5, 0.9, 1.0, 0.0], 500)
    assert histogram(scores, labels).pr_auc() == pytest.approx(
        sk.average_precision_score(labels, scores), abs=1e-14
    )


@pytest.mark.parametrize("wanted", [0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_threshold_keeps_the_wanted_recall_and_little_more(wanted, dtype):
    scores, labels = sample()
    scores = scores.astype(dtype)
    counted = histogram(scores, labels)
    threshold = counted.threshold_for_recall(wanted)
    exact = Confusion.of(scores >= dtype(threshold), labels)
    assert counted.confusion(threshold) == exact
    assert exact.recall >= wanted
    higher = Confusion.of(scores >= threshold + 0.02 * threshold * (1 - threshold) + 1e-7, labels)
    assert higher.recall < wanted or wanted == 1.0


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), max_size=60), st.integers(0, 60))
def test_histograms_merge_exactly(pairs, cut):
    scores, labels = np.array([s for s, _ in pairs]), np.array([b for _, b in pairs], bool)
    whole = histogram(scores, labels)
    parts = histogram(scores[cut:], labels[cut:]) + histogram(scores[:cut], labels[:cut])
    assert np.array_equal(whole.counts, parts.counts)
    assert whole.counts.sum() == len(pairs)
    assert whole.confusion(0.5) == Confusion.of(scores >= 0.5, labels)
    assert Confusion.of(scores[:cut] >= 0.5, labels[:cut]) + Confusion.of(
        scores[cut:] >= 0.5, labels[cut:]
    ) == whole.confusion(0.5)
    assert 0 <= whole.pr_auc() <= 1
    assert np.array_equal(ScoreHistogram(whole.counts).counts, whole.counts)


def test_perfect_and_empty_samples():
    assert histogram([0.9, 0.1], [True, False]).pr_auc() == 1.0
    empty = ScoreHistogram()
    assert (empty.pr_auc(), empty.confusion().recall, empty.confusion().precision) == (0, 0, 0)
    with pytest.raises(ValueError, match="no positives"):
        empty.threshold_for_recall(0.9)


def test_wrong_scores_are_refused():
    with pytest.raises(ValueError, match=r"probabilities in \[0, 1\]"):
        histogram([3.2, -1.0], [True, False])
    with pytest.raises(ValueError, match="probabilities"):
        histogram([np.nan], [True])
    with pytest.raises(ValueError, match="shape"):
        histogram([0.5], [True, False])
    with pytest.raises(ValueError, match="not an edge"):
        ScoreHistogram().confusion(0.3)
    with pytest.raises(ValueError, match="shape"):
        Confusion.of([True], [True, False])


def test_rows_come_back(tmp_path):
    rows = [
        metric_row("r", "box-1", np.float32(0.5), np.float64(0.25)),
        metric_row("seconds", "box-1", 3, unit="s"),
    ]
    save_metrics(tmp_path, rows)
    assert load_metrics(tmp_path) == rows
    assert load_metrics(tmp_path / "elsewhere") == []


def test_rows_that_mislead_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'r' of 'box-1' is nan"):
        save_metrics(tmp_path, [metric_row("r", "box-1", np.nan)])
    with pytest.raises(ValueError, match="twice"):
        save_metrics(tmp_path, [metric_row("r", "a", 1.0), metric_row("r", "a", 2.0)])
    assert load_metrics(tmp_path) == []
