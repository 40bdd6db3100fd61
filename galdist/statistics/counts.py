"""Counts in cells: how many objects cubes of one size hold, and how the numbers scatter with that size.

For cubes of a regular partition of the box with mean number Nbar and variance s^2 (Peebles 1980, sec. 36)::

    sigma^2 = (s^2 - Nbar) / Nbar^2

is the variance of the density in such cubes without the Poisson part of the counts, 1 / Nbar.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Of the one-point distribution: each number to 10, then wider. Bin n holds what rounds to n.
EDGES: Array = np.unique(np.round(np.concatenate([np.arange(11), np.geomspace(11, 1e6, 51)]))) - 0.5


def in_cells(field: NDArray[Any], side: int) -> Array:
    """Sums of a field (n, n, n) in cubes of ``side`` cells, (n / side,) * 3.

    Raises
    ------
    ValueError
        where cubes do not tile the mesh.
    """
    n = field.shape[0]
    if n % side:
        raise ValueError(f"cubes of {side} cells do not tile a mesh of {n}")
    shape = [size for _ in range(3) for size in (n // side, side)]
    sums: Array = field.astype(np.float64, copy=False).reshape(shape).sum(axis=(1, 3, 5))
    return sums


def counts_in_cells(field: NDArray[Any], sides: Sequence[int]) -> dict[str, Any]:
    """One-point distribution and variance of counts (n, n, n) in cubes of each of ``sides`` cells.

    Returns
    -------
    ``mean`` (s,) number in a cube; ``variance`` (s,) of number over mean, Poisson part included; ``poisson``
    (s,) that part, 1 / mean: 0 for fields with fractions in them, which are no counts; ``distribution`` (s,
    bins) fraction of cubes with a number in the bins of `EDGES`. A field of zeros has a variance of NaN.
    """
    whole = bool(np.all(field == np.rint(field)))
    found: Mapping[str, list[Any]] = {key: [] for key in ("mean", "variance", "poisson", "distribution")}
    for side in sides:
        number = in_cells(field, side)
        mean = float(number.mean())
        found["mean"].append(mean)
        found["variance"].append(float(number.var()) / mean**2 if mean else np.nan)
        found["poisson"].append((1 / mean if whole else 0.0) if mean else np.nan)
        # Sums of fractions can fall short of a half by a rounding.
        found["distribution"].append(np.histogram(number, EDGES)[0] / number.size)
    return {key: np.array(values) for key, values in found.items()}
