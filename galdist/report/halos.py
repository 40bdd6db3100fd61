"""The report's sections on galaxies in halos: what the stages ``scores`` and ``tracers`` found.

Tables hold all labels, figures a few: those asked for, else the best ones and the published ones.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from galdist.catalogs.centrals import Centrals, read_centrals
from galdist.catalogs.samples import aligned, open_samples
from galdist.report.artist import Artist, Block, Panel
from galdist.report.published import Published
from galdist.report.tables import Cell, Row, Table, measured, save_latex
from galdist.run import Run, RunError, Step
from galdist.statistics.scores import FILE as SCORES
from galdist.statistics.scores import Comparison, GroupRow, ScoreRow, load_scores
from galdist.statistics.tracer_spectra import FILE as TRACERS
from galdist.statistics.tracer_spectra import load_tracers, over_seeds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from galdist.report.plots import Palette

Array = NDArray[np.float64]

MOST = 5
"""Models in one figure."""
_TRUTH = "truth"
_POINT = {
    **{"mse": "MSE", "mae": "MAE", "rmse": "RMSE", "r2": "R²", "mad": "MAD", "mape": "MAPE [%]"},
    "pearson": "Pearson r",
}
_COMPARED = {
    **{"ks": "KS", "ks_flat": "KS, flat", "ks_mean": "KS, mean"},
    **{"ks_peacock": "2-D KS (Peacock)", "ks_fasano_franceschini": "2-D KS (Fasano & Franceschini)"},
    **{"wasserstein": "Wasserstein", "energy_distance": "energy distance"},
    **{"crps": "CRPS", "energy_score": "energy score"},
    **{"rank_chi2": "rank χ²", "pit_ks": "PIT KS"},
    **{f"{metric}_draw": f"{words}, draws" for metric, words in _POINT.items()},
    **{metric: f"{words}, best values" for metric, words in _POINT.items()},
}
"""Metrics of the table of who is best, in its order; coverage and pinball losses have their level too."""
_ERRORS = "Errors are those of the mean over seeds, or, of a single prediction, of a bootstrap over halos."


class Scores:
    """What a step ``scores`` found, by label, metric and properties."""

    def __init__(self, step: Step) -> None:
        found = load_scores(step.path)
        self.step = step
        self.properties: tuple[str, ...] = tuple(found["scales"])
        self.n_rows: int = found["n_rows"]
        self.split: str = found["split"]
        rows: list[ScoreRow] = found["rows"]
        self._rows = {(row["label"], row["metric"], row["of"]): row for row in rows}
        self.labels = list(dict.fromkeys(row["label"] for row in rows))
        self.seeds = {row["label"]: row["seeds"] for row in rows}
        self.joints = [of for of in dict.fromkeys(row["of"] for row in rows) if "+" in of]
        self.comparisons: dict[tuple[str, str], Comparison] = {
            (one["metric"], one["of"]): one for one in found["comparisons"]
        }
        self.groups: list[GroupRow] = found["groups"]
        self.ranks = {(one["label"], one["of"]): np.array(one["counts"], float) for one in found["ranks"]}

    def row(self, label: str, metric: str, of: str) -> ScoreRow | None:
        """A line of the table; ``all`` are all properties of the catalogue, of a model that has them."""
        if of != "all":
            return self._rows.get((label, metric, of))
        if not all((label, "ks", name) in self._rows for name in self.properties):
            return None
        return self._rows.get((label, metric, "joint")) or self._rows.get((label, metric, "union"))

    def sets(self) -> list[str]:
        """Sets of several properties that are scored together; ``all`` where no configured set is that."""
        known = {frozenset(of.split("+")) for of in self.joints}
        return self.joints if frozenset(self.properties) in known else [*self.joints, "all"]

    def metrics(self, prefix: str, of: str) -> list[str]:
        """Metrics of ``of`` whose names are ``prefix`` and a number, in the order of these."""
        found = {metric for _, metric, other in self._rows if other == of and metric.startswith(prefix)}
        return sorted(found, key=lambda metric: float(metric.removeprefix(prefix)))

    def ranking(self, of: str | None = None) -> list[str]:
        """Labels, the best ones first: by the energy score of a set (the first one), or by the first CRPS."""
        of = of or next(iter(self.sets() if len(self.properties) > 1 else self.properties))
        metric = "crps" if of in self.properties else "energy_score"
        scored = {
            label: found["value"]
            for label in self.labels
            if (found := self.row(label, metric, of)) is not None
        }
        return sorted(self.labels, key=lambda label: scored.get(label, math.inf))


@dataclass(frozen=True)
class _Draws:
    """One draw and the best value of each halo, in the order of the truth's rows."""

    step: Step
    targets: tuple[str, ...]
    draw: NDArray[np.float32]
    point: NDArray[np.float32]

    def of(self, name: str, point: bool = False) -> NDArray[np.float32]:
        """(n,) values of a property."""
        return (self.point if point else self.draw)[:, self.targets.index(name)]


class HaloStudy:
    """The sections of one run: its steps ``scores`` and ``tracers``."""

    def __init__(
        self,
        run: Run,
        steps: Sequence[Step],
        shown: Sequence[str],
        published: Published | None,
        most_boxes: int,
    ) -> None:
        self.run, self.published, self.most_boxes = run, published, most_boxes
        self.scores = [Scores(step) for step in steps if step.has(SCORES)]
        self.tracers = [step for step in steps if step.has(TRACERS)]
        labels = list(dict.fromkeys(label for scores in self.scores for label in scores.labels))
        for step in self.tracers:
            for box in load_tracers(step.path)["simulations"].values():
                labels += [label for label in box["labels"] if label not in labels]
        if strangers := [label for label in shown if label not in labels]:
            raise RunError(
                f"models: there is no label {strangers[0]!r}; the run has {', '.join(labels) or 'none'}"
            )
        self.shown = list(shown) or self._choose(labels)

    def _choose(self, labels: Sequence[str]) -> list[str]:
        """The best two, the published ones, and the next best until a figure is full."""
        best = list(labels)
        if self.scores:  # the best of all properties, where it is not the best of the first set
            scores = self.scores[0]
            of_all = scores.ranking("all" if "all" in scores.sets() else None)[:1]
            best = list(dict.fromkeys([*of_all, *scores.ranking(), *labels]))
        published = [label for label in (self.published.shown if self.published else ()) if label in best]
        return list(dict.fromkeys([*best[:2], *published, *best]))[:MOST]

    @property
    def tabulated(self) -> set[str]:
        """Names of steps whose results are in the tables here."""
        return {step.name for step in (*(scores.step for scores in self.scores), *self.tracers)}

    def headlines(self) -> Iterator[dict[str, str]]:
        """What a reader looks for first: which model is the best, and how far it is from the truth."""
        for scores in self.scores:
            best = scores.ranking()[0]
            for metric, words in (("energy_score", "energy score"), ("energy_distance", "energy distance")):
                for of in scores.sets()[:1]:
                    if (row := scores.row(best, metric, of)) is not None:
                        floor = "" if row["floor"] is None else f" (noise floor {_value(row, 'floor')})"
                        yield {"label": f"{words} of {_set_name(of)}, {best}{floor}", "text": _value(row)}

    # Distributions

    def distributions(self, artist: Artist) -> list[Block | Table]:
        """Marginal and joint distributions, calibration, single values, and tables of scores."""
        blocks: list[Block | Table] = []
        for number, scores in enumerate(self.scores):
            prefix = "" if number == 0 else f"{scores.step.name}-"
            view = _Populations(self, scores)
            blocks += view.figures(artist, prefix)
            blocks += self._tables(artist, scores.step, _score_tables(scores, self.published, prefix))
        return blocks

    def _tables(self, artist: Artist, step: Step, tables: Sequence[Table]) -> Iterator[Table]:
        """Signed by the step that they are of, and saved as LaTeX."""
        for table in tables:
            signed = replace(table, caption=f"{table.caption} {artist.origin([step])}")
            save_latex(signed, artist.out)
            yield signed

    # Tracers

    def tracers_of_boxes(self, artist: Artist) -> list[Block | Table]:
        """Power spectra of the tracers, and tables of chi^2 and counts."""
        blocks: list[Block | Table] = []
        for step in self.tracers:
            found = load_tracers(step.path)
            boxes = list(found["simulations"].items())[: self.most_boxes]
            for number, (name, box) in enumerate(boxes):
                prefix = "" if number == 0 and step is self.tracers[0] else f"{step.name}-{number + 1}-"
                view = _TracerBox(self, step, name, box, tuple(found["band"]))
                blocks += view.figures(artist, prefix)
                blocks += self._tables(artist, step, view.tables(prefix))
        return blocks


class _Populations:
    """Figures of the galaxies that were scored."""

    def __init__(self, study: HaloStudy, scores: Scores) -> None:
        self.study, self.scores = study, scores
        self.labels = [label for label in study.shown if label in scores.labels]

    @cached_property
    def truth(self) -> Centrals:
        """The scored galaxies."""
        steps = _inputs(self.study.run, self.scores.step, "catalogs")
        return read_centrals([step.path for step in steps], self.scores.properties, self.scores.split)  # type: ignore[arg-type]

    @cached_property
    def draws(self) -> dict[str, _Draws]:
        """Of the first seed of each label shown."""
        found: dict[str, _Draws] = {}
        for step in _inputs(self.study.run, self.scores.step, "predictions"):
            store = open_samples(step.path / "samples.zarr")
            if store.label in self.labels and store.label not in found:
                given = aligned(store, self.truth, slice(1))
                found[store.label] = _Draws(step, store.targets, given.samples[:, 0], given.point)
        return found

    def figures(self, artist: Artist, prefix: str) -> list[Block]:
        """All of them."""
        calibration = self._calibration(artist, prefix)
        return [
            self._marginals(artist, prefix),
            *self._joints(artist, prefix),
            *([calibration] if calibration else []),
            *self._points(artist, prefix),
        ]

    def _holders(self, *names: str) -> dict[str, _Draws]:
        """Labels shown that have all these properties."""
        return {
            label: self.draws[label] for label in self.labels if set(names) <= set(self.draws[label].targets)
        }

    def _true(self, name: str) -> Array:
        return np.asarray(self.truth.columns[name], float)

    @property
    def _who(self) -> str:
        return f"{self.scores.n_rows} galaxies of the {self.scores.split} split"

    def _sources(self) -> list[Step]:
        return [self.scores.step, *(draws.step for draws in self.draws.values())]

    def _marginals(self, artist: Artist, prefix: str) -> Block:
        from galdist.report import halo_plots

        panels, beyond = [], []
        for name in self.scores.properties:
            models = {label: draws.of(name) for label, draws in self._holders(name).items()}
            kind = halo_plots.property_of(name)

            def draw(
                ax: "Axes", palette: "Palette", name: str = name, models: Mapping[str, Any] = models
            ) -> None:
                halo_plots.plot_marginal(ax, self._true(name), models, palette, halo_plots.property_of(name))

            beyond += [
                f"{100 * part:.0f}% of {kind.name}, {label}"
                for label, part in halo_plots.beyond(self._true(name), models).items()
                if part >= 0.01
            ]
            distances = ", ".join(
                f"{label} {_value(row)}" for label in models if (row := self.scores.row(label, "ks", name))
            )
            panels.append(
                Panel(
                    draw,
                    f"Distribution of {kind.name}, truth and models. KS distance from the truth: "
                    f"{distances}.",
                )
            )
        caption = (
            f"Distribution of each property of {self._who}: truth (filled), and one draw a halo of each "
            f"model{_in_units(self.scores.properties)}. Below: over the truth, to 2 at most, where there are "
            "20 true galaxies in a bin; the band is their Poisson error."
            + (f" Beside the frame: {'; '.join(beyond)}." if beyond else "")
        )
        return artist.block(
            f"{prefix}marginals", "Marginal distributions", caption, panels, self._sources(),
            size=halo_plots.TALL, columns=2, key=[_TRUTH, *self.labels],
        )  # fmt: skip

    def _joints(self, artist: Artist, prefix: str) -> Iterator[Block]:
        names = self.scores.properties
        pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
        if not pairs:
            return
        first = next((tuple(of.split("+")) for of in self.scores.joints if of.count("+") == 1), pairs[0])
        panels = [self._joint(label, first[0], first[1]) for label in self._holders(*first)]
        if panels:
            yield self._joint_block(artist, f"{prefix}joint", first[:2], panels, columns=min(len(panels), 3))
        complete = list(self._holders(*names))[:1]
        others = [pair for pair in pairs if set(pair) != set(first)]
        panels = [self._joint(label, *pair) for label in complete for pair in others]
        if others and panels:
            yield self._joint_block(artist, f"{prefix}joint-others", None, panels, columns=3)

    def _joint(self, label: str, a: str, b: str) -> Panel:
        from galdist.report import halo_plots

        draws = self.draws[label]
        names = halo_plots.property_of(a), halo_plots.property_of(b)

        def draw(ax: "Axes", palette: "Palette") -> None:
            halo_plots.plot_joint(
                ax, (self._true(a), self._true(b)), (draws.of(a), draws.of(b)), palette, label,
                (names[0].label, names[1].label),
            )  # fmt: skip

        row = self.scores.row(label, "energy_distance", f"{a}+{b}")
        said = f" Energy distance from the truth: {_value(row)}." if row else ""
        return Panel(draw, f"Joint density of {names[0].name} and {names[1].name}, truth and {label}.{said}")

    def _joint_block(
        self, artist: Artist, name: str, pair: Sequence[str] | None, panels: Sequence[Panel], columns: int
    ) -> Block:
        which = f"{_set_name('+'.join(pair))}" if pair else "the other pairs of properties"
        from galdist.report.halo_plots import FEW

        few = self.scores.n_rows < FEW
        caption = (
            f"Joint density of {which} of {self._who}. Filled: the regions that hold "
            f"{'39 and 68%' if few else '39, 68 and 95%'} of the true galaxies; lines: those of one draw "
            f"a halo of each model.{' Dots: single galaxies, gray the true ones.' if few else ''}"
        )
        title = f"Joint density of {which}"
        return artist.block(name, title, caption, panels, self._sources(), size=(2.7, 2.6), columns=columns)

    def _calibration(self, artist: Artist, prefix: str) -> Block | None:
        from galdist.report import halo_plots

        panels = []
        for plot, words in (
            (halo_plots.plot_ranks, "Rank histogram"),
            (halo_plots.plot_coverage, "Coverage of central intervals less the nominal one"),
        ):
            for name in self.scores.properties:
                counts = {
                    label: self.scores.ranks[label, name]
                    for label in self.labels
                    if (label, name) in self.scores.ranks
                }
                if counts:
                    kind = halo_plots.property_of(name)
                    draw = partial(_calibrate, plot, counts, self.scores.n_rows, kind.symbol)
                    panels.append(Panel(draw, f"{words} of {kind.name}, {', '.join(counts)}."))
        if not panels:
            return None
        caption = (
            f"Calibration on {self._who}: where the truth ranks among the draws of each model (flat where "
            "these are "
            "draws from its distribution), and how many truths lie in central intervals of the draws. Bands: "
            "scatter of a calibrated model."
        )
        columns = len(panels) // 2
        return artist.block(
            f"{prefix}calibration", "Calibration", caption, panels, [self.scores.step],
            size=halo_plots.TRACER, columns=columns, key=self.labels,
        )  # fmt: skip

    def _points(self, artist: Artist, prefix: str) -> Iterator[Block]:
        names = self.scores.properties
        blocks = [
            ("points", f"{_short_name(names[0])} of each model", [(label, names[0]) for label in self.labels])
        ]
        if len(names) > 1 and (complete := list(self._holders(*names))):
            blocks.append(
                ("points-others", f"all properties, {complete[0]}", [(complete[0], name) for name in names])
            )
        for file, words, members in blocks:
            panels = [
                self._point(label, name) for label, name in members if name in self.draws[label].targets
            ]
            if not panels:
                continue
            caption = (
                f"Best single value of each halo against the true one: {words}; {self._who}. Dashed: equal. "
                "A single value has less spread than the truth wherever the halo does not decide it."
            )
            title = f"Single values: {words}"
            yield artist.block(
                f"{prefix}{file}", title, caption, panels, self._sources(), size=(2.9, 2.6),
                columns=min(len(panels), 3 if len(panels) != 4 else 2),
            )  # fmt: skip

    def _point(self, label: str, name: str) -> Panel:
        from galdist.report import halo_plots
        from galdist.report.plots import plain

        kind = halo_plots.property_of(name)
        said = [
            words.format(row["value"])
            for metric, words in (("rmse", f"RMSE {{:#.3g}} {kind.unit}".strip()), ("r2", "R² {:.3f}"))
            if (row := self.scores.row(label, metric, name)) is not None
        ]

        def draw(ax: "Axes", palette: "Palette") -> None:
            del palette
            halo_plots.plot_points(
                ax, self._true(name), self.draws[label].of(name, point=True),
                ", ".join([plain(label), *said]).replace("R²", "$R^2$"), kind.label,
            )  # fmt: skip

        return Panel(draw, f"{kind.name}: best single value of {label} against truth. {', '.join(said)}.")


def _calibrate(
    plot: Callable[..., None],
    counts: Mapping[str, Array],
    n_rows: int,
    title: str,
    ax: "Axes",
    palette: "Palette",
) -> None:
    plot(ax, counts, n_rows, palette, title)


def _inputs(run: Run, step: Step, role: str) -> list[Step]:
    """The steps that a step read under a role."""
    declared = next(entry for entry in run.config["steps"] if entry["name"] == step.name)
    names = declared.get("inputs", {}).get(role, [])
    steps = run.steps
    return [steps[name] for name in ([names] if isinstance(names, str) else names)]


# Tables of scores


def _score_tables(scores: Scores, published: Published | None, prefix: str) -> list[Table]:
    names, sets = scores.properties, scores.sets()
    single = [(_short_name(name), "ks", name) for name in names]
    several = [(f"{_set_name(of)}, {kind}", f"ks_{kind}", of) for of in sets for kind in ("flat", "mean")]
    ks = single + several
    energy = [(_short_name(name), "energy_distance", name) for name in names]
    energy += [(_set_name(of), "energy_distance", of) for of in sets]
    plane = [(f"{_set_name(of)}, 2-D KS", "ks_peacock", of) for of in scores.joints]
    remark = f" {published.remarks['ks']}" if published and "ks" in published.remarks else ""
    cited = f" Published: {published.citation}." if published else ""
    bold = f"Bold: not above it by more than two standard deviations. {_ERRORS}"
    floor = (
        "Noise floor: mean and scatter between two true samples of as many galaxies. Between draws: what "
        f"that model would score were the truth one of its own draws, which are of the same halos. {bold}"
    )
    units = "of several properties in units of each one's standard deviation"
    tables = [
        *_best(scores, prefix),
        _table(
            scores, published, f"{prefix}ks", "Kolmogorov–Smirnov distances",
            "KS distance of one draw a halo from the truth, of each property and of several: flat, with "
            "all columns "
            f"pooled into one, and the mean over columns. {floor}{cited}{remark}",
            ks,
        ),
        _table(
            scores, published, f"{prefix}distances", "Energy and two-dimensional distances",
            f"Energy distance, {units}, and two-dimensional KS distance (Peacock 1983) of one draw a halo "
            f"from the truth. {floor}",
            energy + plane,
        ),
        _table(
            scores, published, f"{prefix}wasserstein", "Wasserstein distances",
            f"Wasserstein distance, {units} and sliced, and two-dimensional KS "
            f"distance after Fasano & Franceschini (1987) of one draw a halo from the truth. {floor}",
            [(_with_unit(name), "wasserstein", name) for name in names]
            + [(_set_name(of), "wasserstein", of) for of in sets]
            + [(f"{_set_name(of)}, 2-D KS", "ks_fasano_franceschini", of) for of in scores.joints],
            folded=True,
        ),
        _table(
            scores, None, f"{prefix}between-draws", "Distances between draws",
            "KS and energy distance between two draws of each model for the same halos, with their scatter: "
            "what the model would score were the truth one of its draws.",
            single + energy + plane, key="self_floor", folded=True,
        ),
        _table(
            scores, published, f"{prefix}proper-scores", "CRPS and energy scores",
            f"CRPS of each property{_in_units(names)}, and energy score, {units}: means over halos of all "
            f"draws, lower is better. Bold: the lowest. {_ERRORS}",
            [(_with_unit(name), "crps", name) for name in names]
            + [(_set_name(of), "energy_score", of) for of in sets],
        ),
        _group_table(scores, "range", f"{prefix}range", "Inside and outside the training range"),
        _group_table(scores, "simulation", f"{prefix}simulations", "Scores of each simulation"),
        _pinball_table(scores, f"{prefix}pinball"),
        _table(
            scores, published, f"{prefix}coverage", "Calibration",
            "Fraction of truths within central intervals of the draws. Bold: within 0.01 of the nominal "
            f"one, which stands below. {_ERRORS}",
            [
                (f"{_short_name(name)}, {metric.partition('_')[2]}", metric, name)
                for name in names
                for metric in scores.metrics("coverage_", name)
            ],
            foot="Nominal",
        ),
        _table(
            scores, published, f"{prefix}ranks", "Rank histograms and PIT",
            "χ² of the rank histogram of each property against a flat one, and KS distance of the "
            "probability integral transform (PIT) from uniform. Calibrated: mean and scatter of a "
            f"calibrated model of as many draws as the first one. {bold}",
            [
                (f"{_short_name(name)}, {words}", metric, name)
                for metric, words in (("rank_chi2", "χ²"), ("pit_ks", "PIT KS"))
                for name in names
            ],
            foot="Calibrated", folded=True,
        ),
    ]  # fmt: skip
    ofs = [*names, *sets]
    for number, of in enumerate(ofs):
        tables.append(_point_table(scores, published, f"{prefix}points-{number + 1}", of))
    return [table for table in tables if table.rows and len(table.columns) > 1]


def _best(scores: Scores, prefix: str) -> list[Table]:
    """Who is best at each metric: of the first set of properties; folded, of each property and other sets."""
    sets = scores.sets() if len(scores.properties) > 1 else []
    caption = (
        "The best model of each metric, and those that are as good: worse by two standard deviations of "
        "the difference at most. All others are worse by more; next: the best of them, and by how much. "
        "Errors of differences are of both means over seeds and of a bootstrap over halos, the same ones "
        "for both models; of single predictions of the bootstrap alone. Noise floor: mean and scatter "
        "between two true samples of as many galaxies, or of a calibrated model. Errors of "
        "draws are least where they have no scatter: they say nothing of distributions."
    )
    columns = ("best", "value", "noise floor", "as good", "next", "worse by")
    tables = []
    for name, words, ofs in (
        ("best", f": {_set_name(sets[0])}" if sets else "", sets[:1]),
        ("best-others", " of other properties" if sets else "", [*scores.properties, *sets[1:]]),
    ):
        rows = [
            _best_row(scores, metric, of, scores.comparisons[metric, of])
            for of in ofs
            for metric in _COMPARED
            if (metric, of) in scores.comparisons
        ]
        if name == "best":  # all of one set, which the title names
            rows = [Row(row.note, row.cells) for row in rows]
        title = f"Best models{words}"
        folded = name != "best" and bool(sets)
        heads = ("Score" if name == "best" else "Property", *columns)
        tables.append(Table(f"{prefix}{name}", title, caption, heads, tuple(rows), folded=folded))
    return tables


def _best_row(scores: Scores, metric: str, of: str, found: Comparison) -> Row:
    good = [label for label, (difference, error) in found["worse"].items() if difference <= 2 * error]
    others = {label: worse for label, worse in found["worse"].items() if label not in good}
    after = min(others, key=lambda label: others[label][0], default="")
    row = scores.row(found["best"], metric, of)
    texts = (
        found["best"], _value(row), _value(row, "floor"), ", ".join(good), after,
        measured(*others[after]) if after else "",
    )  # fmt: skip
    return Row(_set_name(of), tuple(map(Cell, texts)), _COMPARED[metric])


def _group_table(scores: Scores, kind: str, name: str, title: str) -> Table:
    """CRPS, energy scores and the coverage of the widest interval of each group of rows; a line a label."""
    names = scores.properties
    found = [row for row in scores.groups if row["kind"] == kind]
    interval = max((row["metric"] for row in found if row["metric"].startswith("coverage")), default="")
    columns = [
        *((_with_unit(of), "crps", of) for of in names),
        *((_set_name(of), "energy_score", of) for of in scores.sets()[-1:] if len(names) > 1),
        *((_short_name(of), interval, of) for of in names),
    ]
    nominal = float(interval.partition("_")[2] or 0)
    values: dict[tuple[str, str], dict[tuple[str, str], GroupRow]] = {}
    for row in found:
        of = "all" if row["of"] in ("joint", "union") else row["of"]
        values.setdefault((row["group"], row["label"]), {})[row["metric"], of] = row
    rows = []
    for group in dict.fromkeys(group for group, _ in values):
        cells = {
            label: [_group_cell(scored.get((metric, of)), nominal) for _, metric, of in columns]
            for (other, label), scored in values.items()
            if other == group
        }
        for line in _strongest(cells):
            n_rows = next(iter(values[group, line.head].values()))["n_rows"]
            rows.append(Row(group, (Cell(str(n_rows)), *line.cells), line.head))
    what = {
        "range": "the halos inside and outside the range of the inputs that each model was trained on",
        "simulation": "the halos of each simulation",
    }[kind]
    caption = (
        f"CRPS{_in_units(names)}, energy score, of several properties in units of each one's standard "
        f"deviation, and coverage of the central {nominal:.0%} intervals, of {what}. Bold: the lowest, "
        f"and the coverage nearest to {nominal:g}. {_ERRORS} Neither "
        "knows of the scatter between simulations."
    )
    spans = [("", 1), ("CRPS", len(names)), ("energy score", len(columns) - 2 * len(names))]
    groups = (*(span for span in spans if span[1]), ("coverage", len(names)))
    head = "Range" if kind == "range" else "Simulation"
    heads = (head, "halos", *(column[0] for column in columns))
    return Table(name, title, caption, heads, tuple(rows), groups=groups, folded=kind == "simulation")


def _group_cell(row: GroupRow | None, nominal: float) -> tuple[str, float | None]:
    """What is shown, and what is the less the better."""
    if row is None:
        return "", None
    covers = row["metric"].startswith("coverage")
    return _value(row), abs(row["value"] - nominal) if covers else row["value"]


def _pinball_table(scores: Scores, name: str) -> Table:
    """A line for each label and property, a column for each level."""
    metrics = list(dict.fromkeys(m for of in scores.properties for m in scores.metrics("pinball_", of)))
    cells = {
        of: {
            label: [(_value(row), row["value"]) if row else ("", None) for row in found]
            for label in scores.labels
            if any(found := [scores.row(label, metric, of) for metric in metrics])
        }
        for of in scores.properties
    }
    rows = [
        Row(_with_unit(of), row.cells, row.head) for of, found in cells.items() for row in _strongest(found)
    ]
    caption = (
        "Pinball loss of the quantiles of each property at the levels above: lower is better. "
        f"Bold: the lowest of each property. {_ERRORS}"
    )
    heads = ("Property", *(metric.removeprefix("pinball_") for metric in metrics))
    return Table(name, "Pinball losses", caption, heads, tuple(rows), folded=True)


def _table(
    scores: Scores,
    published: Published | None,
    name: str,
    title: str,
    caption: str,
    columns: Sequence[tuple[str, str, str]],
    foot: str = "Noise floor",
    key: str = "value",
    folded: bool = False,
) -> Table:
    """A line for each label, a column for each (head, metric, properties), or two where figures were
    published; what is at the ``foot`` is the floor. ``key`` is what of a score is shown."""
    columns = [column for column in columns if any(scores.row(label, *column[1:]) for label in scores.labels)]
    cited = {
        column: {
            label: value
            for label in scores.labels
            if published and (value := published.of(label, *column[1:])) is not None
        }
        for column in columns
    }
    least = {
        column: min(row["value"] for label in scores.labels if (row := scores.row(label, *column[1:])))
        for column in columns
    }
    rows = []
    for label in scores.labels:
        cells = []
        for column in columns:
            if cited[column]:
                cells.append(Cell(_cited(cited[column].get(label))))
            row = scores.row(label, *column[1:])
            cells.append(
                Cell(_value(row, key), key == "value" and _good(row, least[column])) if row else Cell()
            )
        if any(cell.text for cell in cells):
            rows.append(Row(label, tuple(cells)))
    floors = [
        next((row for label in scores.labels if (row := scores.row(label, *column[1:]))), None)
        for column in columns
    ]
    below: list[Row] = []
    if key == "value" and any(row is not None and row["floor"] is not None for row in floors):
        cells = []
        for column, row in zip(columns, floors, strict=True):
            cells += [Cell()] * bool(cited[column])
            cells.append(Cell(_value(row, "floor") if row else ""))
        below = [Row(foot, tuple(cells)), *_between_draws(scores, columns, cited)]
    if any(cited.values()):
        groups = tuple((column[0], 1 + bool(cited[column])) for column in columns)
        heads = [text for column in columns for text in (["published"] * bool(cited[column]) + ["ours"])]
    else:
        groups, heads = (), [column[0] for column in columns]
    return Table(name, title, caption, ("Model", *heads), tuple(rows), tuple(below), groups, folded)


def _between_draws(
    scores: Scores,
    columns: Sequence[tuple[str, str, str]],
    cited: Mapping[tuple[str, str, str], Mapping[str, float]],
) -> tuple[Row, ...]:
    """Distances between draws of the best model that has several, in the columns of `_table`."""
    for label in scores.ranking():
        rows = [scores.row(label, *column[1:]) for column in columns]
        if any(row is not None and row["self_floor"] is not None for row in rows):
            cells: list[Cell] = []
            for column, row in zip(columns, rows, strict=True):
                cells += [Cell()] * bool(cited[column])
                cells.append(Cell(_value(row, "self_floor")))
            return (Row(f"Between draws, {label}", tuple(cells)),)
    return ()


def _good(row: ScoreRow, least: float) -> bool:
    """Whether a number stands out: at its noise floor, near its nominal value, or the lowest."""
    if row["floor"] is None:
        return row["value"] <= least
    if row["metric"].startswith("coverage"):
        return abs(row["value"] - row["floor"]) <= 0.01
    spread = math.hypot(row["floor_error"] or 0, row["error"] or 0)
    return row["value"] - row["floor"] <= 2 * spread


def _point_table(scores: Scores, published: Published | None, name: str, of: str) -> Table:
    """For each label the published figures, those of draws, and those of the best values."""
    rows = []
    cited = False
    for label in scores.labels:
        if scores.row(label, "mse", of) is None:
            continue
        values = [published.of(label, metric, of) if published else None for metric in _POINT]
        if any(value is not None for value in values):
            cited = True
            cells = [Cell(_cited(value)) for value in values]
            rows.append(Row(label, tuple(cells), "published"))
        for suffix, words in (("_draw", "ours, draws"), ("", "ours, best values")):
            found = [scores.row(label, f"{metric}{suffix}", of) for metric in _POINT]
            rows.append(Row(label, tuple(Cell(_value(row) if row else "") for row in found), words))
    several = of == "all" or "+" in of
    unit = "" if several else _unit(of)
    about = (
        ", means over the properties"
        if several
        else f" (MSE in {unit}², MAE, RMSE and MAD in {unit})" * bool(unit)
    )
    caption = (
        f"Errors of single values of {_set_name(of)}{about}: "
        "of one draw a halo, as a survey sees galaxies, and of the best value of each halo. Even a "
        "perfect model's "
        f"draws have twice the mean squared error of its means. {_ERRORS}"
    )
    if cited and published:
        caption += f" Published: {published.citation}. {published.remarks.get('point', '')}"
    title = f"Errors of single values: {_set_name(of)}"
    return Table(name, title, caption.strip(), ("Model", *_POINT.values()), tuple(rows), folded=not cited)


def _value(row: Mapping[str, Any] | None, key: str = "value") -> str:
    """A score with its error, or one of its floors with its scatter."""
    if row is None or row[key] is None:
        return ""
    if key == "floor":
        if row["metric"].startswith("coverage"):
            return f"{row['floor']:.3f}"
        return measured(row["floor"], row["floor_error"])
    if key == "self_floor":
        return measured(row["self_floor"], row["self_floor_error"])
    return measured(row["value"], row["bootstrap"] if row["error"] is None else row["error"])


def _cited(value: float | None) -> str:
    """A published figure."""
    return "" if value is None else f"{value:g}"


def _short_name(name: str) -> str:
    from galdist.report.halo_plots import property_of

    return property_of(name).name


def _unit(name: str) -> str:
    from galdist.report.halo_plots import property_of

    return property_of(name).unit


def _with_unit(name: str) -> str:
    unit = _unit(name)
    return f"{_short_name(name)} [{unit}]" if unit else _short_name(name)


def _in_units(names: Sequence[str]) -> str:
    """What a caption says of the units of properties."""
    from galdist.report.halo_plots import property_of

    found = [kind.measured_in for name in names if (kind := property_of(name)).measured_in]
    return f" ({', '.join(found)})" if found else ""


def _set_name(of: str) -> str:
    return "all properties" if of == "all" else " and ".join(map(_short_name, of.split("+")))


# Tracers


class _TracerBox:
    """Figures and tables of the tracers of one simulation."""

    def __init__(
        self, study: HaloStudy, step: Step, name: str, box: Mapping[str, Any], band: tuple[float, float]
    ) -> None:
        self.study, self.step, self.name, self.box, self.band = study, step, name, box, band
        self.labels = [label for label in study.shown if label in box["labels"]]
        self.numbers = [number for number, entry in box["tracers"].items() if entry["truth"]["n"]]

    @property
    def _where(self) -> str:
        box = self.box
        return f"{self.name} ({box['n_halos']} halos of the {box['split']} split, {box['box_size']:g} Mpc/h)"

    @property
    def _band(self) -> str:
        return f"{self.band[0]:g} to {self.band[1]:g} h/Mpc"

    def _title(self, number: str) -> str:
        return f"{number}: {_selection(self.box['tracers'][number]['selection'])}"

    def _head(self, number: str) -> str:
        """The same above a panel: four of them are as wide as a page."""
        head = self._title(number).replace(", ", ",\n")
        return head.replace("log₁₀ M∗", r"$\log_{10} M_\star$").replace("g–i", "$g - i$")

    def figures(self, artist: Artist, prefix: str) -> list[Block]:
        """All of them."""
        from galdist.report import halo_plots

        ratios = [
            found["mean_ratio"]
            for entry in self.box["tracers"].values()
            if (found := entry["truth"].get("jackknife")) and found["mean_ratio"] is not None
        ]
        checked = (
            f" The jackknife's errors are {min(ratios):.2f} to {max(ratios):.2f} of these in the band."
            if ratios
            else ""
        )
        marks = f"Dotted: the band {self._band}."
        noisy = "Curves that leave the frame are cut off"
        blocks = [
            self._by_tracer(
                artist, f"{prefix}tracers", "Power spectra", self._power, halo_plots.TALL_TRACER,
                f"Power spectra of the seven tracers of {self._where}, shot noise removed: truth, and the "
                "mean over seeds of each model's draws; bins where it is not positive are left out. Below: "
                "relative error. "
                f"Bands: one standard deviation of the truth.{checked} {marks} {noisy} there.",
            ),
            self._by_tracer(
                artist, f"{prefix}tracer-residuals", "Residuals", self._residual, halo_plots.TRACER,
                f"Squared residuals of the power of each tracer of {self._where} over its variance, mean "
                "over draws. "
                "Truth and models have the same halos, so that most of the variance is common to both. "
                f"{marks} {noisy} at 0.01 and 200.",
            ),
        ]  # fmt: skip
        if self.box.get("with_truth"):
            blocks.append(
                self._by_tracer(
                    artist, f"{prefix}tracer-correlation", "Correlation with the truth",
                    self._correlation, halo_plots.TRACER,
                    f"Correlation r(k) of each predicted tracer with the true one, {self._where}, shot "
                    "noise removed. "
                    f"It is 1 where predicted and true tracers lie in the same structures. {marks} {noisy}.",
                )
            )  # fmt: skip
        if self.box.get("cross"):
            panels = [self._cross(label) for label in (_TRUTH, *self.labels) if label in self.box["cross"]]
            blocks.append(
                artist.block(
                    f"{prefix}tracer-cross", "Correlation between tracers",
                    f"Correlation r between tracers of {self._where}, mean over {self._band}: the "
                    "truth's, and the "
                    "difference of each model's from it.",
                    panels, [self.step], size=(2.9, 2.9),
                )
            )  # fmt: skip
        panels = [self._confusion(label) for label in self.labels if label in self.box["confusion"]]
        if panels:
            blocks.append(
                artist.block(
                    f"{prefix}tracer-confusion", "Confusion of tracers",
                    "Fraction of the galaxies of each true tracer (row) that one draw puts in each "
                    f"(column), {self._where}; "
                    "0 is none. A perfect model's draws are no identity: the halo does not decide the "
                    "galaxy.",
                    panels, [self.step], size=(2.9, 2.9),
                )
            )  # fmt: skip
        return blocks

    def _by_tracer(
        self,
        artist: Artist,
        name: str,
        title: str,
        panel: Callable[[str], Panel],
        size: tuple[float, float],
        caption: str,
    ) -> Block:
        key = [_TRUTH, *self.labels] if name.endswith("tracers") else self.labels
        panels = [panel(number) for number in self.numbers]
        return artist.block(name, title, caption, panels, [self.step], size=size, columns=4, key=key)

    def _each(self, label: str, key: str) -> Iterator[Any]:
        """What a label has of each tracer."""
        return (self.box["tracers"][number]["labels"][label][key] for number in self.numbers)

    def _of(self, number: str, key: str) -> dict[str, Array]:
        entry = self.box["tracers"][number]["labels"]
        return {label: entry[label][key] for label in self.labels}

    def _power(self, number: str) -> Panel:
        from galdist.report import halo_plots, plots

        truth = self.box["tracers"][number]["truth"]

        def draw(ax: "Axes", palette: "Palette") -> None:
            halo_plots.plot_tracer_power(
                ax, self.box["k"], plots.Curve(truth["power"], truth["error"]), self._of(number, "power"),
                palette, self.band, self._head(number),
            )  # fmt: skip

        return Panel(draw, f"Power spectrum of tracer {self._title(number)}. {self._said(number)}")

    def _residual(self, number: str) -> Panel:
        from galdist.report import halo_plots

        def draw(ax: "Axes", palette: "Palette") -> None:
            halo_plots.plot_residual(
                ax, self.box["k"], self._of(number, "residual"), palette, self.band, self._head(number)
            )

        return Panel(draw, f"Squared residuals of tracer {self._title(number)}. {self._said(number)}")

    def _said(self, number: str) -> str:
        entry = self.box["tracers"][number]["labels"]
        found = ", ".join(f"{label} {_chi2(entry[label]['chi2_band'])}" for label in self.labels)
        return f"chi² over {self._band}: {found}."

    def _correlation(self, number: str) -> Panel:
        from galdist.report import halo_plots

        found = {
            label: self.box["with_truth"][label][number]["r"]
            for label in self.labels
            if number in self.box["with_truth"][label]
        }

        def draw(ax: "Axes", palette: "Palette") -> None:
            halo_plots.plot_stochasticity(ax, self.box["k"], found, palette, self.band, self._head(number))

        return Panel(draw, f"Correlation of predicted and true galaxies of tracer {self._title(number)}.")

    def _cross(self, label: str) -> Panel:
        from galdist.report import halo_plots

        values = self._matrix(label)
        kind = "correlation"
        if label != _TRUTH:
            values, kind = values - self._matrix(_TRUTH), "difference"
        title = _TRUTH if label == _TRUTH else f"{label} – truth"

        def draw(ax: "Axes", palette: "Palette") -> None:
            del palette
            halo_plots.plot_matrix(ax, values, self.numbers, title, kind, ("tracer", "tracer"))

        reach = np.nanmax(np.abs(values), initial=0) if np.isfinite(values).any() else math.nan
        return Panel(draw, f"Correlation between tracers, {title}; the largest is {reach:.2f}.")

    def _matrix(self, label: str) -> Array:
        """Mean r of each pair of tracers, the lower triangle."""
        values = np.full((len(self.numbers),) * 2, np.nan)
        for pair, found in self.box["cross"][label].items():
            a, _, b = pair.partition("x")
            # A model can have tracers that the truth has not.
            if {a, b} <= set(self.numbers) and found["r_mean"] is not None:
                values[self.numbers.index(b), self.numbers.index(a)] = found["r_mean"]
        return values

    def _confusion(self, label: str) -> Panel:
        from galdist.report import halo_plots

        values = np.asarray(self.box["confusion"][label]["rates"], float)
        names = [str(number) for number in range(len(values))]

        def draw(ax: "Axes", palette: "Palette") -> None:
            del palette
            halo_plots.plot_matrix(ax, values, names, label, "fraction", ("predicted tracer", "true tracer"))

        return Panel(draw, f"Confusion of tracers, {label}; kept by each: {np.round(np.diag(values), 2)}.")

    def tables(self, prefix: str) -> list[Table]:
        """Counts, chi^2, relative errors and correlations of each tracer and label."""
        box = self.box
        heads = tuple(f"{number}" for number in self.numbers)
        selections = "; ".join(self._title(number) for number in self.numbers)
        n_bins, n_band = len(box["k"]), int(np.sum(box["in_band"]))
        tables = [self._counts(f"{prefix}tracer-counts", selections)]
        band, every = f"over the {n_band} bins of {self._band}", f"over all {n_bins} bins"
        of_draws = "mean over draws and seeds"
        expected = "of the power that each model expects, without the scatter of its draws; mean over seeds"
        for key, name, title, what, words in (
            ("chi2_band", "chi2-band", "χ²", of_draws, band),
            ("chi2_expected_band", "chi2-expected-band", "χ² of the expected power", expected, band),
            ("chi2", "chi2-all", "χ²", of_draws, every),
        ):
            cells = {}
            for label in box["labels"]:
                each = [*self._each(label, key), self._sum(label, key)]
                cells[label] = [(_chi2(found), found["value"]) for found in each]
            if all(value is None for row in cells.values() for _, value in row):  # expected, of single draws
                continue
            tables.append(
                Table(
                    f"{prefix}tracer-{name}", f"{title} {words}",
                    f"χ² of the power of each tracer of {self._where} {words}, {what}, error of the mean "
                    "over seeds; lower is better. Bold: the lowest of each tracer. "
                    "Between draws: what that model would score were the truth one of its own draws.",
                    ("Model", *heads, "sum"),
                    _strongest(cells), self._between_draws(key),
                )
            )  # fmt: skip
        tables.append(self._relative(f"{prefix}tracer-relative", heads))
        if box.get("with_truth"):
            tables.append(
                Table(
                    f"{prefix}tracer-stochasticity", "Correlation with the truth",
                    f"Correlation r of predicted and true galaxies of each tracer of {self._where}, mean "
                    f"over {self._band}, shot noise removed; errors are those of the mean over seeds.",
                    ("Model", *heads),
                    tuple(
                        Row(label, tuple(_r_mean(found, number) for number in self.numbers))
                        for label, found in box["with_truth"].items()
                    ),
                )
            )  # fmt: skip
        return [
            *tables,
            self._kept(f"{prefix}tracer-kept"),
            *self._between_tracers(f"{prefix}tracer-between"),
        ]

    def _kept(self, name: str) -> Table:
        """The diagonals of all confusions."""
        order = [0, *map(int, self.numbers)]
        share = np.asarray(self.box["counts"][_TRUTH], float) / self.box["n_halos"]
        rows = [
            Row(label, tuple(Cell(_plain(found["rates"][i][i], 3)) for i in order))
            for label, found in self.box["confusion"].items()
        ]
        caption = (
            "Fraction of the galaxies of each true tracer that one draw of each model puts in the same one, "
            f"{self._where}, mean over draws and seeds. By chance: the tracer's share of all galaxies."
        )
        chance = Row("By chance", tuple(Cell(_plain(share[i], 3)) for i in order))
        heads = ("Model", "none", *self.numbers)
        return Table(
            name, "Galaxies kept by each tracer", caption, heads, tuple(rows), (chance,), folded=True
        )

    def _between_tracers(self, name: str) -> Iterator[Table]:
        """How far correlations between tracers are from the truth's, of all models."""
        cells = {}
        for label in self.box.get("cross", {}):
            difference = self._matrix(label) - self._matrix(_TRUTH)
            if label == _TRUTH or not np.isfinite(difference).any():
                continue
            rms, largest = np.sqrt(np.nanmean(difference**2)), np.nanmax(np.abs(difference))
            row, column = np.argwhere(np.abs(difference) == largest)[0]
            cells[label] = [(_plain(value, 3), value) for value in (rms, largest)]
            cells[label].append((f"{self.numbers[column]} and {self.numbers[row]}", None))
        if cells:
            yield Table(
                name, "Correlations between tracers",
                f"Correlation r between tracers of {self._where}, mean over {self._band}: root mean "
                "square over pairs of tracers, and largest, of the differences from the truth. Bold: the "
                "lowest.",
                ("Model", "rms", "largest", "between"), _strongest(cells), folded=True,
            )  # fmt: skip

    def _sum(self, label: str, key: str) -> Mapping[str, float | None]:
        """χ² of all tracers together."""
        return over_seeds(np.sum([found["seeds"] for found in self._each(label, key)], axis=0, dtype=float))

    def _between_draws(self, key: str) -> tuple[Row, ...]:
        """χ² between draws of the first model shown that has several."""
        for label in self.labels:
            floors = [found["self_floor"] for found in self._each(label, key)]
            if any(floor is not None and math.isfinite(floor) for floor in floors):
                total = float(np.sum(floors, dtype=float))  # NaN where one is not known
                cells = tuple(Cell(_plain(floor, 1)) for floor in (*floors, total))
                return (Row(f"Between draws, {label}", cells),)
        return ()

    def _counts(self, name: str, selections: str) -> Table:
        counts, published = self.box["counts"], self.study.published
        order = [0, *map(int, self.numbers)]
        heads = ("none", *self.numbers)
        rows = [Row(_TRUTH, tuple(_count(counts[_TRUTH][i]) for i in order), "")]
        caption = f"Galaxies of each tracer of {self._where}; {selections}."
        if published and published.tracers:
            numbers = [published.tracers[int(number) - 1] for number in self.numbers]
            rows.append(Row("published truth", (Cell(), *map(_count, numbers))))
            caption += f" Published: {published.citation}; its split is another one."
        rows += [Row(label, tuple(_count(counts[label][i]) for i in order)) for label in self.box["labels"]]
        return Table(name, "Galaxies of each tracer", caption, ("Model", *heads), tuple(rows))

    def _relative(self, name: str, heads: tuple[str, ...]) -> Table:
        band = np.asarray(self.box["in_band"], bool)
        cells = {}
        for label in self.box["labels"]:
            values = []
            for number in self.numbers:
                found = np.asarray(self.box["tracers"][number]["labels"][label]["relative_error"], float)[
                    band
                ]
                mean = 100 * float(np.nanmean(np.abs(found))) if np.isfinite(found).any() else math.nan
                values.append((_plain(mean, 2), mean))
            cells[label] = values
        return Table(
            name, "Relative errors",
            f"Mean absolute relative error [%] of the power of each tracer of {self._where} over "
            f"{self._band}, of "
            "the mean over draws and seeds. Bold: the lowest of each tracer.",
            ("Model", *heads), _strongest(cells),
        )  # fmt: skip


def _strongest(cells: Mapping[str, Sequence[tuple[str, float | None]]]) -> tuple[Row, ...]:
    """Rows of (text, value), the lowest value of each column strong."""
    columns = zip(*cells.values(), strict=True)
    least = [
        min((value for _, value in column if value is not None and math.isfinite(value)), default=None)
        for column in columns
    ]
    return tuple(
        Row(
            label,
            tuple(
                Cell(text, value is not None and value == best)
                for (text, value), best in zip(row, least, strict=True)
            ),
        )
        for label, row in cells.items()
    )


def _chi2(found: Mapping[str, Any]) -> str:
    value = found["value"]
    return "" if value is None or not math.isfinite(value) else measured(value, found["error"])


def _plain(value: float | None, digits: int) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def _r_mean(found: Mapping[str, Any], number: str) -> Cell:
    known = found.get(number)
    return Cell(
        "" if known is None or known["r_mean"] is None else measured(known["r_mean"], known["r_mean_error"])
    )


def _count(number: float) -> Cell:
    return Cell(f"{number:.0f}")


def _selection(words: str) -> str:
    """Of the stage, for people."""
    return words.replace("log M*", "log₁₀ M∗").replace("g-i", "g–i").replace("<=", "≤")
