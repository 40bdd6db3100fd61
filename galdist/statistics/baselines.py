"""The stage `baseline`: what models of tables are compared with, fitted and drawn from in one go.

Random forest, gradient boosting, and abundance with age matching. They fill the same samples store as the
stage `sample`, draws joint over the targets as far as the method goes, and nothing of them is kept but that.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from pydantic import Field as Constraint
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri

from galdist.catalogs.centrals import Centrals, read_centrals
from galdist.config import StrictModel, require
from galdist.grids.store import unknown_name
from galdist.models.tables import TableConfig
from galdist.training.sample import Drawer, Level, SampleConfig, fill
from hpc import ddp
from hpc.strict import repeated

Array = NDArray[np.float64]

_DEFAULTS = TableConfig.model_fields


class ForestConfig(StrictModel):
    """A quantile regression forest (Meinshausen 2006, JMLR 7, 983) of all targets at once.

    The trees split for the mean of the standardized targets. Each leaf knows all training rows that fall into
    it: a draw takes a leaf of a random tree and a random row of it, with all its targets; point and quantiles
    are the mean and the quantiles of just this distribution.
    """

    name: Literal["random-forest"] = "random-forest"
    trees: PositiveInt = 100
    min_samples_leaf: PositiveInt = 20
    """Fewer resolve the mean better, more the distribution: on TNG300 10 to 40 score alike."""
    max_features: Annotated[float, Constraint(gt=0, le=1)] = 0.6
    """Fraction of the inputs that a split chooses from."""


class BoostingConfig(StrictModel):
    """Boosted trees on histograms (scikit-learn) of each target alone: its mean, and quantiles at ``levels``.

    A draw is the inverse of the cumulative distribution at a random level; levels of different targets are
    independent, so that draws have the correlations that the inputs explain and no others. Quantiles that
    cross are sorted (Chernozhukov, Fernández-Val & Galichon 2010, Econometrica 78, 1093). Between the levels,
    and beyond the outer ones, the quantile function is linear in the normal score of the level, exact for a
    Gaussian; it ends at the range of the training rows.
    """

    name: Literal["gradient-boosting"] = "gradient-boosting"
    iterations: PositiveInt = 100
    learning_rate: PositiveFloat = 0.1
    min_samples_leaf: PositiveInt = 100
    """As many as the outer levels need: those of leaves with few rows are too narrow."""
    levels: tuple[Level, ...] = Constraint(
        default=(0.01, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95, 0.99), min_length=2
    )
    """Rising."""

    @model_validator(mode="after")
    def _rising(self) -> "BoostingConfig":
        if any(b <= a for a, b in zip(self.levels, self.levels[1:], strict=False)):
            raise ValueError(f"levels must rise, got {self.levels}")
        return self


class MatchingConfig(StrictModel):
    """Abundance matching of masses, and age matching (Hearin & Watson 2013, MNRAS 435, 1313) at fixed mass.

    ``log_stellar_mass`` has the rank of ``log_halo_mass``. At fixed mass ``color_gi`` has the rank of
    ``formation_redshift``, ``log_ssfr`` the opposite one, and ``log_radius`` that of ``spin`` (Mo, Mao &
    White 1998, MNRAS 295, 319). Each property has the distribution of the training rows, the last three at
    each stellar mass. Ranks are those among the training rows; the point has no scatter.
    """

    name: Literal["abundance-matching"] = "abundance-matching"
    scatter: NonNegativeFloat = 0.0
    """Root mean square over the halos of the standard deviation of log_stellar_mass at fixed log_halo_mass
    [dex]. The distribution of log_stellar_mass is kept: Gaussian noise is added to the matched masses, of the
    width that leaves this scatter after the sums have been matched to the distribution again."""
    rows_per_bin: Annotated[int, Constraint(ge=2)] = 1000
    """Training rows that are one bin of mass."""


Method = Annotated[
    Annotated[ForestConfig | BoostingConfig | MatchingConfig, Constraint(discriminator="name")],
    BeforeValidator(lambda value: {"name": value} if isinstance(value, str) else value),
]


class BaselineConfig(SampleConfig):
    """Settings of the stage `baseline`."""

    method: Method
    """Its name alone is the short form of ``{name: ...}``."""
    inputs: Annotated[tuple[str, ...], Constraint(min_length=1)] = _DEFAULTS["inputs"].default
    """Abundance matching leaves aside those that it does not know."""
    targets: Annotated[tuple[str, ...], Constraint(min_length=1)] = _DEFAULTS["targets"].default

    @model_validator(mode="after")
    def _names(self) -> "BaselineConfig":
        names = [*self.inputs, *self.targets]
        if twice := repeated(names):
            raise ValueError(f"{twice[0]} is named twice among the inputs and targets")
        if isinstance(self.method, MatchingConfig):
            for target in self.targets:
                if target not in MATCHED:
                    raise ValueError(unknown_name("abundance-matching: target", target, list(MATCHED)))
                for needed in ("log_halo_mass", MATCHED[target][0]):
                    if needed not in self.inputs:
                        raise ValueError(
                            f"abundance-matching: {target} needs {needed}, which is not among the inputs "
                            f"({', '.join(self.inputs)})"
                        )
        return self

    @property
    def columns(self) -> list[str]:
        """What it reads of the training rows."""
        if isinstance(self.method, MatchingConfig):
            return list(dict.fromkeys([*_matched_by(self.targets), "log_stellar_mass", *self.targets]))
        return [*self.inputs, *self.targets]

    def check_inputs(self, inputs: Mapping[str, Mapping[str, StrictModel | None]]) -> None:
        """See `galdist.config.ChecksInputs`."""
        require(self.columns, inputs.get("catalogs", {}))


MATCHED: dict[str, tuple[str, int]] = {
    "log_stellar_mass": ("log_halo_mass", 1),
    "color_gi": ("formation_redshift", 1),
    "log_ssfr": ("formation_redshift", -1),
    "log_radius": ("spin", 1),
}
"""What abundance matching knows: target -> the input whose rank it has, and whether that or the opposite."""


def _matched_by(targets: Sequence[str]) -> tuple[str, ...]:
    """Inputs whose ranks abundance matching needs for these targets."""
    return tuple(dict.fromkeys(["log_halo_mass", *(MATCHED[target][0] for target in targets)]))


def baseline(config: BaselineConfig, inputs: Mapping[str, list[Path]], out: Path) -> None:
    """Fit a baseline to the training rows of `centrals` tables, and draw galaxies for rows of a split.

    Called again on the same folder it does the chunks that are not yet there.

    Parameters
    ----------
    config
        settings.
    inputs
        `catalogs`: steps with a `catalog.zarr` that holds `centrals` tables.
    out
        step folder. Gets `samples.zarr` and `metrics.json`, as in the stage `sample`.

    Raises
    ------
    ValueError
        where there are too few training rows, no rows of the split, the scatter cannot be had, or quantiles
        are asked of abundance matching.
    galdist.grids.store.StoreError
        where the tables lack an input or a target.
    hpc.ddp.Stopped
        where a signal asked to stop, before the next chunk; chunks that are done stay.
    """
    model = fit(config, inputs["catalogs"])
    with ddp.group() as group, ddp.stop_requests() as stop:
        fill(config, model, inputs["catalogs"], out, group, stop)


def fit(config: BaselineConfig, catalogs: Sequence[Path]) -> "Baseline":
    """A baseline fitted to the training rows of `centrals` tables; ``config.seed`` decides on what is random.

    Raises
    ------
    ValueError, galdist.grids.store.StoreError
        as in `baseline`.
    """
    rows = read_centrals(catalogs, config.columns, "train")
    if len(rows) < 2:
        where = ", ".join(str(step / "catalog.zarr") for step in catalogs)
        raise ValueError(f"{where}: {len(rows)} training rows; at least 2 were expected")
    if isinstance(config.method, ForestConfig):
        return Forest(config, config.method, rows)
    if isinstance(config.method, BoostingConfig):
        return Boosting(config, config.method, rows)
    return Matching(config, config.method, rows)


class Baseline(Drawer):
    """A fitted baseline."""

    checkpoints: tuple[str, ...] = ()

    def __init__(self, config: BaselineConfig, rows: Centrals, inputs: tuple[str, ...]) -> None:
        self.name: str = config.method.name
        self.inputs = inputs
        self.targets = config.targets
        self.units = {name: rows.units[name] for name in self.targets}
        self.source_columns = {name: rows.source_columns[name] for name in self.targets}
        x = self._matrix(rows, inputs).astype(np.float32)
        self.low: NDArray[np.float32] = x.min(0)
        self.high: NDArray[np.float32] = x.max(0)

    @staticmethod
    def _matrix(rows: Centrals, names: Sequence[str]) -> Array:
        return np.stack([rows.columns[name].astype(np.float64) for name in names], 1)


class Forest(Baseline):
    """`ForestConfig`, fitted; the point is the mean. Any number of threads gives the same."""

    def __init__(self, config: BaselineConfig, method: ForestConfig, rows: Centrals) -> None:
        super().__init__(config, rows, config.inputs)
        import torch
        from sklearn.ensemble import RandomForestRegressor

        x = self._matrix(rows, self.inputs).astype(np.float32)
        y = self._matrix(rows, self.targets)
        spread = y.std(0)
        scaled = (y - y.mean(0)) / np.where(spread > 0, spread, 1)  # targets share the splits
        self._forest = RandomForestRegressor(
            method.trees,
            min_samples_leaf=method.min_samples_leaf,
            max_features=method.max_features,
            random_state=config.seed % (1 << 32),
            n_jobs=torch.get_num_threads(),  # those of the step
        ).fit(x, scaled if scaled.shape[1] > 1 else scaled[:, 0])
        # The rows of leaf l of tree t are members[t, first[t, l] : first[t, l + 1]].
        nodes = max(tree.tree_.node_count for tree in self._forest.estimators_)
        self._members = np.empty((method.trees, len(x)), np.int32)
        self._first = np.empty((method.trees, nodes + 1), np.int32)
        self._means = np.zeros((method.trees, nodes, y.shape[1]))
        self._y = y
        for t, tree in enumerate(self._forest.estimators_):
            leaf = tree.apply(x)
            self._members[t] = np.argsort(leaf, kind="stable")
            count = np.bincount(leaf, minlength=nodes)
            self._first[t] = np.concatenate([[0], np.cumsum(count)])
            sums = np.stack([np.bincount(leaf, values, nodes) for values in y.T], 1)
            self._means[t] = sums / np.maximum(count, 1)[:, None]

    def _leaves(self, inputs: NDArray[np.float32]) -> NDArray[np.int64]:
        return np.asarray(self._forest.apply(inputs)).reshape(len(inputs), -1)

    def point(self, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        leaves = self._leaves(inputs)
        total = np.zeros((len(inputs), len(self.targets)))
        for t, means in enumerate(self._means):  # in one order, whatever the threads
            total += means[leaves[:, t]]
        return (total / len(self._means)).astype(np.float32)

    def sample(self, inputs: NDArray[np.float32], n: int, seed: int, chunk: int = 0) -> NDArray[np.float32]:
        random = np.random.default_rng([seed, chunk])
        tree = random.integers(len(self._members), size=(len(inputs), n))
        leaf = np.take_along_axis(self._leaves(inputs), tree, 1)
        first, end = self._first[tree, leaf], self._first[tree, leaf + 1]
        return self._y[self._members[tree, random.integers(first, end)]].astype(np.float32)

    def quantiles(self, inputs: NDArray[np.float32], levels: Sequence[float]) -> NDArray[np.float32]:
        found = np.empty((len(inputs), len(levels), len(self.targets)), np.float32)
        for i, leaves in enumerate(self._leaves(inputs)):
            members = [
                self._members[t, self._first[t, leaf] : self._first[t, leaf + 1]]
                for t, leaf in enumerate(leaves)
            ]
            weights = np.concatenate([np.full(len(part), 1 / len(part)) for part in members])
            values = self._y[np.concatenate(members)]
            for k, order in enumerate(np.argsort(values, axis=0).T):
                below = np.cumsum(weights[order]) / weights.sum()
                place = np.searchsorted(below, levels).clip(max=len(order) - 1)
                found[i, :, k] = values[order[place], k]
        return found


class Boosting(Baseline):
    """`BoostingConfig`, fitted; the point is the mean."""

    def __init__(self, config: BaselineConfig, method: BoostingConfig, rows: Centrals) -> None:
        super().__init__(config, rows, config.inputs)
        from sklearn.ensemble import HistGradientBoostingRegressor

        x = self._matrix(rows, self.inputs).astype(np.float32)
        y = self._matrix(rows, self.targets)
        self._range = y.min(0), y.max(0)
        self._scores = ndtri(np.array(method.levels))

        def fitted(values: Array, **loss: Any) -> Any:
            return HistGradientBoostingRegressor(
                max_iter=method.iterations,
                learning_rate=method.learning_rate,
                min_samples_leaf=method.min_samples_leaf,
                early_stopping=False,
                random_state=config.seed % (1 << 32),
                **loss,
            ).fit(x, values)

        self._mean = [fitted(values) for values in y.T]
        self._at = [
            [fitted(values, loss="quantile", quantile=level) for level in method.levels] for values in y.T
        ]

    def point(self, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.stack([model.predict(inputs) for model in self._mean], 1).astype(np.float32)

    def sample(self, inputs: NDArray[np.float32], n: int, seed: int, chunk: int = 0) -> NDArray[np.float32]:
        random = np.random.default_rng([seed, chunk])
        return self._values(inputs, random.standard_normal((len(inputs), n, len(self.targets))))

    def quantiles(self, inputs: NDArray[np.float32], levels: Sequence[float]) -> NDArray[np.float32]:
        shape = (len(inputs), len(levels), len(self.targets))
        return self._values(inputs, np.broadcast_to(ndtri(np.array(levels))[:, None], shape))

    def _values(self, inputs: NDArray[np.float32], scores: Array) -> NDArray[np.float32]:
        """Quantiles (n, m, t) at normal scores (n, m, t)."""
        place = np.searchsorted(self._scores, scores).clip(1, len(self._scores) - 1)
        low, high = self._scores[place - 1], self._scores[place]
        weight = (scores - low) / (high - low)
        found = np.empty(scores.shape, np.float32)
        for k, models in enumerate(self._at):
            knots = np.sort(np.stack([model.predict(inputs) for model in models], 1), axis=1)
            below = np.take_along_axis(knots, place[..., k] - 1, 1)
            above = np.take_along_axis(knots, place[..., k], 1)
            values = below + weight[..., k] * (above - below)
            found[..., k] = values.clip(self._range[0][k], self._range[1][k])
        return found


class Matching(Baseline):
    """`MatchingConfig`, fitted; the point is the galaxy without scatter, the median of the mass."""

    def __init__(self, config: BaselineConfig, method: MatchingConfig, rows: Centrals) -> None:
        super().__init__(config, rows, _matched_by(config.targets))
        # Rounded as the inputs that come: what is equal there is equal here.
        columns = {
            name: values.astype(np.float32).astype(np.float64) for name, values in rows.columns.items()
        }
        halo, stellar = columns["log_halo_mass"], columns["log_stellar_mass"]
        self._halo, self._stellar = _Distribution(halo), _Distribution(stellar)
        self._noise = _Noise(self._stellar, method.scatter)
        self._secondary = {
            target: (
                _AtMass(halo, columns[MATCHED[target][0]], method.rows_per_bin),
                _AtMass(stellar, columns[target], method.rows_per_bin),
            )
            for target in self.targets
            if target != "log_stellar_mass"
        }

    def point(self, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        return self._galaxies(inputs, np.zeros((len(inputs), 1)))[:, 0]

    def sample(self, inputs: NDArray[np.float32], n: int, seed: int, chunk: int = 0) -> NDArray[np.float32]:
        return self._galaxies(inputs, np.random.default_rng([seed, chunk]).standard_normal((len(inputs), n)))

    def quantiles(self, inputs: NDArray[np.float32], levels: Sequence[float]) -> NDArray[np.float32]:
        """None: only the mass has a distribution of its own."""
        raise ValueError(f"{self.name} has no quantiles of its own: ask for samples, and take theirs")

    def _galaxies(self, inputs: NDArray[np.float32], noise: Array) -> NDArray[np.float32]:
        """Galaxies (n, m, t) with standard normal ``noise`` (n, m) in the mass."""
        x = {name: inputs[:, i].astype(np.float64) for i, name in enumerate(self.inputs)}
        halo = x["log_halo_mass"]
        mass = self._noise.add(self._stellar.value(self._halo.rank(halo))[:, None], noise)
        found = np.empty((*mass.shape, len(self.targets)), np.float32)
        for k, target in enumerate(self.targets):
            if target == "log_stellar_mass":
                found[..., k] = mass
                continue
            # The rank among halos of this mass is uniform at every halo mass, and so at every stellar mass.
            older, values = self._secondary[target]
            source, sign = MATCHED[target]
            rank = older.rank(halo, x[source])
            found[..., k] = values.value(mass, (rank if sign > 0 else 1 - rank)[:, None])
        return found


class _Distribution:
    """An empirical distribution: rank in (0, 1) of a value, the same for ties, and value of a rank."""

    def __init__(self, values: Array) -> None:
        self.sorted = np.sort(values)
        self._ranks = (np.arange(len(values)) + 0.5) / len(values)

    def rank(self, values: Array) -> Array:
        below, up_to = (np.searchsorted(self.sorted, values, side) for side in ("left", "right"))
        return np.clip((below + up_to) / 2 / len(self.sorted), self._ranks[0], self._ranks[-1])

    def value(self, ranks: Array) -> Array:
        return np.interp(ranks, self._ranks, self.sorted)


class _AtMass:
    """Distributions of a quantity in bins of mass with equal numbers of rows."""

    def __init__(self, mass: Array, values: Array, rows_per_bin: int) -> None:
        parts = np.array_split(np.argsort(mass, kind="stable"), max(1, len(mass) // rows_per_bin))
        edges = mass[[part[0] for part in parts[1:]]]
        self._edges = np.unique(edges[edges > mass.min()])  # equal masses share a bin
        place = self._bin(mass)
        self._bins = [_Distribution(values[place == i]) for i in range(len(self._edges) + 1)]

    def _bin(self, mass: Array) -> NDArray[np.int64]:
        return np.searchsorted(self._edges, mass, "right")

    def rank(self, mass: Array, values: Array) -> Array:
        """Ranks of values among the rows of like mass."""
        return self._each(mass, values, "rank")

    def value(self, mass: Array, ranks: Array) -> Array:
        """Values of ranks among the rows of like mass."""
        return self._each(mass, np.broadcast_to(ranks, mass.shape), "value")

    def _each(self, mass: Array, what: Array, ask: Literal["rank", "value"]) -> Array:
        found, place = np.empty(mass.shape), self._bin(mass)
        for i in np.unique(place):
            here = place == i
            found[here] = getattr(self._bins[i], ask)(what[here])
        return found


class _Noise:
    """Scatter of matched masses that leaves their distribution as it is."""

    _POINTS = 1024

    def __init__(self, masses: _Distribution, scatter: float) -> None:
        self._masses = masses
        self._sigma = 0.0
        # A thinned distribution, for speed: of masses at equidistant ranks.
        self._nodes = masses.value((np.arange(self._POINTS) + 0.5) / self._POINTS)
        if scatter == 0:
            return
        widest = 100 * float(masses.sorted.std())
        if not self._scatter(widest) > scatter:
            raise ValueError(
                f"abundance-matching: a scatter of {scatter:g} dex at fixed halo mass cannot be: all stellar "
                f"masses together scatter by {masses.sorted.std():.3g} dex"
            )
        self._set(brentq(lambda sigma: self._scatter(sigma) - scatter, scatter / 10, widest, rtol=1e-4))

    def _set(self, sigma: float) -> None:
        low, high = self._masses.sorted[[0, -1]]
        self._sigma = sigma
        self._grid = np.linspace(low - 6 * sigma, high + 6 * sigma, 2 * self._POINTS)
        self._cumulative = np.mean([ndtr((self._grid - node) / sigma) for node in self._nodes], axis=0)

    def _scatter(self, sigma: float) -> float:
        """Root mean square of the scatter that noise of width ``sigma`` leaves."""
        self._set(sigma)
        score, weight = np.polynomial.hermite_e.hermegauss(31)
        weight = weight / weight.sum()
        masses = self.add(self._nodes[:, None], score)
        mean = masses @ weight
        return float(np.sqrt(np.mean(((masses - mean[:, None]) ** 2) @ weight)))

    def add(self, masses: Array, noise: Array) -> Array:
        """Matched masses with scatter; standard normal ``noise``, both broadcast."""
        if not self._sigma:
            return np.broadcast_to(masses, np.broadcast_shapes(masses.shape, noise.shape))
        ranks = np.interp(masses + self._sigma * noise, self._grid, self._cumulative)
        return self._masses.value(ranks)
