"""Halo occupation: how many galaxies a halo of mass M holds, fitted and painted.

The model has three parameters (Berlind & Weinberg 2002): no galaxy in halos below M_min, and above it a
Poisson number with mean::

    lambda(M) = (M / M_1)^alpha

It knows the mass of a halo alone, so it is the baseline that a prediction from the whole density field is
compared with.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln, lambertw
from scipy.stats import qmc

Array = NDArray[np.float64]

_POINTS_AT_ONCE = 1_000_000  # of the mean field: bounds its memory
_ONE_SIGMA = 0.683


@dataclass(frozen=True)
class Occupation:
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


def fit(mass: ArrayLike, n_galaxies: ArrayLike, outliers: float = 0.01) -> Occupation:
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
    if mass.shape != number.shape or mass.ndim != 1:
        raise ValueError(
            f"masses and numbers of galaxies are two columns, not {mass.shape} and {number.shape}"
        )
    if not np.all(np.isfinite(mass)) or not np.all(number >= 0):
        raise ValueError("halo masses must be finite and numbers of galaxies not negative")
    n_total = number.sum()
    allowed = outliers * n_total
    without_mass = number[mass <= 0].sum()  # groups in which no sphere reaches the overdensity
    mass, number = mass[mass > 0], number[mass > 0]
    if mass.size == 0:
        raise ValueError("the catalog has no halo with a mass, so no occupation can be fitted")
    if without_mass > allowed:
        raise ValueError(
            f"{without_mass:.0f} of {n_total:.0f} galaxies are in halos without a mass, more than the "
            f"fraction of {outliers:g} that may be outliers; fit another mass"
        )
    if number.sum() < 10 or np.ptp(mass[number > 0]) == 0:
        raise ValueError(
            f"{number.sum():.0f} galaxies in {np.count_nonzero(number)} halos do not determine M_min, M_1 "
            "and alpha; lower the stellar mass above which galaxies count, or use more or larger boxes"
        )
    order = np.argsort(mass)
    mass, number = mass[order], number[order]
    x_pivot = float(np.average(np.log(mass), weights=number))
    x = np.log(mass) - x_pivot

    # M_min can be the mass of any halo that leaves no more than the allowed outliers in less massive ones.
    _, steps = np.unique(mass, return_index=True)
    below = np.cumsum(number) - number + without_mass
    steps = steps[below[steps] <= allowed]
    occupied = np.flatnonzero((number > 0) & (below <= allowed))
    starts = np.searchsorted(mass, mass[occupied[np.linspace(0, occupied.size - 1, 5).astype(int)]])
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

    likely = steps[likelihoods >= value + math.log(1 - _ONE_SIGMA)]
    low, high = mass[max(likely.min() - 1, 0)], mass[likely.max()]  # between halos the staircase is flat
    return Occupation(
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


def concentration(mass: ArrayLike, redshift: float) -> Array:
    """c_200c of halos of M_200c = ``mass`` [Msun/h]: Duffy et al. 2008, table 1, full sample, z = 0-2."""
    relation: Array = 5.71 * (np.asarray(mass, float) / 2e12) ** -0.084 * (1 + redshift) ** -0.47
    return relation


def nfw_radius(u: ArrayLike, c: ArrayLike) -> Array:
    """Radius, in units of R_200c, that holds the fraction ``u`` of the mass of an NFW halo of concentration
    ``c``.

    With m(y) = ln(1 + y) - y / (1 + y) (Navarro, Frenk & White 1997), it solves m(c q) = u m(c) exactly, by
    the Lambert function (Robotham & Howlett 2018).
    """
    c = np.asarray(c, float)
    p = np.asarray(u, float) * (np.log1p(c) - c / (1 + c))
    with np.errstate(invalid="ignore"):
        q = -(1 + 1 / lambertw(-np.exp(-1 - p)).real) / c
    return np.clip(np.nan_to_num(q), 0, 1)  # the Lambert function is not a number at its branch point, u = 0


@dataclass(frozen=True)
class Halos:
    """Halos to put galaxies into: masses [Msun/h], M_200c [Msun/h], R_200c and positions [Mpc/h]."""

    mass: Array
    mass_200c: Array
    radius_200c: Array
    position: Array
    box_size: float
    redshift: float

    def place(self, halo: NDArray[np.intp], u: Array) -> Array:
        """Points of NFW profiles, (n, 3) in [0, box_size): one in each ``halo`` for uniform ``u`` (n, 3).

        The columns of ``u`` become the enclosed fraction of mass, the cosine of the polar angle and the
        azimuth.
        """
        # A halo whose sphere was not found has radius 0, and its galaxies are at its center.
        mass = np.where(self.mass_200c > 0, self.mass_200c, 1e12)
        radius = nfw_radius(u[:, 0], concentration(mass, self.redshift)[halo]) * self.radius_200c[halo]
        cosine, azimuth = 2 * u[:, 1] - 1, 2 * np.pi * u[:, 2]
        sine = np.sqrt(1 - cosine**2)
        direction = np.stack([sine * np.cos(azimuth), sine * np.sin(azimuth), cosine], axis=1)
        return self.wrap(self.position[halo] + radius[:, None] * direction)

    def wrap(self, position: Array) -> Array:
        """Positions in [0, box_size)."""
        position = position % self.box_size
        return np.where(position < self.box_size, position, 0.0)  # rounding can give the box size itself


def paint(occupation: Occupation, halos: Halos, rng: np.random.Generator) -> dict[str, NDArray[Any]]:
    """Galaxies of one realization.

    The number in each halo is Poisson; the first is at the center, the others follow the halo's NFW profile.

    Returns
    -------
    ``position`` (n, 3) [Mpc/h] in [0, box_size), ``halo`` (n,) row of the halo, ``is_central`` (n,); by halo.
    """
    number = rng.poisson(occupation.mean(halos.mass))
    halo = np.repeat(np.arange(number.size), number)
    is_central = np.ones(halo.size, bool)
    is_central[1:] = halo[1:] != halo[:-1]
    position = halos.wrap(halos.position[halo])
    position[~is_central] = halos.place(halo[~is_central], rng.random((np.count_nonzero(~is_central), 3)))
    return {"position": position, "halo": halo, "is_central": is_central}


def expected_points(occupation: Occupation, halos: Halos) -> Iterator[tuple[Array, Array]]:
    """Weighted points whose density is the mean of `paint` over realizations, some halos at a time.

    A halo with a Poisson number of mean l has a central galaxy with probability 1 - exp(-l), and l - (1 -
    exp(-l)) satellites on average. Fixed points sample these evenly, 128 or more for each galaxy: a Sobol
    sequence with its mirror image, so that no halo's center of mass moves.

    Yields
    ------
    positions (n, 3) [Mpc/h] and weights (n,); the weights of all halos sum to the mean number of galaxies.
    """
    mean = occupation.mean(halos.mass)
    central = -np.expm1(-mean)
    satellites = mean - central
    yield halos.wrap(halos.position[mean > 0]), central[mean > 0]
    exponents = np.clip(np.ceil(np.log2(128 * satellites, where=mean > 0, out=np.zeros_like(mean))), 6, 20)
    for exponent in np.unique(exponents[mean > 0]).astype(int):
        half = qmc.Sobol(3, scramble=False).random_base2(exponent - 1) + 0.5**exponent
        mirrored = np.stack([half[:, 0], 1 - half[:, 1], (half[:, 2] + 0.5) % 1], axis=1)
        points = np.concatenate([half, mirrored])
        alike = np.flatnonzero((mean > 0) & (exponents == exponent))
        for chosen in np.array_split(alike, -(-alike.size * len(points) // _POINTS_AT_ONCE)):
            yield (
                halos.place(np.repeat(chosen, len(points)), np.tile(points, (chosen.size, 1))),
                np.repeat(satellites[chosen] / len(points), len(points)),
            )
