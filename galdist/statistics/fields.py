"""Statistics of fields beyond the power spectrum, of the truth and of every prediction, under MPI.

Stage ``field-statistics``: counts in cells (`galdist.statistics.counts`), sizes of voids
(`galdist.statistics.voids`) and the bispectrum (`galdist.statistics.bispectrum`), box by box. Predictions of
one label are samples of one model: the store's attribute ``label``, or the step's name where it has none. The
draws that a store holds (``<field>_sample_<n>``) are samples of the label ``<step>:samples``. They are summed
up as mean and scatter, and the truth's ranks among them say whether the scatter is right.
"""

import logging
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field as Constraint
from pydantic import PositiveFloat, PositiveInt

from galdist.config import StrictModel
from galdist.grids.store import SimulationGrids, Split, open_store
from galdist.statistics import require_nbodykit
from galdist.statistics.bispectrum import bispectrum, shells
from galdist.statistics.counts import EDGES, counts_in_cells, in_cells
from galdist.statistics.coverage import ball_ranks, expected_coverage
from galdist.statistics.distributions import rank_histogram, ranks
from galdist.statistics.metrics import Confusion, MetricRow, save_metrics
from galdist.statistics.spectra import (
    TRUTH,
    Sample,
    arrays,
    field_mesh,
    match,
    measure_each,
    plain,
    rows_over_boxes,
)
from galdist.statistics.voids import find_voids, void_sizes
from hpc import durable, mpi, progress

log = logging.getLogger(__name__)

FILE = "field-statistics.json"
LEVELS = np.linspace(0, 1, 21)
"""Credibilities at which the coverage is told."""
CLASSIFICATION = ("accuracy", "recall", "precision")
"""What is told of the cells that a prediction puts galaxies in."""

Array = NDArray[np.float64]


class FieldStatisticsConfig(StrictModel):
    """What is measured."""

    seed: int
    """Of the random points that coverage is measured with."""
    field: str = "galaxy_counts"
    """The field that predictions predict."""
    split: Split = "test"
    """The simulations to measure."""
    cells: Annotated[tuple[PositiveInt, ...], Constraint(min_length=1)] = (1, 2, 4, 8, 16)
    """Sides of the cubes of counts in cells [cells]; each divides the mesh."""
    void_radii: Annotated[tuple[PositiveFloat, ...], Constraint(min_length=1)] = (1.5, 2, 2.5, 3, 4, 5)
    """Radii of voids that are looked for [Mpc/h], at most a quarter of the box."""
    void_contrast: Annotated[float, Constraint(gt=-1, lt=0)] = -0.7
    """Highest mean contrast in a void."""
    bins: Annotated[int, Constraint(ge=2)] = 12
    """Bins of the bispectrum."""
    coverage_cells: PositiveInt = 8
    """Side of the cubes [cells] whose counts are compared with those of samples; twice of it divides the
    mesh."""


def field_statistics(config: FieldStatisticsConfig, inputs: Mapping[str, list[Path]], out: Path) -> None:
    """Measure truth and predictions; every rank calls it.

    Writes ``field-statistics.json`` (see `load_field_statistics`) and ``metrics.json``. A simulation that was
    measured before an interruption is not measured again. The bispectrum is shared by all ranks; the other
    statistics of a field are one rank's work, who holds one whole field.

    Raises
    ------
    galdist.statistics.MissingEngine
        where nbodykit is not installed.
    ValueError
        for inputs that do not belong together, scales that do not fit to the boxes, or an empty truth.
    """
    require_nbodykit()
    samples = match(inputs, config.field, config.split)
    for sample in samples:
        _check(config, sample)
    labels = {TRUTH: TRUTH}
    for step in inputs.get("predictions", []):
        labels[step.name] = str(open_store(step / "prediction.zarr").attrs.get("label", step.name))
    for name in {name for sample in samples for name in sample.fields}:
        step_name, _, field = name.partition(":")
        if field.startswith(f"{config.field}_sample_"):
            labels[name] = f"{step_name}:samples"
    if TRUTH in [label for name, label in labels.items() if name != TRUTH]:
        raise ValueError(f"a prediction cannot have the label {TRUTH!r}: that is the true field's")
    comm = mpi.world()
    simulations = measure_each(samples, out, lambda sample: _measure(config, sample, labels))
    if comm.rank == 0:
        durable.write_json(out / FILE, {"simulations": simulations})
        domains = {sample.name: sample.domain for sample in samples}
        save_metrics(out, _rows(config, load_field_statistics(out)["simulations"], domains))
        progress.report(len(samples), len(samples))
    comm.barrier()


def load_field_statistics(step: str | Path) -> dict[str, Any]:
    """The statistics of a step folder, lists as numpy arrays; needs no nbodykit.

    Returns
    -------
    ``{"simulations": {name: {...}}}`` with, for each simulation, ``box_size`` [Mpc/h], ``n_mesh``,
    ``redshift``, ``split``; ``side`` (s,) of the cubes and ``radius`` (r,) of voids [Mpc/h], ``edges`` of the
    bins of numbers, ``k`` (b,) [h/Mpc]; ``steps``: label -> its steps; ``fields``: label -> statistics, for
    several samples of one label their means:

    - ``mean``, ``variance``, ``poisson`` (s,) and ``distribution`` (s, bins), see
      `galdist.statistics.counts.counts_in_cells`;
    - ``voids`` (r,) number density [(h/Mpc)^3];
    - ``confusion`` (4,) cells by whether they hold galaxies: true positives, false positives, true negatives,
      false negatives; of predictions that are counts;
    - ``power``, ``equilateral``, ``squeezed`` (b,) with ``_error`` and ``_shot_noise``, see
      `galdist.statistics.bispectrum.bispectrum`.

    ``samples``: label -> for labels with several samples ``number`` of them, ``scatter`` (statistic ->
    standard deviation between samples), ``ranks`` (number + 1,) how many cubes have which rank of the true
    count among the samples', ``statistic_ranks`` the same of the values of all statistics, and
    ``coverage_ranks`` of neighboring cubes together (`galdist.statistics.coverage.ball_ranks`). Undefined
    values are NaN.
    """
    result: dict[str, Any] = arrays(durable.read_json(Path(step) / FILE))
    return result


_VALUES = ("variance", "voids", "power", "equilateral", "squeezed")
"""Statistics whose scatter between samples is compared with the truth."""


def _check(config: FieldStatisticsConfig, sample: Sample) -> None:
    n_mesh, box_size = sample.grids.n_mesh, sample.grids.attrs.box_size
    for what, side in (
        *(("cells", side) for side in config.cells),
        ("coverage_cells", 2 * config.coverage_cells),
    ):
        if n_mesh % side:
            raise ValueError(
                f"{what}: cubes of {side} cells do not tile the {n_mesh}^3 cells of {sample.name}; choose "
                f"divisors of {n_mesh}"
            )
    if not sample.grids.cell_size <= min(config.void_radii) <= max(config.void_radii) <= box_size / 4:
        raise ValueError(
            f"void_radii: {config.void_radii} are not all between a cell and a quarter of the box of "
            f"{sample.name}, {sample.grids.cell_size:.3g} to {box_size / 4:.3g} Mpc/h"
        )
    if shells(n_mesh, config.bins).size < 3:
        raise ValueError(f"{sample.name}: a mesh of {n_mesh}^3 cells is too small for a bispectrum")


def _measure(config: FieldStatisticsConfig, sample: Sample, labels: Mapping[str, str]) -> dict[str, Any]:
    """Statistics of one simulation, as `load_field_statistics` describes them but with lists."""
    comm = mpi.world()
    grids = sample.grids
    n_mesh, box_size = grids.n_mesh, grids.attrs.box_size
    fields = {name: held for name, held in sample.fields.items() if name in labels}
    edges = shells(n_mesh, config.bins)
    measured: dict[str, dict[str, Any]] = {}
    for name, (where, field) in fields.items():
        try:
            mesh = field_mesh(partial(where.read, field), n_mesh, box_size, "none")
        except ValueError as error:
            raise ValueError(f"{name} of {sample.name}, field {field!r}: {error}") from error
        if mesh is not None:
            measured[name] = dict(bispectrum(mesh, edges))
        elif name == TRUTH:
            raise ValueError(
                f"{sample.name}: its field {field!r} is empty, so nothing can be compared with it"
            )
        else:
            log.warning("%s of %s is empty: no statistics", name, sample.name)
    mine = {
        name: _local(config, *fields[name], box_size, None if name == TRUTH else fields[TRUTH])
        for number, name in enumerate(measured)
        if number % comm.size == comm.rank
    }
    gathered = comm.gather(mine)
    if comm.rank:
        return {}
    coarse: dict[str, Array] = {}
    for part in gathered:
        for name, (found, cubes) in part.items():
            measured[name] |= found
            coarse[name] = cubes
    k = measured[TRUTH]["k"]
    groups: dict[str, list[str]] = {}
    for name in measured:
        groups.setdefault(labels[name], []).append(name)
    summed: dict[str, Any] = {}
    several: dict[str, Any] = {}
    for label, names in groups.items():
        members = [measured[name] for name in names]
        summed[label] = {
            key: np.mean([one[key] for one in members], axis=0) for key in members[0] if key != "k"
        }
        if len(names) > 1:
            cubes = np.stack([coarse[name] for name in names])
            several[label] = _compared(config, sample.name, members, measured[TRUTH], cubes, coarse[TRUTH])
    result: dict[str, Any] = plain(
        {
            "box_size": box_size,
            "n_mesh": n_mesh,
            "redshift": grids.attrs.redshift,
            "split": grids.attrs.split,
            "side": np.array(config.cells) * grids.cell_size,
            "radius": np.array(config.void_radii),
            "edges": EDGES,
            "k": k,
            "steps": groups,
            "fields": summed,
            "samples": several,
        }
    )
    return result


def _local(
    config: FieldStatisticsConfig,
    where: SimulationGrids,
    field: str,
    box_size: float,
    truth: tuple[SimulationGrids, str] | None,
) -> tuple[dict[str, Any], Array]:
    """Statistics for which one process holds the whole field, and its counts in coarse cubes."""
    values = where.read(field)
    found = counts_in_cells(values, config.cells)
    voids = find_voids(values, box_size, config.void_radii, config.void_contrast)
    found["voids"] = void_sizes(voids, box_size, config.void_radii)
    if truth is not None and np.all(values == np.rint(values)):  # a mean is above zero almost everywhere
        cells = Confusion.of(values > 0, truth[0].read(truth[1]) > 0)
        found["confusion"] = np.array(astuple(cells), float)
    return found, in_cells(values, config.coverage_cells)


def _compared(
    config: FieldStatisticsConfig,
    simulation: str,
    members: Sequence[Mapping[str, Any]],
    truth: Mapping[str, Any],
    cubes: Array,
    true_cubes: Array,
) -> dict[str, Any]:
    """Scatter of samples, and ranks of the truth among them. ``cubes`` are (S, n, n, n)."""
    number = len(members)
    values = np.array([np.concatenate([one[key] for key in _VALUES]) for one in members])
    true_values = np.concatenate([truth[key] for key in _VALUES])
    defined = np.isfinite(values).all(axis=0) & np.isfinite(true_values)

    def histogram(samples: Array, true: Array) -> Array:
        return rank_histogram(*ranks(samples, true), number)[:, 0]

    # Neighboring cubes, 2 x 2 x 2 of them, are one truth of eight dimensions.
    half = true_cubes.shape[0] // 2
    blocks = np.stack([true_cubes, *cubes]).reshape(-1, half, 2, half, 2, half, 2)
    blocks = blocks.transpose(1, 3, 5, 0, 2, 4, 6).reshape(half**3, number + 1, 8)
    rng = np.random.default_rng([config.seed, zlib.crc32(simulation.encode())])
    inside = ball_ranks(blocks[:, 1:], blocks[:, 0], rng)
    return {
        "number": number,
        "scatter": {key: np.std([one[key] for one in members], axis=0, ddof=1) for key in _VALUES},
        "ranks": histogram(cubes.reshape(number, -1).T, true_cubes.ravel()),
        "statistic_ranks": histogram(values[:, defined].T, true_values[defined]),
        "coverage_ranks": np.bincount(inside, minlength=number + 1),
    }


def _rows(
    config: FieldStatisticsConfig, simulations: Mapping[str, Any], domains: Mapping[str, str]
) -> list[MetricRow]:
    """What predictions have of the truth's variance, voids and bispectrum; not what is undefined."""
    measured: dict[str, dict[str, tuple[float, float | None]]] = {}
    for name, result in simulations.items():
        truth = result["fields"][TRUTH]
        rows: dict[str, float] = {}
        for label, found in result["fields"].items():
            rows[f"n_voids/{label}"] = found["voids"].sum() * result["box_size"] ** 3
            if label == TRUTH:
                continue
            with np.errstate(invalid="ignore", divide="ignore"):
                ratio = (found["variance"] - found["poisson"]) / (truth["variance"] - truth["poisson"])
                bispectra = {
                    shape: np.nanmedian(found[shape][1:] / truth[shape][1:])
                    for shape in ("equilateral", "squeezed")
                }
            for side, value in zip(result["side"], ratio, strict=True):
                rows[f"variance_ratio/{label}/{side:.3g}"] = value
            for shape, value in bispectra.items():
                rows[f"bispectrum_ratio/{label}/{shape}"] = value
            if "confusion" in found:
                cells = Confusion(*found["confusion"])
                rows |= {f"{name}/{label}": getattr(cells, name) for name in CLASSIFICATION}
        for label, found in result["samples"].items():
            away = expected_coverage(found["coverage_ranks"], LEVELS) - LEVELS
            rows[f"coverage_distance/{label}"] = np.abs(away).max()
        measured[name] = {key: (float(value), None) for key, value in rows.items() if math.isfinite(value)}
    return rows_over_boxes(measured, config.split, domains)
