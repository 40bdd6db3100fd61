"""How much of a quantity is owed to each parameter of the simulations: slopes over many boxes."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def slopes(parameters: ArrayLike, values: ArrayLike) -> tuple[Array, Array]:
    """Least-squares slopes of ``values`` (n,) along ``parameters`` (n, p), all at once, with an intercept.

    Returns
    -------
    slopes (p,) and their standard errors (p,), from the scatter that the parameters leave, which is taken to
    be the same everywhere; n - p - 1 degrees of freedom.

    Raises
    ------
    ValueError
        for fewer than p + 2 values, or parameters that do not vary independently of each other.
    """
    x, y = np.asarray(parameters, float), np.asarray(values, float)
    n, p = x.shape
    x, y = x - x.mean(axis=0), y - y.mean()
    if n < p + 2 or np.linalg.matrix_rank(x) < p:
        raise ValueError(
            f"{n} boxes do not determine the slopes of {p} parameters: at least {p + 2} are needed, in which "
            "each parameter varies independently of the others"
        )
    inverse = np.linalg.inv(x.T @ x)
    slope: Array = inverse @ x.T @ y
    variance = np.sum((y - x @ slope) ** 2) / (n - p - 1)
    return slope, np.sqrt(variance * np.diag(inverse))


def responses(
    parameters: Mapping[str, ArrayLike], values: Mapping[str, ArrayLike], truth: str
) -> dict[str, dict[str, Array]]:
    """Logarithmic slopes d ln value / d ln parameter of each label, and how they differ from the truth's.

    The same boxes are in all of them, with the same initial conditions, so that most of their scatter is
    common. The slopes of ln(value / true value) are the differences of slopes, with errors free of it.

    Parameters
    ----------
    parameters, values
        (n,) each, positive; by the parameter's name, and by label, `truth` among them.

    Returns
    -------
    label -> ``slope``, ``error`` (p,) and, but for the truth, ``difference``, ``difference_error`` (p,).
    Labels whose values are not all positive are left out.
    """
    x = np.log(np.stack([np.asarray(parameters[name], float) for name in parameters], axis=1))
    logs = {
        label: np.log(np.asarray(found, float))
        for label, found in values.items()
        if np.all(np.asarray(found, float) > 0)
    }
    result = {}
    for label, log in logs.items():
        slope, error = slopes(x, log)
        result[label] = {"slope": slope, "error": error}
        if label != truth and truth in logs:
            difference, error = slopes(x, log - logs[truth])
            result[label] |= {"difference": difference, "difference_error": error}
    return result


def check_parameters(parameters: Mapping[str, Sequence[float]]) -> None:
    """Refuse parameters of boxes that `responses` could not use.

    Raises
    ------
    ValueError
        as `slopes`, and for parameters that are not positive.
    """
    for name, each in parameters.items():
        if not min(each) > 0:
            raise ValueError(f"{name} is {min(each):g} in a box: logarithms are of positive parameters")
    logs = np.log(np.array(list(parameters.values())).T)
    slopes(logs, np.zeros(len(logs)))
