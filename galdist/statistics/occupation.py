"""Halo occupation: how many galaxies a halo holds on average, by its mass and a second property.

Two forms. `PowerLaw` (Berlind & Weinberg 2002) has three parameters: no galaxy in halos below M_min, and
above it a Poisson number with mean::

    lambda(M) = (M / M_1)^alpha

`Zheng` (Zheng, Coil & Zehavi 2007) has five, and central galaxies apart from satellites::

    <N_cen> = 1/2 erfc((log M_min - log M) / sigma_logM)
    <N_sat> = <N_cen> ((M - M_0) / M_1)^alpha

A central galaxy is there or not; satellites are Poisson. Decorated (Hearin et al. 2016, arXiv:1512.03050,
with two halves) it knows a second property too: halos in the upper half of it at their mass, and those in
the lower half, have::

    <N_cen> +- A_cen min(<N_cen>, 1 - <N_cen>)        <N_sat> (1 +- A_sat)

so that the mean over both halves, at each mass, is what it was. A_cen and A_sat are -1 to 1.

Both are fitted to the number of galaxies in each halo, by maximum likelihood: no other statistic of the same
boxes knows more of the occupation, and clustering, which predictions are compared by, is not fitted to.
"""

import logging
import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import erfc, gammaln

log = logging.getLogger(__name__)

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]

_ONE_SIGMA = 0.683
_SAME_MASS = 1e-5


class Occupation(Protocol):
    """Galaxies in halos of ``mass`` (n,) [Msun/h], in the ``upper`` (n,) half of a second property or not."""

    def means(self, mass: ArrayLike, upper: Flags | None = None) -> tuple[Array, Array]:
        """Probability of a central galaxy and mean number of satellites, (n,) and (n,)."""

    def draw(self, mass: Array, upper: Flags | None, rng: np.random.Generator) -> tuple[Flags, NDArray[Any]]:
        """Whether each halo has a central galaxy, and its number of satellites: one realization."""


@dataclass(frozen=True)
class PowerLaw:
    """A fitted halo occupation, with errors of one standard deviation. Masses in Msun/h.

    M_min's likelihood is no parabola but a staircase that steps at every halo and ends at the lightest
    occupied one. The drop of the log-likelihood from its maximum to the true M_min is exponentially
    distributed with mean 1, so M_min_low to M_min_high, where the drop is below 1.15, holds the truth with a
    probability of 68%; its error is the longer side.
    """

    M_min: float
    M_1: float
    alpha: float
    M_min_error: float = 0.0
    M_1_error: float = 0.0
    alpha_error: float = 0.0
    M_min_low: float = 0.0
    M_min_high: float = 0.0
    log_likelihood: float = 0.0
    n_halos: int = 0
    """Halos that were fitted."""
    n_galaxies: int = 0
    """Galaxies in them."""
    outlier_fraction: float = 0.0
    """Fraction of those galaxies in halos below M_min."""

    def mean(self, mass: ArrayLike) -> Array:
        """Mean number of galaxies in halos of ``mass`` [Msun/h]."""
        mass = np.asarray(mass, float)
        return np.where(mass >= self.M_min, (mass / self.M_1) ** self.alpha, 0.0)

    def means(self, mass: ArrayLike, upper: Flags | None = None) -> tuple[Array, Array]:
        """As `Occupation.means`; the mass is all that it knows."""
        del upper
        mean = self.mean(mass)
        central = -np.expm1(-mean)  # the first of a halo's galaxies is its central one
        return central, mean - central

    def draw(self, mass: Array, upper: Flags | None, rng: np.random.Generator) -> tuple[Flags, NDArray[Any]]:
        """As `Occupation.draw`: the first of a halo's galaxies is its central one."""
        del upper
        number = rng.poisson(self.mean(mass))
        return number > 0, np.maximum(number - 1, 0)


def fit_power_law(mass: ArrayLike, n_galaxies: ArrayLike, outliers: float = 0.01) -> PowerLaw:
    """Maximum-likelihood occupation of halos with ``mass`` [Msun/h] that hold ``n_galaxies``, both (n,).

    Taken literally the model makes M_min the mass of the least occupied halo, so that one galaxy in a
    stripped or unresolved group decides it. So up to a fraction ``outliers`` of the galaxies may be in halos
    below M_min, with a Poisson rate there that is fitted too; it is no part of the model. With ``outliers=0``
    the likelihood is the literal one.

    For a given M_min the log-likelihood is concave in ln lambda's two coefficients (Newton steps; errors
    from the Fisher matrix); for given coefficients it is known for every M_min at once. The two are solved
    in turn.

    Raises
    ------
    ValueError
        for catalogs without halos, with too few galaxies (10) or with galaxies in halos of one mass only.
    """
    mass, number = np.asarray(mass, float), np.asarray(n_galaxies, float)
    held = _with_mass(mass, number, outliers)
    n_total, without_mass = number.sum(), number[~held].sum()
    allowed = outliers * n_total
    mass, number = mass[held], number[held]
    order = np.argsort(mass)
    mass, number = mass[order], number[order]
    x_pivot = float(np.average(np.log(mass), weights=number))
    x = np.log(mass) - x_pivot

    # M_min can be the mass of any halo that leaves no more than the allowed outliers in less massive ones.
    # Masses that differ by rounding are one mass: halos of as many particles each.
    steps = np.flatnonzero(np.diff(x, prepend=-np.inf) > _SAME_MASS)
    below = np.cumsum(number) - number + without_mass
    steps = steps[below[steps] <= allowed]
    occupied = np.flatnonzero((number > 0) & (below <= allowed))
    starts = occupied[np.linspace(0, occupied.size - 1, 5).astype(int)]
    starts = steps[np.searchsorted(steps, starts, side="right") - 1]
    value = -math.inf
    for start in np.unique(starts):  # the staircase has local maxima
        here = start
        for _ in range(100):
            fitted = _poisson_regression(x[here:], number[here:])
            scan = _scan(x, number, fitted, steps)
            better = steps[np.argmax(scan)]
            if scan.max() <= scan[steps == here][0]:
                break
            here = better
        if scan.max() > value:
            value, first, coefficients, likelihoods = float(scan.max()), int(here), fitted, scan
    a, alpha = coefficients

    rate = np.exp(a + alpha * x[first:])
    fisher = np.array([[rate.sum(), rate @ x[first:]], [rate @ x[first:], rate @ x[first:] ** 2]])
    covariance = np.linalg.inv(fisher)
    gradient = np.array([-1 / alpha, a / alpha**2])  # of ln M_1 = -a / alpha in (a, alpha)
    m_1 = math.exp(x_pivot - a / alpha)

    if first == 0:
        log.warning("M_min is the mass of the lightest halo: the catalogs end before the galaxies do")
    likely = steps[likelihoods >= value + math.log(1 - _ONE_SIGMA)]
    low, high = mass[max(likely.min() - 1, 0)], mass[likely.max()]  # between halos the staircase is flat
    return PowerLaw(
        M_min=float(mass[first]),
        M_1=m_1,
        alpha=float(alpha),
        M_min_error=float(max(mass[first] - low, high - mass[first])),
        M_1_error=m_1 * math.sqrt(gradient @ covariance @ gradient),
        alpha_error=math.sqrt(covariance[1, 1]),
        M_min_low=float(low),
        M_min_high=float(high),
        log_likelihood=value,
        n_halos=mass.size,
        n_galaxies=int(n_total),
        outlier_fraction=float(below[first] / n_total),
    )


def _with_mass(mass: Array, number: Array, outliers: float) -> Flags:
    """Halos that can be fitted, (n,), after a check of the columns."""
    if mass.shape != number.shape or mass.ndim != 1:
        raise ValueError(
            f"masses and numbers of galaxies are two columns, not {mass.shape} and {number.shape}"
        )
    if not np.all(np.isfinite(mass)) or not np.all(number >= 0):
        raise ValueError("halo masses must be finite and numbers of galaxies not negative")
    held: Flags = mass > 0
    without_mass = number[~held].sum()  # groups in which no sphere reaches the overdensity
    if not held.any():
        raise ValueError("the catalog has no halo with a mass, so no occupation can be fitted")
    if without_mass > outliers * number.sum():
        raise ValueError(
            f"{without_mass:.0f} of {number.sum():.0f} galaxies are in halos without a mass, more than the "
            f"fraction of {outliers:g} that may be outliers; fit another mass"
        )
    number = number[held]
    if number.sum() < 10 or np.ptp(mass[held][number > 0]) == 0:
        raise ValueError(
            f"{number.sum():.0f} galaxies in {np.count_nonzero(number)} halos do not determine M_min, M_1 "
            "and alpha; lower the stellar mass above which galaxies count, or use more or larger boxes"
        )
    return held


def _poisson_regression(x: Array, number: Array) -> Array:
    """Coefficients (a, b) that maximize the Poisson likelihood of ``number`` with mean exp(a + b x)."""
    coefficients = np.array([math.log(number.mean()), 0.0])
    design = np.stack([np.ones_like(x), x])

    def log_likelihood(c: Array) -> float:
        with np.errstate(over="ignore"):
            return float(number @ (c @ design) - np.exp(c @ design).sum())

    value = log_likelihood(coefficients)
    for _ in range(100):
        rate = np.exp(coefficients @ design)
        step = np.linalg.solve((design * rate) @ design.T, design @ (number - rate))
        while not (new := log_likelihood(coefficients + step)) >= value - 1e-12 * abs(value):
            step /= 2
        coefficients = coefficients + step
        if np.abs(step).max() < 1e-12:
            break
        value = new
    return coefficients


def _scan(x: Array, number: Array, coefficients: Array, first: NDArray[np.intp]) -> Array:
    """Log-likelihood with M_min at the mass of each halo ``first`` of halos sorted by mass."""
    log_rate = coefficients[0] + coefficients[1] * x
    terms = number * log_rate - np.exp(log_rate)
    above = np.cumsum(terms[::-1])[::-1][first]
    halos, galaxies = first.astype(float), (np.cumsum(number) - number)[first]
    with np.errstate(divide="ignore", invalid="ignore"):
        outliers = np.where(galaxies > 0, galaxies * np.log(galaxies / halos) - galaxies, 0.0)
    value: Array = above + outliers - gammaln(number + 1).sum()
    return value


@dataclass(frozen=True)
class Zheng:
    """The five-parameter occupation, decorated where A_cen or A_sat is not 0. Masses in Msun/h.

    Errors are one standard deviation, None where the galaxies do not determine a parameter.
    """

    M_min: float
    sigma_logM: float
    M_0: float
    M_1: float
    alpha: float
    A_cen: float = 0.0
    A_sat: float = 0.0
    M_min_error: float | None = None
    sigma_logM_error: float | None = None
    M_0_error: float | None = None
    M_1_error: float | None = None
    alpha_error: float | None = None
    A_cen_error: float | None = None
    A_sat_error: float | None = None
    log_likelihood: float = 0.0
    n_halos: int = 0
    """Halos that were fitted."""
    n_galaxies: int = 0
    """Galaxies in them."""
    outlier_fraction: float = 0.0
    """Fraction of those galaxies that the mass of their halos does not explain."""

    def mean(self, mass: ArrayLike, upper: Flags | None = None) -> Array:
        """Mean number of galaxies; parameters as in `means`."""
        central, satellites = self.means(mass, upper)
        return central + satellites

    def means(self, mass: ArrayLike, upper: Flags | None = None) -> tuple[Array, Array]:
        """Probability of a central galaxy and mean number of satellites in halos of ``mass`` [Msun/h].

        ``upper`` says which halos are in the upper half of the second property; None: the mean over halves.
        """
        parameters = np.array(
            [
                math.log10(self.M_min),
                math.log(self.sigma_logM),
                math.log10(self.M_0) if self.M_0 > 0 else -math.inf,
                math.log10(self.M_1),
                self.alpha,
                self.A_cen,
                self.A_sat,
            ]
        )
        central, satellites, _, _ = _zheng(parameters, np.asarray(mass, float), _sign(upper))
        return central, satellites

    def draw(self, mass: Array, upper: Flags | None, rng: np.random.Generator) -> tuple[Flags, NDArray[Any]]:
        """As `Occupation.draw`."""
        central, satellites = self.means(mass, upper)
        return rng.random(central.shape) < central, rng.poisson(satellites)


def fit_zheng(
    mass: ArrayLike, n_galaxies: ArrayLike, outliers: float = 0.01, upper: Flags | None = None
) -> Zheng:
    """Maximum-likelihood `Zheng` of halos with ``mass`` [Msun/h] that hold ``n_galaxies``, all (n,).

    With p = <N_cen> and s = <N_sat>, a halo holds N galaxies with the probability of a Bernoulli and a
    Poisson number that add to N::

        P(N) = e^-s s^(N-1) / N! [(1 - p) s + p N]

    so it need not be known which galaxy is central. Galaxies in halos far below M_min (stripped or unresolved
    groups) would make sigma_logM what it is not. So a constant Poisson rate is added to s in all halos, up to
    a fraction ``outliers`` of all galaxies: it is fitted too and no part of the model. ``upper`` (see
    `upper_half`) fits A_cen and A_sat as well. Errors are from the scores' covariance (Berndt et al. 1974).

    Raises
    ------
    ValueError
        for catalogs without halos, with too few galaxies (10) or with galaxies in halos of one mass only.
    """
    mass, number = np.asarray(mass, float), np.asarray(n_galaxies, float)
    held = _with_mass(mass, number, outliers)
    n_total = number.sum()
    mass, number = mass[held], number[held]
    sign = _sign(None if upper is None else np.asarray(upper)[held])
    log_mass = np.log10(mass)
    low, high = log_mass.min(), log_mass.max()
    most = max(outliers * n_total / mass.size, _LEAST_RATE)  # of outliers in a halo
    free = np.array([True] * 5 + [upper is not None] * 2 + [outliers > 0])
    start = np.array([0.0, math.log(0.2), 0.0, 0.0, 1.0, 0.0, 0.0, 0.1])
    bounds = np.array(
        [
            (low - 1, high),
            (math.log(0.01), math.log(2)),
            (low - 2, high),
            (low - 1, high + 3),
            (0.1, 4),
            (-1, 1),
            (-1, 1),
            (0, 1),
        ]
    )

    def log_probability(parameters: Array) -> tuple[Array, Array]:
        """Of each halo, (n,), and its derivatives by the parameters, (8, n)."""
        p, s, by_p, by_s = _zheng(parameters, mass, sign)
        s = s + max(parameters[7] * most, _LEAST_RATE)
        by_s = np.concatenate([by_s, np.full((1, mass.size), most)])
        by_p = np.concatenate([by_p, np.zeros((1, mass.size))])
        one = np.maximum((1 - p) * s + p * number, _LEAST_RATE**2)
        value = (number - 1) * np.log(s) - s + np.log(one) - constant
        return value, by_p * ((number - s) / one) + by_s * ((number - 1) / s - 1 + (1 - p) / one)

    def cost(some: Array, parameters: Array) -> tuple[float, Array]:
        value, gradient = log_probability(_with(parameters, free, some))
        return -value.sum() / n_total, -gradient[free].sum(axis=1) / n_total

    constant = gammaln(number + 1)
    # As many halos above M_min as have galaxies.
    threshold = np.sort(log_mass)[-np.count_nonzero(number)]
    best = None
    for cutoff in (-0.5, 0.2, 0.8):  # the likelihood has local maxima in M_0
        begin = start.copy()
        begin[:4] = threshold, math.log(0.2), threshold + cutoff, threshold + 1.2
        begin = np.clip(begin, *bounds.T)
        found = minimize(
            cost,
            begin[free],
            (begin,),
            "L-BFGS-B",
            jac=True,
            bounds=bounds[free],
            options={"maxiter": 2000, "ftol": 1e-11, "gtol": 1e-7},
        )
        if best is None or found.fun < best.fun:
            best = found
    assert best is not None
    parameters = _with(start, free, best.x)
    value, scores = log_probability(parameters)
    errors = _errors(scores, free & (parameters > bounds[:, 0]) & (parameters < bounds[:, 1]))
    powers = 10 ** parameters[[0, 2, 3]]
    sigma = math.exp(parameters[1])
    scale = np.array([powers[0] * _LN10, sigma, powers[1] * _LN10, powers[2] * _LN10, 1, 1, 1])
    names = ("M_min", "sigma_logM", "M_0", "M_1", "alpha", "A_cen", "A_sat")
    values = [powers[0], sigma, powers[1], powers[2], *parameters[4:7]]
    fitted: dict[str, Any] = {}
    for name, one, error in zip(names, values, scale * errors[:7], strict=True):
        fitted |= {name: float(one), f"{name}_error": float(error) if math.isfinite(error) else None}
    return Zheng(
        **fitted,
        log_likelihood=float(value.sum()),
        n_halos=mass.size,
        n_galaxies=int(n_total),
        outlier_fraction=float(
            (parameters[7] * most * mass.size * (outliers > 0) + n_total - number.sum()) / n_total
        ),
    )


def upper_half(mass: ArrayLike, secondary: ArrayLike, together: int = 50) -> Flags:
    """Halos (n,) in the upper half of a second property at their mass: exactly half of each group of halos.

    A group is ``together`` halos next to one another in mass. What is left of the property's trend with mass
    within a group should be small: give what has little (v_max / M^(1/3), not v_max).
    """
    mass, secondary = np.asarray(mass, float), np.asarray(secondary, float)
    by_mass = np.argsort(-mass, kind="stable")  # a group that is not full has the lightest halos
    group = np.empty(mass.size, np.intp)
    group[by_mass] = np.arange(mass.size) // together
    order = np.lexsort((secondary, group))
    place = np.arange(mass.size) % together
    size = np.bincount(group)[group[order]]
    upper = np.zeros(mass.size, bool)
    upper[order] = place >= size // 2
    return upper


_LN10 = math.log(10)
_LEAST_RATE = 1e-12  # of galaxies in a halo: no number of them is impossible


def _with(parameters: Array, free: Flags, values: Array) -> Array:
    """``parameters`` with the free ones replaced."""
    replaced = parameters.copy()
    replaced[free] = values
    return replaced


def _sign(upper: Flags | None) -> Array:
    return np.zeros(1) if upper is None else np.where(upper, 1.0, -1.0)


def _zheng(parameters: Array, mass: Array, sign: Array) -> tuple[Array, Array, Array, Array]:
    """<N_cen>, <N_sat> (n,), and their derivatives (7, n) by log M_min, ln sigma_logM, log M_0, log M_1,
    alpha, A_cen and A_sat.

    ``sign`` is 1 in the upper half, -1 in the lower one, and 0 for the mean.
    """
    log_min, log_sigma, log_0, log_1, alpha, a_cen, a_sat = parameters[:7]
    sigma = math.exp(log_sigma)
    with np.errstate(divide="ignore"):
        x = (np.log10(mass) - log_min) / sigma
    p = erfc(-x) / 2
    slope = np.where(np.isfinite(x), np.exp(-(x**2)), 0.0) / math.sqrt(math.pi)
    p_by = np.zeros((7, *mass.shape))
    p_by[0] = -slope / sigma
    p_by[1] = np.where(slope > 0, -slope * np.where(slope > 0, x, 0.0), 0.0)

    excess = mass - 10**log_0
    above = excess > 0
    excess = np.where(above, excess, 1.0)
    rate = np.where(above, np.exp(alpha * (np.log(excess) - log_1 * _LN10)), 0.0)
    s = p * rate
    s_by = p_by * rate
    s_by[2] = -alpha * s * _LN10 * 10**log_0 / excess
    s_by[3] = -alpha * s * _LN10
    s_by[4] = s * (np.log(excess) - log_1 * _LN10)

    room = np.minimum(p, 1 - p)
    p_by *= 1 + sign * a_cen * np.where(p < 0.5, 1.0, -1.0)
    p_by[5] = sign * room
    s_by *= 1 + sign * a_sat
    s_by[6] = sign * s
    return p + sign * a_cen * room, s * (1 + sign * a_sat), p_by, s_by


def _errors(scores: Array, inside: Flags) -> Array:
    """Standard deviations of the parameters ``inside`` their bounds; NaN for the others and where nothing
    determines them."""
    errors = np.full(inside.size, np.nan)
    information = scores[inside] @ scores[inside].T
    scale = np.sqrt(np.diag(information))
    known = scale > 0
    places = np.flatnonzero(inside)[known]
    if places.size:
        scaled = information[np.ix_(known, known)] / np.outer(scale[known], scale[known])
        if np.linalg.cond(scaled) < 1e10:
            errors[places] = np.sqrt(np.diag(np.linalg.inv(scaled))) / scale[known]
    return errors
