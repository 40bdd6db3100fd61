"""Halo occupation: how many galaxies a halo of mass M holds, fitted and painted.

The model has three parameters (Berlind & Weinberg 2002): no galaxy in halos below M_min, and above it a
Poisson number with mean::

    lambda(M) = (M / M_1)^alpha

It knows the mass of a halo alone, so it is the baseline that a prediction from the whole density field is
compared with.
"""

import logging
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field as Constraint
from scipy.special import gammaln, lambertw
from scipy.stats import qmc

from galdist.catalogs.catalog import CatalogStore, CatalogWriter, open_catalog
from galdist.config import StrictModel
from galdist.constants import CRITICAL_DENSITY
from galdist.grids.mass_assignment import Scheme, assign
from galdist.grids.store import Chunking, SimulationGrids, Split, create_store, open_store
from galdist.statistics.metrics import metric_row, save_metrics
from hpc import durable, progress

log = logging.getLogger(__name__)

Array = NDArray[np.float64]

_POINTS_AT_ONCE = 1_000_000  # of the mean field: bounds its memory
_ONE_SIGMA = 0.683
_SAME_MASS = 1e-5


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


_DUFFY_2008 = {"200c": (5.71, -0.084, -0.47), "200m": (10.14, -0.081, -1.01)}


def concentration(mass: ArrayLike, redshift: float, definition: Literal["200c", "200m"]) -> Array:
    """NFW concentration of halos of ``mass`` [Msun/h]: Duffy et al. 2008, table 1, full sample, z = 0-2.

    Mass and radius are those of the sphere of 200 times the critical or the mean density.
    """
    amplitude, slope, evolution = _DUFFY_2008[definition]
    relation: Array = amplitude * (np.asarray(mass, float) / 2e12) ** slope * (1 + redshift) ** evolution
    return relation


def nfw_radius(u: ArrayLike, c: ArrayLike) -> Array:
    """Radius, in units of the halo's, that holds the fraction ``u`` of the mass of an NFW halo.

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
    """n halos to put galaxies into."""

    mass: Array
    """(n,) [Msun/h]; the occupation depends on it."""
    radius: Array
    """(n,) of the NFW profile [Mpc/h]."""
    concentration: Array
    """(n,) of the NFW profile."""
    position: Array
    """(n, 3) in [0, box_size) [Mpc/h]."""
    box_size: float

    def place(self, halo: NDArray[np.intp], u: Array) -> Array:
        """Points of NFW profiles, (n, 3) in [0, box_size): one in each ``halo`` for uniform ``u`` (n, 3).

        The columns of ``u`` become the enclosed fraction of mass, the cosine of the polar angle and the
        azimuth.
        """
        radius = nfw_radius(u[:, 0], self.concentration[halo]) * self.radius[halo]
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


class HodConfig(StrictModel):
    """What is fitted, and where galaxies are put."""

    seed: int
    """Of the painted numbers and positions."""
    field: str = "galaxy_counts"
    """The field of the grids that is predicted."""
    training_suites: tuple[str, ...] | None = None
    """Suites whose training simulations are fitted; null for all in the catalogs."""
    split: Split = "test"
    """Simulations of the grids whose halos get galaxies."""
    mass: Literal["mass", "mass_200c"] = "mass"
    """Halo mass that the occupation depends on: that of all linked particles, which every halo has, or
    M_200c. Satellites reach to R_200m (linked particles have about 200 times the mean density) or R_200c.
    """
    halos: Literal["nbody_halos", "halos"] = "nbody_halos"
    """Halos that get galaxies: those of the N-body run, or of the run that formed the galaxies."""
    outliers: Annotated[float, Constraint(ge=0, lt=1)] = 0.01
    """Largest fraction of galaxies that may live in halos below M_min; see `fit`."""


def hod(config: HodConfig, inputs: Mapping[str, list[Path]], out: Path) -> None:
    """Fit the occupation of the training simulations' halos and paint the simulations of a split.

    Writes ``hod.json`` (the fitted `Occupation` and the measured one in bins of mass), ``prediction.zarr``
    (the counts of one realization, and ``expected_<field>``, their mean over realizations: what a
    deterministic prediction is fairly compared with), ``galaxies.zarr`` (the realization's galaxies) and
    ``metrics.json``.

    Raises
    ------
    ValueError
        for catalogs and grids that do not belong together, and catalogs that cannot be fitted.
    """
    catalogs = _catalogs(inputs["catalogs"])
    training = _training(config, catalogs)
    targets = _targets(config, inputs["grids"], catalogs)
    holders = {name: _halos(config, catalogs[name], grids) for name, grids in targets.items()}
    tables = [catalogs[name].table(name, "halos", [config.mass, "n_galaxies"]) for name in training]
    mass = np.concatenate([table[config.mass] for table in tables]).astype(float)
    number = np.concatenate([table["n_galaxies"] for table in tables]).astype(float)
    occupation = fit(mass, number, config.outliers)
    log.info("occupation of %d halos of %s: %s", mass.size, ", ".join(training), occupation)
    first = next(iter(targets.values()))
    truth = first.field(config.field)
    voxel = np.dtype(truth.dtype).itemsize + np.dtype(np.float32).itemsize  # a realization and its mean
    durable.require_space(
        out, voxel * first.n_mesh**3 * len(targets), f"predictions of {len(targets)} boxes before compression"
    )
    record = {**asdict(occupation), "mass": config.mass, "training": training}
    durable.write_json(out / "hod.json", {**record, "occupation": _binned(mass, number, occupation)})

    scheme: Scheme = "ngp" if truth.assignment == "none" else truth.assignment
    mean = truth.model_copy(update={"name": f"expected_{config.field}", "dtype": "float32"})
    store = create_store(
        out / "prediction.zarr",
        [grids.attrs for grids in targets.values()],
        [truth, mean],
        first.n_mesh,
        Chunking(chunk=first.array(config.field).chunks[-1]),
        attrs={"checkpoint": durable.fingerprint(record), "model": "hod"},
    )
    galaxies = CatalogWriter(out / "galaxies.zarr")
    rows = [
        metric_row("M_min", "train", occupation.M_min, occupation.M_min_error, "Msun/h"),
        metric_row("M_1", "train", occupation.M_1, occupation.M_1_error, "Msun/h"),
        metric_row("alpha", "train", occupation.alpha, occupation.alpha_error),
    ]
    for done, (name, grids) in enumerate(targets.items()):
        progress.report(done, len(targets), name)
        halos = holders[name]
        painted = paint(occupation, halos, np.random.default_rng([config.seed, zlib.crc32(name.encode())]))
        counts = assign(painted["position"], halos.box_size, grids.n_mesh, scheme)
        expected = np.zeros_like(counts)
        for points, weights in expected_points(occupation, halos):
            assign(points, halos.box_size, grids.n_mesh, scheme, weights, out=expected)
        store[name].write(truth.name, counts.astype(truth.dtype))
        store[name].write(mean.name, expected.astype(mean.dtype))
        galaxies.add(grids.attrs, {"galaxies": painted})
        rows += [
            metric_row("n_galaxies/truth", name, grids.read(config.field).sum(dtype=float)),
            metric_row("n_galaxies/predicted", name, painted["halo"].size),
            metric_row("n_galaxies/expected", name, occupation.mean(halos.mass).sum()),
        ]
    galaxies.finish(list(targets))
    save_metrics(out, rows)
    progress.report(len(targets), len(targets))


def _catalogs(steps: Sequence[Path]) -> dict[str, CatalogStore]:
    """The catalog that holds each simulation."""
    catalogs: dict[str, CatalogStore] = {}
    for step in steps:
        store = open_catalog(step / "catalog.zarr")
        for name in store.names():
            if name in catalogs:
                raise ValueError(f"simulation {name!r} is in {catalogs[name].path} and in {store.path}")
            catalogs[name] = store
    return catalogs


def _training(config: HodConfig, catalogs: Mapping[str, CatalogStore]) -> list[str]:
    """Names of the simulations to fit."""
    suites = {store.attrs(name).suite for name, store in catalogs.items()}
    for suite in config.training_suites or ():
        if suite not in suites:
            raise ValueError(
                f"training_suites: {suite!r} is not in the catalogs, which have {', '.join(sorted(suites))}"
            )
    training = [
        name
        for name, store in catalogs.items()
        if store.attrs(name).split == "train"
        and store.attrs(name).suite in (config.training_suites or suites)
    ]
    if not training:
        paths = sorted({str(store.path) for store in catalogs.values()})
        raise ValueError(
            f"no training simulation in {', '.join(paths)}: all of them are in the validation or test "
            "split, so no occupation can be fitted"
        )
    return training


def _targets(
    config: HodConfig, steps: Sequence[Path], catalogs: Mapping[str, CatalogStore]
) -> dict[str, SimulationGrids]:
    """The simulations that get galaxies, and their true grids."""
    targets: dict[str, SimulationGrids] = {}
    for step in steps:
        store = open_store(step / "grids.zarr")
        for name in store.names(config.split):
            if name in targets:
                raise ValueError(f"simulation {name!r} is in two of the grids")
            targets[name] = store[name]
    if not targets:
        raise ValueError(
            f"no simulation of the grids is in the {config.split} split: nothing to put galaxies into"
        )
    first = next(iter(targets.values()))
    for name, grids in targets.items():
        if name not in catalogs:
            raise ValueError(
                f"{name} is in the grids but in none of the catalogs, which have {', '.join(catalogs)}"
            )
        if (grids.n_mesh, grids.field(config.field)) != (first.n_mesh, first.field(config.field)):
            raise ValueError(
                f"{name}: mesh or {config.field!r} differ from those of {first.attrs.name}; use two steps"
            )
        _check_counts(config, catalogs[name], grids)
    return targets


def _check_counts(config: HodConfig, catalog: CatalogStore, grids: SimulationGrids) -> None:
    """Grids and catalogs must mean the same by a galaxy, or the fit is of other galaxies than the truth."""
    name = grids.attrs.name
    if config.field != "galaxy_counts" or "halos" not in catalog.tables(name):
        return
    in_catalog = catalog.table(name, "halos", ["n_galaxies"])["n_galaxies"].sum()
    in_grids = grids.read(config.field).sum(dtype=float)
    if abs(in_grids - in_catalog) > 1e-4 * in_catalog + 0.5:
        raise ValueError(
            f"{name} has {in_grids:.0f} galaxies in the grids and {in_catalog} in {catalog.path}: give both "
            "steps the same `min_stellar_mass`"
        )


def _halos(config: HodConfig, catalog: CatalogStore, grids: SimulationGrids) -> Halos:
    """The halos of a simulation that get galaxies.

    Raises
    ------
    ValueError
        where there are none.
    """
    columns = ["position", config.mass] + ["radius_200c"] * (config.mass == "mass_200c")
    table = catalog.table(grids.attrs.name, config.halos, columns)
    mass = table[config.mass].astype(float)
    if not np.any(mass > 0):
        raise ValueError(
            f"{catalog.path}: {grids.attrs.name} has no {config.halos}, so nothing holds galaxies"
        )
    if config.mass == "mass_200c":
        definition: Literal["200c", "200m"] = "200c"
        radius = table["radius_200c"].astype(float)
    else:
        definition = "200m"
        omega_m = grids.attrs.cosmology.get("Omega_m")
        if omega_m is None:
            raise ValueError(
                f"{grids.attrs.name}: Omega_m is not known, so neither is the radius of its halos; use "
                "`mass: mass_200c`"
            )
        radius = np.cbrt(mass / (4 / 3 * np.pi * 200 * omega_m * CRITICAL_DENSITY))  # comoving
    return Halos(
        mass=mass,
        radius=radius,
        # Halos without a mass hold nothing: any concentration will do.
        concentration=concentration(np.where(mass > 0, mass, 1e12), grids.attrs.redshift, definition),
        position=table["position"].astype(float),
        box_size=grids.attrs.box_size,
    )


def _binned(mass: Array, number: Array, occupation: Occupation) -> dict[str, list[float]]:
    """Mean occupation in bins of a fifth of a decade of mass: measured, with its error, and of the model."""
    bins = np.floor(5 * np.log10(mass, where=mass > 0, out=np.full_like(mass, -np.inf)))
    table: dict[str, list[float]] = {key: [] for key in ("mass", "n_halos", "measured", "error", "model")}
    for edge in np.unique(bins[np.isfinite(bins)]):
        here = bins == edge
        count = int(np.count_nonzero(here))
        table["mass"].append(float(10 ** np.log10(mass[here]).mean()))
        table["n_halos"].append(count)
        table["measured"].append(float(number[here].mean()))
        table["error"].append(float(number[here].std() / math.sqrt(count)))
        table["model"].append(float(occupation.mean(mass[here]).mean()))
    return table
