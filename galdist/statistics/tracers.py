"""The seven tracers: classes of galaxies by stellar mass and color, as surveys select them.

Bins of log10 stellar mass [Msun/h] are <= 9.5, (9.5, 10.5] and > 10.5; of g-i color [mag] <= 0.80 (blue),
(0.80, 1.05] (green) and > 1.05 (red). Of the nine cells, light red galaxies and massive blue ones are too
few to be tracers (Rodrigues et al. 2023, MNRAS 522, 3236).
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

COLUMNS = ("log_stellar_mass", "color_gi")
"""What a tracer is told by."""
MASS_EDGES = (9.5, 10.5)
"""Between bins of log10 stellar mass [Msun/h]; a bin includes its upper edge."""
COLOR_EDGES = (0.80, 1.05)
"""Between bins of g-i color [mag]; a bin includes its upper edge."""
TRACERS = (1, 2, 3, 4, 5, 6, 7)

_TRACER_OF = np.array([[6, 3, 0], [7, 4, 1], [0, 5, 2]], np.int8)  # rows: mass, columns: color


def tracer(log_stellar_mass: ArrayLike, color_gi: ArrayLike) -> NDArray[np.int8]:
    """The tracer of each galaxy: 1 to 7, or 0 for those of none.

    Values are compared in single precision, so that a galaxy on an edge has one tracer in every table.

    Parameters
    ----------
    log_stellar_mass
        of any shape, log10 of stellar mass in Msun/h.
    color_gi
        of the same shape, g-i [mag].

    Raises
    ------
    ValueError
        for columns of different shapes, or values that are not finite.
    """
    mass, color = np.asarray(log_stellar_mass, np.float32), np.asarray(color_gi, np.float32)
    if mass.shape != color.shape:
        raise ValueError(
            f"stellar mass and color are of the same galaxies, but have shapes {mass.shape} and {color.shape}"
        )
    for name, values in (("log_stellar_mass", mass), ("color_gi", color)):
        if bad := int(np.count_nonzero(~np.isfinite(values))):
            raise ValueError(
                f"{name}: {bad} of {values.size} values are not finite; leave those galaxies out"
            )
    row = np.searchsorted(np.array(MASS_EDGES, np.float32), mass, side="left")
    column = np.searchsorted(np.array(COLOR_EDGES, np.float32), color, side="left")
    return np.asarray(_TRACER_OF[row, column], np.int8)


def describe(number: int) -> str:
    """What tracer ``number`` (1 to 7) selects, for tables and figures."""
    row, column = np.argwhere(np.equal(_TRACER_OF, number))[0]
    low, high = MASS_EDGES
    blue, red = COLOR_EDGES
    mass = (f"log M* <= {low:g}", f"{low:g} < log M* <= {high:g}", f"log M* > {high:g}")[row]
    color = (f"g-i <= {blue:.2f}", f"{blue:.2f} < g-i <= {red:.2f}", f"g-i > {red:.2f}")[column]
    return f"{mass}, {color}"


def counts(tracers: ArrayLike) -> NDArray[np.int64]:
    """Galaxies of none (first) and of each tracer, (8,)."""
    return np.bincount(np.asarray(tracers).ravel(), minlength=len(TRACERS) + 1)


def confusion(true: ArrayLike, predicted: ArrayLike) -> NDArray[np.int64]:
    """How many galaxies of each true tracer (row) are predicted to be of each (column), (8, 8); 0 is none.

    Parameters
    ----------
    true, predicted
        (n,) tracers of the same galaxies, as `tracer` gives them.

    Raises
    ------
    ValueError
        for columns of different lengths.
    """
    true, predicted = np.asarray(true, np.int64), np.asarray(predicted, np.int64)
    if true.shape != predicted.shape:
        raise ValueError(
            f"true and predicted tracers are of the same galaxies, but have shapes {true.shape} and "
            f"{predicted.shape}"
        )
    n = len(TRACERS) + 1
    return np.bincount((true * n + predicted).ravel(), minlength=n * n).reshape(n, n)


def rates(confusion: ArrayLike) -> NDArray[np.float64]:
    """Rows of a `confusion` that sum to one: how a true tracer is spread. NaN where there is no galaxy."""
    number = np.asarray(confusion, float)
    total = number.sum(axis=1, keepdims=True)
    spread: NDArray[np.float64] = np.divide(number, total, where=total > 0, out=np.full(number.shape, np.nan))
    return spread
