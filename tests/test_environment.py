"""Overdensity in a periodic box, against counts by hand, an analytic case and a table of somebody else's."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galdist.catalogs.environment import overdensity

BOX = 20.0


def brute_force(position: np.ndarray, box_size: float, radius: float, weight: np.ndarray) -> np.ndarray:
    separation = np.abs(position[:, None] - position[None])
    separation = np.minimum(separation, box_size - separation)
    inside = (separation**2).sum(axis=2) <= radius**2
    mean = weight.sum() / box_size**3
    return (inside * weight).sum(axis=1) / (mean * 4 / 3 * np.pi * radius**3)


@pytest.mark.parametrize("radius", [1.0, 3.0, 10.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_counts_by_hand(radius: float, weighted: bool) -> None:
    rng = np.random.default_rng(1)
    position = np.concatenate([rng.uniform(0, BOX, (300, 3)), rng.normal(0, 1, (100, 3)) % BOX])
    weight = 10 ** rng.uniform(10, 14, 400) if weighted else np.ones(400)
    found = overdensity(position, BOX, radius, weight if weighted else None)
    np.testing.assert_allclose(found, brute_force(position, BOX, radius, weight), rtol=1e-10)


def test_a_uniform_box_has_the_mean_density_and_oneself() -> None:
    n, radius = 20_000, 3.0
    volume = 4 / 3 * np.pi * radius**3
    expected_count = n * volume / 50.0**3
    found = overdensity(np.random.default_rng(2).uniform(0, 50, (n, 3)), 50.0, radius)
    # Oneself is certain to be there, the others are where chance puts them.
    expected = (1 + (n - 1) * volume / 50.0**3) / expected_count
    # Spheres that overlap are not independent: about as many are as fit into the box.
    assert found.mean() == pytest.approx(expected, abs=4 / np.sqrt(expected_count * 50.0**3 / volume))
    assert found.var() == pytest.approx(1 / expected_count, rel=0.2)
    around = overdensity(
        np.random.default_rng(2).uniform(0, 50, (n, 3)), 50.0, radius, around=np.zeros((1, 3))
    )
    assert around[0] == pytest.approx(1, abs=5 / np.sqrt(expected_count))


def test_objects_near_a_face_feel_those_beyond_it() -> None:
    position = np.array([[0.1, 5, 5], [19.9, 5, 5], [10, 5, 5]])
    mean = 3 * 4 / 3 * np.pi / BOX**3
    np.testing.assert_allclose(overdensity(position, BOX, 1.0) * mean, [2, 2, 1])


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    shift=st.tuples(*[st.floats(-100, 100, allow_nan=False)] * 3),
    axes=st.permutations([0, 1, 2]),
    weighted=st.booleans(),
    scale=st.floats(1e-3, 1e12),
)
def test_it_does_not_depend_on_the_frame(
    seed: int, shift: tuple[float, float, float], axes: list[int], weighted: bool, scale: float
) -> None:
    """Nor on the order of the objects, the unit of the weights or rounding to float32."""
    rng = np.random.default_rng(seed)
    # On a mesh finer than rounding, so that no pair is at the edge of a sphere in one frame alone.
    position = rng.integers(0, 64, (80, 3)) * (BOX / 64) + BOX / 128
    weight = rng.integers(1, 10, 80).astype(float) if weighted else None
    plain = overdensity(position, BOX, 3.01, weight)
    order = rng.permutation(80)
    moved = np.mod(position[order][:, axes] + shift, BOX).astype(np.float32)
    other = overdensity(moved, BOX, 3.01, None if weight is None else weight[order] * scale)
    np.testing.assert_allclose(other, plain[order], rtol=1e-9)


def test_galaxies_of_astrid(shared_data) -> None:
    """The table's own overdensity: without oneself, minus 1."""
    import pandas

    table = pandas.read_parquet(shared_data / "camels_astrid_galaxies.parquet")
    for _, galaxies in [*table.groupby("sim")][:5]:
        position = galaxies[["pos_x", "pos_y", "pos_z"]].to_numpy() / 1e3
        mean = len(galaxies) * 4 / 3 * np.pi * 3**3 / 25**3
        np.testing.assert_allclose(
            overdensity(position, 25.0) - 1 / mean - 1, galaxies["overdensity3"], rtol=1e-4, atol=1e-5
        )


def test_what_cannot_be() -> None:
    position = np.full((4, 3), 1.0)
    with pytest.raises(ValueError, match="does not fit into a box of 5 Mpc/h"):
        overdensity(position, 5.0, 3.0)
    for weight in (np.ones(3), np.zeros(4), np.array([1, 1, 1, -1.0])):
        with pytest.raises(ValueError, match="weights must be 4 numbers"):
            overdensity(position, BOX, 3.0, weight)
