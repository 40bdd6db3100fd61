"""The stage ``smogn``: training rows with more of what is rare, by interpolation and Gaussian noise.

SMOGN, Branco, Torgo & Ribeiro (2017, PMLR 74, 36), with the relevance of Ribeiro (2011); on halos and
galaxies: de Santi et al. (2022, MNRAS 514, 2463). It changes how often galaxies of each kind are seen, and
with that p(galaxy | halo) where the inputs do not decide which kind it is: a model of distributions is better
trained without it.
"""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field as Constraint
from pydantic import PositiveFloat, PositiveInt, field_validator
from scipy.interpolate import PchipInterpolator
from scipy.spatial import cKDTree

from galdist.catalogs.catalog import CatalogWriter, open_catalog
from galdist.catalogs.centrals import SPLITS, TABLE, read_centrals
from galdist.catalogs.columns import ColumnName
from galdist.config import StrictModel, require
from galdist.simulations.simulation import SimulationError
from hpc import progress

ControlPoint = tuple[float, Annotated[float, Constraint(ge=0, le=1)]]
"""A value of a property and its relevance."""
_PAIRS = 500  # rows that the median distance from a row is estimated with


class SmognConfig(StrictModel):
    """How rows are added and left out. Defaults are those of de Santi et al. (2022)."""

    inputs: Annotated[tuple[ColumnName, ...], Constraint(min_length=1)] = (
        "log_halo_mass",
        "log_concentration",
        "formation_redshift",
        "spin",
        "overdensity",
    )
    targets: Annotated[tuple[ColumnName, ...], Constraint(min_length=1)] = ("log_stellar_mass", "color_gi")
    """Properties whose rare values are to be seen more often."""
    control_points: dict[ColumnName, tuple[ControlPoint, ...]] = Constraint(default_factory=dict)
    """Property -> points of its relevance; by default those of `relevance`."""
    threshold: Annotated[float, Constraint(gt=0, lt=1)] = 0.5
    """Relevance from which a value is rare."""
    neighbors: PositiveInt = 7
    perturbation: PositiveFloat = 0.04
    """Standard deviation of the noise, in those of the rows that are alike."""
    seed: int = 0

    @field_validator("control_points")
    @classmethod
    def _increasing(cls, points: dict[str, tuple[ControlPoint, ...]]) -> dict[str, tuple[ControlPoint, ...]]:
        for name, given in points.items():
            if len(given) < 2 or any(a[0] >= b[0] for a, b in pairwise(given)):
                raise ValueError(f"{name}: give two points at least, at increasing values; got {given}")
        return points

    def check_inputs(self, inputs: Mapping[str, Mapping[str, StrictModel | None]]) -> None:
        """See `galdist.config.ChecksInputs`."""
        require((*self.inputs, *self.targets), inputs.get("catalogs", {}))


def smogn(config: SmognConfig, inputs: Mapping[str, list[Path]], out: Path) -> None:
    """Make ``out / "catalog.zarr"``: the catalogue read, with its training rows balanced.

    Validation and test rows are as they were, and come first. Halos that were made up are nowhere: the table
    has no ``position``, and no other columns than ``inputs`` and ``targets``. Simulations are balanced one by
    one; constants of a simulation (its cosmology) stay with it.

    Raises
    ------
    galdist.grids.store.StoreError
        for columns that the catalogue does not have.
    galdist.simulations.simulation.SimulationError
        where nothing is rare, everything is, or a kind has too few rows.
    """
    step = inputs["catalogs"][0]
    store = open_catalog(step / "catalog.zarr")
    names = store.names()
    wanted = [*dict.fromkeys((*config.inputs, *config.targets))]
    read_centrals([step], wanted, None)  # says what is missing
    writer = CatalogWriter(out / "catalog.zarr")
    for done, name in enumerate(names):
        progress.report(done, len(names), name)
        attrs = store.attrs(name)
        held = store.columns(name, TABLE)
        columns = [column for column in wanted if column in held]
        table = store.table(name, TABLE, [*columns, "split"])
        training = table["split"] == SPLITS.index("train")
        facts: dict[str, Any] = {**store.facts(name, TABLE), "smogn": config.model_dump(mode="json")}
        if training.any():
            rows = np.stack([table[column][training] for column in columns], 1).astype(np.float64)
            made = balance(rows, columns, config, np.random.default_rng([config.seed, done]))
            facts["smogn"]["rows_before"] = int(training.sum())
        else:
            made = np.empty((0, len(columns)))
        merged = {
            column: np.concatenate([table[column][~training], made[:, i].astype(table[column].dtype)])
            for i, column in enumerate(columns)
        }
        merged["split"] = np.concatenate(
            [table["split"][~training], np.full(len(made), SPLITS.index("train"), np.int8)]
        )
        writer.add(attrs, {TABLE: merged}, held, {TABLE: facts})
    writer.finish(names)
    progress.report(len(names), len(names))


def relevance(values: NDArray[Any], points: tuple[ControlPoint, ...] = ()) -> NDArray[np.float64]:
    """How rare values are: 0 for those that are common, 1 for the rarest.

    A monotone cubic (PCHIP) between control points, flat at the first and the last and constant beyond them.
    By default there are three: the median is not relevant at all; the ends of the whiskers of a box plot (the
    last values within 1.5 quartile distances of the box) are fully, each where values lie beyond it (Ribeiro
    2011).

    Parameters
    ----------
    values
        (n,), any units.
    points
        (value, relevance), at increasing values.

    Returns
    -------
    array
        (n,) in [0, 1].
    """
    if not points:
        low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
        reach = 1.5 * (high - low)
        inside = values[(values >= low - reach) & (values <= high + reach)]
        points = (
            (float(inside.min()), float(values.min() < inside.min())),
            (float(median), 0.0),
            (float(inside.max()), float(values.max() > inside.max())),
        )
    at, height = np.array([(points[0][0] - 1, points[0][1]), *points, (points[-1][0] + 1, points[-1][1])]).T
    return np.clip(PchipInterpolator(at, height)(np.clip(values, at[0], at[-1])), 0, 1)


def kinds(targets: NDArray[Any], relevances: NDArray[Any], threshold: float) -> NDArray[np.int64]:
    """Number of the kind of each row: 0 where nothing is rare, else one for each property and side.

    A row that is rare in several properties is of the kind in which it is rarest; with one property this is
    SMOGN's partition, with low, common and high values.

    Parameters
    ----------
    targets, relevances
        (n, n_targets).

    Returns
    -------
    array
        (n,): 1 + 2 t for low values of property t, 2 + 2 t for high ones.
    """
    rarest = relevances.argmax(1)
    rows = np.arange(len(targets))
    high = targets[rows, rarest] > np.median(targets, axis=0)[rarest]
    return np.where(relevances[rows, rarest] >= threshold, 1 + 2 * rarest + high, 0)


def balance(
    rows: NDArray[np.float64], columns: list[str], config: SmognConfig, generator: np.random.Generator
) -> NDArray[np.float64]:
    """As many rows of each kind: rows of common kinds are left out, rare ones added.

    A row is added beside a real one of its kind. Where one of its nearest neighbors (of the same kind; over
    all columns, in units of their standard deviations), drawn at random, is closer than half of the median
    distance to its kind, it lies between the two; else it is the row with Gaussian noise. No column leaves
    the range of the real rows.

    Parameters
    ----------
    rows
        (n, n_columns) without NaN.
    columns
        names; those of the targets among them.

    Returns
    -------
    array
        (m, n_columns) with m near n: the real rows that were kept and those that were made, in random order.
    """
    if not np.isfinite(rows).all():
        raise ValueError("rows that are not finite numbers cannot be interpolated")
    targets = rows[:, [columns.index(name) for name in config.targets]]
    rare = np.stack(
        [
            relevance(targets[:, i], config.control_points.get(name, ()))
            for i, name in enumerate(config.targets)
        ],
        1,
    )
    of_kind = kinds(targets, rare, config.threshold)
    found, sizes = np.unique(of_kind, return_counts=True)
    if len(found) < 2:
        raise SimulationError(
            f"smogn: {'no' if found[0] == 0 else 'every'} row of {len(rows)} is rare in "
            f"{', '.join(config.targets)} (relevance {rare.min():.2g} to {rare.max():.2g}): change threshold "
            f"({config.threshold}) or control_points"
        )
    if sizes.min() < 2:
        raise SimulationError(
            f"smogn: one row alone of {len(rows)} is of its kind: it has no neighbor; raise threshold "
            f"({config.threshold}) or change control_points"
        )
    wanted = round(len(rows) / len(found))
    scale = rows.std(0)
    scale[scale == 0] = 1
    balanced = [_resample(rows[of_kind == kind], scale, wanted, config, generator) for kind in found]
    result = np.clip(np.concatenate(balanced), rows.min(0), rows.max(0))
    return np.asarray(generator.permutation(result))


def _resample(
    rows: NDArray[np.float64],
    scale: NDArray[np.float64],
    wanted: int,
    config: SmognConfig,
    generator: np.random.Generator,
) -> NDArray[np.float64]:
    """As many rows of one kind as are wanted."""
    n = len(rows)
    if wanted <= n:
        return rows[generator.choice(n, wanted, replace=False)]
    each, more = divmod(wanted - n, n)
    seeds = np.concatenate([np.tile(np.arange(n), each), generator.choice(n, more, replace=False)])
    scaled = rows / scale
    k = min(config.neighbors, n - 1)
    distances, neighbors = cKDTree(scaled).query(scaled, k + 1, workers=-1)
    drawn = generator.integers(1, k + 1, seeds.size)  # the first is the row itself
    safe = _median_distance(scaled, generator) / 2
    near = distances[seeds, drawn] < safe[seeds]
    along = generator.random((seeds.size, 1))
    between = rows[seeds] + along * (rows[neighbors[seeds, drawn]] - rows[seeds])
    sigma = np.minimum(safe, config.perturbation)[seeds, None] * rows.std(0)
    noisy = rows[seeds] + sigma * generator.standard_normal((seeds.size, rows.shape[1]))
    return np.concatenate([rows, np.where(near[:, None], between, noisy)])


def _median_distance(rows: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float64]:
    """Median distance from each row to the others, (n,): of as many of them, drawn, as tell it to some
    percent."""
    others = rows[generator.choice(len(rows), min(_PAIRS, len(rows)), replace=False)]
    medians = np.empty(len(rows))
    for start in range(0, len(rows), 4096):
        some = rows[start : start + 4096]
        squares = (some**2).sum(1)[:, None] - 2 * some @ others.T + (others**2).sum(1)
        medians[start : start + 4096] = np.sqrt(np.median(np.maximum(squares, 0), axis=1))
    return medians
