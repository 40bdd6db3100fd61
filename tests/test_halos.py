"""Halos: planted ones are found where they are, as heavy as they are."""

from importlib.util import find_spec

import numpy as np
import pytest

from galdist.constants import CRITICAL_DENSITY
from galdist.simulations import cola, halos
from hpc import mpi

pytestmark = pytest.mark.skipif(
    find_spec("nbodykit") is None, reason="nbodykit is not installed: run `make setup`"
)
BOX = 32.0
COSMOLOGY = cola.Cosmology()


def nfw(rng, n, radius, c):
    """n positions and the enclosed mass profile of an NFW halo of concentration c, cut at its radius."""
    x = np.geomspace(1e-4, c, 5000)
    mass = np.log1p(x) - x / (1 + x)
    r = np.interp(rng.uniform(0, 1, n), mass / mass[-1], x) * radius / c
    direction = rng.normal(size=(n, 3))
    return direction / np.linalg.norm(direction, axis=1)[:, None] * r[:, None]


@pytest.fixture(scope="module")
def planted():
    """Three NFW halos, 200 times denser than the mean, among 32^3 particles; one across the box's edge."""
    rng = np.random.default_rng(4)
    centers = np.array([[0.1, 16.0, 31.95], [10.0, 10.0, 10.0], [20.0, 25.0, 5.0]])
    lengths, concentration = np.array([4000, 1500, 400]), np.array([5.0, 8.0, 12.0])
    n_total = 32**3
    background = rng.uniform(0, BOX, (n_total - lengths.sum(), 3))
    density = n_total / BOX**3
    radius = (3 * lengths / (800 * np.pi * density)) ** (1 / 3)
    pieces = [
        c + nfw(rng, n, r, k) for c, n, r, k in zip(centers, lengths, radius, concentration, strict=True)
    ]
    velocity = [
        rng.normal(0, 200, (n, 3)) + v
        for n, v in zip(lengths, ([300, 0, 0], [0, -100, 0], [0, 0, 50]), strict=True)
    ]
    position = np.concatenate([*pieces, background]) % BOX
    velocity = np.concatenate([*velocity, rng.normal(0, 50, background.shape)])
    particles = cola.Particles(1.0, np.arange(n_total), position, velocity)
    # history: the first halo had 60% in one piece at a=0.6 and 30% at a=0.3; the others were whole at a=0.3
    now = np.repeat([1, 2, 3, 0], [*lengths, len(background)])
    late, early = now.copy(), now.copy()
    late[:4000] = np.where(np.arange(4000) < 2400, 1, 0)
    early[:4000] = np.where(np.arange(4000) < 1200, 1, 0)
    number, found, members = halos.find_halos(
        mpi.world(), COSMOLOGY, particles, [(0.3, early), (0.6, late)], BOX
    )
    return particles, centers, lengths, radius, concentration, number, found, members


def test_groups(planted):
    particles, _, lengths, _, _, number, found, members = planted
    assert len(found) >= 3
    assert (found.number == np.arange(len(found))).all()
    assert (np.diff(found.length) <= 0).all()
    np.testing.assert_allclose(found.length[:3], lengths, rtol=0.12)
    assert (np.bincount(number[number >= 0]) == found.length).all()
    for i in range(len(found)):
        ids = members.ids[members.offset[i] : members.offset[i + 1]]
        assert (np.diff(ids) > 0).all()
        assert found.identity[i] == ids[0]
        assert (number[ids] == i).all()
    assert (members.position == particles.position[members.ids]).all()


def test_centers_and_velocities(planted):
    _, centers, _, radius, _, _, found, _ = planted
    offset = (found.position[:3] - centers + BOX / 2) % BOX - BOX / 2
    assert (np.linalg.norm(offset, axis=1) < 0.06 * radius).all()
    np.testing.assert_allclose(found.mean_velocity[0], [300, 0, 0], atol=15)
    assert (found.position >= 0).all()
    assert (found.position < BOX).all()
    np.testing.assert_allclose(found.velocity_dispersion[:3], 200, rtol=0.06)


def test_spherical_overdensities(planted):
    _, _, lengths, radius, concentration, _, found, _ = planted
    np.testing.assert_allclose(found.radius_200m[:3], radius, rtol=0.03)
    mass = found.mass[0] / found.length[0] * lengths
    np.testing.assert_allclose(found.mass_200m[:3], mass, rtol=0.06)
    for i, (m, r, c) in enumerate(zip(mass, radius, concentration, strict=True)):
        x = np.geomspace(1e-3, 1, 10_000) * c
        profile = (np.log1p(x) - x / (1 + x)) / (np.log1p(c) - c / (1 + c)) * m
        enclosed = profile / (4 / 3 * np.pi * (x / c * r) ** 3)
        for name, threshold in (("200c", 200.0), ("500c", 500.0)):
            edge = np.flatnonzero(enclosed > threshold * CRITICAL_DENSITY)[-1]
            assert getattr(found, f"radius_{name}")[i] == pytest.approx(x[edge] / c * r, rel=0.06)
            assert getattr(found, f"mass_{name}")[i] == pytest.approx(profile[edge], rel=0.12)
        v_max = np.sqrt(halos.GRAVITY * (profile / (x / c * r)).max())
        assert found.v_max[i] == pytest.approx(v_max, rel=0.06)
        assert found.concentration[i] == pytest.approx(c, rel=0.3)


def test_formation_redshift(planted):
    found = planted[6]
    assert found.formation_redshift[0] == pytest.approx(1 / 0.5 - 1, abs=0.05)  # half between 30% and 60%
    np.testing.assert_allclose(
        found.formation_redshift[1:3], 1 / 0.15 - 1, rtol=0.02
    )  # whole at 0.3: half at 0.15


def test_environment_leaves_the_halo_out(planted):
    particles, *_, found, _ = planted
    for i in range(3):
        offset = (particles.position - found.position[i] + BOX / 2) % BOX - BOX / 2
        inside = (np.linalg.norm(offset, axis=1) < halos.ENVIRONMENT_RADIUS).sum() - found.length[i]
        mean = 4 / 3 * np.pi * halos.ENVIRONMENT_RADIUS**3 * 32**3 / BOX**3
        assert found.overdensity[i] == pytest.approx(inside / mean - 1, abs=1e-9)


def test_no_halos_in_a_lattice():
    position = (np.indices((16, 16, 16)).reshape(3, -1).T + 0.5) * 2.0
    particles = cola.Particles(1.0, np.arange(16**3), position, np.zeros_like(position))
    number, found, members = halos.find_halos(mpi.world(), COSMOLOGY, particles, [], BOX)
    assert (number == -1).all()
    assert len(found) == 0
    assert (members.offset == [0]).all()
