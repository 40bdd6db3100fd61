"""Half-mass redshifts from merger trees in SubLink's layout."""

from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from universe import REDSHIFTS, write_trees

from galdist.simulations.simulation import SimulationError
from galdist.simulations.trees import find_trees, half_mass_redshift

N_SNAPSHOTS = len(REDSHIFTS)
SCALE_FACTOR = 1 / (1 + REDSHIFTS)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(powers=st.lists(st.floats(0.3, 4), min_size=1, max_size=6), seed=st.integers(0, 100))
def test_mass_that_grows_as_a_power_of_the_scale_factor(
    tmp_path: Path, powers: list[float], seed: int
) -> None:
    """M = M0 a^p has half of it at a = 2^(-1/p); lines between snapshots are off by their spacing^2."""
    histories = [{s: 5e2 * SCALE_FACTOR[s] ** p for s in range(N_SNAPSHOTS)} for p in powers]
    files = write_trees(tmp_path, histories)
    subhalos = np.random.default_rng(seed).permutation(len(powers))
    found = half_mass_redshift(files, subhalos, N_SNAPSHOTS - 1, REDSHIFTS)
    expected = np.maximum(2 ** (-1 / np.array(powers)), SCALE_FACTOR[0])[subhalos]
    np.testing.assert_allclose(1 / (1 + found), expected, atol=2e-3)


def test_the_first_time_counts(tmp_path: Path) -> None:
    """Also where the mass falls below half again, as in an encounter."""
    history = {10: 1.0, 20: 6.0, 30: 2.0, 49: 10.0}
    found = half_mass_redshift(write_trees(tmp_path, [history]), [0], 49, REDSHIFTS)
    a = SCALE_FACTOR[10] + 0.8 * (SCALE_FACTOR[20] - SCALE_FACTOR[10])
    np.testing.assert_allclose(1 / (1 + found), a)


def test_subhalos_in_no_tree_and_other_snapshots(tmp_path: Path) -> None:
    files = write_trees(tmp_path, [{10: 1.0, 49: 4.0}, {10: 3.0, 49: 4.0}])
    found = half_mass_redshift(files, [1, 7, 0], 49, REDSHIFTS)
    assert found[0] == pytest.approx(REDSHIFTS[10]), "half of it was there when it was first seen"
    assert np.isnan(found[1])
    assert 0 < found[2] < REDSHIFTS[10]
    np.testing.assert_allclose(half_mass_redshift(files, [0], 10, REDSHIFTS), REDSHIFTS[10])
    assert half_mass_redshift(files, [], 49, REDSHIFTS).size == 0


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    files = write_trees(tmp_path / "trees", [{49: 1.0}] * 4, n_files=3)
    assert find_trees(tmp_path / "trees") == files
    with pytest.raises(SimulationError, match="snapshots 49 to 49, redshifts are given for 0 to 39"):
        half_mass_redshift(files, [0], 49, REDSHIFTS[:40])
    files[1].unlink()
    with pytest.raises(SimulationError, match=r"tree_extended\.1\.hdf5: this file of the tree is missing"):
        find_trees(tmp_path / "trees")
    with pytest.raises(SimulationError, match="no merger tree here"):
        find_trees(tmp_path)
    with h5py.File(files[0], "r+") as out:
        del out["SubfindID"]
    with pytest.raises(SimulationError, match="field SubfindID is missing"):
        half_mass_redshift(files[:1], [0], 49, REDSHIFTS)
