"""Balanced training rows, against the smogn package's numbers and what the method promises."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tables import make_tables

from galdist.catalogs.centrals import read_centrals
from galdist.catalogs.smogn import SmognConfig, balance, kinds, relevance, smogn
from galdist.grids.store import StoreError
from galdist.simulations.simulation import SimulationError
from hpc.strict import SettingsError, validate

COLUMNS = ["a", "b", "y"]
CONFIG = SmognConfig(inputs=("a", "b"), targets=("y",))

# Of smogn 0.1.2 (NumPy 1.26, pandas 2.1), k = 7 and pert = 0.04, on the rows of `table`: relevance of sorted
# y, and mean and standard deviation by column of the rows that its `over_sampling` adds to the 74 rare ones
# to make them 300, over 20 seeds; SCATTER is that of the means over the seeds.
RANKS = [0, 50, 100, 200, 299, 400, 500, 550, 599]
RELEVANCE = [1.0, 0.619959, 0.375377, 0.071881, 0.0, 0.0, 0.0, 0.0, 0.0]
N_RARE, N_MADE = 74, 226
MEAN, SCATTER = np.array([8.623, 9.129, 8.022]), np.array([0.0097, 0.0122, 0.0095])
STD = np.array([0.6114, 0.8623, 0.4648])


def table() -> np.ndarray:
    random = np.random.default_rng(3)
    x = random.normal(size=(600, 2))
    y = x[:, 0] + 0.5 * x[:, 1] + 0.4 * random.normal(size=600)
    return np.column_stack([x, y]) + 10


def balanced(rows: np.ndarray, seed: int, config: SmognConfig = CONFIG) -> np.ndarray:
    return balance(rows, COLUMNS, config, np.random.default_rng(seed))


def made_of(rows: np.ndarray, result: np.ndarray) -> np.ndarray:
    real = {tuple(row) for row in rows}
    return np.array([row for row in result if tuple(row) not in real])


def test_relevance_is_that_of_the_package() -> None:
    np.testing.assert_allclose(relevance(np.sort(table()[:, 2]))[RANKS], RELEVANCE, atol=1e-6)


def test_rows_are_made_as_the_package_makes_them() -> None:
    rows = table()
    assert (relevance(rows[:, 2]) >= 0.5).sum() == N_RARE
    many = [made_of(rows, balanced(rows, seed)) for seed in range(30)]
    assert {len(made) for made in many} == {N_MADE}
    mean = np.mean([made.mean(0) for made in many], axis=0)
    assert (np.abs(mean - MEAN) < 3 * SCATTER * (1 / 20 + 1 / 30) ** 0.5).all()
    np.testing.assert_allclose(np.mean([made.std(0, ddof=1) for made in many], axis=0), STD, rtol=0.03)


def test_relevance_of_control_points() -> None:
    points = ((8.75, 0.0), (10.5, 0.2), (11.5, 1.0))
    phi = relevance(np.array([5.0, 8.75, 10.5, 11.5, 14.0]), points)
    np.testing.assert_allclose(phi, [0, 0, 0.2, 1, 1], atol=1e-12)
    between = relevance(np.linspace(8, 12, 200), points)
    assert (np.diff(between) >= -1e-12).all()


def test_sides_without_outliers_are_not_rare() -> None:
    """A hard lower cut, as that of stellar masses, is a low end, but nothing is rare about it."""
    values = np.random.default_rng(0).exponential(size=4000)
    phi = relevance(values)
    assert phi[values < np.median(values)].max() == 0
    assert phi.max() == 1


def test_kinds_are_sides_of_the_rarest_property() -> None:
    targets = np.array([[0.0, 0.0], [-3, 0], [3, 0], [0, -3], [0, 3], [3, 3], [0, 0]])
    rare = np.array([[0, 0], [0.9, 0], [0.9, 0], [0, 0.9], [0, 0.9], [0.6, 0.9], [0.4, 0.4]])
    assert kinds(targets, rare, 0.5).tolist() == [0, 1, 2, 3, 4, 4, 0]


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(200, 900), st.sampled_from([1, 2]))
def test_balance(seed: int, n: int, n_targets: int) -> None:
    random = np.random.default_rng(seed)
    rows = random.standard_t(3, (n, 3))
    config = SmognConfig(inputs=("a", "b"), targets=("y", "b")[:n_targets])
    result = balanced(rows, seed, config)
    assert np.isfinite(result).all()
    assert (result.min(0) >= rows.min(0)).all()
    assert (result.max(0) <= rows.max(0)).all()
    assert abs(len(result) - n) <= 2 * n_targets + 1
    np.testing.assert_array_equal(result, balanced(rows, seed, config))
    assert (balanced(rows, seed + 1, config)[:20] != result[:20]).any()


def test_every_kind_has_as_many_rows() -> None:
    rows = np.random.default_rng(1).standard_t(3, (3000, 3))
    result = balanced(rows, 0)
    phi, (low, high) = relevance(rows[:, 2]), np.quantile(rows[:, 2], (0.25, 0.75))
    edges = rows[phi >= 0.5, 2]
    below, above = edges[edges < low].max(), edges[edges > high].min()
    counts = [(result[:, 2] <= below).sum(), (result[:, 2] >= above).sum()]
    # Some that were made lie just inside the edge, by the noise.
    np.testing.assert_allclose(counts, 1000, rtol=0.1)


def test_made_rows_lie_between_neighbors_or_near_a_row() -> None:
    rows = table()
    made = made_of(rows, balanced(rows, 5))
    rare = rows[relevance(rows[:, 2]) >= 0.5]
    to_rare = np.linalg.norm(made[:, None] - rare, axis=2).min(1)
    spread = np.linalg.norm(rare[:, None] - rare, axis=2)
    assert to_rare.max() < np.median(spread) / 2
    assert np.median(to_rare) > 0


def test_nothing_to_balance() -> None:
    flat = np.random.default_rng(0).uniform(size=(500, 3))
    with pytest.raises(SimulationError, match=r"no row of 500 is rare in y .*change threshold"):
        balanced(flat, 0)
    alone = np.random.default_rng(0).uniform(size=(500, 3))
    alone[0, 2] = 50
    with pytest.raises(SimulationError, match="one row alone of 500 is of its kind"):
        balanced(alone, 0, CONFIG.model_copy(update={"control_points": {"y": ((10.0, 0.0), (20.0, 1.0))}}))


def test_control_points_are_checked() -> None:
    _, problems = validate(SmognConfig, {"control_points": {"y": [[2, 0], [1, 1]]}})
    assert "at increasing values" in str(SettingsError("run", problems))


def test_stage(tmp_path: Path) -> None:
    step, out = make_tables(tmp_path / "halos", (900, 700)), tmp_path / "augmented"
    inputs, targets = ("log_halo_mass", "spin", "Omega_m"), ("log_stellar_mass", "color_gi")
    config = SmognConfig(
        inputs=inputs, targets=targets, control_points={"color_gi": ((0.3, 0), (0.8, 1))}, seed=2
    )
    smogn(config, {"catalogs": [step]}, out)
    for split in ("validation", "test"):
        before, after = (read_centrals([path], [*inputs, *targets], split) for path in (step, out))
        for column in (*inputs, *targets):
            np.testing.assert_array_equal(before.columns[column], after.columns[column])
    before, after = (read_centrals([path], [*inputs, *targets], "train") for path in (step, out))
    assert abs(len(after) - len(before)) < 8
    red = [(rows.columns["color_gi"] > 0.7).mean() for rows in (before, after)]
    assert red[1] > 1.5 * red[0] or red[0] > 0.4
    assert after.units == before.units
    with pytest.raises(StoreError, match="position"):
        read_centrals([out], ["position"], "train")


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    step = make_tables(tmp_path / "halos", (300,))
    with pytest.raises(StoreError, match=r"log_radius.*log_stellar_mass"):
        smogn(
            SmognConfig(inputs=("spin",), targets=("log_stellar_mass", "log_radius")),
            {"catalogs": [step]},
            tmp_path / "out",
        )


def test_real_rows(shared_data: Path) -> None:
    """The rows that the peer needs a day for: 122,000, five inputs, two properties."""
    import pandas

    table = pandas.read_parquet(shared_data / "tng300_centrals.parquet").iloc[:122_000]
    names = ["M_h", "C_h", "z_h", "S_h", "Delta3_h", "smass", "color"]
    config = SmognConfig(inputs=tuple(names[:5]), targets=("smass", "color"))
    rows = table[names].to_numpy(np.float64)
    result = balance(rows, names, config, np.random.default_rng(0))
    assert len(result) == pytest.approx(len(rows), abs=3)
    assert np.isfinite(result).all()
    massive = [(values[:, 5] > 11).mean() for values in (rows, result)]
    assert massive[1] > 3 * massive[0]
