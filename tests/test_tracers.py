"""The seven tracers: the table of the definition, its edges, counts and confusion."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix

from galdist.statistics.tracers import TRACERS, confusion, counts, describe, rates, tracer

# Rodrigues et al. 2023: tracer -> mass interval (low, high], color interval (low, high].
INF = float("inf")
DEFINITION = {
    1: ((9.5, 10.5), (1.05, INF)),
    2: ((10.5, INF), (1.05, INF)),
    3: ((-INF, 9.5), (0.80, 1.05)),
    4: ((9.5, 10.5), (0.80, 1.05)),
    5: ((10.5, INF), (0.80, 1.05)),
    6: ((-INF, 9.5), (-INF, 0.80)),
    7: ((9.5, 10.5), (-INF, 0.80)),
}


def by_hand(mass, color):
    mass, color = np.float32(mass), np.float32(color)
    for number, ((low, high), (blue, red)) in DEFINITION.items():
        if np.float32(low) < mass <= np.float32(high) and np.float32(blue) < color <= np.float32(red):
            return number
    return 0


masses = st.floats(7, 13) | st.sampled_from([9.5, 10.5])
colors = st.floats(-1, 2) | st.sampled_from([0.8, 1.05])


@given(st.lists(st.tuples(masses, colors), min_size=1, max_size=30))
def test_tracers_are_those_of_the_definition_in_any_precision(galaxies):
    mass, color = np.array(galaxies).T
    found = tracer(mass, color)
    assert found.dtype == np.int8
    assert found.tolist() == [by_hand(*galaxy) for galaxy in galaxies]
    np.testing.assert_array_equal(tracer(mass.astype("f4"), color.astype("f4")), found)


def test_an_edge_belongs_to_the_lower_bin():
    grid = np.array([[9.5, 10.5, 10.6]] * 3), np.array([[0.8] * 3, [1.05] * 3, [1.06] * 3])
    assert tracer(*grid).tolist() == [[6, 7, 0], [3, 4, 5], [0, 1, 2]]


def test_selections_are_told_in_words():
    assert describe(3) == "log M* <= 9.5, 0.80 < g-i <= 1.05"
    assert describe(2) == "log M* > 10.5, g-i > 1.05"
    assert len({describe(number) for number in TRACERS}) == 7


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="color_gi: 1 of 2 values are not finite"):
        tracer([10.0, 10.0], [0.5, np.nan])
    with pytest.raises(ValueError, match="log_stellar_mass: 1 of 1"):
        tracer([-np.inf], [0.5])
    with pytest.raises(ValueError, match=r"\(2,\) and \(1,\)"):
        tracer([10.0, 10.0], [0.5])
    with pytest.raises(ValueError, match="same galaxies"):
        confusion([1, 2], [1])


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=100))
def test_confusion_is_that_of_scikit_learn(pairs):
    true, predicted = np.array(pairs, np.int8).T
    found = confusion(true, predicted)
    np.testing.assert_array_equal(found, confusion_matrix(true, predicted, labels=range(8)))
    np.testing.assert_array_equal(found.sum(axis=1), counts(true))
    np.testing.assert_array_equal(found.sum(axis=0), counts(predicted))
    total = rates(found).sum(axis=1)
    np.testing.assert_array_equal(np.isnan(total), counts(true) == 0)
    np.testing.assert_allclose(total[counts(true) > 0], 1)


def test_numbers_are_near_the_published_ones(shared_data):
    """Of the 15% test set of Rodrigues et al. 2023; the table here is an emulation of theirs."""
    import pandas

    table = pandas.read_parquet(shared_data / "tng300_centrals.parquet", columns=["smass", "color"])
    found = 0.15 * counts(tracer(table["smass"], table["color"]))[1:]
    published = np.array([1497, 1942, 1777, 2300, 482, 11172, 6908])
    assert np.abs(found / published - 1)[[0, 2, 3, 5, 6]].max() < 0.1
    assert found.argmin() == published.argmin()  # massive green galaxies: the emulation has half as many
