"""Normalizations come back from their inverse; the 48 symmetries are those of the cube."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from galdist.data.transforms import N_SYMMETRIES, Normalization, cube_symmetry


def test_symmetries_are_48_distinct_rigid_motions() -> None:
    field = np.random.default_rng(0).normal(size=(1, 4, 4, 4)).astype(np.float32)
    images = {cube_symmetry(field, s).tobytes() for s in range(N_SYMMETRIES)}
    assert len(images) == N_SYMMETRIES
    assert np.array_equal(cube_symmetry(field, 0), field)
    # rigid: neighbors stay neighbors, so the field's gradient energy is that of the image
    energy = sum(np.square(np.diff(field, axis=axis)).sum() for axis in (1, 2, 3))
    for s in range(N_SYMMETRIES):
        image = cube_symmetry(field, s)
        assert sum(np.square(np.diff(image, axis=axis)).sum() for axis in (1, 2, 3)) == pytest.approx(energy)


def gradient(field: np.ndarray) -> np.ndarray:
    """Periodic central differences of a scalar (1, z, y, x), components in the order x, y, z."""
    return np.concatenate([(np.roll(field, -1, axis) - np.roll(field, 1, axis)) / 2 for axis in (3, 2, 1)])


@given(symmetry=st.integers(0, N_SYMMETRIES - 1), seed=st.integers(0, 1000))
def test_vectors_turn_with_the_cube(symmetry: int, seed: int) -> None:
    field = np.random.default_rng(seed).normal(size=(1, 5, 5, 5)).astype(np.float32)
    turned = cube_symmetry(gradient(field), symmetry)
    np.testing.assert_allclose(turned, gradient(cube_symmetry(field, symmetry)), atol=1e-6)


def test_unknown_symmetry_is_refused() -> None:
    with pytest.raises(ValueError, match="48"):
        cube_symmetry(np.zeros((1, 2, 2, 2), np.float32), 48)


@settings(deadline=None)
@given(
    mean=st.floats(0.01, 1e11),
    seed=st.integers(0, 1000),
    names=st.sampled_from([["log1p"], ["standardize"], ["log1p", "standardize"]]),
)
def test_normalization_is_invertible(mean: float, seed: int, names: list) -> None:
    fields = np.random.default_rng(seed).gamma(0.5, 2 * mean, (3, 500)).astype(np.float32)
    normalization = Normalization(names)
    normalization.fit(lambda: iter(fields))
    y = normalization(torch.from_numpy(fields))
    # float32 keeps what it can of small values beside the largest
    np.testing.assert_allclose(normalization.inverse(y).numpy(), fields, rtol=1e-5, atol=1e-5 * fields.max())
    assert torch.all(torch.diff(y.flatten()[torch.from_numpy(np.argsort(fields, axis=None))]) >= 0)


def test_standardized_training_split_has_zero_mean_and_unit_variance() -> None:
    fields = np.random.default_rng(1).poisson(3.0, (4, 8, 8, 8)).astype(np.float32)
    normalization = Normalization(["log1p", "standardize"])
    normalization.fit(lambda: iter(fields))
    y = normalization(torch.from_numpy(fields))
    assert y.mean().item() == pytest.approx(0, abs=1e-5)
    assert y.std(correction=0).item() == pytest.approx(1, abs=1e-5)


def test_constants_are_saved_with_the_weights() -> None:
    fitted = Normalization(["log1p", "standardize"])
    fitted.fit(lambda: iter([np.arange(100, dtype=np.float32)]))
    loaded = Normalization(["log1p", "standardize"])
    loaded.load_state_dict(fitted.state_dict())
    x = torch.linspace(0, 200, 7)
    assert torch.equal(loaded(x), fitted(x))


def test_fields_that_a_transform_cannot_take_are_refused() -> None:
    with pytest.raises(ValueError, match="positive mean"):
        Normalization(["log1p"]).fit(lambda: iter([np.full(8, -1, np.float32)]))
    with pytest.raises(ValueError, match="varies"):
        Normalization(["standardize"]).fit(lambda: iter([np.ones(8, np.float32)]))
