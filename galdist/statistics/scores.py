"""The stage ``scores``: how far drawn galaxies are from the true ones, as populations and halo by halo.

Every metric has the scatter between seeds of a model, a bootstrap error, and beside it what a perfect model
would score on as many galaxies (see `ScoreRow`), so that nobody chases noise.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np
from numpy.typing import NDArray
from pydantic import Field as Constraint

from galdist.catalogs.centrals import SPLITS, Centrals, read_centrals
from galdist.catalogs.samples import SamplesStore, aligned, open_samples
from galdist.config import StrictModel
from galdist.grids.store import Split
from galdist.statistics import distributions, tracers
from galdist.statistics.distributions import Array, Weights
from galdist.statistics.metrics import MetricRow, metric_row, save_metrics
from galdist.statistics.spectra import TRUTH
from hpc import durable, progress
from hpc.strict import did_you_mean

log = logging.getLogger(__name__)

FILE = "scores.json"
Level = Annotated[float, Constraint(gt=0, lt=1)]
Columns = tuple[str, ...]
Measured = dict[tuple[str, str], Array]
"""(metric, of) -> its value for the sample itself and for each resampling of its rows."""

_ROWS = 1 << 16  # of an ensemble, at a time
_PAIRS = 3  # of draws of one prediction that are compared with each other
_FEWEST = 30  # rows of a group that is scored by itself: the mean of fewer says little
_HEADLINES = ("ks", "ks_flat", "ks_mean", "energy_distance", "crps", "energy_score", "rmse")


class ScoresConfig(StrictModel):
    """What is scored."""

    split: Split = "test"
    """The rows that predictions were made for."""
    joints: tuple[Annotated[Columns, Constraint(min_length=2)], ...] | None = None
    """Sets of properties scored together for every model that has them, besides all that a model has; null:
    stellar mass and color."""
    levels: tuple[Level, ...] = (0.05, 0.25, 0.5, 0.75, 0.95)
    """Of the quantiles whose pinball loss is taken."""
    intervals: tuple[Level, ...] = (0.5, 0.9)
    """Probabilities of the central intervals whose coverage is counted."""
    bootstrap: Annotated[int, Constraint(ge=2)] = 100
    """Resamplings of the rows."""
    floor_draws: Annotated[int, Constraint(ge=2)] = 50
    """Pairs of true samples that a noise floor is the mean of."""
    seed: int = 0


class ScoreRow(TypedDict):
    """One line of the table of scores."""

    label: str
    """Of the model; its seeds together."""
    seeds: int
    metric: str
    of: str
    """A property; ``joint``, all properties of a model that draws them together; ``union``, all properties of
    several models side by side; or the names of a configured set, joined by ``+``."""
    value: float
    """Mean over seeds."""
    error: float | None
    """Standard deviation of that mean, from the scatter between seeds; None for one seed."""
    bootstrap: float
    """Standard deviation of that mean when rows (halos) are resampled."""
    floor: float | None
    """What a perfect model scores on average: for distances, that between two true samples of as many
    galaxies in other halos (`distributions.noise_floor`); for coverage the nominal one. None for the scores
    whose least value nature sets."""
    floor_error: float | None
    """Standard deviation of the floor from sample to sample (not of its mean)."""
    self_floor: float | None
    """For distances: that between two draws of the model for the same halos. The model would score this were
    the truth one of its draws. It is below ``floor``: what properties owe to the halos is common to both."""
    self_floor_error: float | None
    """Its standard deviation from pair to pair."""


class Comparison(TypedDict):
    """Who is best at a metric, and how much worse the others are."""

    metric: str
    of: str
    """A property, a configured set, or ``all`` properties."""
    best: str
    """Label."""
    worse: dict[str, tuple[float, float]]
    """Every other label -> how much worse, and the standard deviation of that: of both means over seeds, and
    of the difference when halos are resampled, the same ones for both."""


class GroupRow(ScoreRow):
    """A score of some of the rows: of proper scores and coverage, which are means over rows. No floors."""

    kind: str
    """``simulation``, or ``range``: of the training data, as each prediction's halos are marked."""
    group: str
    """Name of the simulation; ``inside`` or ``outside`` the range."""
    n_rows: int


def load_scores(step: str | Path) -> dict[str, Any]:
    """What a step of this stage found.

    Returns
    -------
    ``rows`` (list of `ScoreRow`); ``split``; ``n_rows``; ``scales``: the standard deviation of each true
    property, the unit of Wasserstein and energy distances and of energy scores of several properties;
    ``ranks``: a list of {``label``, ``of``, ``counts``}, the rank histogram (see
    `distributions.rank_histogram`), mean over seeds; ``comparisons`` (list of `Comparison`);
    ``groups`` (list of `GroupRow`).
    """
    found: dict[str, Any] = durable.read_json(Path(step) / FILE)
    return found


def scores(config: ScoresConfig, inputs: Mapping[str, list[Path]], out: Path) -> None:
    """Compare predictions with the true galaxies.

    Writes ``out / "scores.json"`` (see `load_scores`) and its headlines as ``metrics.json``.
    Predictions of one label are seeds of one model; a prediction of several models side by side is their
    union. Metrics, per property and for sets of them:

    - distances between populations (`distributions.distances`), of one draw a halo, as a survey sees one
      galaxy a halo; those of several properties in units of each one's standard deviation;
    - ``crps`` and ``energy_score`` of all draws; ``pinball_<level>`` of the quantiles of the prediction, or
      where it holds none at this level, of those of its draws; ``coverage_<interval>``; ``rank_chi2``
      (`distributions.flatness`) and ``pit_ks``, the KS distance of the PIT from uniform;
    - metrics of single values (`distributions.point_metrics`), of the best value and, under names that end in
      ``_draw``, of one draw, which even for a perfect model are worse (the mean squared error doubles).

    Proper scores and coverage are also given of each simulation, where there are several, and of the halos
    inside and outside the range that a model was trained on; not of groups of less than 30.

    Raises
    ------
    ValueError
        for predictions that are not finite, labelled ``truth``, or of one label but different properties,
        numbers of draws or kinds of model; for a model given twice; and for ``joints`` that none predicts.
    galdist.grids.store.StoreError
        for properties that the catalogue has not, rows of the split that were not predicted, and stores that
        cannot be read.
    """
    groups = _groups(inputs["predictions"])
    _check_joints(config, groups)
    truth = _Truth.read(config, inputs["catalogs"], groups)
    n_predictions = sum(len(stores) for stores in groups.values())
    rng = np.random.default_rng(config.seed)
    weights = distributions.resamplings(truth.n_rows, config.bootstrap, rng)
    rows: list[ScoreRow] = []
    ranks = []
    groups_of_rows: list[GroupRow] = []
    resampled: dict[str, Measured] = {}
    done = 0
    for label, stores in groups.items():
        seeds, selves, histograms, grouped = [], [], [], []
        for store in stores:
            progress.report(done, n_predictions, label)
            prediction = _Prediction.read(store, truth)
            measured, counts, single = _measure(config, prediction, truth, weights)
            seeds.append(measured)
            selves.append(_between_draws(config, prediction, truth))
            histograms.append(counts)
            grouped.append(_by_group(single, _row_groups(prediction, truth), weights))
            done += 1
        rows += _rows(label, seeds, selves, truth.floors(config, stores[0]))
        groups_of_rows += _group_rows(label, grouped)
        resampled[label] = _comparable(seeds, all_of=set(stores[0].targets) == set(truth.targets))
        ranks += [
            {"label": label, "of": of, "counts": np.mean([one[of] for one in histograms], axis=0).tolist()}
            for of in histograms[0]
        ]
    durable.write_json(
        out / FILE,
        {
            "split": config.split,
            "n_rows": truth.n_rows,
            "scales": dict(zip(truth.targets, truth.scale.tolist(), strict=True)),
            "rows": rows,
            "ranks": ranks,
            "comparisons": _comparisons(resampled, rows),
            "groups": groups_of_rows,
        },
    )
    save_metrics(out, list(_headlines(rows, truth.units)))
    progress.report(n_predictions, n_predictions)


def _groups(steps: Sequence[Path]) -> dict[str, list[SamplesStore]]:
    """Predictions by label."""
    groups: dict[str, list[SamplesStore]] = {}
    seen: dict[tuple[str, ...], SamplesStore] = {}
    for step in steps:
        store = open_samples(step / "samples.zarr")
        if store.label == TRUTH:
            raise ValueError(
                f"{store.path}: the label {TRUTH!r} is that of the true galaxies; give it another"
            )
        group = groups.setdefault(store.label, [])
        if group and (difference := _difference(group[0], store)):
            raise ValueError(
                f"{group[0].path} and {store.path} are both labelled {store.label!r}, but {difference}: "
                "seeds of one model predict the same; give one of them another label"
            )
        if store.checkpoints and store.checkpoints in seen:
            raise ValueError(
                f"{seen[store.checkpoints].path} and {store.path} are of the same model: it would count as "
                "two; name one of them"
            )
        seen[store.checkpoints] = store
        group.append(store)
    return groups


def _difference(first: SamplesStore, second: SamplesStore) -> str:
    """Why two predictions are no seeds of one model; empty where they can be."""
    targets = [", ".join(store.targets) for store in (first, second)]
    if set(first.targets) != set(second.targets):
        return f"predict {targets[0]} and {targets[1]}"
    if first.n_samples != second.n_samples:
        return f"have {first.n_samples} and {second.n_samples} draws a halo"
    if _is_union(first) != _is_union(second):
        return f"one is of several models side by side, and the other of one model of {targets[0]}"
    return ""


def _is_union(store: SamplesStore) -> bool:
    """Whether it is of several models side by side."""
    return len(store.checkpoints) > 1


def _check_joints(config: ScoresConfig, groups: Mapping[str, list[SamplesStore]]) -> None:
    """Refuse sets that would be scored of no model."""
    targets = [set(stores[0].targets) for stores in groups.values()]
    known = sorted(set().union(*targets))
    for names in config.joints or ():
        for name in names:
            if name not in known:
                raise ValueError(
                    f"joints: no prediction has {name!r}{did_you_mean(name, known)} They have "
                    f"{', '.join(known)}"
                )
        if not any(set(names) <= held for held in targets):
            raise ValueError(
                f"joints: no prediction has all of {', '.join(names)}: leave the set out, or name a model of "
                "these properties"
            )


def _sets(config: ScoresConfig, store: SamplesStore) -> dict[str, Columns]:
    """Properties that are scored together: what the set is called -> its columns."""
    joints = (tracers.COLUMNS,) if config.joints is None else config.joints
    sets = {"+".join(names): names for names in joints if set(names) <= set(store.targets)}
    if len(store.targets) > 1:
        sets["union" if _is_union(store) else "joint"] = store.targets
    return {**{name: (name,) for name in store.targets}, **sets}


@dataclass
class _Truth:
    """The true galaxies of the split."""

    centrals: Centrals
    targets: Columns
    values: Array
    """(n, t)"""
    pool: Array
    """(N, t): true galaxies of the same parent, in the same simulations."""
    units: dict[str, str]
    _floors: dict[Columns, distributions.Distances] = field(default_factory=dict)

    @classmethod
    def read(
        cls, config: ScoresConfig, steps: Sequence[Path], groups: Mapping[str, list[SamplesStore]]
    ) -> "_Truth":
        every = [name for stores in groups.values() for store in stores for name in store.targets]
        targets = tuple(dict.fromkeys(every))
        centrals = read_centrals(steps, targets, config.split)
        if not len(centrals):
            raise ValueError(
                f"the catalogue has no row in the {config.split} split ({', '.join(map(str, steps))})"
            )
        # Training rows are left out: they may have been multiplied or thinned to balance them.
        others = (split for split in SPLITS if split not in (config.split, "train"))
        parts = [centrals, *(read_centrals(steps, targets, split) for split in others)]
        scored = np.unique(centrals.simulation)
        values = [np.stack([part.columns[name] for name in targets], axis=1).astype(float) for part in parts]
        pool = [v[np.isin(part.simulation, scored)] for part, v in zip(parts, values, strict=True)]
        constant = [
            name for name, spread in zip(targets, np.ptp(values[0], axis=0), strict=True) if not spread > 0
        ]
        if constant:
            raise ValueError(
                f"column {constant[0]} of the {config.split} split has one value in all {len(centrals)} "
                "rows, or some that are not finite: nothing can be scored with it"
            )
        return cls(centrals, targets, values[0], np.concatenate(pool), centrals.units)

    @property
    def n_rows(self) -> int:
        return len(self.values)

    @property
    def scale(self) -> Array:
        """(t,) standard deviation of each property."""
        return np.asarray(self.values.std(axis=0))

    def places(self, columns: Columns) -> list[int]:
        """Where columns are in ``targets``."""
        return [self.targets.index(name) for name in columns]

    def floors(self, config: ScoresConfig, store: SamplesStore) -> dict[tuple[str, str], tuple[float, float]]:
        """(metric, of) -> mean and standard deviation of what a perfect model scores."""
        found = {}
        for of, columns in _sets(config, store).items():
            if columns not in self._floors:
                places = self.places(columns)
                rng = np.random.default_rng(config.seed)
                self._floors[columns] = distributions.noise_floor(
                    self.pool[:, places], self.n_rows, config.floor_draws, rng, self.scale[places]
                )
            for metric, draws in self._floors[columns].items():
                found[metric, of] = float(draws.mean()), float(draws.std(ddof=1))
        size = store.n_samples
        for of in store.targets:
            for level in config.intervals:
                found[f"coverage_{level:g}", of] = level, math.sqrt(level * (1 - level) / self.n_rows)
            found["rank_chi2", of] = float(size), math.sqrt(2 * size)
            kolmogorov = np.array([distributions.KOLMOGOROV_MEAN, distributions.KOLMOGOROV_STD])
            mean, std = kolmogorov / math.sqrt(self.n_rows)
            found["pit_ks", of] = float(mean), float(std)
        return found


@dataclass(frozen=True)
class _Prediction:
    """What a model drew for the halos of the split, in the order of the truth's rows."""

    store: SamplesStore
    point: NDArray[np.float32]
    samples: NDArray[np.float32]
    quantiles: NDArray[np.float32] | None
    extrapolated: NDArray[np.bool_]

    @classmethod
    def read(cls, store: SamplesStore, truth: _Truth) -> "_Prediction":
        found = aligned(store, truth.centrals)
        for name in ("point", "samples", "quantiles"):
            values = getattr(found, name)
            if values is not None and not np.isfinite(values).all():
                raise ValueError(f"{store.path}: {name} are not all finite")
        return cls(store, found.point, found.samples, found.quantiles, found.extrapolated)

    def places(self, columns: Columns) -> list[int]:
        """Where columns are in the last axis of its arrays."""
        return [self.store.targets.index(name) for name in columns]


def _measure(
    config: ScoresConfig, prediction: _Prediction, truth: _Truth, weights: Weights
) -> tuple[Measured, dict[str, Array], Measured]:
    """Every metric of one prediction, the rank histogram of each property, and those metrics that are means
    over rows, of each row (n,)."""
    measured: Measured = {}
    histograms: dict[str, Array] = {}
    single: Measured = {}
    done: dict[Columns, str] = {}
    size = prediction.store.n_samples
    for of, columns in _sets(config, prediction.store).items():
        if columns in done:  # the configured set is all that the model has
            for known in (measured, single):
                known |= {(m, of): value for (m, other), value in known.items() if other == done[columns]}
            continue
        done[columns] = of
        places = prediction.places(columns)
        true, scale = truth.values[:, truth.places(columns)], truth.scale[truth.places(columns)]
        draw = prediction.samples[:, 0, places]
        found = distributions.distances(draw, true, weights, weights, scale)
        found |= distributions.point_metrics(prediction.point[:, places], true, weights)
        of_draw = distributions.point_metrics(draw, true, weights)
        found |= {f"{metric}_draw": value for metric, value in of_draw.items()}
        if len(columns) == 1:
            found |= _pinball(config, prediction, places[0], true[:, 0], weights)
        if size > 1:
            score = _energy_score(prediction.samples, places, true, scale if len(columns) > 1 else None)
            rows = {"energy_score" if len(columns) > 1 else "crps": score}
            if len(columns) == 1:
                calibration, histograms[of], covered = _calibration(
                    config, prediction.samples[:, :, places[0]], true[:, 0], weights
                )
                found |= calibration
                rows |= covered
            found |= {metric: distributions.means(values, weights) for metric, values in rows.items()}
            single |= {(metric, of): values for metric, values in rows.items()}
        measured |= {(metric, of): value for metric, value in found.items()}
    return measured, histograms, single


def _row_groups(prediction: _Prediction, truth: _Truth) -> dict[tuple[str, str], NDArray[np.bool_]]:
    """(kind, group) -> which rows (n,), as in `GroupRow`."""
    outside, simulation = prediction.extrapolated, truth.centrals.simulation
    groups = {("range", "inside"): ~outside, ("range", "outside"): outside}
    groups |= {
        ("simulation", attrs.name): simulation == number
        for number, attrs in enumerate(truth.centrals.simulations)
    }
    return {
        group: rows for group, rows in groups.items() if rows.sum() >= _FEWEST and not rows.all()
    }  # what has all rows is no part


def _by_group(
    single: Measured, groups: Mapping[tuple[str, str], NDArray[np.bool_]], weights: Weights
) -> dict[tuple[str, str], tuple[int, Measured]]:
    """Number of rows of each group, and means over them in each resampling of all rows."""
    if not single:  # one draw has no proper scores
        return {}
    values = np.stack(list(single.values()), axis=1)
    found = {}
    for group, rows in groups.items():
        drawn = weights[rows]
        mean = distributions.means(values[rows], drawn) / drawn.mean(axis=0)[:, None]
        found[group] = int(rows.sum()), dict(zip(single, mean.T, strict=True))
    return found


def _group_rows(
    label: str, seeds: Sequence[Mapping[tuple[str, str], tuple[int, Measured]]]
) -> Iterator[GroupRow]:
    """Lines of the groups that all seeds have."""
    for (kind, group), (n_rows, _) in seeds[0].items():
        if all((kind, group) in one for one in seeds):
            for row in _rows(label, [one[kind, group][1] for one in seeds], [], {}):
                yield GroupRow(**row, kind=kind, group=group, n_rows=n_rows)


def _energy_score(samples: NDArray[np.float32], places: list[int], true: Array, scale: Array | None) -> Array:
    """Score of each row, of one property (CRPS) or several, in bounded memory."""
    parts = [slice(start, start + _ROWS) for start in range(0, len(true), _ROWS)]
    if scale is None:
        scores = [distributions.crps(samples[part, :, places[0]], true[part, 0]) for part in parts]
    else:
        scores = [
            distributions.energy_score(samples[part][:, :, places], true[part], scale) for part in parts
        ]
    return np.concatenate(scores)


def _pinball(
    config: ScoresConfig, prediction: _Prediction, place: int, true: Array, weights: Weights
) -> dict[str, Array]:
    """Pinball losses of the quantiles that the prediction has, and of its draws' where it has none."""
    found = {}
    for level in config.levels:
        held = [i for i, other in enumerate(prediction.store.levels) if math.isclose(level, other)]
        if held and prediction.quantiles is not None:
            quantile = prediction.quantiles[:, held[0], place]
        else:
            quantile = np.quantile(prediction.samples[:, :, place], level, axis=1, method="median_unbiased")
        loss = distributions.pinball(quantile, true, level)
        found[f"pinball_{level:g}"] = distributions.means(loss, weights)
    return found


def _calibration(
    config: ScoresConfig, samples: NDArray[np.float32], true: Array, weights: Weights
) -> tuple[dict[str, Array], Array, dict[str, Array]]:
    """Flatness of ranks and uniformity of the PIT of one property; the rank histogram; and the coverage of
    each row."""
    size = samples.shape[1]
    # As coarse as the draws: a truth that a model gives back would else be a little above or below its draw.
    low, high = distributions.ranks(samples, true.astype(samples.dtype))
    histogram = distributions.rank_histogram(low, high, size, weights)
    uniform = (np.arange(len(true)) + 0.5) / len(true)
    transform = distributions.pit(low, high, size, np.random.default_rng(config.seed))
    even = np.ones_like(weights)
    found = {
        "rank_chi2": distributions.flatness(histogram),
        "pit_ks": distributions.distances(transform, uniform, weights, even)["ks"],
    }
    covered = {
        f"coverage_{level:g}": distributions.coverage(low, high, size, level) for level in config.intervals
    }
    return found, histogram[:, 0], covered


def _between_draws(config: ScoresConfig, prediction: _Prediction, truth: _Truth) -> Measured:
    """Distances between pairs of draws for the same halos."""
    found: dict[tuple[str, str], list[Array]] = {}
    for of, columns in _sets(config, prediction.store).items():
        places, scale = prediction.places(columns), truth.scale[truth.places(columns)]
        for pair in range(min(_PAIRS, prediction.store.n_samples // 2)):
            first, second = (prediction.samples[:, 2 * pair + i, places] for i in (0, 1))
            for metric, value in distributions.distances(first, second, scale=scale).items():
                found.setdefault((metric, of), []).append(value)
    return {key: np.concatenate(values) for key, values in found.items()}


def _rows(
    label: str,
    seeds: Sequence[Measured],
    selves: Sequence[Measured],
    floors: Mapping[tuple[str, str], tuple[float, float]],
) -> list[ScoreRow]:
    """The table's lines of one label; none of what is undefined, such as the correlation with a constant."""
    rows = []
    for metric, of in seeds[0]:
        values = np.stack([measured[metric, of] for measured in seeds])
        mean = values.mean(axis=0)
        if not np.isfinite(mean).all():
            log.warning("%s: %s of %s is undefined, and left out", label, metric, of)
            continue
        floor, floor_error = floors.get((metric, of), (None, None))
        pairs = np.concatenate([one[metric, of] for one in selves if (metric, of) in one] or [np.empty(0)])
        rows.append(
            ScoreRow(
                label=label,
                seeds=len(seeds),
                metric=metric,
                of=of,
                value=float(mean[0]),
                error=float(values[:, 0].std(ddof=1) / math.sqrt(len(seeds))) if len(seeds) > 1 else None,
                bootstrap=float(mean[1:].std(ddof=1)),
                floor=floor,
                floor_error=floor_error,
                self_floor=float(pairs.mean()) if pairs.size else None,
                self_floor_error=float(pairs.std(ddof=1)) if pairs.size > 1 else None,
            )
        )
    return rows


def _comparable(seeds: Sequence[Measured], all_of: bool) -> Measured:
    """Means over seeds of what other labels have too: ``joint`` and ``union`` are that only where they are
    ``all_of`` the properties, and then one."""
    found: Measured = {}
    for metric, of in seeds[0]:
        mean = np.mean([measured[metric, of] for measured in seeds], axis=0)
        if np.isfinite(mean).all() and (all_of or of not in ("joint", "union")):
            found[metric, "all" if of in ("joint", "union") else of] = mean
    return found


def _comparisons(labels: Mapping[str, Measured], rows: Sequence[ScoreRow]) -> list[Comparison]:
    """Of each metric that two labels have."""
    errors = {
        (row["label"], row["metric"], "all" if row["of"] in ("joint", "union") else row["of"]): row["error"]
        for row in rows
    }
    found = []
    for metric, of in dict.fromkeys(key for measured in labels.values() for key in measured):
        badness = {
            label: _badness(metric, measured[metric, of])
            for label, measured in labels.items()
            if (metric, of) in measured
        }
        best = min(badness, key=lambda label: badness[label][0])
        worse = {}
        for label, values in badness.items():
            if label != best:
                difference = values - badness[best]
                seeds = [errors[one, metric, of] or 0.0 for one in (label, best)]
                worse[label] = float(difference[0]), math.hypot(difference[1:].std(ddof=1), *seeds)
        if worse:
            found.append(Comparison(metric=metric, of=of, best=best, worse=worse))
    return found


def _badness(metric: str, values: Array) -> Array:
    """What is the less the better."""
    name, _, level = metric.removesuffix("_draw").partition("_")
    if name in ("r2", "pearson"):
        return -values
    return np.abs(values - float(level)) if name == "coverage" else values


def _headlines(rows: Sequence[ScoreRow], units: Mapping[str, str]) -> Iterator[MetricRow]:
    """Rows of the table of results: the scatter between seeds as their error, else that of the bootstrap."""
    for row in rows:
        if row["metric"] in _HEADLINES:
            error = row["bootstrap"] if row["error"] is None else row["error"]
            unit = units.get(row["of"], "") if row["metric"] in ("crps", "rmse") else ""
            yield metric_row(f"{row['metric']}/{row['of']}", row["label"], row["value"], error, unit)
