"""COLA: growth of structure, initial conditions, and the matter power and halos that come out."""

import itertools
from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from galdist.constants import HUBBLE
from galdist.simulations import cola, halos
from hpc import mpi

needs_nbodykit = pytest.mark.skipif(
    find_spec("nbodykit") is None, reason="nbodykit is not installed: run `make setup`"
)
SMALL = {"box_size": 32.0, "n_particles": 32, "seed": 3}


def last(**options):
    """The particles at z=0 of one universe."""
    particles = None
    for particles in cola.evolve(mpi.world(), options.pop("cosmology", cola.Cosmology()), **options):  # noqa: B007
        pass
    return particles


def displacement(particles, box_size, n):
    """(n, n, n, 3) displacement from the lattice."""
    site = np.stack(np.unravel_index(particles.ids, (n, n, n)), axis=1) * (box_size / n)
    offset = (particles.position - site + box_size / 2) % box_size - box_size / 2
    return offset.reshape(n, n, n, 3)


class TestGrowth:
    def test_einstein_de_sitter(self):
        growth = cola.Growth(cola.Cosmology(Omega_m=1.0))
        for a in (0.05, 0.3, 1.0):
            np.testing.assert_allclose(growth.D1(a), a, rtol=1e-6)
            np.testing.assert_allclose(growth.D2(a), -3 / 7 * a**2, rtol=1e-5)
            np.testing.assert_allclose(growth.T_D1(a), a**1.5, rtol=1e-6)

    @given(omega=st.floats(0.1, 0.9), a=st.floats(0.05, 1.0))
    @settings(max_examples=20, deadline=None)
    def test_first_order_is_the_growth_integral(self, omega, a):
        # Heath (1977): without radiation, D is E(a) times the integral of (a E)^-3
        cosmology = cola.Cosmology(Omega_m=omega)

        def heath(a):
            return cosmology.hubble(a) * quad(lambda x: (x * cosmology.hubble(x)) ** -3, 0, a)[0]

        np.testing.assert_allclose(cola.Growth(cosmology).D1(a), heath(a) / heath(1.0), rtol=1e-5)

    def test_second_order_approximation(self):
        # Bouchet et al. (1995): D2 = -3/7 D1^2 Omega(a)^(-1/143), with D1 that is a early on
        cosmology = cola.Cosmology(Omega_m=0.3)
        growth = cola.Growth(cosmology)
        for a in (0.2, 0.6, 1.0):
            omega = 0.3 * a**-3 / cosmology.hubble(a) ** 2
            np.testing.assert_allclose(
                growth.D2(a), -3 / 7 * growth.D1(a) ** 2 * omega ** (-1 / 143), rtol=1e-3
            )

    def test_derivatives(self):
        cosmology = cola.Cosmology()
        growth, a, d = cola.Growth(cosmology), 0.5, 1e-4
        Q = a**3 * cosmology.hubble(a)
        np.testing.assert_allclose(
            growth.T_D1(a), Q * (growth.D1(a + d) - growth.D1(a - d)) / (2 * d), rtol=1e-5
        )
        np.testing.assert_allclose(
            growth.T_D2(a), Q * (growth.D2(a + d) - growth.D2(a - d)) / (2 * d), rtol=1e-5
        )

    def test_kicks_and_drifts_add_up_and_are_those_of_short_steps(self):
        cosmology = cola.Cosmology()
        growth, a, d = cola.Growth(cosmology), 0.4, 1e-5
        assert growth.kick(0.3, 0.5, a) == pytest.approx(growth.kick(0.3, a, a) + growth.kick(a, 0.5, a))
        assert growth.drift(0.3, 0.5, a) == pytest.approx(growth.drift(0.3, a, a) + growth.drift(a, 0.5, a))
        Q = a**3 * cosmology.hubble(a)
        assert growth.kick(a - d, a + d, a) == pytest.approx(2 * d / Q, rel=1e-6)
        assert growth.drift(a - d, a + d, a) == pytest.approx(2 * d / Q, rel=1e-6)


@needs_nbodykit
class TestInitialConditions:
    def test_class_has_the_cosmology_asked_for(self):
        found = cola.class_cosmology(cola.Cosmology(Omega_m=0.31, Omega_b=0.05, h=0.68, n_s=0.95))
        assert (found.h, found.n_s, found.Omega0_b) == pytest.approx((0.68, 0.95, 0.05))
        assert found.Omega0_m == pytest.approx(0.31, rel=1e-6)
        assert found.Omega0_k == pytest.approx(0, abs=1e-9)
        assert found.Omega0_ncdm_tot == 0

    def test_linear_power_has_its_sigma_8(self):
        power = cola.linear_power(cola.Cosmology(sigma_8=0.77))

        def integrand(ln_k):
            k = np.exp(ln_k)
            x = 8 * k
            window = 3 * (np.sin(x) - x * np.cos(x)) / x**3
            return k**3 * power(np.array([k]))[0] * window**2 / (2 * np.pi**2)

        assert quad(integrand, np.log(1e-4), np.log(8), limit=200)[0] ** 0.5 == pytest.approx(0.77, rel=2e-3)

    def test_transfer_functions_agree(self):
        k = np.geomspace(0.01, 5, 20)
        ratio = cola.linear_power(cola.Cosmology(), "EisensteinHu")(k) / cola.linear_power(cola.Cosmology())(
            k
        )
        assert np.abs(ratio - 1).max() < 0.06

    def test_displacements_have_the_linear_power(self):
        n, box, z = 32, 200.0, 99.0
        start = next(
            cola.evolve(
                mpi.world(),
                cola.Cosmology(),
                box_size=box,
                n_particles=n,
                seed=1,
                steps=2,
                initial_redshift=z,
                fixed_amplitude=True,
            )
        )
        psi = np.fft.rfftn(displacement(start, box, n), axes=(0, 1, 2)) / n**3
        modes = (
            2
            * np.pi
            / box
            * np.stack(np.meshgrid(*[np.fft.fftfreq(n, 1 / n)] * 2, np.arange(n // 2 + 1), indexing="ij"), -1)
        )
        k = np.linalg.norm(modes, axis=-1)
        inside = (k > 0) & (k < 0.6 * np.pi * n / box)
        divergence = -1j * (modes * psi).sum(axis=-1)
        growth = cola.Growth(cola.Cosmology()).D1(1 / (1 + z))
        measured = np.abs(divergence[inside]) ** 2 * box**3 / growth**2
        ratio = measured / cola.linear_power(cola.Cosmology())(k[inside])
        assert ratio.mean() == pytest.approx(1.0, abs=0.01)
        assert ratio.std() < 0.1  # every mode has its mean amplitude; the second order is what is left

    def test_large_scales_do_not_depend_on_the_resolution(self):
        fields = []
        for n in (16, 32):
            options = {**SMALL, "n_particles": n, "box_size": 100.0, "steps": 2, "initial_redshift": 99.0}
            start = next(cola.evolve(mpi.world(), cola.Cosmology(), **options))
            waves = np.fft.rfftn(displacement(start, 100.0, n)[..., 0]) / n**3
            fields.append(waves[:4, :4, :4])
        assert np.abs(fields[0] - fields[1]).max() < 0.02 * np.abs(fields[1]).max()

    def test_inverted_phases_are_the_opposite_field(self):
        pair = [
            displacement(
                next(
                    cola.evolve(
                        mpi.world(),
                        cola.Cosmology(),
                        **SMALL,
                        steps=2,
                        initial_redshift=199.0,
                        inverted_phase=inverted,
                    )
                ),
                32.0,
                32,
            )
            for inverted in (False, True)
        ]
        assert np.abs(pair[0] + pair[1]).std() < 0.02 * pair[0].std()

    def test_seeds_differ(self):
        first, second = (
            next(cola.evolve(mpi.world(), cola.Cosmology(), **{**SMALL, "seed": seed}, steps=2))
            for seed in (1, 2)
        )
        assert (
            np.corrcoef(displacement(first, 32.0, 32).ravel(), displacement(second, 32.0, 32).ravel())[0, 1]
            < 0.5
        )


@needs_nbodykit
class TestEvolution:
    def test_linear_growth_of_small_waves(self):
        """Nothing but linear growth happens to tiny fluctuations; the particle lattice must not feed them."""
        n, box, z = 32, 64.0, 19.0
        cosmology = cola.Cosmology(sigma_8=0.02)
        options = {
            "box_size": box,
            "n_particles": n,
            "seed": 5,
            "steps": 10,
            "initial_redshift": z,
            "mesh_factor": 3,
            "outputs": [0.68],  # between two steps
        }
        states = [
            (p.scale_factor, displacement(p, box, n))
            for p in cola.evolve(mpi.world(), cosmology, **options)
            if p.between or p.scale_factor in (1.0, 0.05)
        ]
        assert [a for a, _ in states] == [0.05, 0.68, 1.0]
        growth = cola.Growth(cosmology)
        first, *others = (np.fft.rfftn(state, axes=(0, 1, 2)) for _, state in states)
        k = np.linalg.norm(
            np.stack(np.meshgrid(*[np.fft.fftfreq(n, 1 / n)] * 2, np.arange(n // 2 + 1), indexing="ij")),
            axis=0,
        )
        for low, high, tolerance in (
            (1, 4, 0.01),
            (4, 8, 0.03),
        ):  # of 16, the Nyquist frequency of the particles
            here = (k >= low) & (k < high)
            for (a, _), later in zip(states[1:], others, strict=True):
                ratio = (np.conj(first[here]) * later[here]).real.sum() / (np.abs(first[here]) ** 2).sum()
                assert ratio * growth.D1(1 / (1 + z)) == pytest.approx(growth.D1(a), rel=tolerance)

    def test_outputs_join_the_steps_and_change_nothing(self):
        """Just before and after a step an output is that step's particles."""
        options = {**SMALL, "steps": 4}
        plain = list(cola.evolve(mpi.world(), cola.Cosmology(), **options))
        times = [plain[2].scale_factor * (1 - 1e-9), plain[2].scale_factor * (1 + 1e-9)]
        states = list(cola.evolve(mpi.world(), cola.Cosmology(), **options, outputs=[*times[::-1], 1.0]))
        assert [state.between for state in states] == [False, False, True, False, True, False, False]
        steps = [state for state in states if not state.between]
        for one, other in zip(steps, plain, strict=True):
            assert (one.position == other.position).all()
            assert (one.velocity == other.velocity).all()
        for state in (states[2], states[4]):
            offset = (state.position - plain[2].position + 16.0) % 32.0 - 16.0
            assert np.abs(offset).max() < 1e-6
            np.testing.assert_allclose(state.velocity, plain[2].velocity, atol=1e-4)

    def test_particles_stay_in_the_box_and_keep_their_momentum(self):
        particles = last(**SMALL, steps=5)
        assert (np.sort(particles.ids) == np.arange(32**3)).all()
        assert particles.position.min() >= 0.0
        assert particles.position.max() < 32.0
        assert np.abs(particles.velocity.mean(axis=0)).max() < 1e-8 * particles.velocity.std()

    def test_velocities_are_the_rate_of_the_displacement(self):
        # dx/da = v / (a^2 H): the finite difference of two late outputs, where COLA steps are short
        cosmology = cola.Cosmology()
        states = list(cola.evolve(mpi.world(), cosmology, **SMALL, steps=60))[-3:]
        before, now, after = states
        rate = displacement(after, 32.0, 32) - displacement(before, 32.0, 32)
        rate = ((rate + 16.0) % 32.0 - 16.0) / (after.scale_factor - before.scale_factor)
        a = now.scale_factor
        expected = now.velocity.reshape(rate.shape) / (HUBBLE * a**2 * float(cosmology.hubble(a)))
        assert np.corrcoef(rate.ravel(), expected.ravel())[0, 1] > 0.99
        assert (rate * expected).sum() / (expected**2).sum() == pytest.approx(1.0, abs=0.02)

    def test_single_precision_is_close(self):
        double, single = (last(**SMALL, steps=5, dtype=dtype) for dtype in ("f8", "f4"))
        assert single.position.dtype == "f4"
        offset = (double.position - single.position + 16.0) % 32.0 - 16.0
        assert np.abs(offset).max() < 1e-4 * 32.0


def power_of(particles, box_size, edges, n_mesh=256):
    """Matter power of nbodykit's FFTPower in bins of k, and the mean k of each."""
    from nbodykit.algorithms.fftpower import FFTPower
    from nbodykit.source.catalog import ArrayCatalog

    catalog = ArrayCatalog({"Position": particles.position.astype("f8")}, BoxSize=[box_size] * 3)
    mesh = catalog.to_mesh(Nmesh=n_mesh, resampler="tsc", interlaced=True, compensated=True, dtype="f8")
    power = FFTPower(mesh, mode="1d", dk=edges[1] - edges[0], kmin=edges[0], kmax=edges[-1]).power
    return power["k"], power["power"].real


@needs_nbodykit
@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_matter_power_of_linear_theory_and_halofit():
    """P(k) of a fixed pair in 256 Mpc/h: within 5% of linear to 0.1 h/Mpc, within 10% of HALOFIT to 0.5."""
    from nbodykit.algorithms.fftpower import FFTPower
    from nbodykit.cosmology import HalofitPower
    from nbodykit.source.mesh import LinearMesh

    box, cosmology = 256.0, cola.Cosmology()
    fundamental = 2 * np.pi / box
    edges = np.arange(fundamental / 2, 0.6, 2 * fundamental)
    measured = []
    for inverted in (False, True):
        particles = last(
            box_size=box,
            n_particles=128,
            seed=1,
            steps=15,
            mesh_factor=3,
            dtype="f4",
            fixed_amplitude=True,
            inverted_phase=inverted,
        )
        k, power = power_of(particles, box, edges)
        measured.append(power)
    power = np.mean(measured, axis=0)
    # linear theory in the same bins, with the same finite number of modes
    linear = cola.linear_power(cosmology)
    mesh = LinearMesh(linear, BoxSize=[box] * 3, Nmesh=256, seed=9, unitary_amplitude=True)
    binned = (
        FFTPower(mesh, mode="1d", dk=edges[1] - edges[0], kmin=edges[0], kmax=edges[-1]).power["power"].real
    )
    matched = cola.class_cosmology(cosmology).match(sigma8=cosmology.sigma_8)
    halofit = binned * HalofitPower(matched, 0.0)(k) / linear(k)
    print("k, P/linear, P/HALOFIT:")
    print(np.stack([k, power / binned, power / halofit], axis=1)[k < 0.5].round(4))
    assert np.abs(power / binned - 1)[k < 0.1].max() < 0.05
    assert np.abs(power / halofit - 1)[k < 0.5].max() < 0.10


@needs_nbodykit
@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_halo_mass_function_of_tinker():
    """Number of halos by M200m within 25% of Tinker et al. (2008) above 200 particles, in bins of 0.4 dex."""
    from colossus.cosmology import cosmology as colossus_cosmology
    from colossus.lss import mass_function

    box, n, cosmology = 128.0, 128, cola.Cosmology()
    particle_mass = cosmology.mean_density * (box / n) ** 3
    masses = []
    for inverted in (False, True):
        particles = last(
            box_size=box,
            n_particles=n,
            seed=1,
            steps=20,
            mesh_factor=3,
            dtype="f4",
            fixed_amplitude=True,
            inverted_phase=inverted,
        )
        masses.append(halos.find_halos(mpi.world(), cosmology, particles, [], box)[1].mass_200m)
    mass = np.concatenate(masses)
    colossus_cosmology.setCosmology(
        "test",
        flat=True,
        H0=100 * cosmology.h,
        Om0=cosmology.Omega_m,
        Ob0=cosmology.Omega_b,
        sigma8=cosmology.sigma_8,
        ns=cosmology.n_s,
        relspecies=False,
        persistence="",
    )
    edges = 200 * particle_mass * 10 ** np.arange(0, 2.0, 0.4)
    ratios = []
    for low, high in itertools.pairwise(edges):
        m = np.geomspace(low, high, 50)
        density = mass_function.massFunction(m, 0.0, mdef="200m", model="tinker08", q_out="dndlnM")
        expected = 2 * box**3 * np.trapezoid(density, np.log(m))
        if expected >= 50:  # below, Poisson noise is a good part of the 25%
            ratios.append(((mass >= low) & (mass < high)).sum() / expected)
    print("N / Tinker in bins of 0.4 dex from 200 particles:", np.round(ratios, 3))
    assert len(ratios) >= 3
    assert np.abs(np.array(ratios) - 1).max() < 0.25
