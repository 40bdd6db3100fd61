"""The report's sections on statistics of fields: counts in cells, voids, bispectra and coverage, and how
numbers and powers respond to the parameters of simulations."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from galdist.report.artist import Artist, Block, Panel, thin_lines
from galdist.report.tables import Cell, Row, Table, measured, save_latex
from galdist.run import Step
from galdist.statistics.coverage import expected_coverage
from galdist.statistics.fields import FILE, LEVELS, load_field_statistics
from galdist.statistics.spectra import FILE as SPECTRA
from galdist.statistics.spectra import TRUTH, load_spectra

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from galdist.report.plots import Curve, Palette

Array = NDArray[np.float64]
_Boxes = Sequence[Mapping[str, Any]]


_MOST = 4  # steps in one figure: as many as there are colors


def chunks(labels: Iterable[str]) -> list[list[str]]:
    """Steps of some labels, as many at a time as a figure can show; one chunk of none where there is none."""
    steps = list(dict.fromkeys(label.partition(":")[0] for label in labels))
    number = max(1, math.ceil(len(steps) / _MOST))
    return [part.tolist() for part in np.array_split(np.array(steps, str), number)]


def part_of(part: int, parts: Sequence[Any]) -> tuple[str, str]:
    """What a figure that is one of several adds to its name and title; the only one adds nothing."""
    return (f"-{part}", f", {part} of {len(parts)}") if len(parts) > 1 else ("", "")


def of_steps(found: Mapping[str, Any], steps: Sequence[str]) -> dict[str, Any]:
    """What is labeled by the truth or by some steps."""
    return {label: one for label, one in found.items() if label.partition(":")[0] in (TRUTH, *steps)}


def further_draw(label: str) -> bool:
    """Whether a field is one of a step's draws, and not the first."""
    return re.search(r"_sample_[1-9]\d*$", label) is not None


def field_blocks(
    artist: Artist, steps: Sequence[Step], domain: Callable[[str, str], str | None]
) -> list[Block]:
    """Statistics of every step that has them: boxes of one domain and mesh together, as their mean.

    ``domain`` gives that of a step's box.
    """
    blocks = []
    for step in steps:
        if not step.has(FILE):
            continue
        groups: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
        for name, found in load_field_statistics(step.path)["simulations"].items():
            mesh = found["box_size"], found["n_mesh"], found["redshift"]
            groups.setdefault((domain(step.name, name) or "", *mesh), {})[name] = found
        for number, ((where, box_size, n_mesh, redshift), named) in enumerate(groups.items(), start=1):
            boxes = list(named.values())
            names = ", ".join(named) if len(named) <= 4 else f"{len(named)} boxes"
            caption = (
                f"Numbers in cubes of two sizes, their variance, sizes of voids and bispectra without shot "
                f"noise of {names} ({box_size:g} Mpc/h, {n_mesh}³ cells, z = {redshift:.2g}). Bands: "
                + (
                    f"error of the mean over boxes; thin lines: {thin_lines(len(boxes))}."
                    if len(boxes) > 1
                    else "scatter between samples, and of Gaussian modes in bispectra without samples."
                )
            )
            name = f"{step.name}-{number}" if len(groups) > 1 else step.name
            title = f"{where}, z = {redshift:.2g}" if where and len(groups) > 1 else f"z = {redshift:.2g}"
            parts = chunks(label for label in _labels(boxes) if label != TRUTH)
            for part, chosen in enumerate(parts, start=1):
                suffix, note = part_of(part, parts)
                shown = [
                    {**box, **{kind: of_steps(box[kind], chosen) for kind in ("fields", "samples")}}
                    for box in boxes
                ]
                key = [_look(shown, label) for label in _labels(shown)]
                panels = _panels(shown)
                blocks.append(
                    artist.block(f"{name}{suffix}", f"{title}{note}", caption, panels, [step], key=key)
                )
    return blocks


def response_tables(artist: Artist, steps: Sequence[Step]) -> list[Table]:
    """Slopes along parameters of every step that measured them; the same as LaTeX for papers."""
    tables = []
    for step in steps:
        if not step.has(SPECTRA):
            continue
        spectra = load_spectra(step.path)
        if "response" not in spectra:
            continue
        parameters, quantities = spectra["response"]["parameters"], spectra["response"]["quantities"]
        labels = [label for label in next(iter(quantities.values())) if label != TRUTH]
        rows = [
            Row(_quantity(name), tuple(_slopes(found, [TRUTH, *labels], place)), parameter)
            for name, found in quantities.items()
            for place, parameter in enumerate(parameters)
        ]
        caption = (
            f"Slopes d ln x / d ln (parameter) over {len(spectra['simulations'])} boxes, none of them in "
            "the training, along all parameters at once, with errors from the scatter that is left; powers "
            "are without shot noise. Differences from the truth's slope are paired: both share their initial "
            f"conditions. Bold: more than two standard deviations. {artist.origin([step])}"
        )
        table = Table(
            f"response-{step.name}",
            "Response to parameters",
            caption,
            ("", "slope", *("slope", "difference") * len(labels)),
            tuple(rows),
            groups=((TRUTH, 1), *((label, 2) for label in labels)),
        )
        save_latex(table, artist.out)
        tables.append(table)
    return tables


def _slopes(found: Mapping[str, Any], labels: Sequence[str], place: int) -> Iterator[Cell]:
    for label in labels:
        slopes = found.get(label, {})
        for slope, error in (("slope", "error"), ("difference", "difference_error")):
            if slope in slopes:
                value, scatter = slopes[slope][place], slopes[error][place]
                far = slope == "difference" and abs(value) > 2 * scatter
                yield Cell(measured(value, scatter), strong=far)
            elif slope == "slope" or label != TRUTH:
                yield Cell()


def _quantity(name: str) -> str:
    if band := re.fullmatch(r"power/k(.+)-(.+)", name):
        return f"power, k = {band[1]} to {band[2]} h/Mpc"
    return "number of galaxies"


def _labels(boxes: _Boxes) -> list[str]:
    return [label for label in boxes[0]["fields"] if all(label in box["fields"] for box in boxes)]


def _look(boxes: _Boxes, label: str) -> str:
    """The palette knows steps and their fields: stores of one label look like the first of theirs."""
    return label if ":" in label else str(boxes[0]["steps"][label][0])


def _panels(boxes: _Boxes) -> list[Panel]:
    from galdist.report import field_plots as plots
    from galdist.report import halo_plots

    first = boxes[0]
    truth = first["fields"][TRUTH]
    sides, radius, k = first["side"], first["radius"], first["k"]

    curves = partial(_curves, boxes)
    panels = [
        Panel(
            partial(_draw_distribution, boxes, place),
            f"Distribution of the number of galaxies in cubes of {sides[place]:.3g} Mpc/h.",
        )
        for place in dict.fromkeys((0, len(sides) // 2))
    ]
    variances = curves("variance", lambda found: found["variance"] - found["poisson"])
    voids = curves("voids", lambda found: found["voids"])
    panels += [
        Panel(
            lambda ax, palette: plots.plot_variance(ax, sides, variances, palette, truth["poisson"]),
            f"Variance of counts against the side of cubes. {_first(variances, sides, 'Mpc/h')}",
        ),
        Panel(
            lambda ax, palette: plots.plot_voids(ax, radius, voids, palette),
            f"Number density of voids against radius. {_first(voids, radius, 'Mpc/h')}",
        ),
    ]
    for shape in ("equilateral", "squeezed"):
        found = curves(shape, partial(_without_shot_noise, shape))
        panels.append(
            Panel(
                partial(_draw_bispectrum, k, found, shape),
                f"Bispectrum of {shape} triangles against wavenumber. {_first(found, k, 'h/Mpc')}",
            )
        )
    sampled = [label for label in first["samples"] if all(label in box["samples"] for box in boxes)]
    if sampled:
        within = {_look(boxes, label): _sum(boxes, label, "coverage_ranks") for label in sampled}
        ranks = {_look(boxes, label): _sum(boxes, label, "ranks") for label in sampled}
        levels = {label: expected_coverage(histogram, LEVELS) for label, histogram in within.items()}
        n_within, n_ranks = (int(next(iter(found.values())).sum()) for found in (within, ranks))
        panels += [
            Panel(
                lambda ax, palette: plots.plot_expected_coverage(ax, LEVELS, levels, n_within, palette),
                "Expected coverage of the samples against credibility.",
            ),
            Panel(
                lambda ax, palette: halo_plots.plot_ranks(ax, ranks, n_ranks, palette, "cubes"),
                "Rank histogram of true numbers in cubes among the samples'.",
            ),
        ]
    return panels


def _without_shot_noise(shape: str, found: Mapping[str, Any]) -> Array:
    rest: Array = found[shape] - found[f"{shape}_shot_noise"]
    return rest


def _draw_distribution(boxes: _Boxes, place: int, ax: "Axes", palette: "Palette") -> None:
    from galdist.report import field_plots

    curves = _curves(boxes, "distribution", lambda found: found["distribution"][place])
    field_plots.plot_distribution(ax, boxes[0]["edges"], curves, palette, boxes[0]["side"][place])


def _draw_bispectrum(
    k: Array, curves: "Mapping[str, Curve]", shape: str, ax: "Axes", palette: "Palette"
) -> None:
    from galdist.report import field_plots

    field_plots.plot_bispectrum(ax, k, curves, palette, shape)


def _curves(boxes: _Boxes, statistic: str, get: Callable[[Mapping[str, Any]], Array]) -> "dict[str, Curve]":
    return {_look(boxes, label): _curve(boxes, label, statistic, get) for label in _labels(boxes)}


def _curve(boxes: _Boxes, label: str, statistic: str, get: Callable[[Mapping[str, Any]], Array]) -> "Curve":
    """Mean over boxes, with what is known of its error."""
    from galdist.report.plots import Curve

    values = np.array([get(box["fields"][label]) for box in boxes])
    if len(boxes) > 1:
        return Curve(values.mean(axis=0), values.std(axis=0, ddof=1) / np.sqrt(len(boxes)), list(values))
    nothing = np.zeros_like(values[0])
    scatter = boxes[0]["samples"].get(label, {}).get("scatter", {})
    error = scatter.get(statistic, boxes[0]["fields"][label].get(f"{statistic}_error", nothing))
    return Curve(values[0], error)


def _sum(boxes: _Boxes, label: str, histogram: str) -> Array:
    return np.sum([box["samples"][label][histogram] for box in boxes], axis=0)


def _first(curves: "Mapping[str, Curve]", x: Array, unit: str) -> str:
    """The first values, in words."""
    texts = []
    for label, (value, *_) in curves.items():
        known = np.flatnonzero(np.isfinite(value))
        if known.size:
            texts.append(f"{label}: {value[known[0]]:.3g} at {x[known[0]]:.2g} {unit}")
    return "; ".join(texts) + "."
