"""Dark-matter universes by COLA, with pmesh under MPI, and what is measured on their particle meshes.

COLA (COmoving Lagrangian Acceleration; Tassev, Zaldarriaga & Eisenstein 2013, arXiv:1301.0322) integrates
only the difference between a particle's path and its path in second-order Lagrangian perturbation theory
(2LPT), so that large scales are right whatever the number of time steps.

The particles of a rank are those of its part of the initial lattice, for the whole run; forces come from a
mesh that pmesh distributes. nbodykit and pmesh are imported inside functions: importing nbodykit sets Dask's
scheduler to synchronous for the whole process.
"""

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from galdist.constants import CRITICAL_DENSITY, HUBBLE
from galdist.statistics import require_nbodykit

_N_LPT = -2.5  # exponent of the time-stepping ansatz, the value of Tassev et al. (2013), section A.3


@dataclass(frozen=True)
class Cosmology:
    """Flat LCDM; all at z=0, ``h`` = H0 / (100 km/s/Mpc), ``sigma_8`` linear."""

    Omega_m: float = 0.3
    sigma_8: float = 0.8
    Omega_b: float = 0.049
    h: float = 0.6711
    n_s: float = 0.9624

    def hubble(self, a: Any) -> Any:
        """E(a) = H(a)/H0 without radiation."""
        return np.sqrt(self.Omega_m * np.asarray(a) ** -3.0 + 1.0 - self.Omega_m)

    def age(self, a: float) -> float:
        """Age of the universe in units of today's, without radiation."""
        ratio = (1.0 - self.Omega_m) / self.Omega_m
        return float(np.arcsinh(np.sqrt(ratio) * a**1.5) / np.arcsinh(np.sqrt(ratio)))

    def critical_density(self, a: float) -> float:
        """Comoving critical density [(Msun/h)/(Mpc/h)^3]: that of ``a`` times a^3."""
        return CRITICAL_DENSITY * (self.Omega_m + (1.0 - self.Omega_m) * a**3)

    @property
    def mean_density(self) -> float:
        """Comoving mean matter density [(Msun/h)/(Mpc/h)^3]."""
        return CRITICAL_DENSITY * self.Omega_m


class Growth:
    """First- and second-order growth of flat LCDM, from their differential equations.

    With T = Q d/da and Q = a^3 E(a) (Tassev et al. 2013, section A.1): T^2[D1] = 3/2 Omega_m a D1 and T^2[D2]
    = 3/2 Omega_m a (D2 - D1^2). D1(a=1) = 1; D2 is about -3/7 D1^2 (Bouchet et al. 1995, A&A 296, 575).
    """

    def __init__(self, cosmology: Cosmology):
        from scipy.integrate import solve_ivp

        self.cosmology = cosmology
        start = np.log(1e-3)

        def derivatives(ln_a: float, y: np.ndarray) -> list[float]:
            a = np.exp(ln_a)
            Q_over_a = a**2 * float(cosmology.hubble(a))
            D1, T1, D2, T2 = y
            source = 1.5 * cosmology.Omega_m * a / Q_over_a
            return [T1 / Q_over_a, source * D1, T2 / Q_over_a, source * (D2 - D1**2)]

        a = np.exp(start)  # deep in matter domination: D1 = a, D2 = -3/7 a^2
        q = a**3 * float(cosmology.hubble(a))
        solution = solve_ivp(
            derivatives,
            (start, 0.0),
            [a, q, -3 / 7 * a**2, -6 / 7 * a * q],
            method="DOP853",
            rtol=1e-10,
            atol=1e-14,
            dense_output=True,
        )
        self._solution = solution.sol
        self._norm = solution.y[0, -1]

    def _get(self, a: float, column: int, order: int) -> float:
        return float(self._solution(np.log(a))[column] / self._norm**order)

    def D1(self, a: float) -> float:
        """First-order growth factor, 1 at a=1."""
        return self._get(a, 0, 1)

    def T_D1(self, a: float) -> float:
        """Q dD1/da."""
        return self._get(a, 1, 1)

    def D2(self, a: float) -> float:
        """Second-order growth factor (negative)."""
        return self._get(a, 2, 2)

    def T_D2(self, a: float) -> float:
        """Q dD2/da."""
        return self._get(a, 3, 2)

    def kick(self, a_from: float, a_to: float, a_force: float) -> float:
        """Factor of the force T^2[x] at ``a_force`` that takes T[x] to ``a_to`` (eq. A.15)."""
        slope = _N_LPT * a_force ** (_N_LPT - 1) * a_force**3 * float(self.cosmology.hubble(a_force))
        return (a_to**_N_LPT - a_from**_N_LPT) / slope

    def drift(self, a_from: float, a_to: float, a_velocity: float) -> float:
        """Factor of T[x] at ``a_velocity`` that takes x to ``a_to`` (eq. A.15)."""
        from scipy.integrate import quad

        def integrand(a: float) -> float:
            return a ** (_N_LPT - 3) / float(self.cosmology.hubble(a))

        return quad(integrand, a_from, a_to, epsabs=0.0, epsrel=1e-10)[0] / a_velocity**_N_LPT


Transfer = Literal["CLASS", "EisensteinHu"]


@functools.lru_cache(maxsize=8)
def linear_power(cosmology: Cosmology, transfer: Transfer = "CLASS") -> Callable[[np.ndarray], np.ndarray]:
    """Linear P(k) [(Mpc/h)^3] at z=0 as a function of k [h/Mpc], normalized to ``sigma_8``."""
    require_nbodykit()
    from nbodykit.cosmology import LinearPower

    power = LinearPower(class_cosmology(cosmology), 0.0, transfer)
    power.sigma8 = cosmology.sigma_8
    return power


def class_cosmology(cosmology: Cosmology) -> Any:
    """The cosmology as CLASS knows it (`nbodykit.cosmology.Cosmology`): massless neutrinos, and an amplitude
    of its own."""
    from nbodykit.cosmology import Cosmology as ClassCosmology

    return ClassCosmology(
        h=cosmology.h,
        Omega0_b=cosmology.Omega_b,
        Omega0_cdm=cosmology.Omega_m - cosmology.Omega_b,
        n_s=cosmology.n_s,
        m_ncdm=None,
        N_ur=3.046,
    )


@dataclass
class Particles:
    """The particles of this rank, in the order of their lattice, at one time.

    Attributes
    ----------
    scale_factor
        a of positions and velocities.
    ids
        (n,) int64: index of the particle's lattice site, z fastest; 0 to n_total - 1 over all ranks.
    position
        (n, 3) comoving Mpc/h in [0, box_size).
    velocity
        (n, 3) peculiar km/s.
    between
        whether they are an output between two time steps.
    """

    scale_factor: float
    ids: np.ndarray
    position: np.ndarray
    velocity: np.ndarray
    between: bool = False


def evolve(
    comm: Any,
    cosmology: Cosmology,
    *,
    box_size: float,
    n_particles: int,
    seed: int,
    steps: int,
    mesh_factor: int = 2,
    initial_redshift: float = 19.0,
    dtype: str = "f8",
    transfer: Transfer = "CLASS",
    fixed_amplitude: bool = False,
    inverted_phase: bool = False,
    outputs: Sequence[float] = (),
) -> Iterator[Particles]:
    """Run COLA from 2LPT at ``initial_redshift`` to z=0, and yield the particles at the start, after each
    step, and at ``outputs``.

    Steps are equal in a, and outputs do not change them: for one between two steps the particles of the step
    before drift as far, and are kicked by the force that acts there. The white noise depends on ``seed``
    alone: another number of ranks gives the same particles, and another ``n_particles`` the same large-scale
    modes.

    Parameters
    ----------
    comm
        communicator; every rank calls this and takes every item.
    box_size
        Mpc/h.
    n_particles
        a side: ``n_particles**3`` in all.
    mesh_factor
        force mesh cells a side for each particle a side.
    dtype
        "f8", or "f4" for half the memory.
    fixed_amplitude
        every mode has its mean amplitude and only a random phase (Angulo & Pontzen 2016, arXiv:1603.05253).
    inverted_phase
        the phases of the paired simulation: the initial field with the opposite sign.
    outputs
        scale factors.
    """
    require_nbodykit()
    from pmesh.pm import ParticleMesh

    growth = Growth(cosmology)
    lattice = ParticleMesh(Nmesh=[n_particles] * 3, BoxSize=box_size, dtype=dtype, comm=comm)
    delta = _initial_density(
        lattice, linear_power(cosmology, transfer), seed, fixed_amplitude, inverted_phase
    )
    psi1, psi2 = _displacements(lattice, delta)
    position, ids = lattice.generate_uniform_particle_grid(shift=0.0, dtype=dtype, return_id=True)
    del lattice, delta
    force = _ForceMesh(
        ParticleMesh(Nmesh=[n_particles * mesh_factor] * 3, BoxSize=box_size, dtype=dtype, comm=comm)
    )

    a_steps = np.linspace(1.0 / (1.0 + initial_redshift), 1.0, steps + 1)
    a = float(a_steps[0])
    position = (position + growth.D1(a) * psi1 + growth.D2(a) * psi2).astype(dtype)
    _wrap(position, box_size)
    residual = np.zeros_like(psi1)  # T[x] minus that of 2LPT

    def accelerate(position: np.ndarray, a: float) -> np.ndarray:
        acceleration = force(position)
        acceleration -= growth.D1(a) * psi1
        acceleration -= (growth.D2(a) - growth.D1(a) ** 2) * psi2
        acceleration *= 1.5 * cosmology.Omega_m * a
        return acceleration

    def drift(a: float, a_to: float, a_velocity: float) -> np.ndarray:
        moved = position + growth.drift(a, a_to, a_velocity) * residual
        moved += (growth.D1(a_to) - growth.D1(a)) * psi1
        moved += (growth.D2(a_to) - growth.D2(a)) * psi2
        _wrap(moved, box_size)
        return moved

    def velocity(residual: np.ndarray, a: float) -> np.ndarray:
        result = residual + growth.T_D1(a) * psi1 + growth.T_D2(a) * psi2
        result *= HUBBLE / a  # a dx/dt with T[x] = a^3 E dx/da
        return result

    for step, a_value in enumerate(a_steps):
        a = float(a_value)
        acceleration = accelerate(position, a)
        if step > 0:
            residual += growth.kick(0.5 * (a_steps[step - 1] + a), a, a) * acceleration
        yield Particles(a, ids, position, velocity(residual, a))
        if step == steps:
            return
        a_next = float(a_steps[step + 1])
        a_middle = 0.5 * (a + a_next)
        residual += growth.kick(a, a_middle, a) * acceleration
        for a_out in sorted(time for time in outputs if a < time < a_next):
            there = drift(a, a_out, a_middle)
            kicked = residual + growth.kick(a_middle, a_out, a_out) * accelerate(there, a_out)
            yield Particles(a_out, ids, there, velocity(kicked, a_out), between=True)
        position = drift(a, a_next, a_middle)


def friends_of_friends(
    comm: Any, position: np.ndarray, box_size: float, linking_length: float, minimum: int
) -> np.ndarray:
    """Group of each particle, by nbodykit's FOF (Davis et al. 1985).

    Parameters
    ----------
    position
        (n, 3) Mpc/h, the particles of this rank.
    linking_length
        in units of the mean particle separation.
    minimum
        smaller groups are dropped.

    Returns
    -------
    (n,) int64: a number that the particles of one group share, over all ranks; 0 outside groups.
    """
    require_nbodykit()
    from nbodykit.algorithms.fof import FOF
    from nbodykit.source.catalog import ArrayCatalog

    catalog = ArrayCatalog({"Position": position.astype("f8")}, BoxSize=[box_size] * 3, comm=comm)
    logging.getLogger("FOF").setLevel(logging.WARNING)  # two lines a call
    # nbodykit keeps groups of more than nmin particles
    return FOF(catalog, linking_length, nmin=minimum - 1).labels.astype("i8")


def spread(comm: Any, box_size: float, position: np.ndarray, margin: float) -> Any:
    """Layout that sends points to the ranks whose part of the box, widened by ``margin`` [Mpc/h], holds them.

    ``.exchange(array)`` sends, ``.gather(array, mode="any")`` brings results back.
    """
    require_nbodykit()
    from pmesh.domain import GridND

    return GridND.uniform([box_size] * 3, comm=comm).decompose(position, smoothing=margin)


def _initial_density(
    lattice: Any, power: Callable[[np.ndarray], np.ndarray], seed: int, fixed: bool, inverted: bool
) -> Any:
    """Linear density of z=0 on the lattice, in Fourier space."""
    volume = float(np.prod(lattice.BoxSize))

    def color(k: Any, value: np.ndarray) -> np.ndarray:
        k2 = k.normp(2, zeromode=1.0)
        return value * np.sqrt(power(np.sqrt(k2).ravel()).reshape(k2.shape) / volume)

    noise = lattice.generate_whitenoise(seed, unitary=fixed, invertphase=inverted, mean=0)
    return noise.apply(color, out=Ellipsis)


def _displacements(lattice: Any, delta: Any) -> tuple[np.ndarray, np.ndarray]:
    """Psi1, Psi2 (n, 3): x = q + D1 Psi1 + D2 Psi2 (Bouchet et al. 1995)."""
    size = lattice.create("real").size
    psi1 = np.empty((size, 3), lattice.dtype)
    for axis in range(3):
        psi1[:, axis] = _inverse_gradient(delta, axis).c2r(out=Ellipsis).value.ravel()

    def derivative(i: int, j: int) -> np.ndarray:
        def filter(k: Any, value: np.ndarray) -> np.ndarray:
            return value * (k[i] * k[j] / k.normp(2, zeromode=1.0))

        return delta.apply(filter).c2r(out=Ellipsis).value

    source = lattice.create("real")
    xx, yy, zz = (derivative(i, i) for i in range(3))
    source.value[...] = xx * yy + xx * zz + yy * zz
    del xx, yy, zz
    for i, j in ((0, 1), (0, 2), (1, 2)):
        source.value[...] -= derivative(i, j) ** 2
    source = source.r2c(out=Ellipsis)
    psi2 = np.empty_like(psi1)
    for axis in range(3):
        psi2[:, axis] = -_inverse_gradient(source, axis).c2r(out=Ellipsis).value.ravel()
    return psi1, psi2


def _inverse_gradient(field: Any, axis: int) -> Any:
    """-grad(inverse Laplacian) of a field in Fourier space, one component."""
    nyquist = np.pi * field.Nmesh[axis] / field.BoxSize[axis]

    def filter(k: Any, value: np.ndarray) -> np.ndarray:
        # i k of the Nyquist wave is not the transform of a real field
        k_axis = np.where(np.abs(k[axis]) < 0.999 * nyquist, k[axis], 0.0)
        return value * (1j * k_axis / k.normp(2, zeromode=1.0))

    return field.apply(filter)


class _ForceMesh:
    """Gravity on a mesh: CIC, the seven-point Laplacian and the four-point gradient, both as in FastPM (Feng
    et al. 2016, arXiv:1603.00476).

    The gradient vanishes at the mesh's Nyquist frequency. With ik there, the images of the particle lattice
    that fall beside it (on it, for two cells a particle) push the particles, and structure grows by tens of
    per cent too much where displacements are small against a cell. The Laplacian gives small scales back part
    of what CIC and the gradient take from them: at three cells a particle, 5% more halos of 200 particles
    than with -k^2.
    """

    def __init__(self, mesh: Any):
        self.mesh = mesh
        k = mesh.create_coords("transposedcomplex")
        cell = mesh.BoxSize / mesh.Nmesh
        laplacian = sum((2.0 / h * np.sin(0.5 * k[i].astype("f8") * h)) ** 2 for i, h in enumerate(cell))
        laplacian[laplacian == 0.0] = np.inf
        self._green = (1.0 / laplacian).astype(mesh.dtype)
        complex_type = np.result_type(mesh.dtype, "c8")
        self._gradient = [
            (1j * (8.0 * np.sin(k[i] * h) - np.sin(2.0 * k[i] * h)) / (6.0 * h)).astype(complex_type)
            for i, h in enumerate(cell)
        ]

    def __call__(self, position: np.ndarray) -> np.ndarray:
        """-grad(inverse Laplacian of delta) at the particles, (n, 3)."""
        layout = self.mesh.decompose(position)
        density = self.mesh.paint(position, layout=layout)
        density.value[...] *= float(np.prod(self.mesh.Nmesh)) / self.mesh.comm.allreduce(len(position))
        potential = density.r2c(out=Ellipsis)  # its mean goes with the Laplacian's zero mode
        potential.value[...] *= self._green
        force = np.empty_like(position)
        component = self.mesh.create("transposedcomplex")
        for axis, gradient in enumerate(self._gradient):
            np.multiply(potential.value, gradient, out=component.value)
            force[:, axis] = component.c2r(out=Ellipsis).readout(position, layout=layout)
        return force


def _wrap(position: np.ndarray, box_size: float) -> None:
    np.mod(position, box_size, out=position)
    position[position >= box_size] = 0.0  # a tiny negative number wraps to the box size itself
