"""Tables of predictions: which voxels they put galaxies in, and what is left where models were not trained.

A domain is what one step of grids holds: a suite, a set, a range of parameters, a redshift. A model's domain
are the grids that it was trained on.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from galdist.catalogs.catalog import open_catalog
from galdist.grids.store import GridStore
from galdist.report.artist import Artist
from galdist.report.published import Published
from galdist.report.tables import Cell, Row, Table, measured, save_latex
from galdist.run import Run, Step
from galdist.statistics import fields, spectra
from galdist.statistics.fields import load_field_statistics
from galdist.statistics.metrics import Confusion
from galdist.statistics.spectra import TRUTH
from hpc import durable

_COUNTS = ("true_positives", "false_positives", "true_negatives", "false_negatives")
_CELLS = ("accuracy", "recall", "precision")
_COMPARED = {
    "r": "r",
    "power_ratio": "P / P of the truth",
    "variance_ratio": "variance / truth's",
    "bispectrum_ratio": "bispectrum / truth's",
}
"""Metrics of spectra and of statistics of fields: what they are of, by their first word."""

_Domain = str
_Pair = tuple[tuple[_Domain, ...], _Domain]
"""Grids that a model was trained on, and those that it is tested on."""
_Values = dict[tuple[str, _Domain], list[tuple[float, float | None]]]


@dataclass(frozen=True)
class Prediction:
    """A step that predicted boxes.

    Attributes
    ----------
    step
        of the prediction.
    model
        what predicted, in words.
    trained
        the grids that it was trained on.
    """

    step: Step
    model: str
    trained: tuple[_Domain, ...]


class Domains:
    """The predictions of a run, with the domains of their models and of the boxes that were predicted."""

    def __init__(
        self,
        run: Run,
        steps: Sequence[Step],
        stores: Mapping[str, GridStore],
        predictions: Mapping[str, GridStore],
    ) -> None:
        self._stores = stores
        self._steps = {step.name: step for step in steps}
        self._inputs: dict[str, Mapping[str, list[str]]] = {
            entry["name"]: {
                role: [given] if isinstance(given, str) else list(given)
                for role, given in (entry.get("inputs") or {}).items()
            }
            for entry in run.config["steps"]
        }
        self._run_steps = run.steps
        self.predictions = [
            Prediction(step, self._model(step), self._trained(step))
            for step in steps
            if step.name in predictions
        ]

    def domain(self, step: str, box: str) -> _Domain | None:
        """The grids that a step read a box from; None where they are not known."""
        found = [
            name
            for name in self._inputs.get(step, {}).get("grids", [])
            if name in self._stores and box in self._stores[name]
        ]
        return found[0] if found else None

    def confusions(self) -> dict[tuple[str, _Domain], Confusion]:
        """Voxels with and without galaxies of each (step, domain): as its metrics have them, else as the
        statistics of fields do."""
        found: dict[tuple[str, _Domain], Confusion] = {}

        def add(by: str, step: str, box: str, cells: Confusion) -> None:
            if domain := self.domain(by, box):
                found[step, domain] = found.get((step, domain), Confusion()) + cells

        for prediction in self.predictions:
            name = prediction.step.name
            boxes: dict[str, dict[str, float]] = defaultdict(dict)
            for row in prediction.step.metrics:
                boxes[row["sample"]][row["metric"]] = row["value"]
            for box, values in boxes.items():
                if all(count in values for count in _COUNTS):
                    add(name, name, box, Confusion(*(int(values[count]) for count in _COUNTS)))
        told = {step for step, _ in found}
        names = {prediction.step.name for prediction in self.predictions} - told
        for step in self._steps.values():
            if not step.has(fields.FILE):
                continue
            for box, result in load_field_statistics(step.path)["simulations"].items():
                for label in names & result["fields"].keys():
                    if "confusion" in result["fields"][label]:
                        cells = result["fields"][label]["confusion"]
                        add(step.name, label, box, Confusion(*(int(count) for count in cells)))
        return found

    def tables(self, artist: Artist, published: Published | None) -> list[Table]:
        """Which voxels hold galaxies, and how models do elsewhere; the same as LaTeX for papers."""
        confusions, values = self.confusions(), self._values()
        tables = [_classification(self.predictions, confusions, published)] if confusions else []
        pairs = [*confusions, *((step, domain) for step, found in values.items() for _, domain in found)]
        tested = dict.fromkeys(domain for _, domain in pairs)
        if len(tested) > 1:
            tables.append(
                _transfer(self.predictions, confusions, values, list(tested), self._described(tested))
            )
        origin = artist.origin(prediction.step for prediction in self.predictions)
        signed = [replace(table, caption=f"{table.caption} {origin}") for table in tables]
        for table in signed:
            save_latex(table, artist.out)
        return signed

    def _values(self) -> dict[str, _Values]:
        """Metrics of single boxes by spectra and statistics of fields: step -> (metric, domain) -> values."""
        found: dict[str, _Values] = {p.step.name: defaultdict(list) for p in self.predictions}
        for step in self._steps.values():
            if not (step.has(spectra.FILE) or step.has(fields.FILE)):
                continue
            rows = {(row["metric"], row["sample"]): row for row in step.metrics}
            for (metric, box), row in rows.items():
                kind, _, rest = metric.partition("/")
                label, _, where = rest.partition("/")
                domain = self.domain(step.name, box)
                if domain is None or label not in found:
                    continue
                if kind == "n" and (truth := rows.get((f"n/{TRUTH}", box))):
                    found[label]["galaxies / true galaxies", domain].append(
                        (row["value"] / truth["value"], None)
                    )
                elif kind in _COMPARED:
                    words = f"{_COMPARED[kind]}, {_scale(kind, where)}"
                    found[label][words, domain].append((row["value"], row["error"]))
        return found

    def _model(self, step: Step) -> str:
        """What predicted, in words that tell the models of a run apart but not where they were trained."""
        if step.stage == "hod":
            form = durable.read_json(step.path / "hod.json").get("form", {})
            kind, second = form.get("kind", ""), form.get("assembly_bias")
            return f"HOD, {kind}" + (f" decorated by {second}" if second else "")
        trained = self._inputs.get(step.name, {}).get("model", [])
        return self._network(trained[0]) if trained else step.name

    def _network(self, trained: str) -> str:
        step = self._run_steps.get(trained)
        config = step.config.get("model", {}) if step else {}
        words = [str(config.get("name", trained))]
        if config.get("loss") not in (None, "squared-error", "cross-entropy"):
            words.append(config["loss"])
        if config.get("parameters"):
            words.append(f"given {', '.join(config['parameters'])}")
        parts = [self._network(part) for part in self._inputs.get(trained, {}).get("models", [])]
        return ", ".join(words) + (f" on {' and '.join(parts)}" if parts else "")

    def _trained(self, step: Step) -> tuple[_Domain, ...]:
        inputs = self._inputs.get(step.name, {})
        if step.stage != "hod":
            return tuple(
                g for model in inputs.get("model", []) for g in self._inputs.get(model, {}).get("grids", [])
            )
        fitted = set(durable.read_json(step.path / "hod.json")["training"])
        found: list[_Domain] = []
        for name in inputs.get("training") or inputs.get("catalogs", []):
            catalog = open_catalog(self._run_steps[name].path / "catalog.zarr")
            found += [
                domain
                for box in fitted & set(catalog.names())
                for domain, store in self._stores.items()
                if box in store and store[box].attrs.redshift == catalog.attrs(box).redshift
            ]
        return tuple(dict.fromkeys(domain for domain in self._stores if domain in found))

    def _described(self, tested: Iterable[_Domain]) -> str:
        """What the domains are."""
        texts = []
        for name in tested:
            attrs = [self._stores[name][box].attrs for box in self._stores[name]]
            suites = " and ".join(dict.fromkeys(f"{one.suite} {one.set}".strip() for one in attrs))
            redshifts = " and ".join(dict.fromkeys(f"{one.redshift:.2g}" for one in attrs))
            step = self._steps[name]
            ranges = [
                (f", {low:g} ≤ " if low is not None else ", ")
                + parameter
                + (f" < {high:g}" if high is not None else "")
                for parameter, (low, high) in (step.config.get("where") or {}).items()
            ]
            texts.append(f"{name}: {suites}, z = {redshifts}{''.join(ranges)}")
        return "; ".join(texts)


def balance(cells: Confusion) -> float:
    """Fraction of voxels that hold galaxies."""
    return (cells.true_positives + cells.false_negatives) / max(cells.total, 1)


def false_positive_rate(cells: Confusion) -> float:
    """Fraction of the voxels without galaxies that are taken to hold some."""
    return cells.false_positives / max(cells.false_positives + cells.true_negatives, 1)


def implied_balance(accuracy: float, recall: float, precision: float) -> float:
    """Fraction of voxels with galaxies that the three ratios of a confusion imply.

    Of all voxels, b (1 - R) are missed and b R (1 - P) / P falsely called: together they are 1 - accuracy.
    """
    return (1 - accuracy) / (1 - recall + recall * (1 - precision) / precision)


def _classification(
    predictions: Sequence[Prediction],
    confusions: Mapping[tuple[str, _Domain], Confusion],
    published: Published | None,
) -> Table:
    def cells(
        accuracy: float, recall: float, precision: float, share: float, false: float
    ) -> tuple[Cell, ...]:
        values = (accuracy, 1 - share, recall, precision, share, false)
        return tuple(Cell(f"{100 * value:.4g}") for value in values)

    models = {prediction.step.name: prediction for prediction in predictions}
    rows = [
        Row(
            step,
            cells(found.accuracy, found.recall, found.precision, balance(found), false_positive_rate(found)),
            domain,
        )
        for (step, domain), found in sorted(
            confusions.items(), key=lambda item: list(models).index(item[0][0])
        )
    ]
    foot = []
    for label in dict.fromkeys(
        label for label, metric, _ in (published.scores if published else {}) if metric == "recall"
    ):
        assert published is not None
        ratios = [published.of(label, metric, "voxels") for metric in _CELLS]
        if None in ratios:
            continue
        accuracy, recall, precision = (float(value or 0) for value in ratios)
        share = implied_balance(accuracy, recall, precision)
        false = (1 - accuracy - share * (1 - recall)) / (1 - share)
        foot.append(Row(label, cells(accuracy, recall, precision, share, false), "published"))
    caption = (
        "Voxels that hold galaxies, in percent: as a classifier's threshold calls them, or, of draws and "
        "halo occupations, where they put any. Where few voxels hold galaxies the accuracy is high "
        "whatever is predicted, as that of none shows, and the precision is low: figures of unlike shares "
        "of voxels with galaxies compare by recall and false positives alone."
    )
    if foot and published:
        caption += (
            f" Published: {published.citation}; the share of voxels with galaxies is what their three "
            f"figures imply. {published.remarks.get('voxels', '')}"
        )
    return Table(
        "voxels",
        "Voxels with galaxies",
        caption.rstrip(),
        ("prediction", "accuracy", "of none", "recall", "precision", "with galaxies", "false positives"),
        tuple(rows),
        tuple(foot),
    )


def _transfer(
    predictions: Sequence[Prediction],
    confusions: Mapping[tuple[str, _Domain], Confusion],
    values: Mapping[str, _Values],
    tested: Sequence[_Domain],
    domains: str,
) -> Table:
    """Every metric of every model, by where it was trained and tested."""
    pairs: dict[_Pair, None] = {}
    lines: dict[str, dict[str, dict[_Pair, Cell]]] = defaultdict(lambda: defaultdict(dict))
    alike: dict[tuple[tuple[_Domain, ...], str], list[str]] = defaultdict(list)
    for prediction in predictions:
        alike[prediction.trained, prediction.model].append(prediction.step.name)
    for (trained, model), steps in alike.items():
        for domain in tested:
            strong = domain in trained
            found: dict[str, Cell] = {}
            total = sum((confusions.get((step, domain), Confusion()) for step in steps), Confusion())
            if total.total:
                shown = {name: getattr(total, name) for name in _CELLS}
                shown |= {"false positives": false_positive_rate(total), "with galaxies": balance(total)}
                found = {f"{name} [%]": Cell(f"{100 * value:.4g}", strong) for name, value in shown.items()}
            for metric in dict.fromkeys(metric for step in steps for metric, _ in values[step]):
                each = [one for step in steps for one in values[step].get((metric, domain), [])]
                if each:
                    found[metric] = Cell(_mean(each), strong)
            for metric, cell in found.items():
                pairs[trained, domain] = None
                lines[model][metric][trained, domain] = cell
    pairs = dict.fromkeys(
        sorted(pairs, key=lambda pair: list(dict.fromkeys(p[0] for p in pairs)).index(pair[0]))
    )
    groups = [
        (f"trained on {' and '.join(trained)}" if trained else "", sum(pair[0] == trained for pair in pairs))
        for trained in dict.fromkeys(pair[0] for pair in pairs)
    ]
    rows = [
        Row(model, tuple(found.get(pair, Cell()) for pair in pairs), metric)
        for model, metrics in lines.items()
        for metric, found in metrics.items()
    ]
    return Table(
        "domains",
        "Where models were trained, and elsewhere",
        "Predictions of boxes of the grids that a model was trained on (bold: boxes that it has not seen, of "
        "the same kind) and of others. Means over boxes with the error of the mean; of one box, the error "
        f"for Gaussian modes. Confusions are of all boxes together. {domains}.",
        ("model", *(domain for _, domain in pairs)),
        tuple(rows),
        groups=tuple(groups),
    )


def _mean(values: Sequence[tuple[float, float | None]]) -> str:
    if len(values) == 1:
        return measured(*values[0])
    each = np.array([value for value, _ in values])
    return measured(float(each.mean()), float(each.std(ddof=1) / np.sqrt(each.size)))


def _scale(kind: str, where: str) -> str:
    """The scale of a metric, in words."""
    if band := re.fullmatch(r"k(.+)-(.+)", where):
        return f"k = {band[1]} to {band[2]} h/Mpc"
    return f"cubes of {where} Mpc/h" if kind == "variance_ratio" else where
