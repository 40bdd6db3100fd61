"""Mass assignment against the definition of the schemes, and what must hold of every one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from galdist.grids.mass_assignment import REACH, Scheme, _jump_about, assign

SCHEMES: tuple[Scheme, ...] = ("ngp", "cic", "tsc")
BOX = 25.0


def particles(n: int, seed: int = 0, dtype: str = "f4") -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, BOX * (1 - 1e-6), (n, 3)).astype(dtype)


def window(scheme: str, d: np.ndarray) -> np.ndarray:
    """Share of a cell whose center is ``d`` cells below the particle (Hockney & Eastwood 1988, 5-3)."""
    if scheme == "ngp":
        return np.where((d >= -0.5) & (d < 0.5), 1.0, 0.0)
    d = np.abs(d)
    if scheme == "cic":
        return np.maximum(1 - d, 0)
    return np.where(d < 0.5, 0.75 - d**2, np.where(d < 1.5, 0.5 * (1.5 - d) ** 2, 0))


def reference(positions: np.ndarray, n_mesh: int, scheme: str, weights: np.ndarray) -> np.ndarray:
    """Every particle against every cell, with the nearest periodic image."""
    centers = np.arange(n_mesh) + 0.5
    shares = []
    for axis in (2, 1, 0):
        d = positions[:, axis, None].astype("f8") * n_mesh / BOX - centers
        shares.append(window(scheme, (d + n_mesh / 2) % n_mesh - n_mesh / 2))
    return np.einsum("pz,py,px,p->zyx", *shares, weights)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_follows_the_definition(scheme: Scheme, dtype: str) -> None:
    positions, weights = particles(300, dtype=dtype), np.random.default_rng(1).uniform(1, 3, 300)
    positions[:2] = [[0, BOX * 0.51, BOX * (1 - 1e-7)], [0.01, 0.01, 24.99]]  # across the periodic faces
    found = assign(positions, BOX, 10, scheme, weights)
    np.testing.assert_allclose(found, reference(positions, 10, scheme, weights), atol=2e-8)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_particle_at_a_center_is_seen_alike_along_every_axis(scheme: Scheme) -> None:
    mesh = assign(np.array([[4.5, 5.5, 6.5]]), 10.0, 10, scheme)
    assert np.unravel_index(mesh.argmax(), mesh.shape) == (6, 5, 4), "index order is z, y, x"
    around = mesh[4:9, 3:8, 2:7]
    np.testing.assert_array_equal(around, around.transpose(2, 1, 0))
    assert (mesh > 0).sum() == {"ngp": 1, "cic": 1, "tsc": 27}[scheme]


@settings(max_examples=40, deadline=None)
@given(
    scheme=st.sampled_from(SCHEMES),
    n_mesh=st.integers(3, 20),
    positions=npst.arrays(
        "f4",
        st.tuples(st.integers(0, 50), st.just(3)),
        elements=st.floats(0, 24.875, width=32, allow_subnormal=False),
    ),
)
def test_mass_is_conserved_and_nothing_is_negative(
    scheme: Scheme, n_mesh: int, positions: np.ndarray
) -> None:
    weights = np.linspace(1, 2, len(positions))
    mesh = assign(positions, BOX, n_mesh, scheme, weights)
    assert mesh.min(initial=0) >= 0
    assert mesh.sum() == pytest.approx(weights.sum(), rel=1e-7)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_order_of_particles_does_not_matter_to_the_last_bit(scheme: Scheme) -> None:
    positions = particles(100_000)
    mesh = assign(positions, BOX, 64, scheme)
    np.testing.assert_array_equal(assign(positions[::-1], BOX, 64, scheme), mesh)
    parts = assign(positions[:33_333], BOX, 64, scheme)
    np.testing.assert_array_equal(assign(positions[33_333:], BOX, 64, scheme, out=parts), mesh)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_particles_that_jump_about_are_sorted_first_with_the_same_result(scheme: Scheme) -> None:
    positions, weights = particles(60_000), np.random.default_rng(2).uniform(1, 2, 60_000)
    blocks = (positions * 16 / BOX).astype(int)
    in_order = np.lexsort((blocks[:, 1], blocks[:, 2]))
    assert _jump_about(positions, BOX, 128)
    assert not _jump_about(positions[in_order], BOX, 128)
    for share in (None, weights):
        ordered = None if share is None else share[in_order]
        np.testing.assert_allclose(
            assign(positions, BOX, 128, scheme, share),
            assign(positions[in_order], BOX, 128, scheme, ordered),
            rtol=0 if share is None else 1e-12,
        )


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("thickness", [3, 8, 16])
def test_slabs_make_the_box(scheme: Scheme, thickness: int) -> None:
    positions = particles(5_000)
    whole = assign(positions, BOX, 24, scheme)
    slabs = []
    for first in range(0, 24, thickness):
        slab = np.zeros((min(thickness, 24 - first), 24, 24))
        low, high = first - REACH[scheme], first + len(slab) + REACH[scheme]
        z = positions[:, 2] * 24 / BOX
        near = ((z >= low) & (z <= high)) | (z - 24 >= low) | (z + 24 <= high)
        slabs.append(assign(positions[near], BOX, 24, scheme, out=slab, first_plane=first))
    np.testing.assert_array_equal(np.concatenate(slabs), whole)


@pytest.mark.parametrize("scheme", ["cic", "tsc"])
def test_center_of_mass_stays(scheme: Scheme) -> None:
    """First moments are kept by the schemes that are continuous."""
    positions = np.random.default_rng(3).uniform(5, 20, (100, 3))
    mesh = assign(positions, BOX, 50, scheme)
    centers = (np.arange(50) + 0.5) * BOX / 50
    found = [np.sum(mesh.sum(axis=tuple({0, 1, 2} - {2 - axis})) * centers) / 100 for axis in range(3)]
    np.testing.assert_allclose(found, positions.mean(axis=0), rtol=1e-7)


def test_momentum_of_moving_particles() -> None:
    positions, velocity = particles(1000), np.random.default_rng(4).normal(0, 300, (1000, 3))
    mass = 6.5e9
    momentum = [assign(positions, BOX, 16, "cic", mass * velocity[:, axis]) for axis in range(3)]
    np.testing.assert_allclose([m.sum() for m in momentum], mass * velocity.sum(axis=0), rtol=1e-6)


def test_one_weight_for_all() -> None:
    positions = particles(1000)
    np.testing.assert_allclose(
        assign(positions, BOX, 16, "tsc", 2.5), 2.5 * assign(positions, BOX, 16, "tsc")
    )


def test_more_particles_in_a_cell_than_float32_can_count() -> None:
    positions = np.full((2**20, 3), 1.2, "f4")
    mesh = np.zeros((3, 3, 3))
    for _ in range(17):
        assign(positions, 3.0, 3, "ngp", out=mesh)
    assert mesh[1, 1, 1] == 17 * 2**20
    assert np.float32(2**24) + np.float32(1) == 2**24, "which float32 sums would lose"


@pytest.mark.parametrize("value", [-0.1, 25.1, np.nan, np.inf])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_positions_outside_the_box(scheme: Scheme, value: float) -> None:
    positions = particles(40_000)
    positions[17, 1] = value
    with pytest.raises(ValueError, match=r"1 particles are outside the box \[0, 25\]"):
        assign(positions, BOX, 64, scheme)


def test_wrong_arguments() -> None:
    positions = particles(10)
    with pytest.raises(ValueError, match="'pcs' is not one of ngp, cic, tsc"):
        assign(positions, BOX, 8, "pcs")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"positions: \(n, 3\)"):
        assign(positions[:, :2], BOX, 8)
    with pytest.raises(ValueError, match="of int64"):
        assign(positions.astype(int), BOX, 8)
    with pytest.raises(ValueError, match=r"out: contiguous float64 \(nz, 8, 8\) expected"):
        assign(positions, BOX, 8, out=np.zeros((8, 8, 8), "f4"))
    with pytest.raises(ValueError, match=r"weights: 1 or 10"):
        assign(positions, BOX, 8, weights=np.ones(3))
    with pytest.raises(ValueError, match="at least 3 cells"):
        assign(positions, BOX, 2)
