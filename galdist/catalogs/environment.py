"""The environment of halos: how dense a periodic box is around each of them."""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import PositiveFloat

from galdist.config import StrictModel

_ROWS = 1 << 16  # neighbors are listed for this many halos at a time


class OverdensityConfig(StrictModel):
    """How to compute the column ``overdensity``."""

    radius: PositiveFloat = 3.0
    """Of the sphere [Mpc/h]."""
    weight: str | None = None
    """Column whose sum is the density, such as a mass; by default the density is one of numbers."""


def overdensity(
    position: ArrayLike,
    box_size: float,
    radius: float = 3.0,
    weight: ArrayLike | None = None,
    around: ArrayLike | None = None,
) -> NDArray[np.float64]:
    """Density within ``radius`` over the mean density of the box: 1 on average over places, not objects.

    It is the number of objects, or the sum of their weights, in the sphere around each object, itself
    included, over that expected in a volume as large. So it is measured in TNG300 by Montero-Dorta et al.
    (2020, MNRAS 496, 1182) and de Santi et al. (2022, MNRAS 514, 2463): number density of subhalos within
    3 Mpc/h, normalized by that of the box.

    Parameters
    ----------
    position
        (n, 3) [Mpc/h], in a periodic box.
    box_size
        its side [Mpc/h].
    radius
        at most half of ``box_size``; a distance equal to it is inside.
    weight
        (n,), not negative; 1 by default.
    around
        (m, 3) [Mpc/h]: centers of the spheres; by default the objects themselves.

    Returns
    -------
    array
        (m,) float64.

    Raises
    ------
    ValueError
        for a sphere that does not fit into the box, weights that are not of the objects or sum to nothing.
    """
    from scipy.spatial import cKDTree

    if radius > box_size / 2:
        raise ValueError(
            f"overdensity: a sphere of radius {radius:g} Mpc/h does not fit into a box of {box_size:g} Mpc/h"
        )
    # Positions that are float32 can be a rounding beyond the box, which the tree does not accept.
    points = np.mod(np.asarray(position, np.float64), box_size)
    points[points >= box_size] = 0.0
    centers = points if around is None else np.mod(np.asarray(around, np.float64), box_size)
    tree = cKDTree(points, boxsize=box_size)
    mean = 4 / 3 * np.pi * radius**3 / box_size**3
    if weight is None:
        inside = tree.query_ball_point(centers, radius, return_length=True)
        return np.asarray(inside / (len(points) * mean))
    weights = np.asarray(weight, np.float64)
    if weights.shape != (len(points),) or not weights.sum() > 0 or weights.min() < 0:
        raise ValueError(
            f"overdensity: weights must be {len(points)} numbers that are not negative and not all 0, got "
            f"{weights.shape} that sum to {weights.sum():g}"
        )
    sums = np.empty(len(centers))
    for start in range(0, len(centers), _ROWS):
        lists = tree.query_ball_point(centers[start : start + _ROWS], radius)
        lengths = np.fromiter(map(len, lists), np.int64, len(lists))
        members = np.concatenate([np.asarray(each, np.int64) for each in lists] or [np.empty(0, np.int64)])
        owner = np.repeat(np.arange(len(lists)), lengths)
        sums[start : start + len(lists)] = np.bincount(owner, weights[members], minlength=len(lists))
    return sums / (weights.sum() * mean)
