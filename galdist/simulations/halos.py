"""Halos of a particle simulation under MPI: friends-of-friends groups and their properties.

A group is whole on one rank (its owner) while its properties are measured. Groups are numbered from the
largest to the smallest; equal ones by the smallest particle ID. Neither the numbers nor the order of sums
depends on the number of ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
from numba import njit

from galdist.constants import GRAVITY
from galdist.simulations.cola import (
    Cosmology,
    Particles,
    friends_of_friends,
    spread,
)

LINKING_LENGTH = 0.2  # mean particle separations
MINIMUM_PARTICLES = 20
ENVIRONMENT_RADIUS = 3.0  # Mpc/h
_SEARCH = 1.6  # spherical overdensities are looked for out to this many R200m of the friends-of-friends mass
_CORE_FRACTION, _CORE_MINIMUM = 0.1, 10  # particles that define a halo's center and its velocity


@dataclass
class Table:
    """Columns: arrays of one length, one in each field of the dataclass."""

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))

    def take(self, rows: np.ndarray) -> Self:
        """Some rows, in the order given."""
        return type(self)(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    @classmethod
    def concatenate(cls, tables: Sequence[Self]) -> Self:
        """The rows of several tables, one table after the other."""
        return cls(**{f.name: np.concatenate([getattr(t, f.name) for t in tables]) for f in fields(cls)})


@dataclass
class Halos(Table):
    """Columns of the groups of this rank (n of them), comoving, at one time.

    Attributes
    ----------
    number
        place in the list of all groups, 0 for the largest.
    identity
        smallest particle ID of the group: the same whatever the number of ranks.
    length
        particles of the group.
    mass
        friends-of-friends mass [Msun/h].
    position, velocity
        (n, 3) of the density peak, by shrinking spheres (Power et al. 2003): Mpc/h; mean peculiar velocity of
        the innermost tenth of the particles [km/s].
    mean_position, mean_velocity
        (n, 3) of all particles of the group.
    mass_200c, radius_200c, mass_200m, radius_200m, mass_500c, radius_500c, mass_top_hat, radius_top_hat
        spherical overdensities around ``position`` of all matter, Msun/h and Mpc/h: first radius, going out,
        where the mean density falls below 200 or 500 times the critical or mean density, or the virial
        density of Bryan & Norman (1998). 0 where the group is nowhere that dense.
    v_max, r_max
        largest circular velocity [km/s] and its radius [Mpc/h].
    velocity_dispersion
        one-dimensional, of the group's particles [km/s].
    half_mass_radius
        of the group's particles around ``position`` [Mpc/h].
    angular_momentum
        (n, 3) specific, around ``position`` [Mpc/h km/s], of physical distances.
    spin
        lambda' of Bullock et al. (2001).
    concentration
        of the NFW profile with the same half-mass radius in units of radius_200m.
    formation_redshift
        redshift at which the main progenitor had half of the particles.
    overdensity
        of the matter outside the group within 3 Mpc/h.
    """

    number: np.ndarray
    identity: np.ndarray
    length: np.ndarray
    mass: np.ndarray
    position: np.ndarray
    velocity: np.ndarray
    mean_position: np.ndarray
    mean_velocity: np.ndarray
    mass_200c: np.ndarray
    radius_200c: np.ndarray
    mass_200m: np.ndarray
    radius_200m: np.ndarray
    mass_500c: np.ndarray
    radius_500c: np.ndarray
    mass_top_hat: np.ndarray
    radius_top_hat: np.ndarray
    v_max: np.ndarray
    r_max: np.ndarray
    velocity_dispersion: np.ndarray
    half_mass_radius: np.ndarray
    angular_momentum: np.ndarray
    spin: np.ndarray
    concentration: np.ndarray
    formation_redshift: np.ndarray
    overdensity: np.ndarray


@dataclass
class Members:
    """Particles of the groups of this rank: those of group i are ``offset[i]:offset[i + 1]``, by ID."""

    offset: np.ndarray
    ids: np.ndarray
    position: np.ndarray
    velocity: np.ndarray


def route(comm: Any, destination: np.ndarray, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    """Send row i of each array to rank ``destination[i]``; rows arrive in the order of the sending ranks."""
    order = np.argsort(destination, kind="stable")
    bounds = np.searchsorted(destination[order], np.arange(comm.size + 1))
    result = []
    for array in arrays:
        ordered = array[order]
        pieces = comm.alltoall([ordered[bounds[r] : bounds[r + 1]] for r in range(comm.size)])
        result.append(np.concatenate(pieces))
    return tuple(result)


def find_halos(
    comm: Any,
    cosmology: Cosmology,
    particles: Particles,
    progenitors: Sequence[tuple[float, np.ndarray]],
    box_size: float,
) -> tuple[np.ndarray, Halos, Members]:
    """Groups of the particles and their properties.

    Parameters
    ----------
    particles
        of this rank, at one time.
    progenitors
        (a, groups) at earlier times, a rising: `friends_of_friends` groups of the same particles.
    box_size
        Mpc/h.

    Returns
    -------
    number
        (n,) int64: group number of each of this rank's particles, -1 outside groups.
    halos
        the groups that this rank owns.
    members
        their particles.
    """
    n_total = comm.allreduce(len(particles.ids))
    a = particles.scale_factor
    particle_mass = cosmology.mean_density * box_size**3 / n_total
    label = friends_of_friends(comm, particles.position, box_size, LINKING_LENGTH, MINIMUM_PARTICLES)
    grouped = np.flatnonzero(label > 0)
    history = np.stack([groups[grouped] for _, groups in progenitors] or [label[grouped]], axis=1)
    owner_label, ids, position, velocity, history = route(
        comm,
        label[grouped] % comm.size,  # nbodykit numbers groups by size: this balances the ranks
        label[grouped],
        particles.ids[grouped],
        particles.position[grouped].astype("f8"),
        particles.velocity[grouped].astype("f8"),
        history,
    )
    order = np.lexsort((ids, owner_label))
    owner_label, ids, position, velocity = owner_label[order], ids[order], position[order], velocity[order]
    history = np.ascontiguousarray(history[order])
    labels, start = np.unique(owner_label, return_index=True)
    length = np.diff(np.append(start, len(ids)))
    identity = ids[start]

    all_labels, all_identities, all_lengths = (
        np.concatenate(comm.allgather(column)) for column in (labels, identity, length)
    )
    ranking = np.lexsort((all_identities, -all_lengths))
    number_of_label = np.full(all_labels.max(initial=0) + 1, -1, "i8")
    number_of_label[all_labels[ranking]] = np.arange(len(ranking))
    number = np.where(label > 0, number_of_label[label], -1)

    mine = np.argsort(number_of_label[labels])
    rows = np.concatenate([np.arange(start[i], start[i] + length[i]) for i in mine] or [np.arange(0)])
    length = length[mine]
    offset = np.concatenate(([0], np.cumsum(length)))
    members = Members(offset, ids[rows], position[rows], velocity[rows])
    history = history[rows]

    own = _group_properties(members.position, members.velocity, offset, box_size)
    center, core_velocity, mean_position, mean_velocity, dispersion, half_mass, momentum = own
    momentum = a * momentum
    formation = _formation_redshift(history, offset, np.array([time for time, _ in progenitors]), a)
    mass = particle_mass * length
    spheres = _spherical_overdensities(comm, cosmology, particles, center, mass, box_size, n_total)
    radius_200m, mass_200m = spheres["radius_200m"], spheres["mass_200m"]
    sphere_mass = cosmology.mean_density * 4 / 3 * np.pi * ENVIRONMENT_RADIUS**3
    overdensity = np.maximum(spheres.pop("mass_environment") - mass, 0.0) / sphere_mass - 1.0

    radius = (3 * mass / (800 * np.pi * cosmology.mean_density)) ** (1 / 3)
    spin = np.linalg.norm(momentum, axis=1) / np.sqrt(2 * GRAVITY * mass * (a * radius))
    halos = Halos(
        number=number_of_label[labels[mine]],
        identity=identity[mine],
        length=length,
        mass=mass,
        position=center,
        velocity=core_velocity,
        mean_position=mean_position,
        mean_velocity=mean_velocity,
        velocity_dispersion=dispersion,
        half_mass_radius=half_mass,
        angular_momentum=momentum,
        spin=spin,
        concentration=_nfw_concentration(spheres.pop("half_mass_radius_200m"), radius_200m, mass_200m),
        formation_redshift=formation,
        overdensity=overdensity,
        **spheres,
    )
    return number, halos, members


def _spherical_overdensities(
    comm: Any,
    cosmology: Cosmology,
    particles: Particles,
    center: np.ndarray,
    mass: np.ndarray,
    box_size: float,
    n_total: int,
) -> dict[str, np.ndarray]:
    """Masses, radii and circular velocity around this rank's centers, from all particles of all ranks."""
    particle_mass = cosmology.mean_density * box_size**3 / n_total
    a, position = particles.scale_factor, particles.position
    critical = cosmology.critical_density(a)
    Omega_m = cosmology.mean_density / critical
    x = Omega_m - 1.0
    top_hat = 18 * np.pi**2 + 82 * x - 39 * x**2  # Bryan & Norman (1998), eq. 6
    thresholds = critical * np.array([200.0, 200.0 * Omega_m, 500.0, top_hat])
    radius = _SEARCH * (3 * mass / (800 * np.pi * cosmology.mean_density)) ** (1 / 3)
    margin = max(*comm.allgather(float(radius.max(initial=0.0))), ENVIRONMENT_RADIUS)

    there = spread(comm, box_size, center, 0.0)
    here = spread(comm, box_size, position, margin)
    n_cells = min(round(n_total ** (1 / 3)), 512)  # about a particle each
    local, first = _chain(here.exchange(position).astype("f8"), box_size, n_cells)
    result = _profiles(
        local,
        first,
        n_cells,
        there.exchange(center),
        there.exchange(radius),
        box_size,
        thresholds / particle_mass,
    )
    result = there.gather(result, mode="any")
    names = ("200c", "200m", "500c", "top_hat")
    table = {f"mass_{name}": particle_mass * result[:, i] for i, name in enumerate(names)}
    table |= {f"radius_{name}": result[:, 4 + i] for i, name in enumerate(names)}
    table["v_max"] = np.sqrt(GRAVITY * particle_mass * result[:, 8] / a)
    table["r_max"] = result[:, 9]
    table["half_mass_radius_200m"] = result[:, 10]
    table["mass_environment"] = particle_mass * result[:, 11]
    return table


def _chain(position: np.ndarray, box_size: float, n_cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions sorted by cell, and the first row of each cell (one more at the end)."""
    cell = np.minimum((position * (n_cells / box_size)).astype("i8"), n_cells - 1)
    index = (cell[:, 0] * n_cells + cell[:, 1]) * n_cells + cell[:, 2]
    first = np.concatenate(([0], np.cumsum(np.bincount(index, minlength=n_cells**3))))
    return position[np.argsort(index, kind="stable")], first


@njit(cache=True)
def _profiles(
    position: np.ndarray,
    first: np.ndarray,
    n_cells: int,
    center: np.ndarray,
    radius: np.ndarray,
    box_size: float,
    thresholds: np.ndarray,
) -> np.ndarray:  # pragma: no cover - compiled
    """Rows of (N x 4, R x 4, max N/r, its r, half-mass radius of the second N, N in the environment).

    ``thresholds`` are number densities; ``radius`` is how far each center's particles are looked for.
    """
    n_thresholds = len(thresholds)
    result = np.zeros((len(center), 2 * n_thresholds + 4))
    cell_size = box_size / n_cells
    buffer = np.empty(1024)
    for h in range(len(center)):
        reach = int(np.ceil(max(radius[h], ENVIRONMENT_RADIUS) / cell_size))
        span = min(2 * reach + 1, n_cells)
        n = 0
        limit = radius[h] ** 2
        base = (center[h] / cell_size).astype(np.int64) - reach
        for i in range(span):
            ci = (base[0] + i) % n_cells
            for j in range(span):
                cj = (base[1] + j) % n_cells
                for k in range(span):
                    cell = (ci * n_cells + cj) * n_cells + (base[2] + k) % n_cells
                    for p in range(first[cell], first[cell + 1]):
                        r2 = 0.0
                        for d in range(3):
                            x = position[p, d] - center[h, d]
                            x -= box_size * np.rint(x / box_size)
                            r2 += x * x
                        if r2 < ENVIRONMENT_RADIUS**2:
                            result[h, 2 * n_thresholds + 3] += 1.0
                        if r2 < limit:
                            if n == len(buffer):
                                buffer = np.concatenate((buffer, np.empty(n)))
                            buffer[n] = r2
                            n += 1
        r = np.sqrt(np.sort(buffer[:n]))
        for t in range(n_thresholds):
            for m in range(_CORE_MINIMUM, n + 1):
                # between particle m and m+1 the mean density of m particles falls through the threshold
                edge = (3.0 * m / (4.0 * np.pi * thresholds[t])) ** (1.0 / 3.0)
                if edge < r[m - 1]:
                    break  # already below it at the m-th particle
                if m == n or edge < r[m]:
                    result[h, t] = m
                    result[h, n_thresholds + t] = edge
                    break
        for m in range(_CORE_MINIMUM, n + 1):
            if m / r[m - 1] > result[h, 2 * n_thresholds]:
                result[h, 2 * n_thresholds] = m / r[m - 1]
                result[h, 2 * n_thresholds + 1] = r[m - 1]
        inside = int(result[h, 1])
        if inside > 0:
            result[h, 2 * n_thresholds + 2] = 0.5 * (r[(inside - 1) // 2] + r[inside // 2])
    return result


@njit(cache=True)
def _group_properties(
    position: np.ndarray, velocity: np.ndarray, offset: np.ndarray, box_size: float
) -> tuple:  # pragma: no cover - compiled
    """The first columns of `Halos` that need the particles of the groups alone."""
    n_groups = len(offset) - 1
    center = np.zeros((n_groups, 3))
    core_velocity = np.zeros((n_groups, 3))
    mean_position = np.zeros((n_groups, 3))
    mean_velocity = np.zeros((n_groups, 3))
    dispersion = np.zeros(n_groups)
    half_mass = np.zeros(n_groups)
    momentum = np.zeros((n_groups, 3))
    for g in range(n_groups):
        n = offset[g + 1] - offset[g]
        origin = position[offset[g]]
        x = position[offset[g] : offset[g + 1]] - origin
        x -= box_size * np.rint(x / box_size)
        v = velocity[offset[g] : offset[g + 1]]
        mean = np.zeros(3)
        for d in range(3):
            mean[d] = x[:, d].mean()
            mean_velocity[g, d] = v[:, d].mean()
        core = max(_CORE_MINIMUM, int(_CORE_FRACTION * n))
        peak = mean.copy()
        r2 = ((x - peak) ** 2).sum(axis=1)
        limit = r2.max()
        while True:  # a sphere shrinks by 5% around the mean of what it holds
            limit *= 0.95**2
            inside = np.flatnonzero(r2 <= limit)
            if len(inside) < core:
                break
            for d in range(3):
                peak[d] = x[inside, d].mean()
            r2 = ((x - peak) ** 2).sum(axis=1)
        order = np.argsort(r2, kind="mergesort")
        half_mass[g] = np.sqrt(r2[order[n // 2]])
        for d in range(3):
            core_velocity[g, d] = v[order[:core], d].mean()
            center[g, d] = (origin[d] + peak[d]) % box_size
            mean_position[g, d] = (origin[d] + mean[d]) % box_size
        total = np.zeros(3)
        variance = 0.0
        for p in range(n):
            a = x[p] - peak
            b = v[p] - mean_velocity[g]
            variance += (b**2).sum()
            total[0] += a[1] * b[2] - a[2] * b[1]
            total[1] += a[2] * b[0] - a[0] * b[2]
            total[2] += a[0] * b[1] - a[1] * b[0]
        momentum[g] = total / n
        dispersion[g] = np.sqrt(variance / (3 * n))
    return center, core_velocity, mean_position, mean_velocity, dispersion, half_mass, momentum


def _formation_redshift(
    history: np.ndarray, offset: np.ndarray, scale_factors: np.ndarray, now: float
) -> np.ndarray:
    """Redshift at which the largest progenitor had half of each group's particles.

    The progenitor at an earlier time is the group there that holds most of the particles of the group of
    ``now``; its fraction grows from 0 at a=0 to 1 at ``now`` and is interpolated linearly in a between the
    times that are known.
    """
    a_known = np.concatenate(([0.0], scale_factors, [now]))
    fraction = np.ones((len(offset) - 1, len(a_known)))
    fraction[:, 0] = 0.0
    if len(scale_factors):
        _largest_shares(history, offset, fraction[:, 1:-1])
    first = np.argmax(fraction >= 0.5, axis=1)  # first time at which half is assembled
    rows = np.arange(len(fraction))
    low, high = fraction[rows, first - 1], fraction[rows, first]
    a = a_known[first - 1] + (0.5 - low) / (high - low) * (a_known[first] - a_known[first - 1])
    return 1.0 / a - 1.0


@njit(cache=True)
def _largest_shares(
    history: np.ndarray, offset: np.ndarray, shares: np.ndarray
) -> None:  # pragma: no cover - compiled
    for g in range(len(offset) - 1):
        for t in range(history.shape[1]):
            labels = np.sort(history[offset[g] : offset[g + 1], t])
            best = 0
            run = 0
            for i in range(len(labels)):
                run = run + 1 if i > 0 and labels[i] == labels[i - 1] else 1
                if labels[i] > 0 and run > best:
                    best = run
            shares[g, t] = best / len(labels)


def _nfw_concentration(half_mass_radius: np.ndarray, radius: np.ndarray, mass: np.ndarray) -> np.ndarray:
    """c of the NFW profile (Navarro, Frenk & White 1997) with this half-mass radius, 0.1 to 50."""
    c = np.geomspace(0.1, 50.0, 600)

    def enclosed(x: np.ndarray) -> np.ndarray:
        return np.log1p(x) - x / (1 + x)

    x = np.geomspace(1e-3, 50.0, 4000)
    ratio = np.interp(0.5 * enclosed(c), enclosed(x), x) / c  # falls with c
    measured = np.divide(half_mass_radius, radius, out=np.full(len(radius), ratio[0]), where=mass > 0)
    return np.interp(measured, ratio[::-1], c[::-1])
