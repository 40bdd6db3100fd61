"""The stage ``tracers``: power spectra of the seven tracers, of the truth and of predicted galaxies.

A halo's galaxy is a tracer or none by its stellar mass and color (`galdist.statistics.tracers`). A predicted
galaxy sits where the true one does, so that a prediction moves halos between tracers, and with them power.

Power. Points are painted with TSC on an interlaced mesh and the window is divided out
(`galdist.statistics.spectra.catalog_mesh`); bins are one fundamental mode wide and end at ``k_max``. Shot
noise V/N is removed from auto powers. Two different tracers share no halo, so their cross power has none; a
predicted and a true tracer share N_ab of their N_a and N_b halos, and V N_ab / (N_a N_b) is removed.

Comparison. The variance of the true power P with number density n is that of Gaussian modes,
``sigma^2 = 2 / (V Vk) (P + 1/n)^2``; the residual of a bin is ``(P_predicted - P)^2 / sigma^2``, and chi^2
its sum over all bins, or over those of a band. Halos are the same in truth and prediction, so most of sigma
is common to both: a chi^2 far below the number of bins is no sign of too large errors. The chi^2 of draws is
that of the power which the model expects and their scatter about it, half of what two of them differ by. The
stochasticity ``r = P_ab / sqrt(P_aa P_bb)`` is undefined where shot noise leaves no positive power.

Seeds. Predictions of one label are seeds of one model. A value of a label is the mean over its seeds, of the
mean over each seed's draws; ``std`` is the scatter between seeds, ``error`` that of their mean.
"""

import gc
import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field as Constraint
from pydantic import PositiveFloat, PositiveInt, field_validator

from galdist.catalogs.centrals import Centrals, read_centrals
from galdist.catalogs.samples import SamplesStore, aligned, open_samples
from galdist.config import StrictModel
from galdist.grids.store import SimulationAttrs, Split
from galdist.statistics import require_nbodykit
from galdist.statistics.metrics import MetricRow, metric_row, save_metrics
from galdist.statistics.spectra import (
    TRUTH,
    Band,
    Modes,
    arrays,
    catalog_modes,
    gaussian_variance,
    jackknife,
    plain,
    power,
)
from galdist.statistics.tracers import COLUMNS, TRACERS, confusion, counts, describe, rates, tracer
from hpc import durable, mpi, progress

log = logging.getLogger(__name__)

FILE = "tracers.json"
_ROUNDING = 1e-9  # relative, of the centers of bins

Array = NDArray[np.float64]


class TracersConfig(StrictModel):
    """What is measured."""

    split: Split = "test"
    """The halos to measure."""
    draws: PositiveInt = 1
    """Joint draws of each prediction that are measured."""
    n_mesh: Annotated[int, Constraint(ge=8)] = 128
    """Cells a side."""
    k_max: PositiveFloat = 1.0
    """Largest wavenumber [h/Mpc]."""
    band: Band = (0.1, 0.4)
    """Wavenumbers [h/Mpc] of the chi^2 in the table of results: the bins whose centers are there."""
    cross: Literal["none", "truth", "all"] = "all"
    """Cross powers between tracers: of the truth, or also of each prediction's first draw, with those of each
    predicted tracer with the true one."""
    jackknife: Annotated[int, Constraint(ge=0)] = 3
    """Cubes a side of the jackknife that checks the errors of the truth; 0 leaves it out."""

    @field_validator("band")
    @classmethod
    def _ordered(cls, band: Band) -> Band:
        if not band[0] < band[1]:
            raise ValueError(f"a band goes from low to high wavenumbers, not from {band[0]:g} to {band[1]:g}")
        return band

    @field_validator("jackknife")
    @classmethod
    def _cubes(cls, n_side: int) -> int:
        if n_side == 1:
            raise ValueError("a jackknife needs 2 or more cubes a side; 0 leaves it out")
        return n_side


@dataclass(frozen=True)
class _Prediction:
    """Tracers that a model gave halos."""

    label: str
    draws: NDArray[np.int8]
    """(draws, n)."""


@dataclass(frozen=True)
class _Box:
    """A simulation to measure."""

    attrs: SimulationAttrs
    position: Array
    """(n, 3) [Mpc/h]."""
    tracers: NDArray[np.int8]
    """(n,) of the truth."""
    predictions: dict[str, _Prediction]
    """By the name of the step that made it."""

    @property
    def measured(self) -> tuple[str, ...]:
        """What is measured on its own: the truth and each prediction."""
        return TRUTH, *self.predictions

    @property
    def fundamental(self) -> float:
        """Width of a bin [h/Mpc]."""
        return 2 * math.pi / self.attrs.box_size

    def n_bins(self, k_max: float) -> int:
        """Bins whose center is not above ``k_max``."""
        return math.floor(k_max / self.fundamental * (1 + _ROUNDING))

    def in_band(self, config: "TracersConfig") -> NDArray[np.bool_]:
        """(bins,) whether the center of each is in the band."""
        centers = self.fundamental * np.arange(1, self.n_bins(config.k_max) + 1)
        low, high = config.band
        return (centers >= low * (1 - _ROUNDING)) & (centers <= high * (1 + _ROUNDING))


def tracers(config: TracersConfig, inputs: Mapping[str, list[Path]], out: Path) -> None:
    """Measure the tracers of truth and predictions; every rank calls it.

    Writes ``tracers.json`` (see `load_tracers`) and ``metrics.json``: chi^2 over the band for each tracer and
    label. What was measured before an interruption is not measured again.

    Raises
    ------
    galdist.statistics.MissingEngine
        where nbodykit is not installed.
    ValueError
        for inputs that do not belong together, or a band or ``k_max`` that the box or the mesh does not have.
    """
    require_nbodykit()
    boxes = _boxes(config, inputs)
    comm = mpi.world()
    for name in ("CatalogMesh", "MeshSource"):  # nbodykit's: lines for each of hundreds of meshes
        logging.getLogger(name).setLevel(logging.WARNING)
    gc.freeze()  # it also collects garbage for each, a third of the time where all modules are looked through
    parts = {
        box.attrs.name: {name: out / "parts" / box.attrs.name / f"{name}.json" for name in box.measured}
        for box in boxes
    }
    total = sum(map(len, parts.values()))
    done = 0
    for box in boxes:
        missing = [name for name, path in parts[box.attrs.name].items() if not path.exists()]
        missing = comm.bcast(missing)
        done += len(box.measured) - len(missing)
        truth = _modes(config, box, box.tracers) if missing else {}
        for name in missing:
            if comm.rank == 0:
                progress.report(done, total, f"{box.attrs.name}, {name}")
            if name == TRUTH:
                measured = _measure_truth(config, box, truth)
            else:
                measured = _measure_prediction(config, box, box.predictions[name], truth)
            if comm.rank == 0:
                durable.write_json(parts[box.attrs.name][name], plain(measured))
            done += 1
    if comm.rank == 0:
        simulations = {
            box.attrs.name: _compared(
                config,
                box,
                {name: durable.read_json(path) for name, path in parts[box.attrs.name].items()},
            )
            for box in boxes
        }
        durable.write_json(out / FILE, plain({"band": config.band, "simulations": simulations}))
        save_metrics(out, _rows(config, simulations))
        progress.report(total, total)
    comm.barrier()


def load_tracers(step: str | Path) -> dict[str, Any]:
    """What the stage measured, lists as numpy arrays, undefined values NaN; needs no nbodykit.

    Returns
    -------
    ``{"band": [low, high], "simulations": {name: {...}}}`` with, for each simulation:

    ``box_size`` [Mpc/h], ``redshift``, ``split``, ``n_halos``, ``n_mesh``, ``nyquist`` [h/Mpc], and for each
    bin ``k`` (mean of its modes), ``k_min`` (lower edge), ``modes`` and ``in_band`` (1 where its center
    is); ``labels``: label -> its steps.

    ``tracers``: "1" to "7" -> ``selection`` (words), ``truth`` and ``labels``. ``truth`` has ``n`` (halos),
    ``shot_noise`` [(Mpc/h)^3], ``power`` and ``error`` (sigma), and ``jackknife``: ``power``, ``error``,
    ``ratio`` (its error over sigma) and ``mean_ratio`` (over the band). A label has ``n`` and ``n_std``,
    ``power`` and ``power_std`` (scatter between seeds), ``relative_error`` (P / P_true - 1), ``residual``
    (mean over draws), ``chi2`` and ``chi2_band`` (each ``value``, ``std``, ``error``, ``seeds`` one value a
    step, and ``self_floor``, that between two draws of one step: the model would score this were the truth
    one of its draws), ``chi2_expected`` and ``chi2_expected_band`` (the same of the power that the model
    expects, without bias from the number of draws, so that it may be negative; half of ``self_floor``, here
    too, were the truth one of its draws; needs two draws), ``empty`` (draws without a galaxy of the tracer,
    which are left out of all but ``n``) and ``steps``: step -> ``n``, ``shot_noise`` and
    ``power`` of each draw. What a tracer without galaxies has no value for is NaN (null in the file).

    ``counts``: "truth" or label -> galaxies of none and of each tracer (8). ``confusion``: label ->
    ``counts`` (8, 8), true tracer by predicted one, a mean over draws and seeds, and ``rates``, rows that
    sum to one.

    ``cross``: "truth" or label -> "1x2", ... -> ``power``, ``r``, ``r_std`` (scatter between seeds),
    ``r_mean`` (over the band) and ``r_mean_error`` (of the mean over seeds); ``with_truth``: label -> "1",
    ... -> the same of the predicted tracer with the true one, and ``shot_noise``. Both are there where they
    were asked for.
    """
    result: dict[str, Any] = arrays(durable.read_json(Path(step) / FILE))
    return result


# What is read, and checked before anything is measured.


def _boxes(config: TracersConfig, inputs: Mapping[str, list[Path]]) -> list[_Box]:
    centrals = read_centrals(inputs["catalogs"], ["position", *COLUMNS], config.split)
    stores = _stores(inputs["predictions"])
    predictions = {step: _prediction(config, store, centrals) for step, store in stores.items()}
    boxes = []
    for index, attrs in enumerate(centrals.simulations):
        here = centrals.simulation == index
        if not here.any():
            continue
        columns = {name: values[here] for name, values in centrals.columns.items()}
        box = _Box(
            attrs,
            np.asarray(columns["position"], float),
            tracer(*(columns[name] for name in COLUMNS)),
            {step: replace(every, draws=every.draws[:, here]) for step, every in predictions.items()},
        )
        _check_bins(config, box)
        boxes.append(box)
    if not boxes:
        raise ValueError(f"no halo of the {config.split} split in {', '.join(map(str, inputs['catalogs']))}")
    return boxes


def _stores(steps: Sequence[Path]) -> dict[str, SamplesStore]:
    """Predictions that have both columns, by step."""
    stores: dict[str, SamplesStore] = {}
    for step in steps:
        store = open_samples(step / "samples.zarr")
        if missing := [name for name in COLUMNS if name not in store.targets]:
            log.info(
                "%s (%s) is left out: it does not predict %s, and a tracer needs both",
                step.name,
                store.label,
                " and ".join(missing),
            )
            continue
        if step.name in stores or TRUTH in (step.name, store.label):
            raise ValueError(
                f"{step}: a prediction's step has a name of its own, and neither it nor its label "
                f"({store.label!r}) is {TRUTH!r}"
            )
        stores[step.name] = store
    if not stores:
        raise ValueError(
            f"none of the predictions ({', '.join(step.name for step in steps)}) has both of "
            f"{' and '.join(COLUMNS)}, so there are no predicted tracers: name one that has"
        )
    return stores


def _prediction(config: TracersConfig, store: SamplesStore, centrals: Centrals) -> _Prediction:
    """The prediction for the halos of the split."""
    if store.n_samples < config.draws:
        raise ValueError(
            f"{store.path} has {store.n_samples} draws a halo, but `draws` asks for {config.draws}: lower "
            "it, or raise `samples` of the step that predicts"
        )
    values = aligned(store, centrals, slice(config.draws)).samples
    mass, color = (values[:, :, store.targets.index(name)].T for name in COLUMNS)
    return _Prediction(store.label, tracer(mass, color))


def _check_bins(config: TracersConfig, box: _Box) -> None:
    name, width, n_bins = box.attrs.name, box.fundamental, box.n_bins(config.k_max)
    most = config.n_mesh // 2 - 1
    if n_bins > most:
        raise ValueError(
            f"{name}: {config.n_mesh}^3 cells have bins up to {most * width:.3g} h/Mpc, so k_max "
            f"{config.k_max:g} needs n_mesh {2 * (n_bins + 1)}; twice that keeps it far from the Nyquist "
            "frequency"
        )
    if not box.in_band(config).any():
        raise ValueError(
            f"{name}: the band {config.band[0]:g}-{config.band[1]:g} h/Mpc has no bin; they lie at multiples "
            f"of {width:.3g} h/Mpc up to {config.k_max:g}: change `band` or `k_max`"
        )


# What is measured, on all ranks.


def _modes(config: TracersConfig, box: _Box, tracers: NDArray[np.int8]) -> dict[int, Modes]:
    """Modes of each tracer that has galaxies."""
    comm = mpi.world()
    return {
        number: catalog_modes(
            box.position[members[comm.rank :: comm.size]],
            box.attrs.box_size,
            config.n_mesh,
            box.n_bins(config.k_max),
        )
        for number in TRACERS
        if (members := np.flatnonzero(tracers == number)).size
    }


def _auto(config: TracersConfig, box: _Box, modes: Mapping[int, Modes]) -> dict[str, Any]:
    """Halos, shot noise and power of each tracer."""
    n_bins = box.n_bins(config.k_max)
    found: dict[str, Any] = {}
    for number in TRACERS:
        if number in modes:
            n, shot_noise = modes[number].number, modes[number].shot_noise
            measured = power(modes[number].mesh).power["power"].real[:n_bins] - shot_noise
        else:
            n, shot_noise, measured = 0, math.nan, np.full(n_bins, np.nan)
        found[str(number)] = {"n": n, "shot_noise": shot_noise, "power": measured}
    return found


def _pairs(modes: Mapping[int, Modes]) -> dict[str, Array]:
    """Cross powers of all pairs of tracers."""
    return {f"{a}x{b}": modes[a].cross(modes[b]) for a in modes for b in modes if a < b}


def _measure_truth(config: TracersConfig, box: _Box, modes: Mapping[int, Modes]) -> dict[str, Any]:
    comm = mpi.world()
    if not modes:
        raise ValueError(f"{box.attrs.name} has no galaxy of any tracer among {len(box.tracers)}")
    n_bins = box.n_bins(config.k_max)
    bins = power(next(iter(modes.values())).mesh).power
    result: dict[str, Any] = {
        "counts": counts(box.tracers),
        "k": bins["k"][:n_bins],
        "k_min": bins.edges["k"][:n_bins],
        "modes": bins["modes"][:n_bins],
        "tracers": _auto(config, box, modes),
    }
    if config.cross != "none":
        result["cross"] = _pairs(modes)
    if config.jackknife:
        result["jackknife"] = {}
        for number in modes:
            mine = np.flatnonzero(box.tracers == number)[comm.rank :: comm.size]
            direct, error = jackknife(box.position[mine], box.attrs.box_size, n_bins, config.jackknife)
            result["jackknife"][str(number)] = {"power": direct, "error": error}
    return result


def _measure_prediction(
    config: TracersConfig, box: _Box, prediction: _Prediction, truth: Mapping[int, Modes]
) -> dict[str, Any]:
    pairs = [confusion(box.tracers, draw) for draw in prediction.draws]
    result: dict[str, Any] = {"confusion": np.mean(pairs, axis=0), "draws": []}
    for index, draw in enumerate(prediction.draws):
        modes = _modes(config, box, draw)
        result["draws"].append(_auto(config, box, modes))
        if index == 0 and config.cross == "all":
            result["cross"] = _pairs(modes)
            result["with_truth"] = {}
            for number in modes.keys() & truth.keys():
                shared = int(pairs[0][number, number])
                noise = box.attrs.box_size**3 * shared
                noise /= modes[number].number * truth[number].number
                measured = modes[number].cross(truth[number]) - noise
                result["with_truth"][str(number)] = {"power": measured, "shot_noise": noise}
    return result


# What follows from it, on one rank: `parts` are the results above, after JSON.


def _compared(config: TracersConfig, box: _Box, parts: Mapping[str, Any]) -> dict[str, Any]:
    """A simulation's entry of the result, as `load_tracers` describes it."""
    truth = arrays(parts[TRUTH])
    labels: dict[str, dict[str, Any]] = {}
    for step, prediction in box.predictions.items():
        labels.setdefault(prediction.label, {})[step] = arrays(parts[step])
    in_band = box.in_band(config)
    result: dict[str, Any] = {
        "box_size": box.attrs.box_size,
        "redshift": box.attrs.redshift,
        "split": config.split,
        "n_halos": len(box.tracers),
        "n_mesh": config.n_mesh,
        "nyquist": math.pi * config.n_mesh / box.attrs.box_size,
        **{key: truth[key] for key in ("k", "k_min", "modes")},
        "in_band": in_band.astype(int),
        "labels": {label: list(steps) for label, steps in labels.items()},
        "tracers": {},
        "counts": {TRUTH: truth["counts"]},
        "confusion": {},
    }
    for number, true in truth["tracers"].items():
        variance = np.full(in_band.size, np.nan)
        if true["n"]:
            variance = gaussian_variance(
                true["power"], truth["k"], box.fundamental, true["n"], box.attrs.box_size
            )
        entry: dict[str, Any] = {"selection": describe(int(number)), "labels": {}}
        entry["truth"] = {**true, "error": np.sqrt(variance)}
        if number in truth.get("jackknife", {}):
            found = truth["jackknife"][number]
            ratio = found["error"] / np.sqrt(variance)
            entry["truth"]["jackknife"] = {**found, "ratio": ratio, "mean_ratio": ratio[in_band].mean()}
        for label, steps in labels.items():
            draws = {step: [draw[number] for draw in part["draws"]] for step, part in steps.items()}
            entry["labels"][label] = _of_label(draws, true["power"], variance, in_band)
        result["tracers"][number] = entry
    for label, steps in labels.items():
        pairs = np.mean([part["confusion"] for part in steps.values()], axis=0)
        result["counts"][label] = pairs.sum(axis=0)
        result["confusion"][label] = {"counts": pairs, "rates": rates(pairs)}
    if config.cross != "none":
        result["cross"] = {TRUTH: _between_tracers([(truth["cross"], truth["tracers"])], in_band)}
    if config.cross == "all":
        result["with_truth"] = {}
        for label, steps in labels.items():
            first = [(part["cross"], part["draws"][0]) for part in steps.values()]
            result["cross"][label] = _between_tracers(first, in_band)
            first = [(part["with_truth"], part["draws"][0]) for part in steps.values()]
            result["with_truth"][label] = _with_truth(first, truth["tracers"], in_band)
    return result


def _of_label(
    draws: Mapping[str, Sequence[Mapping[str, Any]]], true: Array, variance: Array, in_band: NDArray[np.bool_]
) -> dict[str, Any]:
    """A label's entry for one tracer; ``draws``: step -> its draws' entries."""
    unknown = np.full(in_band.size, np.nan)
    number = over_seeds([float(np.mean([draw["n"] for draw in seed])) for seed in draws.values()])
    powers = [[draw["power"] for draw in seed if draw["n"]] for seed in draws.values()]
    means = [np.mean(seed, axis=0) for seed in powers if seed]
    mean = np.mean(means, axis=0) if means else unknown
    residuals = [[(found - true) ** 2 / variance for found in seed] for seed in powers]
    entry: dict[str, Any] = {
        "n": number["value"],
        "n_std": number["std"],
        "empty": sum(draw["n"] == 0 for seed in draws.values() for draw in seed),
        "power": mean,
        "power_std": np.std(means, axis=0, ddof=1) if len(means) > 1 else unknown,
        "relative_error": np.divide(mean, true, where=true > 0, out=unknown.copy()) - 1,
        "residual": np.mean([np.mean(seed, axis=0) for seed in residuals if seed], axis=0)
        if means
        else unknown,
        "steps": {
            step: {key: np.array([draw[key] for draw in seed], float) for key in ("n", "shot_noise", "power")}
            for step, seed in draws.items()
        },
    }
    for suffix, bins in (("", np.ones_like(in_band)), ("_band", in_band)):
        of_draws = [float(np.mean([r[bins].sum() for r in seed])) if seed else math.nan for seed in residuals]
        between = [
            float(np.mean([_distance(*pair, variance, bins) for pair in itertools.combinations(seed, 2)]))
            if len(seed) > 1
            else math.nan
            for seed in powers
        ]
        floor = over_seeds(between)["value"]
        expected = [chi2 - distance / 2 for chi2, distance in zip(of_draws, between, strict=True)]
        entry[f"chi2{suffix}"] = {**over_seeds(of_draws), "seeds": of_draws, "self_floor": floor}
        entry[f"chi2_expected{suffix}"] = {
            **over_seeds(expected),
            "seeds": expected,
            "self_floor": None if floor is None else floor / 2,
        }
    return entry


def _distance(first: Array, second: Array, variance: Array, bins: NDArray[np.bool_]) -> float:
    """chi^2 between two powers over some bins."""
    return float(((first - second)[bins] ** 2 / variance[bins]).sum())


def over_seeds(values: Sequence[Any]) -> dict[str, float | None]:
    """Mean, scatter, and error of the mean over the seeds that have a value."""
    known = np.array([value for value in values if math.isfinite(value)])
    std = float(known.std(ddof=1)) if known.size > 1 else None
    return {
        "value": float(known.mean()) if known.size else None,
        "std": std,
        "error": None if std is None else std / math.sqrt(known.size),
    }


def _between_tracers(
    seeds: Sequence[tuple[Mapping[str, Array], Mapping[str, Any]]], in_band: NDArray[np.bool_]
) -> dict[str, Any]:
    """Pair -> cross power and r; each seed has cross powers by pair, and the entries of its tracers."""
    result = {}
    for pair in sorted({pair for cross, _ in seeds for pair in cross}):
        a, _, b = pair.partition("x")
        known = [(cross[pair], auto[a]["power"], auto[b]["power"]) for cross, auto in seeds if pair in cross]
        result[pair] = _correlation(known, in_band)
    return result


def _with_truth(
    seeds: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
    truth: Mapping[str, Any],
    in_band: NDArray[np.bool_],
) -> dict[str, Any]:
    """Tracer -> cross power of predicted and true ones, and r; each seed has these, and its auto powers."""
    result = {}
    for number, true in truth.items():
        known = [(cross[number], auto[number]["power"]) for cross, auto in seeds if number in cross]
        if known:
            result[number] = {
                **_correlation([(cross["power"], auto, true["power"]) for cross, auto in known], in_band),
                "shot_noise": np.mean([cross["shot_noise"] for cross, _ in known]),
            }
    return result


def _correlation(seeds: Sequence[tuple[Array, Array, Array]], in_band: NDArray[np.bool_]) -> dict[str, Any]:
    """Mean cross power and r over seeds, from each one's P_ab, P_aa and P_bb."""
    each = [_stochasticity(*seed) for seed in seeds]
    r = [over_seeds(values) for values in zip(*each, strict=True)]
    of_band = [values[in_band & np.isfinite(values)] for values in each]
    mean = over_seeds([float(values.mean()) if values.size else math.nan for values in of_band])
    return {
        "power": np.mean([cross for cross, _, _ in seeds], axis=0),
        "r": np.array([found["value"] for found in r], float),
        "r_std": np.array([found["std"] for found in r], float),
        "r_mean": mean["value"],
        "r_mean_error": mean["error"],
    }


def _stochasticity(cross: Array, first: Array, second: Array) -> Array:
    """r = P_ab / sqrt(P_aa P_bb); NaN where an auto power is not positive."""
    defined = (first > 0) & (second > 0)
    r = np.full(cross.shape, np.nan)
    r[defined] = cross[defined] / np.sqrt(first[defined] * second[defined])
    return r


def _rows(config: TracersConfig, simulations: Mapping[str, Any]) -> list[MetricRow]:
    """chi^2 over the band, and numbers of galaxies; what is undefined is left out."""
    low, high = config.band
    rows = []
    for name, result in simulations.items():
        for number, entry in result["tracers"].items():
            rows.append(metric_row(f"n/tracer{number}/{TRUTH}", name, entry["truth"]["n"]))
            for label, found in entry["labels"].items():
                chi2 = found["chi2_band"]
                rows.append(metric_row(f"n/tracer{number}/{label}", name, found["n"], found["n_std"]))
                if chi2["value"] is not None:
                    metric = f"chi2/tracer{number}/{label}/k{low:g}-{high:g}"
                    rows.append(metric_row(metric, name, chi2["value"], chi2["error"]))
    return rows
