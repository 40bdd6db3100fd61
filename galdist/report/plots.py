"""Figures of a run: arrays in, matplotlib Axes out.

Truth, matter, halo occupation, every prediction and every model keep their colors, markers and line styles in
all figures.
The colors are those of Okabe & Ito (2008), which people with any color vision tell apart; line styles and
markers say the same once more, for gray prints. Legends stand outside the data. `on_dark` recolors a figure.
"""

import contextlib
import itertools
import math
import re
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogFormatterMathtext, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike, NDArray

from galdist.report.artist import SINGLE

PANEL = (3.4, 3.0)
"""Width and height of one panel [inches]: as wide as a column of a journal page."""

_KEY = 4.4  # inches, width of a legend that several panels share: a phone shows all of it

Quantity = Literal["overdensity", "counts", "probability"]

K_LABEL = r"$k\ \ [h\,\mathrm{Mpc}^{-1}]$"
LENGTH_UNIT = r"[$h^{-1}\,\mathrm{Mpc}$]"


GROUND, INK, MUTED = "#ffffff", "#111111", "#6b6b6b"
MATTER, HOD = "#9a9a9a", "#d55e00"
PREDICTIONS = ("#0072b2", "#009e73", "#cc79a7", "#b8860b")
OCCUPATIONS = (HOD, "#7a3300", "#e69f00")
"""Of the forms of occupation in one figure: dark and light beside the usual one."""
MODELS = (PREDICTIONS[0], HOD, *PREDICTIONS[1:3], "#6633cc")
"""Of models of galaxies in halos: as many as one figure can hold. The last is none of Okabe & Ito's."""

_ON_DARK = {
    INK: "#ececec",
    MUTED: "#a0a0a0",
    MATTER: "#8a8a8a",
    HOD: "#ff9a4d",
    OCCUPATIONS[1]: "#c46a2e",
    OCCUPATIONS[2]: "#ffd27f",
    MODELS[-1]: "#8866ff",
    **dict(zip(PREDICTIONS, ("#56b4e9", "#2fc79b", "#e3a0c8", "#f0e442"), strict=True)),
}


Line = Literal["-", "--", "-.", ":"] | tuple[float, tuple[float, ...]]
"""A line style, as matplotlib has them."""
_LINES: tuple[Line, ...] = (
    "-",
    (0, (5, 1.5)),
    (0, (6, 1.5, 1.5, 1.5)),
    (0, (1.5, 1.2)),
    (0, (8, 1.5, 1.5, 1.5, 1.5, 1.5)),
)


class Look(NamedTuple):
    """How one field is drawn, everywhere."""

    name: str
    color: str
    line: Line
    marker: str


class Palette:
    """Looks of the fields of a run, by label: ``truth``, ``matter``, a prediction's step, ``step:field``.

    Parameters
    ----------
    predictions
        steps that predict, in the order of the run.
    hods
        those of them that are halo occupation models.
    models
        labels of models of galaxies in halos; their line styles differ too.
    """

    def __init__(
        self, predictions: Sequence[str] = (), hods: Sequence[str] = (), models: Sequence[str] = ()
    ) -> None:
        self._looks = {
            "truth": Look("truth", INK, "-", "o"),
            "matter": Look("matter", MATTER, "-", ""),
        }
        learned = zip(itertools.cycle(PREDICTIONS), itertools.cycle("s^Dv"), strict=False)
        occupations = zip(itertools.cycle(OCCUPATIONS), itertools.cycle("XpP"), strict=False)
        for step in predictions:
            if step in hods:
                color, marker = next(occupations)
                self._looks[step] = Look(step, color, "--", marker)
            else:
                color, marker = next(learned)
                self._looks[step] = Look(step, color, "-", marker)
        for model, color, line, marker in zip(
            models, itertools.cycle(MODELS), itertools.cycle(_LINES), itertools.cycle("s^DvP")
        ):
            self._looks[model] = Look(model, color, line, marker)

    def __getitem__(self, label: str) -> Look:
        """The look of ``label``; a further field of a step (``step:field``) has no marker."""
        if label in self._looks:
            return self._looks[label]
        step, _, field = label.partition(":")
        look = self._looks[step]
        line: Line = ":" if field.startswith("expected") else "-."
        what = field.replace("galaxy_", "").removesuffix("_counts").replace("_", " ")
        return look._replace(name=f"{step}, {what}", line=line, marker="")


class Curve(NamedTuple):
    """A measured function of k: values and one standard deviation, both (n_bins,); NaN where undefined."""

    value: NDArray[np.float64]
    error: NDArray[np.float64]
    boxes: Sequence[ArrayLike] = ()
    """Values of single boxes where ``value`` is a mean over them."""

    @property
    def thin(self) -> Sequence[ArrayLike]:
        """How these are drawn: see `galdist.report.artist.thin_lines`."""
        if len(self.boxes) <= SINGLE:
            return self.boxes
        with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # bins that no box has
            return list(np.nanquantile(np.asarray(self.boxes, float), (0.16, 0.84), axis=0))


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Matplotlib settings of every figure; make and save figures inside it."""
    settings: dict[Any, Any] = {
        "font.family": "STIXGeneral",
        "mathtext.fontset": "stix",
        "font.size": 9.5,
        "axes.titlesize": 10.5,
        "legend.fontsize": 8.5,
        "axes.linewidth": 0.7,
        "lines.linewidth": 1.4,
        "lines.markersize": 3.5,
        "xtick.direction": "in",
        "ytick.direction": "in",
        "xtick.top": True,
        "ytick.right": True,
        "legend.frameon": False,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
        "savefig.dpi": 200,
        "svg.fonttype": "path",
        "svg.hashsalt": "galdist",
        "pdf.fonttype": 42,
        "text.parse_math": True,
        **dict.fromkeys(
            ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
        ),
    }
    with mpl.rc_context(settings):
        yield


def figure(columns: int = 1, rows: int = 1, panel: tuple[float, float] = PANEL) -> tuple[Figure, list[Axes]]:
    """A figure of ``rows x columns`` panels, without any global state, and its Axes, row by row."""
    layout = ConstrainedLayoutEngine(h_pad=0.11, w_pad=0.06)
    created = Figure(figsize=(panel[0] * columns, panel[1] * rows), layout=layout)
    return created, list(created.subplots(rows, columns, squeeze=False).flat)


def settle(drawn: Figure) -> None:
    """Lay a figure out until Axes with others inset below have room for these, whose size follows theirs:
    each pass knows the sizes of the one before only."""
    engine = drawn.get_layout_engine()
    if engine is not None and any(ax.child_axes for ax in drawn.axes):
        for _ in range(3):
            engine.execute(drawn)


def on_dark(svg: str) -> str:
    """An SVG file made in this style, in the colors for dark ground. Its images stay as they are."""
    return re.sub("|".join(_ON_DARK), lambda found: _ON_DARK[found[0]], svg)


def sign(drawn: Figure, caption: str) -> None:
    """Write below the figure, small, which run made it."""
    lines = textwrap.fill(caption, int(27 * drawn.get_figwidth()))  # letters of this size in an inch
    drawn.supxlabel(plain(lines), fontsize=5.5, color=MUTED, x=0.005, ha="left")


def figure_key(drawn: Figure, palette: Palette, labels: Sequence[str]) -> None:
    """One legend above all panels of a figure."""
    columns = _columns([palette[label].name for label in labels], drawn.get_figwidth())
    drawn.legend(
        handles=_handles(palette, labels), loc="outside upper center", ncols=columns, handlelength=2.6
    )


def key_size(palette: Palette, labels: Sequence[str]) -> tuple[float, float]:
    """Width and height of `plot_key` [inches]."""
    rows = math.ceil(len(labels) / _columns([palette[label].name for label in labels], _KEY - 0.6))
    return _KEY, 0.2 + 0.18 * rows


def plot_key(ax: Axes, palette: Palette, labels: Sequence[str]) -> None:
    """A legend alone."""
    ax.set_axis_off()
    columns = _columns([palette[label].name for label in labels], _KEY - 0.6)
    ax.legend(
        handles=_handles(palette, labels), loc="center", ncols=columns, handlelength=2.6, borderaxespad=0
    )


def _handles(palette: Palette, labels: Sequence[str]) -> list[Line2D]:
    looks = [palette[label] for label in labels]
    return [Line2D([], [], color=look.color, linestyle=look.line, label=plain(look.name)) for look in looks]


def plain(text: str) -> str:
    """``text`` for matplotlib, letter by letter: dollar signs do not start a formula."""
    return text.replace("$", r"\$")


def plot_slice(
    ax: Axes,
    image: ArrayLike,
    box_size: float,
    quantity: Quantity,
    title: str = "",
    vmax: float | None = None,
    unit: str = "galaxies",
) -> None:
    """A projected slab of a box as an image with its color bar.

    Parameters
    ----------
    image : (n_y, n_x)
        ``overdensity``: density over mean density (log scale); ``counts``: sum along each column (log
        scale from 0.5, or from 0.05 for means, which are no whole numbers; below is black);
        ``probability``: the highest of each column.
    box_size
        side of the box [Mpc/h].
    vmax
        upper end of the scale, the same for all images that are to be compared; None: the image's maximum.
    unit
        what is counted.
    """
    image = np.asarray(image, float)
    vmax = float(image.max()) if vmax is None else vmax
    norm: Normalize
    if quantity == "overdensity":
        norm, color_map, label = LogNorm(0.1, max(vmax, 1.0), clip=True), "magma", r"$1 + \delta$"
    elif quantity == "counts":
        # Most columns hold none or one, a cluster holds many. None is black, one stands out against it.
        # A mean field is far below one nearly everywhere.
        floor = 0.5 if np.array_equal(image, np.rint(image)) else 0.05
        norm, color_map, label = LogNorm(floor, max(vmax, 2.0)), "viridis", f"{plain(unit)} per column"
    else:
        norm, color_map, label = Normalize(0, 1), "viridis", "highest probability in column"
    shown = ax.imshow(
        image,
        origin="lower",
        extent=(0, box_size, 0, box_size),
        norm=norm,
        cmap=mpl.colormaps[color_map].with_extremes(under="black", bad="black"),
        interpolation="none",  # vector files keep the cells themselves, sharp at any size
    )
    ax.set(title=plain(title), xlabel=f"$x$ {LENGTH_UNIT}", ylabel=f"$y$ {LENGTH_UNIT}")
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.yaxis.set_major_locator(MaxNLocator(5))
    ax.tick_params(direction="out", top=False, right=False)
    # As wide as the image, whatever room the layout gives to both.
    bar = ax.figure.colorbar(
        shown,
        cax=ax.inset_axes((0, -0.27, 1, 0.045)),
        orientation="horizontal",
        label=label,
        extend="max" if image.max() > vmax else "neither",
    )
    bar.outline.set_linewidth(0.5)
    if quantity != "probability":
        decimal_ticks(bar.ax.xaxis, float(norm.vmax or 1) / float(norm.vmin or 1))


def plot_loss(ax: Axes, epoch: ArrayLike, losses: Mapping[str, ArrayLike]) -> None:
    """Losses of each epoch, by name (``training``, ``validation``); log scale where they span much."""
    _epochs(ax, epoch, losses)
    values = np.concatenate([np.asarray(loss, float) for loss in losses.values()])
    low, high = np.nanmin(values), np.nanmax(values)
    if low > 0 and high > 6 * low:  # on less, a logarithmic axis would have too few ticks
        ax.set_yscale("log")
        decimal_ticks(ax.yaxis, high / low)
    ax.set_ylabel("loss")


def plot_scores(ax: Axes, epoch: ArrayLike, scores: Mapping[str, ArrayLike]) -> None:
    """Scores between 0 and 1 of each epoch, by name (accuracy, recall, precision, PR-AUC)."""
    _epochs(ax, epoch, scores)
    ax.set(ylabel="score on validation boxes", ylim=(-0.03, 1.03))


def plot_metric(ax: Axes, epoch: ArrayLike, metric: Mapping[str, ArrayLike]) -> None:
    """Any one number of each epoch, by name."""
    _epochs(ax, epoch, metric)
    ax.set_ylabel(plain(next(iter(metric))))


def plot_throughput(ax: Axes, epoch: ArrayLike, speed: Mapping[str, ArrayLike]) -> None:
    """Training speed of each epoch, and the fractions of the time in which it waited (right axis).

    ``speed`` holds the first before the others, each by its name.
    """
    (name, samples_per_second), *waits = speed.items()
    _epochs(ax, epoch, {name: samples_per_second})
    ax.set(ylabel="samples per second", ylim=(0, 1.15 * np.nanmax(np.asarray(samples_per_second, float))))
    wait = ax.twinx()
    ax.tick_params(right=False)
    for (name, waiting), dash in zip(waits, itertools.cycle((":", "-."))):
        wait.plot(epoch, 100 * np.asarray(waiting, float), dash, color=HOD, label=plain(name))
    wait.set(ylabel="time waiting [%]", ylim=(0, None))
    if wait.get_ylim()[1] < 10:
        wait.set_ylim(0, 10)
    handles = [*ax.lines, *wait.lines]
    _legend(ax, handles)


def mark_epoch(ax: Axes, epoch: float) -> None:
    """Mark the epoch whose weights were kept."""
    ax.axvline(epoch, color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)))


def plot_power(
    ax: Axes,
    k: ArrayLike,
    powers: Mapping[str, Curve],
    palette: Palette,
    nyquist: float,
    shot_noise: Mapping[str, ArrayLike] | None = None,
) -> None:
    """Power spectra [(Mpc/h)^3] of fields, by label, shot noise included.

    Bands are one standard deviation; thin lines are `galdist.report.artist.thin_lines`.

    Parameters
    ----------
    k : (n_bins,) mean wavenumber of each bin [h/Mpc].
    nyquist
        Nyquist wavenumber of the mesh [h/Mpc]; the axis ends there.
    shot_noise
        what shot noise adds to each bin, by label: dash-dotted.
    """
    _curves(ax, k, powers, palette, nyquist, positive=True)
    for label, noise in (shot_noise or {}).items():
        ax.plot(
            k,
            noise,
            linestyle=(0, (6, 2, 1, 2)),
            color=palette[label].color,
            linewidth=0.9,
            label=f"shot noise, {plain(palette[label].name)}",
        )
    ax.set(yscale="log", ylabel=r"$P(k)\ \ [h^{-3}\,\mathrm{Mpc}^{3}]$")
    _legend(ax)


def plot_quadrupole(
    ax: Axes, k: ArrayLike, quadrupoles: Mapping[str, Curve], palette: Palette, nyquist: float
) -> None:
    """Quadrupoles of the power in redshift space, times k; parameters as in `plot_power`."""
    k = np.asarray(k, float)
    ax.axhline(0, color=MUTED, linewidth=0.7)
    scaled = {
        label: Curve(k * c.value, k * c.error, [k * np.asarray(box, float) for box in c.boxes])
        for label, c in quadrupoles.items()
    }
    _curves(ax, k, scaled, palette, nyquist)
    ax.set(ylabel=r"$k\,P_2(k)\ \ [h^{-2}\,\mathrm{Mpc}^{2}]$")
    _legend(ax)


def plot_correlation(
    ax: Axes, k: ArrayLike, correlations: Mapping[str, Curve], palette: Palette, nyquist: float
) -> None:
    """Cross-correlation coefficients r(k) with the truth; parameters as in `plot_power`."""
    ax.axhline(1, color=MUTED, linewidth=0.7)
    _curves(ax, k, correlations, palette, nyquist)
    low = min(
        (np.nanmin(c.value - c.error) for c in correlations.values() if np.isfinite(c.value).any()), default=0
    )
    ax.set(ylabel=r"$r(k)$ with truth", ylim=(max(-1.05, min(-0.03, low - 0.05)), 1.06))
    _legend(ax)


def plot_transfer(
    ax: Axes, k: ArrayLike, transfers: Mapping[str, Curve], palette: Palette, nyquist: float
) -> None:
    """Transfer functions T(k) = sqrt(P / P_truth); parameters as in `plot_power`."""
    ax.axhline(1, color=MUTED, linewidth=0.7)
    _curves(ax, k, transfers, palette, nyquist)
    ax.set(ylabel=r"$T(k) = [P(k)\,/\,P_\mathrm{truth}(k)]^{1/2}$")
    low, high = ax.get_ylim()
    ax.set_ylim(max(0, min(low, 0.8)), max(high, 1.2))
    _legend(ax)


def plot_occupation(
    ax: Axes,
    mass: ArrayLike,
    measured: Curve,
    model: ArrayLike,
    M_min: float,
) -> None:
    """Mean number of galaxies in halos of ``mass`` [Msun/h], measured in bins and as fitted; both axes are
    logarithmic, so bins without galaxies are not seen.

    ``M_min`` [Msun/h], below which the fitted model has none, is marked.
    """
    value = np.where(measured.value > 0, measured.value, np.nan)
    below = np.minimum(measured.error, 0.9 * value)  # a bar to zero would have no end here
    ax.errorbar(
        mass,
        value,
        (below, measured.error),
        fmt="o",
        color=INK,
        elinewidth=0.8,
        label="truth, training boxes",
    )
    ax.plot(mass, np.where(np.asarray(model) > 0, model, np.nan), "--", color=HOD, label="fit")
    ax.axvline(M_min, color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)))
    ax.set(
        xscale="log",
        yscale="log",
        xlabel=r"$M\ \ [h^{-1}\,\mathrm{M}_\odot]$",
        ylabel=r"$\langle N_\mathrm{gal} \rangle$",
    )
    low, high = ax.get_ylim()
    decimal_ticks(ax.yaxis, high / low)
    _legend(ax)


def _curves(
    ax: Axes,
    k: ArrayLike,
    curves: Mapping[str, Curve],
    palette: Palette,
    nyquist: float,
    positive: bool = False,
) -> None:
    k = np.asarray(k, float)
    for label, curve in curves.items():
        look, value, error = palette[label], curve.value, curve.error
        for line in curve.thin:
            ax.plot(k, line, color=look.color, linestyle=look.line, linewidth=0.5, alpha=0.45)
        lower = np.maximum(value - error, value / 10) if positive else value - error
        ax.fill_between(k, lower, value + error, color=look.color, alpha=0.18, linewidth=0)
        ax.plot(
            k,
            value,
            color=look.color,
            linestyle=look.line,
            marker=look.marker,
            markevery=_markers(k),
            label=plain(look.name),
        )
    ax.set(xscale="log", xlabel=K_LABEL, xlim=(k[0] * 0.92, nyquist * 1.3))
    ax.axvspan(nyquist, 2 * nyquist, color=MUTED, alpha=0.12, linewidth=0)
    ax.annotate(
        r"$k_\mathrm{Nyquist}$",
        (nyquist, 1),
        (2, -9),  # below the ticks
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        rotation=90,
        va="top",
        fontsize=8,
        color=MUTED,
    )
    decimal_ticks(ax.xaxis, nyquist / k[0])


def _markers(k: NDArray[np.float64]) -> list[int]:
    """About 12 bins, evenly spread on a logarithmic axis: markers on all of them would hide the line."""
    wanted = np.geomspace(k[0], k[-1], 12)
    return sorted({int(np.abs(np.log(k / one)).argmin()) for one in wanted})


def _epochs(ax: Axes, epoch: ArrayLike, lines: Mapping[str, ArrayLike]) -> None:
    epoch = np.asarray(epoch, float)
    colors = (INK, PREDICTIONS[0], HOD, PREDICTIONS[1])
    for (name, values), color, dash in zip(
        lines.items(), itertools.cycle(colors), itertools.cycle(("-", "--", "-.", ":"))
    ):
        values = np.asarray(values, float)
        # A line of one epoch has no length: show the point.
        ax.plot(
            epoch,
            values,
            color=color,
            linestyle=dash,
            label=plain(name),
            marker="o" if epoch.size < 3 else "",
        )
    ax.set_xlabel("epoch")
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if len(lines) > 1:
        _legend(ax)


def _legend(ax: Axes, handles: Sequence[object] | None = None) -> None:
    """The legend above the Axes, where no data are, in as many columns as fit."""
    found, labels = ax.get_legend_handles_labels()
    if handles is not None:
        found = list(handles)  # type: ignore[arg-type]
        labels = [str(handle.get_label()) for handle in found]
    if not found:
        return
    ax.legend(
        found,
        labels,
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=_columns(labels, 2.9),  # a legend wider than its Axes would squeeze them
        handlelength=2.2,
        columnspacing=1.2,
        borderaxespad=0.3,
    )


def _columns(labels: Sequence[str], width: float) -> int:
    """Columns of a legend that fit into ``width`` [inches]."""
    widths = [0.06 * len(label) + 0.45 for label in labels]  # characters and handles
    return next(
        n
        for n in range(len(labels), 0, -1)
        if n == 1 or sum(max(column) for column in np.array_split(widths, n)) < width
    )


def decimal_ticks(axis: Axis, span: float) -> None:
    """Tick a logarithmic axis that spans a factor ``span`` at decimals, unless powers of ten are enough."""
    if span < 300:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axis.set_major_locator(LogLocator())
        axis.set_major_formatter(LogFormatterMathtext())
    axis.set_minor_formatter(NullFormatter())
