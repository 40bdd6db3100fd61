"""Neighbors of halos: which others lie within a linking length, in a periodic box."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import PositiveFloat, PositiveInt

from galdist.config import StrictModel

_ROWS = 1 << 16  # for which neighbors are sought at a time


class Neighborhood(StrictModel):
    """Which halos are the neighbors of one."""

    linking_length: PositiveFloat = 3.0
    """Greatest distance [Mpc/h]."""
    most: PositiveInt = 32
    """Neighbors of a halo at most: the nearest ones."""


@dataclass(frozen=True)
class Neighbors:
    """Neighbors of n halos, one halo's after the other's, each nearest first."""

    count: NDArray[np.int64]
    """(n,): how many each has."""
    row: NDArray[np.int64]
    """(e,): where each neighbor is in the table."""
    distance: NDArray[np.float32]
    """(e,): from the halo [Mpc/h]."""


class Halos:
    """The halos of a simulation, among which each one has its neighbors.

    Parameters
    ----------
    inputs
        (n, d): what is known of each.
    position
        (n, 3) [Mpc/h], in [0, ``box_size``].
    box_size
        side of the periodic box [Mpc/h].
    """

    def __init__(self, inputs: NDArray[np.float32], position: NDArray[Any], box_size: float) -> None:
        from scipy.spatial import cKDTree

        self.inputs, self.box_size = inputs, box_size
        # Positions that are float32 can be a rounding beyond the box, which the tree does not accept.
        self._points = np.mod(np.asarray(position, np.float64), box_size)
        self._points[self._points >= box_size] = 0.0
        self._tree = cKDTree(self._points, boxsize=box_size)

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def density(self) -> float:
        """Mean number of halos in a (Mpc/h)^3."""
        return float(len(self) / self.box_size**3)

    def neighbors(self, rows: NDArray[np.int64], of: Neighborhood) -> Neighbors:
        """Neighbors of the halos ``rows``; a distance equal to the linking length is within it.

        Raises
        ------
        ValueError
            for a linking length of more than half of the box.
        """
        if of.linking_length > self.box_size / 2:
            raise ValueError(
                f"a linking length of {of.linking_length:g} Mpc/h does not fit into a box of "
                f"{self.box_size:g} Mpc/h: at most half of the box does"
            )
        within = np.nextafter(of.linking_length, np.inf)
        parts = []
        for start in range(0, len(rows), _ROWS):
            some = rows[start : start + _ROWS]
            # A halo finds itself too, though not as the first where others are at its place.
            distance, found = self._tree.query(
                self._points[some], np.arange(1, of.most + 2), distance_upper_bound=within
            )
            others = (found < len(self)) & (found != some[:, None])
            others &= np.cumsum(others, axis=1) <= of.most
            parts.append((others.sum(1), found[others], distance[others].astype(np.float32)))
        if not parts:
            return Neighbors(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
        return Neighbors(*(np.concatenate(each) for each in zip(*parts, strict=True)))
