"""Galaxies painted into halos by a fitted occupation (`galdist.statistics.occupation`).

An occupation knows the mass of a halo, and at most a second property of it: it is the baseline that a
prediction from the whole density field is compared with.
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
from scipy.special import lambertw, spence
from scipy.stats import qmc

from galdist.catalogs.catalog import CatalogStore, CatalogWriter, open_catalog
from galdist.catalogs.environment import overdensity
from galdist.config import StrictModel
from galdist.constants import CRITICAL_DENSITY, GRAVITY
from galdist.grids.mass_assignment import Scheme, assign
from galdist.grids.store import Chunking, SimulationGrids, Split, create_store, open_store
from galdist.statistics.metrics import metric_row, save_metrics
from galdist.statistics.occupation import (
    Flags,
    Occupation,
    PowerLaw,
    Zheng,
    fit_power_law,
    fit_zheng,
    upper_half,
)
from hpc import durable, progress

log = logging.getLogger(__name__)

Array = NDArray[np.float64]

_POINTS_AT_ONCE = 1_000_000  # of the mean field: bounds its memory


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


def nfw_dispersion(q: ArrayLike, c: ArrayLike) -> Array:
    """One-dimensional velocity dispersion of an NFW halo of isotropic orbits, by Jeans' equation.

    At radius ``q`` in units of the halo's, and in units of its circular velocity there (Lokas & Mamon 2001,
    MNRAS 321, 155, eq. 14).
    """
    c = np.asarray(c, float)
    x = np.maximum(np.asarray(q, float) * c, 1e-6)  # it goes to zero at the center, slower than numbers do
    log = np.log1p(x)
    bracket = np.pi**2 - np.log(x) - 1 / x - 1 / (1 + x) ** 2 - 6 / (1 + x)
    bracket += (1 + 1 / x**2 - 4 / x - 2 / (1 + x)) * log + 3 * log**2 + 6 * spence(1 + x)
    dispersion: Array = np.sqrt(c * x * (1 + x) ** 2 * bracket / (2 * (np.log1p(c) - c / (1 + c))))
    return dispersion


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
    velocity: Array
    """(n, 3) mean of the halo, peculiar [km/s]."""
    circular_velocity: Array
    """(n,) at the halo's radius [km/s]."""
    box_size: float
    upper: Flags | None = None
    """(n,) in the upper half of the occupation's second property, where it knows one."""

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

    def dispersion(self, halo: NDArray[np.intp], u: Array) -> Array:
        """One-dimensional velocity dispersion (n,) [km/s] where `place` puts points."""
        c = self.concentration[halo]
        return self.circular_velocity[halo] * nfw_dispersion(nfw_radius(u[:, 0], c), c)

    def wrap(self, position: Array) -> Array:
        """Positions in [0, box_size)."""
        position = position % self.box_size
        return np.where(position < self.box_size, position, 0.0)  # rounding can give the box size itself


def paint(occupation: Occupation, halos: Halos, rng: np.random.Generator) -> dict[str, NDArray[Any]]:
    """Galaxies of one realization.

    A central galaxy is at the center of its halo, with the halo's velocity; satellites follow the halo's NFW
    profile, with velocities around the halo's that are Gaussian and isotropic, of the dispersion there.

    Returns
    -------
    ``position`` (n, 3) [Mpc/h] in [0, box_size), ``velocity`` (n, 3) [km/s], ``halo`` (n,) row of the halo,
    ``is_central`` (n,); by halo.
    """
    has_central, satellites = occupation.draw(halos.mass, halos.upper, rng)
    halo = np.repeat(np.arange(satellites.size), satellites + has_central)
    is_central = np.ones(halo.size, bool)
    is_central[1:] = halo[1:] != halo[:-1]
    is_central &= has_central[halo]
    position = halos.wrap(halos.position[halo])
    velocity = halos.velocity[halo]
    orbiting, u = halo[~is_central], rng.random((np.count_nonzero(~is_central), 3))
    position[~is_central] = halos.place(orbiting, u)
    velocity[~is_central] += halos.dispersion(orbiting, u)[:, None] * rng.standard_normal(u.shape)
    return {"position": position, "velocity": velocity, "halo": halo, "is_central": is_central}


def expected_points(occupation: Occupation, halos: Halos) -> Iterator[tuple[Array, Array]]:
    """Weighted points whose density is the mean of `paint` over realizations, some halos at a time.

    Fixed points sample the satellites of a halo evenly, 128 or more for each galaxy: a Sobol sequence with
    its mirror image, so that no halo's center of mass moves.

    Yields
    ------
    positions (n, 3) [Mpc/h] and weights (n,); the weights of all halos sum to the mean number of galaxies.
    """
    central, satellites = occupation.means(halos.mass, halos.upper)
    yield halos.wrap(halos.position[central > 0]), central[central > 0]
    occupied = satellites > 0
    exponents = np.clip(
        np.ceil(np.log2(128 * satellites, where=occupied, out=np.zeros_like(satellites))), 6, 20
    )
    for exponent in np.unique(exponents[occupied]).astype(int):
        half = qmc.Sobol(3, scramble=False).random_base2(exponent - 1) + 0.5**exponent
        mirrored = np.stack([half[:, 0], 1 - half[:, 1], (half[:, 2] + 0.5) % 1], axis=1)
        points = np.concatenate([half, mirrored])
        alike = np.flatnonzero(occupied & (exponents == exponent))
        for chosen in np.array_split(alike, -(-alike.size * len(points) // _POINTS_AT_ONCE)):
            yield (
                halos.place(np.repeat(chosen, len(points)), np.tile(points, (chosen.size, 1))),
                np.repeat(satellites[chosen] / len(points), len(points)),
            )


class PowerLawForm(StrictModel):
    """`galdist.statistics.occupation.PowerLaw`: M_min, M_1 and alpha."""

    kind: Literal["power-law"] = "power-law"


class ZhengForm(StrictModel):
    """`galdist.statistics.occupation.Zheng`: M_min, sigma_logM, M_0, M_1 and alpha."""

    kind: Literal["zheng"]
    assembly_bias: Literal["concentration", "overdensity"] | None = None
    """Second property of halos, for A_cen and A_sat: the concentration, by the largest circular velocity at a
    given mass, or the density of other halos' mass within 3 Mpc/h. null: the mass alone."""


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
    form: Annotated[PowerLawForm | ZhengForm, Constraint(discriminator="kind")] = PowerLawForm()
    """How the mean number of galaxies depends on the halo."""
    outliers: Annotated[float, Constraint(ge=0, lt=1)] = 0.01
    """Largest fraction of galaxies that may live in halos that the form has no galaxies for; see
    `galdist.statistics.occupation`."""


def hod(config: HodConfig, inputs: Mapping[str, list[Path]], out: Path) -> None:
    """Fit the occupation of the training simulations' halos and paint the simulations of a split.

    ``inputs["catalogs"]`` hold the halos that are painted, ``inputs["training"]`` those that are fitted, by
    default the same: other suites, ranges of parameters, or redshifts of simulations of the same names.

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
    fitted = _catalogs(inputs.get("training") or inputs["catalogs"])
    training = _training(config, fitted)
    targets = _targets(config, inputs["grids"], catalogs)
    holders = {name: _halos(config, catalogs[name], grids) for name, grids in targets.items()}
    tables = [
        fitted[name].table(name, "halos", [config.mass, "n_galaxies", *_secondary_columns(config)])
        for name in training
    ]
    mass = np.concatenate([table[config.mass] for table in tables]).astype(float)
    number = np.concatenate([table["n_galaxies"] for table in tables]).astype(float)
    upper: Flags | None = None
    occupation: PowerLaw | Zheng
    if isinstance(config.form, ZhengForm):
        if config.form.assembly_bias:
            boxes = [fitted[name].attrs(name).box_size for name in training]
            halves = [_upper(config, table, box) for table, box in zip(tables, boxes, strict=True)]
            upper = np.concatenate(halves)
        occupation = fit_zheng(mass, number, config.outliers, upper)
    else:
        occupation = fit_power_law(mass, number, config.outliers)
    log.info("occupation of %d halos of %s: %s", mass.size, ", ".join(training), occupation)
    first = next(iter(targets.values()))
    truth = first.field(config.field)
    voxel = np.dtype(truth.dtype).itemsize + np.dtype(np.float32).itemsize  # a realization and its mean
    durable.require_space(
        out, voxel * first.n_mesh**3 * len(targets), f"predictions of {len(targets)} boxes before compression"
    )
    record = {
        **asdict(occupation),
        "form": config.form.model_dump(),
        "mass": config.mass,
        "training": training,
    }
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
        metric_row(name, "train", record[name], record[f"{name}_error"], "Msun/h" if name[0] == "M" else "")
        for name in ("M_min", "sigma_logM", "M_0", "M_1", "alpha", "A_cen", "A_sat")
        if name in record and (upper is not None or name[0] != "A")
    ]
    rows.append(metric_row("log_likelihood", "train", occupation.log_likelihood))
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
            metric_row(
                "n_galaxies/expected", name, sum(map(np.sum, occupation.means(halos.mass, halos.upper)))
            ),
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
    columns = ["position", "velocity", config.mass, *_secondary_columns(config)]
    columns += ["radius_200c"] * (config.mass == "mass_200c")
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
        velocity=table["velocity"].astype(float),
        circular_velocity=np.sqrt(
            GRAVITY * mass * (1 + grids.attrs.redshift) / np.where(radius > 0, radius, 1.0)
        ),
        box_size=grids.attrs.box_size,
        upper=_upper(config, table, grids.attrs.box_size) if _secondary_columns(config) else None,
    )


def _secondary_columns(config: HodConfig) -> list[str]:
    """Columns of halos that their second property follows from."""
    property = config.form.assembly_bias if isinstance(config.form, ZhengForm) else None
    return {"concentration": ["v_max"], "overdensity": ["position", "mass"], None: []}[property]


def _upper(config: HodConfig, table: Mapping[str, NDArray[Any]], box_size: float) -> Flags:
    """Which halos of a box are in the upper half of the second property at their mass.

    Halves are those of each box and table: baryons change v_max, and so would halves of one run's halos be
    others in its N-body twin.
    """
    mass = table[config.mass].astype(float)
    held = mass > 0
    upper = np.zeros(mass.size, bool)
    if "v_max" in table:
        # v_max^3 / M has the units and, at given mass, the order of the concentration, and little trend.
        secondary = table["v_max"][held] / np.cbrt(mass[held])
    else:
        weight = table["mass"].astype(float)
        around = overdensity(table["position"], box_size, weight=weight)
        own = weight / (weight.sum() * 4 / 3 * np.pi * 3.0**3 / box_size**3)
        secondary = (around - own)[held]
    upper[held] = upper_half(mass[held], secondary)
    return upper


def _binned(mass: Array, number: Array, occupation: PowerLaw | Zheng) -> dict[str, list[float]]:
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
