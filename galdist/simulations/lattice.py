"""The lattice that a simulation's particles started from: their sites, by their IDs, and how far they moved.

IDs number the sites of n^3 particles one after the other, from any first number on. Two orders are in use.
Row by row, z fastest, as the simulations of this program; and tile by tile, the tiles z fastest and within
each a lattice of 16^3, 32^3 or 64^3 sites, where the initial conditions are of a program that repeats a small
file of sites (2LPTic, N-GenIC: GlassFile, GlassTileFac). Which one it is, and whether z or x is fastest
within a tile, is found: in a wrong order particles are anywhere in the box, in the right one near their
sites.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from galdist.simulations.simulation import Simulation, SimulationError

_TILES = (16, 32, 64)  # sides of those that are repeated
_PART = 1 << 19  # IDs read at a time
_SAMPLE = 1 << 12  # particles that show the order, in each of some places of the files
_PLACES = 32
_FAR = 0.2  # rms distance to a site along an axis, in boxes; of particles that are anywhere it is 0.29


@dataclass(frozen=True)
class Lattice:
    """Sites of particles by their IDs. Site (i, j, k) is at (i, j, k) box_size / side: sites elsewhere in
    their cells show as a displacement that all particles share."""

    side: int
    """Sites along each side of the box."""
    first: int
    """The lowest ID."""
    tile: int
    """Sites along each side of a block that is numbered as a whole; ``side`` where there is one."""
    x_fastest: bool = False
    """Within a block; by default z is."""

    def sites(self, ids: NDArray[np.integer]) -> NDArray[np.int64]:
        """Site (n, 3) of each particle, in the order x, y, z."""
        number = ids.astype(np.int64) - self.first
        block, within = np.divmod(number, self.tile**3)
        inside = _unravel(within, self.tile)
        if self.x_fastest:
            inside = inside[:, ::-1]
        return _unravel(block, self.side // self.tile) * self.tile + inside

    def displacements(
        self, sites: NDArray[np.int64], positions: NDArray[np.floating], box_size: float
    ) -> NDArray[np.float32]:
        """How far particles are from their sites, the shortest way around the box (n, 3) [Mpc/h]."""
        moved = positions.astype(np.float64) - sites * (box_size / self.side)
        return (moved - box_size * np.round(moved / box_size)).astype(np.float32)


def _unravel(number: NDArray[np.int64], side: int) -> NDArray[np.int64]:
    return np.stack([number // side**2, number // side % side, number % side], axis=1)


def find_lattice(simulation: Simulation) -> Lattice:
    """The lattice of the dark matter of a simulation. Reads all IDs, and some of the positions.

    Raises
    ------
    SimulationError
        where the particles are not as many as a lattice has, their IDs do not follow one another, or all of
        the known orders leave them anywhere in the box.
    """
    n_particles = simulation.n_particles()
    side = round(n_particles ** (1 / 3))
    where = f"{simulation.name} ({simulation.particle_files[0].parent})"
    if side**3 != n_particles or not n_particles:
        raise SimulationError(f"{where}: {n_particles} particles are no cubic lattice, so they have no sites")
    first, last = _range_of_ids(simulation)
    if last - first + 1 != n_particles:
        raise SimulationError(
            f"{where}: IDs from {first} to {last} of {n_particles} particles do not follow one another, so "
            "they do not number a lattice"
        )
    ids, positions = _sample(simulation)
    found: dict[float, Lattice] = {}
    for tile in (side, *(tile for tile in _TILES if tile < side and side % tile == 0)):
        for x_fastest in (False, True):
            lattice = Lattice(side, first, tile, x_fastest)
            moved = lattice.displacements(lattice.sites(ids), positions, simulation.box_size)
            rms = np.sqrt(np.square(moved, dtype=np.float64).mean(axis=0)).max() / simulation.box_size
            found.setdefault(float(rms), lattice)
    if min(found) > _FAR:
        raise SimulationError(
            f"{where}: IDs do not number a lattice in any order that is known (row by row, or by tiles of "
            f"{', '.join(map(str, _TILES))} sites a side): particles would be {min(found):.2f} boxes (rms) "
            "from their sites"
        )
    return found[min(found)]


def _range_of_ids(simulation: Simulation) -> tuple[int, int]:
    low, high = [], []
    for file in simulation.particle_files:
        n_rows = simulation.n_particles_in(file)
        for start in range(0, n_rows, _PART):
            ids = simulation.particles(file, ("id",), start, min(start + _PART, n_rows))["id"]
            low.append(int(ids.min()))
            high.append(int(ids.max()))
    return min(low), max(high)


def _sample(simulation: Simulation) -> tuple[NDArray[np.integer], NDArray[np.floating]]:
    """IDs and positions from all over the files, for what lies together in them lies together in the box."""
    parts = []
    places = max(_PLACES // len(simulation.particle_files), 1)
    for file in simulation.particle_files:
        n_rows = simulation.n_particles_in(file)
        parts += [
            simulation.particles(file, ("id", "position"), start, start + _SAMPLE)
            for start in np.linspace(0, max(n_rows - _SAMPLE, 0), places).astype(int).tolist()
        ]
    ids = np.concatenate([part["id"] for part in parts])
    return ids, np.concatenate([part["position"] for part in parts])
