"""Spherical voids of a density on a periodic mesh (Banerjee & Dalal 2016, arXiv:1606.06167, sec. 3).

The density contrast is averaged in spheres, from the largest radius down. At each radius the emptiest place
whose contrast is below a threshold becomes a void, then the next emptiest of which the sphere overlaps with
no void so far, until there is none. A sphere holds the cells whose centers are inside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray
from scipy import fft

Array = NDArray[np.float64]

_SAME = 1e-9  # contrasts that differ by rounding are the same, and the first cell of them comes first


@dataclass(frozen=True)
class Voids:
    """n voids, from the largest down."""

    center: NDArray[np.int64]
    """(n, 3) cell, index order of the mesh."""
    radius: Array
    """(n,) in the units of the radii that were looked for."""


def find_voids(
    field: NDArray[Any], box_size: float, radii: Sequence[float], threshold: float = -0.7
) -> Voids:
    """Voids of a density or of counts (n, n, n).

    Parameters
    ----------
    box_size
        side of the periodic box.
    radii
        of voids, in the units of ``box_size``; each at most a quarter of it.
    threshold
        highest mean density contrast in a void, -1 to 0.

    Raises
    ------
    ValueError
        for radii or thresholds out of range.
    """
    n = field.shape[0]
    cell = box_size / n
    radii = sorted(radii, reverse=True)
    if not radii or not cell <= radii[-1] <= radii[0] <= box_size / 4:
        raise ValueError(
            f"radii of voids are between one cell ({cell:.3g}) and a quarter of the box "
            f"({box_size / 4:.3g}), not {list(radii)}"
        )
    if not -1 < threshold < 0:
        raise ValueError(f"the contrast of a void is between -1 and 0, not below {threshold}")
    density = field.astype(np.float64)
    mean = density.mean()
    if mean == 0:
        return Voids(np.empty((0, 3), np.int64), np.empty(0))
    modes = fft.rfftn(density / mean, overwrite_x=True)
    offset = np.minimum(np.arange(n), n - np.arange(n)) * cell
    distance2 = offset[:, None, None] ** 2 + offset[:, None] ** 2 + offset**2
    centers: list[tuple[int, int, int]] = []
    found: list[float] = []
    for radius in radii:
        sphere = (distance2 <= radius**2 * (1 + 1e-12)).astype(np.float64)
        sphere /= sphere.sum()
        contrast = fft.irfftn(modes * fft.rfftn(sphere), s=(n,) * 3, overwrite_x=True).ravel()
        contrast = np.rint((contrast - 1) / _SAME) * _SAME
        candidates = np.flatnonzero(contrast < threshold)
        candidates = candidates[np.argsort(contrast[candidates], kind="stable")]
        taken = np.zeros((n, n, n), np.bool_)
        for center, size in zip(centers, found, strict=True):
            _mark(taken, center, (radius + size) / cell)
        for place in _choose(taken, candidates, 2 * radius / cell):
            centers.append(tuple(int(i) for i in np.unravel_index(place, taken.shape)))  # type: ignore[arg-type]
            found.append(radius)
    return Voids(np.array(centers, np.int64).reshape(-1, 3), np.array(found))


def void_sizes(voids: Voids, box_size: float, radii: Sequence[float]) -> Array:
    """Number density of voids of each of ``radii``, as they were looked for: (r,) [1 / units^3]."""
    numbers = [np.count_nonzero(voids.radius == radius) for radius in radii]
    return np.array(numbers, float) / box_size**3


@numba.njit(cache=True)
def _choose(taken, candidates, reach):  # type: ignore[no-untyped-def]
    """The first candidates that no earlier one comes nearer to than ``reach`` [cells]."""
    n = taken.shape[0]
    chosen = []
    for place in candidates:
        z, y, x = place // (n * n), place // n % n, place % n
        if not taken[z, y, x]:
            chosen.append(place)
            _mark(taken, (z, y, x), reach)
    return chosen


@numba.njit(cache=True)
def _mark(taken, center, reach):  # type: ignore[no-untyped-def]
    """Mark the cells nearer to a cell than ``reach`` [cells]: spheres there would overlap."""
    n = taken.shape[0]
    most = min(int(np.ceil(reach)), n // 2)
    for dz in range(-most, most + 1):
        for dy in range(-most, most + 1):
            rest = reach * reach * (1 - 1e-12) - dz * dz - dy * dy
            if rest <= 0:
                continue
            for dx in range(-most, most + 1):
                if dx * dx < rest:
                    taken[(center[0] + dz) % n, (center[1] + dy) % n, (center[2] + dx) % n] = True
