"""Stage ``report``: a self-contained HTML page of what a run did and found, and figures for papers.

It reads what the steps saved and computes nothing beyond drawing. A step is known by its files:
``history.jsonl`` is a training, ``prediction.zarr`` a prediction, ``spectra.json`` spectra, ``scores.json``
and ``tracers.json`` tell of galaxies in halos, ``metrics.json`` goes into the table of results. What a run
does not have is left out of its page.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import jinja2
import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import Field as Constraint
from pydantic import PositiveFloat, PositiveInt, field_validator

from galdist import __version__, status
from galdist.config import StrictModel
from galdist.grids.store import GridStore, SimulationGrids, open_store
from galdist.report.artist import Artist, Block, Panel, thin_lines
from galdist.report.domains import Domains
from galdist.report.fields import chunks, field_blocks, further_draw, of_steps, part_of, response_tables
from galdist.report.halos import MOST, HaloStudy
from galdist.report.published import PUBLISHED
from galdist.report.tables import Table, measured
from galdist.run import Step, open_run
from galdist.statistics.metrics import Confusion, MetricRow
from galdist.statistics.spectra import MATTER, TRUTH, load_spectra
from hpc import durable, progress

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from galdist.report.plots import Curve, Palette, Quantity

_DrawEpochs = Callable[["Axes", NDArray[np.float64], dict[str, NDArray[np.float64]]], None]

FILE = "report.html"

_LINKS = {
    "dask-report.html": "Dask report",
    "log.txt": "log",
    "config.yaml": "configuration",
    "provenance.json": "provenance",
}
_LOSSES = {"train_loss": "training", "validation_loss": "validation"}
_SCORES = {"accuracy": "accuracy", "recall": "recall", "precision": "precision", "pr_auc": "PR-AUC"}
_SPEED = {
    "samples_per_second": "samples/s",
    "data_wait_fraction": "waiting for data",
    "device_wait_fraction": "waiting for the GPU",
}
_CONFUSION = ("true_positives", "false_positives", "true_negatives", "false_negatives")
_NOT_DRAWN = {
    *("epoch", "seconds", "learning_rate", "threshold", "peak_gpu_memory"),
    *(*_LOSSES, *_SCORES, *_SPEED, *_CONFUSION),
}
_UNKNOWN = "–"
_FEW = 6  # labels that a panel's own legend has room for


class ReportConfig(StrictModel):
    """What the page shows."""

    title: str | None = None
    """Heading of the page; null: the name of the run."""
    boxes: PositiveInt = 2
    """How many of the predicted boxes are shown as slices."""
    slab: PositiveFloat = 5.0
    """Thickness of the slices [Mpc/h]; they lie in the middle of the box."""
    models: Annotated[tuple[str, ...], Constraint(max_length=MOST)] = ()
    """Labels of the models of galaxies in halos that figures show (tables have all); by default the best ones
    and published ones."""
    published: str | None = None
    """Published figures beside our own: ``tng300`` for a run on the centrals of TNG300-1, ``camels`` for
    voxels of CAMELS."""

    @field_validator("published")
    @classmethod
    def _known(cls, published: str | None) -> str | None:
        if published is not None and published not in PUBLISHED:
            raise ValueError(f"nothing is known of {published!r}; there is {', '.join(PUBLISHED)}")
        return published


def report(config: ReportConfig, inputs: Mapping[str, list[Path]], out: Path) -> None:
    """Write ``report.html``, ``figures/*.{pdf,png}`` and ``tables/*.tex`` of the steps ``inputs["steps"]``.

    Raises
    ------
    galdist.run.RunError
        where ``out`` does not lie in a run folder, a file of a step is not what it should be, or no model has
        a label of ``config.models``.
    """
    from galdist.report.plots import Palette

    run = open_run(out.parent)
    given = {path.name for path in inputs["steps"]} - {out.name}
    steps = [step for step in run.steps.values() if step.name in given]
    stores = {step.name: open_store(step.path / "grids.zarr") for step in steps if step.has("grids.zarr")}
    predictions = {
        step.name: open_store(step.path / "prediction.zarr") for step in steps if step.has("prediction.zarr")
    }
    published = PUBLISHED[config.published] if config.published else None
    halos = HaloStudy(run, steps, config.models, published, config.boxes)
    hods = [step.name for step in steps if step.stage == "hod"]
    artist = Artist(run, out, Palette(list(predictions), hods, halos.shown))
    domains = Domains(run, steps, stores, predictions)

    sections = []
    drawn: tuple[tuple[str, Callable[[], Sequence[Block | Table]]], ...] = (
        ("Boxes", partial(_slices, artist, config, steps, stores, predictions, hods)),
        ("Spectra", partial(_spectra, artist, steps, stores, domains)),
        ("Statistics of fields", partial(field_blocks, artist, steps, domains.domain)),
        ("Response to parameters", partial(response_tables, artist, steps)),
        ("Predictions", partial(domains.tables, artist, published)),
        ("Halo occupation", partial(_occupation, artist, steps)),
        ("Distributions", partial(halos.distributions, artist)),
        ("Tracers", partial(halos.tracers_of_boxes, artist)),
        ("Training", partial(_training, artist, steps)),
    )
    for number, (title, draw) in enumerate(drawn):
        progress.report(number, len(drawn) + 1, title)
        if blocks := draw():
            sections.append({"title": title, "id": title.lower().replace(" ", "-"), "blocks": blocks})

    progress.report(len(drawn), len(drawn) + 1, "page")
    simulations = {name for store in (*stores.values(), *predictions.values()) for name in store}
    results = _results(steps, simulations)
    page = _environment().get_template("template.html").render(
        title=config.title or run.name,
        run=run,
        version=__version__,
        summary=_summary(steps),
        headlines=[*halos.headlines(), *_headlines(results, predictions)],
        steps=[_step_row(step, steps) for step in steps],
        sections=sections,
        confusions=_confusions(results, predictions),
        results=[
            row
            for row in results
            if row["metric"] not in _CONFUSION and row["step"] not in halos.tabulated
        ],
        resources=[row for step in steps for row in _resources(step)],
        restarts=[row for step in steps for row in _restarts(step)],
        versions=_versions(steps),
    )  # fmt: skip
    durable.write_text(out / FILE, page)
    progress.report(len(drawn) + 1, len(drawn) + 1)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        duration=status.duration, size=status.size_text, moment=_moment, number=_number
    )
    return environment


# Boxes


class _Layer(NamedTuple):
    """A field of a box that is shown as a slice."""

    title: str
    grids: SimulationGrids
    field: str
    quantity: "Quantity"


def _slices(
    artist: Artist,
    config: ReportConfig,
    steps: Sequence[Step],
    stores: Mapping[str, GridStore],
    predictions: Mapping[str, GridStore],
    hods: Sequence[str],
) -> list[Block]:
    """Input, truth and predictions of the first predicted boxes (of the first test boxes where none is)."""
    by_name = {step.name: step for step in steps}
    predicted = {name for store in predictions.values() for name in store}
    boxes = [
        (step, name)
        for step, store in stores.items()
        for name in store
        if (name in predicted if predicted else store[name].attrs.split == "test")
    ]
    blocks = []
    for number, (step, name) in enumerate(boxes[: config.boxes], start=1):
        grids = stores[step][name]
        holders = {label: store[name] for label, store in predictions.items() if name in store}
        layers = _layers(grids, holders, hods)
        planes, low, high = _slab(grids, config.slab)
        images = {layer.title: _project(layer, planes) for layer in layers}
        scale = max(
            (float(images[layer.title].max()) for layer in layers if layer.title == TRUTH), default=None
        )
        where = f"z = {low:.3g} to {high:.3g} Mpc/h of the {grids.attrs.box_size:g} Mpc/h box {name}"
        panels = [
            Panel(
                partial(_draw_slice, layer, images[layer.title], scale),
                f"Map of {layer.title} ({_words(layer.field)}) in the slab {where}"
                + (f": {images[layer.title].sum():.0f} in all." if layer.quantity == "counts" else "."),
            )
            for layer in layers
        ]
        what = _words(layers[0].field).capitalize() if layers else "Fields"
        caption = f"{what} and what is predicted from it, projected through {where}."
        used = [by_name[step], *(by_name[label] for label in holders)]
        blocks.append(
            artist.block(f"slices-{number}", name, caption, panels, used, size=(2.7, 3.45), columns=4)
        )
    return blocks


def _layers(
    grids: SimulationGrids, predictions: Mapping[str, SimulationGrids], hods: Iterable[str]
) -> list[_Layer]:
    scalars = [field for field in grids.fields if grids.field(field).components == 1]
    targets = [field for field in scalars if any(field in found.fields for found in predictions.values())]
    targets = targets or [field for field in scalars if field == "galaxy_counts"]
    matter = [field for field in scalars if field.startswith("matter")]
    layers = [_Layer(MATTER, grids, field, "overdensity") for field in matter[:1]]
    layers += [_Layer(TRUTH, grids, field, "counts") for field in targets[:1]]
    further = []
    for label, found in sorted(predictions.items(), key=lambda item: item[0] in hods):
        for field in found.fields:
            if found.field(field).components != 1 or further_draw(field):
                continue
            if field in targets[:1]:
                layers.append(_Layer(label, found, field, "counts"))
            else:
                quantity: Quantity = "probability" if field.endswith("probability") else "counts"
                further.append(_Layer(f"{label}: {_words(field)}", found, field, quantity))
    return layers + further


def _slab(grids: SimulationGrids, thickness: float) -> tuple[slice, float, float]:
    """Planes of the middle of the box, and the z range they fill [Mpc/h]."""
    cells = min(max(1, round(thickness / grids.cell_size)), grids.n_mesh)
    start = (grids.n_mesh - cells) // 2
    return slice(start, start + cells), start * grids.cell_size, (start + cells) * grids.cell_size


def _project(layer: _Layer, planes: slice) -> NDArray[np.float64]:
    """The slab as an image: sums of counts, highest of probabilities, densities over the box's mean."""
    values = layer.grids.read(layer.field, planes).astype(np.float64)
    if layer.quantity == "counts":
        return values.sum(axis=0)
    if layer.quantity == "probability":
        return values.max(axis=0)
    # By chunks: a large box does not fit into memory.
    array = layer.grids.array(layer.field)
    thickness = (array.shards or array.chunks)[0]
    total = sum(
        layer.grids.read(layer.field, slice(start, start + thickness)).sum(dtype=np.float64)
        for start in range(0, layer.grids.n_mesh, thickness)
    )
    mean = total / layer.grids.n_mesh**3
    return values.mean(axis=0) / (mean or 1.0)


def _draw_slice(
    layer: _Layer, image: NDArray[np.float64], counts_max: float | None, ax: "Axes", palette: "Palette"
) -> None:
    from galdist.report import plots

    units = layer.grids.field(layer.field).units
    plots.plot_slice(
        ax,
        image,
        layer.grids.attrs.box_size,
        layer.quantity,
        title=layer.title,
        vmax=counts_max if layer.quantity == "counts" else None,
        unit=f"{_words(layer.field)} [{units}]" if units else "galaxies",
    )


# Training


def _training(artist: Artist, steps: Sequence[Step]) -> list[Block]:
    """Curves of every step that trained; of seeds of one model, the first one's."""
    declared = {entry["name"]: entry for entry in artist.run.config["steps"]}
    groups: dict[str, list[Step]] = defaultdict(list)
    for step in steps:
        if step.has("history.jsonl") and step.history:
            config = {key: value for key, value in step.config.items() if key != "seed"}
            alike = declared[step.name].get("inputs"), config, "seed" in step.config or step.name
            groups[durable.fingerprint(alike)].append(step)
    blocks = []
    for step, *others in groups.values():
        history = step.history
        kept = None
        caption = f"Training of {step.name}: {len(history)} epochs."
        if others:
            names = f"{others[0].name} to {others[-1].name}" if len(others) > 1 else others[0].name
            caption += f" Of {1 + len(others)} seeds, the first ({names} alike)."
        if step.has("model/model.yaml"):
            model = yaml.safe_load((step.path / "model" / "model.yaml").read_text(encoding="utf-8"))
            kept = model["epoch"] + 1
            caption += f" Dotted: epoch {kept}, whose weights were kept."
        panels = _training_panels(step.name, history, kept)
        blocks.append(artist.block(f"training-{step.name}", step.name, caption, panels, [step]))
    return blocks


def _training_panels(name: str, history: list[dict[str, Any]], kept: int | None) -> list[Panel]:
    """Losses, scores, every other number that was recorded, and speed."""
    from galdist.report import plots

    columns = {
        key: np.array([math.nan if row.get(key) is None else row[key] for row in history], float)
        for key in dict.fromkeys(key for row in history for key in row)
    }
    epoch = columns["epoch"] + 1  # the first epoch is 0 in files and 1 to people

    def panel(what: str, names: Mapping[str, str], draw: _DrawEpochs) -> Panel:
        found = {name: columns[key] for key, name in names.items() if key in columns}

        def drawn(ax: "Axes", palette: "Palette") -> None:
            draw(ax, epoch, found)
            if kept is not None:
                plots.mark_epoch(ax, kept)

        last = ", ".join(f"{name} {values[-1]:.4g}" for name, values in found.items())
        return Panel(drawn, f"{what} of {name} against epoch; after {epoch.size} epochs: {last}.")

    panels = [panel("Loss", _LOSSES, plots.plot_loss)]
    if any(key in columns for key in _SCORES):
        panels.append(panel("Scores on validation boxes", _SCORES, plots.plot_scores))
    panels += [
        panel(_words(key).capitalize(), {key: _words(key)}, plots.plot_metric)
        for key in columns
        if key not in _NOT_DRAWN
    ]
    panels.append(panel("Speed", _SPEED, plots.plot_throughput))
    return panels


# Spectra


def _spectra(
    artist: Artist, steps: Sequence[Step], stores: Mapping[str, GridStore], domains: Domains
) -> list[Block]:
    """P(k), r(k) and T(k) of every step with spectra: boxes of one domain and mesh as their mean."""
    suites = {name: store[name].attrs.suite for store in stores.values() for name in store}
    blocks = []
    for step in steps:
        if not step.has("spectra.json"):
            continue
        groups: dict[tuple[Any, ...], dict[str, Any]] = defaultdict(dict)
        for name, found in load_spectra(step.path)["simulations"].items():
            mesh = found["box_size"], found["n_mesh"], found["redshift"]
            groups[suites.get(name, ""), domains.domain(step.name, name) or "", *mesh][name] = found
        named = [suite for suite, *_ in groups]
        for number, ((suite, domain, box_size, n_mesh, redshift), boxes) in enumerate(
            groups.items(), start=1
        ):
            names = ", ".join(boxes) if len(boxes) <= 4 else f"{len(boxes)} boxes"
            caption = (
                f"Power spectrum, cross-correlation with the truth and transfer function of {names} "
                f"({box_size:g} Mpc/h, {n_mesh}³ cells, z = {redshift:.2g}), shot noise included. "
                "Bands: one standard deviation for Gaussian modes"
                + (
                    f", of the mean over {len(boxes)} boxes; thin lines: {thin_lines(len(boxes))}."
                    if len(boxes) > 1
                    else "."
                )
            )
            where = f"({domain})" if domain and named.count(suite) > 1 else ""
            title = " ".join(filter(None, [suite, where, f"z = {redshift:.2g}"]))
            name = f"{step.name}-{number}" if len(groups) > 1 else step.name
            if all(TRUTH in box.get("multipoles", {}) for box in boxes.values()):
                blocks.append(
                    artist.block(
                        f"multipoles-{name}",
                        f"{title}, in redshift space",
                        f"Monopole and quadrupole of the galaxies' power in redshift space, of {names}, z = "
                        f"{redshift:.2g}: means over lines of sight along the three axes. The monopole "
                        "includes shot noise."
                        + (f" Thin lines: {thin_lines(len(boxes))}." if len(boxes) > 1 else ""),
                        _multipole_panels(list(boxes.values())),
                        [step],
                    )
                )
            shared = chunks(label for box in boxes.values() for label in box["cross"] if label != MATTER)
            for part, chosen in enumerate(shared, start=1):
                suffix, note = part_of(part, shared)
                shown = [
                    {**box, **{kind: _shown(box[kind], chosen) for kind in ("fields", "cross")}}
                    for box in boxes.values()
                ]
                panels, key, about = _spectra_panels(shown), list(shown[0]["fields"]), caption
                if len(key) > _FEW:  # legends of their own would leave the panels no room
                    panels = [Panel(partial(_without_legend, panel.draw), panel.alt) for panel in panels]
                    about += " Dash-dotted, in P(k): the truth's shot noise."
                else:
                    key = []
                blocks.append(
                    artist.block(f"{name}{suffix}", f"{title}{note}", about, panels, [step], key=key)
                )
    return blocks


def _without_legend(draw: Callable[["Axes", "Palette"], None], ax: "Axes", palette: "Palette") -> None:
    draw(ax, palette)
    if legend := ax.get_legend():
        legend.remove()


def _shown(fields: Mapping[str, Any], chosen: Sequence[str]) -> dict[str, Any]:
    """Truth, matter, and the fields of some steps; of several draws the first."""
    kept = of_steps(fields, [MATTER, *chosen])
    return {label: found for label, found in kept.items() if not further_draw(label)}


def _spectra_panels(boxes: list[dict[str, Any]]) -> list[Panel]:
    from galdist.report import plots

    k, nyquist = boxes[0]["k"], boxes[0]["nyquist"]
    powers = _curves(boxes, "fields", "power")
    noises = _curves(boxes, "fields", "shot_noise_power")
    correlations = _curves(boxes, "cross", "r")
    transfers = _curves(boxes, "cross", "transfer")
    # The matter's r says how hard the task is; its T (the inverse bias) would only stretch the axis. Of
    # fields that are no counts (`step:galaxy_probability`) the amplitude has no meaning, only r.
    transfers = {label: curve for label, curve in transfers.items() if label != MATTER and _is_count(label)}
    powers = {label: curve for label, curve in powers.items() if _is_count(label)}
    panels = [
        Panel(
            lambda ax, palette: plots.plot_power(
                ax, k, powers, palette, nyquist, {TRUTH: noises[TRUTH].value}
            ),
            f"Power spectra against wavenumber. {_ends(k, powers, '(Mpc/h)^3')}",
        )
    ]
    if correlations:
        panels.append(
            Panel(
                lambda ax, palette: plots.plot_correlation(ax, k, correlations, palette, nyquist),
                f"Cross-correlation coefficient r(k) with the truth. {_ends(k, correlations)}",
            )
        )
    if transfers:
        panels.append(
            Panel(
                lambda ax, palette: plots.plot_transfer(ax, k, transfers, palette, nyquist),
                f"Transfer function T(k). {_ends(k, transfers)}",
            )
        )
    return panels


def _multipole_panels(boxes: list[dict[str, Any]]) -> list[Panel]:
    from galdist.report import plots

    k, nyquist = boxes[0]["k"], boxes[0]["nyquist"]
    monopoles, quadrupoles = (_curves(boxes, "multipoles", pole) for pole in ("monopole", "quadrupole"))

    def draw_monopole(ax: "Axes", palette: "Palette") -> None:
        plots.plot_power(ax, k, monopoles, palette, nyquist)
        ax.set_ylabel(ax.get_ylabel().replace("P(k)", "P_0(k)"))

    return [
        Panel(
            draw_monopole,
            f"Monopoles against wavenumber. {_ends(k, monopoles, '(Mpc/h)^3')}",
        ),
        Panel(
            lambda ax, palette: plots.plot_quadrupole(ax, k, quadrupoles, palette, nyquist),
            f"Quadrupoles against wavenumber. {_ends(k, quadrupoles, '(Mpc/h)^3')}",
        ),
    ]


def _is_count(label: str) -> bool:
    """Whether a label stands for galaxies, or for their mean numbers (``step:expected_...``)."""
    field = label.partition(":")[2]
    return not field or field.startswith("expected")


def _curves(boxes: list[dict[str, Any]], group: str, key: str) -> "dict[str, Curve]":
    """Mean over boxes with its error, by label; with single boxes where there are several."""
    from galdist.report.plots import Curve

    labels = [label for label in boxes[0][group] if all(label in box[group] for box in boxes)]
    means = {}
    for label in labels:
        values = [box[group][label][key] for box in boxes]
        nothing = np.zeros_like(values[0])
        errors = [box[group][label].get(f"{key}_error", nothing) for box in boxes]
        error = np.sqrt(np.sum(np.square(errors), axis=0)) / len(boxes)
        means[label] = Curve(np.mean(values, axis=0), error, values if len(boxes) > 1 else ())
    return means


def _occupation(artist: Artist, steps: Sequence[Step]) -> list[Block]:
    """Mean numbers of galaxies that halo occupation models were fitted to."""

    blocks = []
    for step in steps:
        if not step.has("hod.json"):
            continue
        fitted = durable.read_json(step.path / "hod.json")
        bins = {key: np.array(values, float) for key, values in fitted["occupation"].items()}
        parameters = ", ".join(
            f"{name} = {fitted[name]:.3g}" + " Msun/h" * (name[0] == "M")
            for name in ("M_min", "sigma_logM", "M_0", "M_1", "alpha", "A_cen", "A_sat")
            if fitted.get(name)
        )
        panel = Panel(
            partial(_draw_occupation, bins, fitted["M_min"]),
            f"Mean number of galaxies in halos against halo mass, measured and fitted: {parameters}.",
        )
        n_boxes = len(fitted["training"])
        caption = (
            f"Mean number of galaxies in the {fitted['n_halos']} halos of {n_boxes} training "
            f"{'box' if n_boxes == 1 else 'boxes'} by mass ({fitted['mass']}), and "
            f"of the fit (dotted: M_min): {parameters}. Bars: error of the mean."
        )
        blocks.append(artist.block(f"occupation-{step.name}", step.name, caption, [panel], [step]))
    return blocks


def _draw_occupation(
    bins: Mapping[str, NDArray[np.float64]], m_min: float, ax: "Axes", palette: "Palette"
) -> None:
    from galdist.report import plots

    del palette  # truth and fit have the colors that every figure gives them
    plots.plot_occupation(
        ax, bins["mass"], plots.Curve(bins["measured"], bins["error"]), bins["model"], m_min
    )


def _ends(k: NDArray[np.float64], curves: "Mapping[str, Curve]", unit: str = "") -> str:
    """Values at both ends, in words."""
    texts = []
    for label, (value, *_) in curves.items():
        good = np.flatnonzero(np.isfinite(value))
        if good.size:
            first, last = good[0], good[-1]
            texts.append(
                f"{label}: {value[first]:.3g} at k = {k[first]:.2g}, {value[last]:.3g} at {k[last]:.2g} h/Mpc"
            )
    return "; ".join(texts) + (f", in {unit}." if unit else ".")


# Tables


def _summary(steps: Sequence[Step]) -> dict[str, Any]:
    records = [step.provenance for step in steps]

    def each(key: str) -> list[str]:
        return list(dict.fromkeys(str(record[key]) for record in records if record.get(key) is not None))

    return {
        "started": min(each("started"), default=None),
        "finished": max(each("finished"), default=None),
        "seconds": sum(record.get("seconds") or 0 for record in records),
        "hosts": each("host"),
        "platforms": each("platform"),
        "commits": each("git_commit"),
        "seeds": each("run_seed"),
        "processes": max((record.get("ranks") or 1 for record in records), default=1),
        "memory": max((_peak(record) for record in records), default=0),
    }


def _step_row(step: Step, steps: Sequence[Step]) -> dict[str, Any]:
    record = step.provenance
    longest = max((other.provenance.get("seconds") or 0 for other in steps), default=0)
    return {
        "name": step.name,
        "stage": step.stage,
        "state": step.state,
        "record": record,
        "share": 100 * (record.get("seconds") or 0) / longest if longest else 0,
        "memory": _peak(record),
        "memories": ", ".join(
            f"{label}: {status.size_text(size)}" for label, size in record.get("peak_memory", {}).items()
        ),
        "links": {label: f"../{step.name}/{file}" for file, label in _LINKS.items() if step.has(file)},
    }


def _resources(step: Step) -> list[dict[str, Any]]:
    """What a step asked for and used; where it had jobs of workers beside its own, one of them in a row
    below."""
    record = step.provenance
    asked, usage = record.get("asked") or {}, record.get("usage") or {}
    job = record.get("job") or {}
    ranks, nodes = asked.get("ranks") or 1, asked.get("nodes") or 1
    memory = asked.get("memory")
    own = {
        "elapsed": record.get("seconds"),
        "time_limit": asked.get("time"),
        "memory_asked": memory and nodes * memory,
        "cpus": asked.get("cpus") and ranks * asked["cpus"],
        "gpus": nodes * (asked.get("gpus") or 0),
        "max_rss": sum((record.get("peak_memory") or {}).values()),
    }
    speed = {row["metric"]: row["value"] for row in step.metrics if row["sample"] == "train"}
    rows = [
        {
            "name": step.name,
            "job": job.get("id") or _UNKNOWN,
            "nodes": ", ".join(job.get("nodes") or record.get("hosts") or []) or _UNKNOWN,
            "starts": 1 + len(record.get("attempts") or []) + (job.get("restarts") or 0) if record else 0,
            "data": _speed(speed),
            **_shares(own | {key: value for key, value in usage.items() if value}, speed),
        }
    ]
    if workers := usage.get("workers"):  # sums over their jobs, but for the memory used
        each = {
            key: workers[key] / nodes
            for key in ("elapsed", "cpu_seconds", "cpus", "memory_asked")
            if workers.get(key)
        }
        unknown = {"job": _UNKNOWN, "nodes": _UNKNOWN, "starts": 0, "data": _UNKNOWN}
        rows.append({"name": f"each of its {nodes} workers", **unknown, **_shares({**workers, **each}, {})})
    return rows


def _shares(usage: Mapping[str, Any], speed: Mapping[str, float]) -> dict[str, Any]:
    elapsed, cpu_seconds = usage.get("elapsed"), usage.get("cpu_seconds")
    busy = cpu_seconds / elapsed if elapsed and cpu_seconds else None
    gpus = [
        f"{usage['gpus']}" if usage.get("gpus") else "",
        f"{usage['gpu_utilization']:.0f}% busy" if usage.get("gpu_utilization") is not None else "",
        f"{speed['peak_gpu_memory']:.3g} GB" if "peak_gpu_memory" in speed else "",
    ]
    return {
        "time": _used(elapsed, usage.get("time_limit"), status.duration),
        "memory": _used(usage.get("max_rss"), usage.get("memory_asked"), status.size_text),
        "cores": _used(busy, usage.get("cpus"), lambda cores: f"{cores:.3g}"),
        "gpus": ", ".join(filter(None, gpus)) or _UNKNOWN,
    }


def _used(used: float | None, asked: float | None, words: Callable[[float], str]) -> dict[str, Any]:
    """What was used of what was asked for, as far as either is known: in words, and in percent."""
    text = (words(used) if used else _UNKNOWN) + (f" of {words(asked)}" if asked else "")
    return {"text": text, "percent": min(100 * used / asked, 100) if used and asked else None}


def _speed(speed: Mapping[str, float]) -> str:
    texts = [
        f"{speed['samples_per_second']:.3g} samples/s" if "samples_per_second" in speed else "",
        *(
            f"{100 * speed[key]:.0f}% waiting for {what}"
            for key, what in (("data_wait_fraction", "data"), ("device_wait_fraction", "the GPU"))
            if key in speed
        ),
    ]
    return ", ".join(filter(None, texts)) or _UNKNOWN


def _restarts(step: Step) -> list[dict[str, Any]]:
    """Attempts at a step that did not end well."""
    return [
        {
            "name": step.name,
            "started": attempt.get("started"),
            "job": attempt.get("job") or _UNKNOWN,
            "why": str(attempt.get("error") or _UNKNOWN).splitlines()[0],
        }
        for attempt in step.provenance.get("attempts") or []
    ]


def _peak(record: Mapping[str, Any]) -> int:
    return max((record.get("peak_memory") or {}).values(), default=0)


def _versions(steps: Sequence[Step]) -> dict[str, dict[str, list[str]]]:
    """Package -> version -> steps that ran with it."""
    versions: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for step in steps:
        for package, version in (step.provenance.get("versions") or {}).items():
            versions[package][str(version)].append(step.name)
    return {package: dict(found) for package, found in sorted(versions.items())}


def _results(steps: Sequence[Step], simulations: set[str]) -> list[dict[str, Any]]:
    """Rows of the table of results. ``box``: the row is of one of several boxes of its step."""
    rows = []
    for number, step in enumerate(steps):
        found = step.metrics
        several = len({row["sample"] for row in found}) > 1
        rows += [
            {
                "step": step.name,
                "number": number,
                **row,
                "box": several and row["sample"] in simulations,
                "text": _value(row),
            }
            for row in found
        ]
    return rows


def _confusions(results: Sequence[Mapping[str, Any]], predictions: Iterable[str]) -> list[dict[str, Any]]:
    """Confusions of predictions, each over all of its boxes."""
    samples: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for row in results:
        if row["step"] in predictions and not row["box"]:
            samples[row["step"], row["sample"]][row["metric"]] = row["value"]
    return [
        {
            "step": step,
            "sample": re.sub("^all", "all boxes", sample),
            "confusion": Confusion(*(int(values[name]) for name in _CONFUSION)),
            "threshold": values.get("threshold"),
        }
        for (step, sample), values in samples.items()
        if all(name in values for name in _CONFUSION)
    ]


def _headlines(
    results: Sequence[Mapping[str, Any]], predictions: Mapping[str, GridStore]
) -> list[dict[str, str]]:
    """What a reader looks for first: recall and accuracy of predictions, r of each with the truth."""
    found = []
    for row in results:
        correlation = re.fullmatch(r"r/([^:/]+)(:expected_[^/]+)?/k(.+)", row["metric"])
        if row["box"]:
            continue
        domain = row["sample"].partition(" of ")[2]
        where = f", {domain}" if domain else ""
        if row["step"] in predictions and row["metric"] in ("recall", "accuracy"):
            found.append({"label": f"{row['metric']}, {row['step']}{where}", "text": row["text"]})
        elif correlation and correlation[1] in predictions:
            band = correlation[3].replace("-", " to ")
            what = f"{correlation[1]} ({_words(correlation[2][1:])})" if correlation[2] else correlation[1]
            label = f"r of {what} with truth, k = {band} h/Mpc{where}"
            found.append({"label": label, "text": row["text"]})
    return found


# Words


def _words(name: str) -> str:
    return name.replace("_", " ")


def _value(row: MetricRow) -> str:
    """Value and error, as far as their digits mean something."""
    value, error = row["value"], row["error"]
    return _number(value) if error is None or error <= 0 else measured(value, error)


def _number(value: float) -> str:
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}".replace(",", "\u202f")
    return f"{value:.4g}"


def _moment(when: str) -> str:
    """An ISO time, to the second, as it was recorded."""
    return datetime.fromisoformat(when).strftime("%Y-%m-%d %H:%M:%S %Z").strip()
