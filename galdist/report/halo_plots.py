"""Figures of galaxies in halos: arrays in, matplotlib Axes out, in the style of `galdist.report.plots`.

They have no legends of their own: what is drawn in one is drawn in many, and `plots.figure_key` is for all.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import gaussian_filter

from galdist.report.plots import INK, K_LABEL, MATTER, MUTED, Curve, Palette, decimal_ticks, plain

TRUTH = "truth"
TALL = (3.4, 3.7)
"""Size of a panel with another one below it [inches]."""
TRACER, TALL_TRACER = (2.4, 2.6), (2.4, 3.5)
"""Of panels of which four side by side fill a page, without and with another one below."""

Array = NDArray[np.float64]

_BINS = 50
_RANKS = 20  # bars of a rank histogram
_MASSES = (0.39, 0.68, 0.95)
"""Of the galaxies within the contours."""


class Property(NamedTuple):
    """What an axis is of."""

    name: str
    """In words, for people and short heads: ``log M∗``."""
    label: str
    """Of an axis, with units."""


PROPERTIES = {
    "log_stellar_mass": Property("log M∗", r"$\log_{10}\,(M_\star\,/\,h^{-1}\mathrm{M}_\odot)$"),
    "color_gi": Property("g–i", r"$g - i$  [mag]"),
    "log_ssfr": Property("log sSFR", r"$\log_{10}\,(\mathrm{sSFR}\,/\,h\,\mathrm{yr}^{-1})$"),
    "log_radius": Property("log R", r"$\log_{10}\,(R_\star\,/\,h^{-1}\mathrm{kpc})$"),
}


def property_of(name: str) -> Property:
    """How a column is called; those without a name of their own by their column's."""
    words = name.replace("_", " ")
    return PROPERTIES.get(name, Property(words, plain(words)))


def plot_marginal(
    ax: Axes, truth: ArrayLike, models: Mapping[str, ArrayLike], palette: Palette, label: str
) -> None:
    """Distributions of one property, of truth (filled) and models, and below it their ratio to the truth's.

    The gray band is the Poisson error of the truth's bins. Densities that span much are on a log scale.

    Parameters
    ----------
    truth, models : (n,) values.
    label
        of the horizontal axis.
    """
    truth = np.asarray(truth, float)
    edges = _edges(truth, [np.asarray(values, float) for values in models.values()])
    number = np.histogram(truth, edges)[0]
    scale = 1 / (len(truth) * np.diff(edges))
    density = number * scale
    ax.stairs(density, edges, fill=True, color=MATTER, alpha=0.28, linewidth=0)
    ax.stairs(density, edges, color=INK, linewidth=1.3)
    below = _below(ax, label, "model / truth")
    relative = 1 / np.sqrt(np.maximum(number, 1))
    known = number >= _FEWEST
    below.fill_between(
        edges, _steps(np.where(known, 1 - relative, np.nan)), _steps(np.where(known, 1 + relative, np.nan)),
        step="post", color=MATTER, alpha=0.35, linewidth=0,
    )  # fmt: skip
    below.axhline(1, color=INK, linewidth=0.8)
    for name, values in models.items():
        look = palette[name]
        found = np.histogram(np.asarray(values, float), edges)[0] / (len(np.asarray(values)) * np.diff(edges))
        ax.stairs(found, edges, baseline=None, color=look.color, linestyle=look.line, linewidth=1.2)
        ratio = np.divide(found, density, where=known, out=np.full(len(found), np.nan))
        below.stairs(ratio, edges, baseline=None, color=look.color, linestyle=look.line, linewidth=1.1)
    below.set(ylim=(0.45, 1.55), yticks=(0.6, 1.0, 1.4))  # none at the ends, beside those of the other panel
    ax.set(ylabel="probability density", xlim=(edges[0], edges[-1]))
    below.set_xlim(edges[0], edges[-1])
    shown = density[number >= _FEWEST]
    if shown.size and shown.max() > 100 * shown.min():
        ax.set_yscale("log")
        ax.set_ylim(0.5 * shown.min(), 2.5 * density.max())
    else:
        ax.set_ylim(0, 1.15 * density.max())


_FEWEST = 20  # galaxies of a bin whose ratio is drawn: of fewer the error is larger than the panel


def plot_joint(
    ax: Axes,
    truth: tuple[ArrayLike, ArrayLike],
    model: tuple[ArrayLike, ArrayLike],
    palette: Palette,
    name: str,
    labels: tuple[str, str],
) -> None:
    """Joint density of two properties: regions that hold 39, 68 and 95% of the true galaxies, filled, and
    lines around as many of the model's.

    Parameters
    ----------
    truth, model : two arrays (n,) each.
    labels
        of the axes.
    """
    edges = [_wider(_edges(np.asarray(axis, float), [])) for axis in truth]
    centers = [0.5 * (one[1:] + one[:-1]) for one in edges]
    true = _smooth(truth, edges)
    drawn = _smooth(model, edges)
    top = true.max() * 2
    for level, shade in zip(reversed(_levels(true)), (0.22, 0.32, 0.45), strict=True):
        ax.contourf(*centers, true.T, levels=[level, top], colors=[MATTER], alpha=shade)
    look = palette[name]
    widths = (0.9, 1.2, 1.5)
    if drawn.any():  # a model that has gone wrong may draw nothing near the truth
        levels = np.unique(_levels(drawn))
        ax.contour(*centers, drawn.T, levels=levels, colors=[look.color], linewidths=widths)
    ax.set(
        title=plain(look.name), xlabel=labels[0], ylabel=labels[1],
        xlim=(edges[0][0], edges[0][-1]), ylim=(edges[1][0], edges[1][-1]),
    )  # fmt: skip
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10)))


def plot_ranks(ax: Axes, counts: Mapping[str, ArrayLike], n_rows: int, palette: Palette, title: str) -> None:
    """Rank histograms: how often the truth has each rank among the draws, over what a calibrated model has.

    Parameters
    ----------
    counts
        (draws + 1,) number of truths of each rank.
    n_rows
        truths in all; the gray band is the scatter of a calibrated model.
    """
    n_groups = min(_RANKS, *(len(np.asarray(values)) for values in counts.values()))
    for name, values in counts.items():
        found = np.asarray(values, float)
        groups = np.array_split(found, n_groups)
        edges = np.append(0, np.cumsum([len(group) for group in groups])) / len(found)
        height = np.array([group.mean() for group in groups]) * len(found) / found.sum()
        look = palette[name]
        ax.stairs(height, edges, baseline=None, color=look.color, linestyle=look.line, linewidth=1.3)
    scatter = np.sqrt(n_groups / n_rows)
    ax.axhspan(1 - scatter, 1 + scatter, color=MATTER, alpha=0.35, linewidth=0)
    ax.axhline(1, color=INK, linewidth=0.8)
    low, high = np.clip(ax.get_ylim(), 0.5, 1.6)  # what is worse need not be seen in full
    ax.set(
        title=title, xlabel="rank of the truth among the draws", ylabel="frequency over uniform",
        xlim=(0, 1), ylim=(min(low, 0.8), max(high, 1.2)),
    )  # fmt: skip


def plot_coverage(
    ax: Axes, counts: Mapping[str, ArrayLike], n_rows: int, palette: Palette, title: str
) -> None:
    """How many truths lie in central intervals of the draws, less how many should; parameters as in
    `plot_ranks`."""
    nominal = np.linspace(0, 1, 101)
    scatter = 100 * np.sqrt(nominal * (1 - nominal) / n_rows)
    ax.fill_between(100 * nominal, -scatter, scatter, color=MATTER, alpha=0.35, linewidth=0)
    ax.axhline(0, color=INK, linewidth=0.8)
    for name, values in counts.items():
        level, covered = _coverage(np.asarray(values, float))
        look = palette[name]
        ax.plot(100 * level, 100 * (covered - level), color=look.color, linestyle=look.line, linewidth=1.3)
    low, high = np.clip(ax.get_ylim(), -8, 8)
    ax.set(
        title=title, xlabel="nominal coverage [%]", ylabel="coverage – nominal [%]",
        xlim=(0, 100), ylim=(min(low, -2), max(high, 2)),
    )  # fmt: skip


def plot_points(ax: Axes, truth: ArrayLike, predicted: ArrayLike, title: str, label: str) -> None:
    """Best single values against true ones, as numbers of galaxies on a log scale; dashed: equal."""
    truth, predicted = np.asarray(truth, float), np.asarray(predicted, float)
    low, high = _edges(truth, [])[[0, -1]]
    number = np.histogram2d(truth, predicted, bins=90, range=[[low, high]] * 2)[0]
    shown = ax.imshow(
        np.where(number > 0, number, np.nan).T,
        origin="lower", extent=(low, high, low, high), aspect="auto", interpolation="none",
        norm=LogNorm(1, max(number.max(), 10)), cmap=mpl.colormaps["viridis"],
    )  # fmt: skip
    ax.axline((low, low), slope=1, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
    ax.set_title(plain(title), fontsize=9)
    ax.set(xlabel=f"true {label}", ylabel=f"predicted {label}")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10)))
    bar = ax.figure.colorbar(shown, ax=ax, label="galaxies", pad=0.02, aspect=28)
    bar.outline.set_linewidth(0.5)


def plot_tracer_power(
    ax: Axes,
    k: ArrayLike,
    truth: Curve,
    models: Mapping[str, ArrayLike],
    palette: Palette,
    band: tuple[float, float],
    title: str,
) -> None:
    """Power spectrum of a tracer [(Mpc/h)^3], shot noise removed, and below it models over truth, less one.

    The gray band is one standard deviation of the truth; the dotted lines are the ends of ``band`` [h/Mpc].
    Bins whose power is not positive are left out of the logarithmic axis.
    """
    k, value = np.asarray(k, float), np.asarray(truth.value, float)
    positive = value > 0
    lower = np.maximum(value - truth.error, 0.02 * np.abs(value))
    ax.fill_between(
        k, np.where(positive, lower, np.nan), np.where(positive, value + truth.error, np.nan),
        color=MATTER, alpha=0.35, linewidth=0,
    )  # fmt: skip
    ax.plot(k, np.where(positive, value, np.nan), color=INK, linewidth=1.2)
    below = _below(ax, K_LABEL, r"$\Delta P / P_\mathrm{truth}$")
    relative = np.where(positive, truth.error / np.where(positive, value, 1), np.nan)
    below.fill_between(k, -relative, relative, color=MATTER, alpha=0.35, linewidth=0)
    below.axhline(0, color=INK, linewidth=0.8)
    for name, power in models.items():
        look = palette[name]
        power = np.asarray(power, float)
        drawn: dict[str, Any] = {"color": look.color, "linestyle": look.line, "linewidth": 1.2}
        ax.plot(k, np.where(power > 0, power, np.nan), **drawn)
        below.plot(k, np.where(positive, power / np.where(positive, value, 1) - 1, np.nan), **drawn)
    ax.set_title(title, fontsize=9)
    ax.set(xscale="log", yscale="log", ylabel=r"$P(k)\ \ [h^{-3}\,\mathrm{Mpc}^{3}]$")
    if positive.any():
        ax.set_ylim(0.4 * value[positive].min(), 2.5 * value[positive].max())
        decimal_ticks(ax.yaxis, np.divide(*ax.get_ylim()[::-1]))
    below.set_xscale("log")
    below.set(ylim=(-0.5, 0.5), yticks=(-0.3, 0.0, 0.3))
    _wavenumbers((ax, below), k, band)


def _curves_about_one(
    ax: Axes, k: NDArray[np.float64], curves: Mapping[str, ArrayLike], palette: Palette, title: str
) -> None:
    """A curve a model, and the line at 1."""
    ax.axhline(1, color=INK, linewidth=0.8)
    for name, values in curves.items():
        look = palette[name]
        ax.plot(k, np.asarray(values, float), color=look.color, linestyle=look.line, linewidth=1.2)
    ax.set_title(title, fontsize=9)


def plot_residual(
    ax: Axes,
    k: ArrayLike,
    residuals: Mapping[str, ArrayLike],
    palette: Palette,
    band: tuple[float, float],
    title: str,
) -> None:
    """Squared residuals of a tracer's power over its variance, in each bin; the line is one sigma."""
    k = np.asarray(k, float)
    _curves_about_one(ax, k, residuals, palette, title)
    ax.set(
        xscale="log", yscale="log", xlabel=K_LABEL,
        ylabel=r"$(P - P_\mathrm{truth})^2\,/\,\sigma^2$",
    )  # fmt: skip
    low, high = ax.get_ylim()
    ax.set_ylim(max(low, 1e-2), min(max(high, 3), 200))
    _wavenumbers((ax,), k, band)


def plot_stochasticity(
    ax: Axes,
    k: ArrayLike,
    correlations: Mapping[str, ArrayLike],
    palette: Palette,
    band: tuple[float, float],
    title: str,
) -> None:
    """r(k) of each model's tracer with the true one."""
    k = np.asarray(k, float)
    _curves_about_one(ax, k, correlations, palette, title)
    ax.set(
        xscale="log", xlabel=K_LABEL, ylabel=r"$r(k)$ with truth",
        ylim=(0.55, 1.25),
    )  # fmt: skip
    _wavenumbers((ax,), k, band)


def plot_matrix(
    ax: Axes, matrix: ArrayLike, names: Sequence[str], title: str, kind: str, labels: tuple[str, str]
) -> None:
    """A small square matrix with its numbers.

    Parameters
    ----------
    matrix
        (n, n); NaN is left blank.
    kind
        ``fraction``: 0 to 1; ``correlation``: about one; ``difference``: about zero.
    labels
        of the axes, horizontal first.
    """
    values = np.asarray(matrix, float)
    norm: Normalize
    if kind == "fraction":
        norm, color_map = Normalize(0, 1), "Blues"
    elif kind == "correlation":
        norm, color_map = Normalize(0.5, 1.5), "Blues"
    else:
        norm, color_map = Normalize(-0.5, 0.5), "PuOr_r"
    shown = ax.imshow(values, norm=norm, cmap=mpl.colormaps[color_map], interpolation="none")
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            red, green, blue, _ = shown.cmap(norm(value))
            dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
            text = f"{value:.2f}".replace("-0.00", "0.00")
            text = re.sub(r"^(-?)0\.", r"\1.", text).replace("-", "−")
            ax.text(
                column, row, text, ha="center", va="center", fontsize=7,
                color="#fdfdfd" if dark else "#101010",
            )  # fmt: skip
    ax.set(title=plain(title), xlabel=labels[0], ylabel=labels[1])
    ax.set_xticks(range(len(names)), names)
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(length=0)


def _below(ax: Axes, xlabel: str, ylabel: str) -> Axes:
    """Axes right below others, which they share the horizontal axis with."""
    below = ax.inset_axes((0, -0.42, 1, 0.38))
    ax.tick_params(labelbottom=False, which="both")
    below.set(xlabel=xlabel, ylabel=ylabel)
    return below


def _wavenumbers(axes: Sequence[Axes], k: Array, band: tuple[float, float]) -> None:
    for ax in axes:
        ax.set_xlim(k[0] * 0.92, k[-1] * 1.08)
        for end in band:
            ax.axvline(end, color=MUTED, linewidth=0.7, linestyle=(0, (1, 2)))
        decimal_ticks(ax.xaxis, k[-1] / k[0])


def _edges(truth: Array, others: Sequence[Array]) -> Array:
    """Bins over nearly all true values, and nearly all of the others unless these lie far off."""
    low, high = np.quantile(truth, (0.0005, 0.9995))
    width = high - low
    for values in others:
        ends = np.quantile(values, (0.002, 0.998))
        low = max(min(low, float(ends[0])), low - 0.15 * width)
        high = min(max(high, float(ends[1])), high + 0.15 * width)
    return np.linspace(low, high, _BINS + 1)


def _wider(edges: Array) -> Array:
    """Bins of about the same width with empty ones around, so that contours close."""
    margin = 0.06 * (edges[-1] - edges[0])
    return np.linspace(edges[0] - margin, edges[-1] + margin, len(edges) + 6)


def _steps(values: Array) -> Array:
    """Heights of bins for `fill_between`, which wants one more."""
    return np.append(values, values[-1])


def _smooth(columns: tuple[ArrayLike, ArrayLike], edges: Sequence[Array]) -> Array:
    number = np.histogram2d(np.asarray(columns[0], float), np.asarray(columns[1], float), bins=list(edges))[0]
    return np.asarray(gaussian_filter(number, 1.0))


def _levels(density: Array) -> list[float]:
    """Densities above which `_MASSES` of the galaxies are, falling."""
    ordered = np.sort(density.ravel())[::-1]
    held = np.cumsum(ordered) / ordered.sum()
    return [float(ordered[min(int(np.searchsorted(held, mass)), len(ordered) - 1)]) for mass in _MASSES]


def _coverage(counts: Array) -> tuple[Array, Array]:
    """Nominal and measured coverage of the central intervals between draws, falling."""
    n = len(counts)
    outer = np.arange(1, (n + 1) // 2)  # ranks left out at either end; all of them hold everything
    covered = np.array([counts[i : n - i].sum() for i in outer]) / counts.sum()
    return (n - 2 * outer) / n, covered
