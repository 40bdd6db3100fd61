"""Figures of galaxies in halos: arrays in, matplotlib Axes out, in the style of `galdist.report.plots`.

They have no legends of their own: what is drawn in one is drawn in many, and `plots.figure_key` is for all.
"""

import math
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
FEW = 1000
"""Galaxies, of less than which a joint density shows each one."""
_SHARP = 100_000  # galaxies whose joint density is blurred by one bin


class Property(NamedTuple):
    """How a property of galaxies is written."""

    name: str
    """In text and heads of tables: ``log₁₀ M∗``."""
    symbol: str
    """The same as a formula of matplotlib, without units."""
    label: str
    """Of an axis, with units."""
    unit: str
    """Of differences: ``dex``, ``mag``."""
    measured_in: str
    """What captions say of its units: ``M∗ in Msun/h``."""


PROPERTIES = {
    "log_stellar_mass": Property(
        "log₁₀ M∗",
        r"$\log_{10} M_\star$",
        r"$\log_{10}\,(M_\star\,/\,h^{-1}\mathrm{M}_\odot)$",
        "dex",
        "M∗ in Msun/h",
    ),
    "color_gi": Property("g–i", "$g - i$", "$g - i$  [mag]", "mag", ""),
    "log_ssfr": Property(
        "log₁₀ sSFR",
        r"$\log_{10} \mathrm{sSFR}$",
        r"$\log_{10}\,(\mathrm{sSFR}\,/\,h\,\mathrm{yr}^{-1})$",
        "dex",
        "sSFR in h/yr",
    ),
    "log_radius": Property(
        "log₁₀ R∗",
        r"$\log_{10} R_\star$",
        r"$\log_{10}\,(R_\star\,/\,h^{-1}\mathrm{kpc})$",
        "dex",
        "R∗ in kpc/h",
    ),
    "log_metallicity": Property("log₁₀ Z∗", r"$\log_{10} Z_\star$", r"$\log_{10} Z_\star$", "dex", ""),
}


def property_of(name: str) -> Property:
    """How a column is written; those without a symbol of their own by their column's name."""
    if name in PROPERTIES:
        return PROPERTIES[name]
    words = name.removeprefix("log_").replace("_", " ")
    if words == name.replace("_", " "):
        return Property(words, plain(words), plain(words), "", "")
    symbol = rf"$\log_{{10}}$ {plain(words)}"
    return Property(f"log₁₀ {words}", symbol, symbol, "dex", "")


def plot_marginal(
    ax: Axes, truth: ArrayLike, models: Mapping[str, ArrayLike], palette: Palette, kind: Property
) -> None:
    """Distributions of one property, of truth (filled) and models, and below it their ratio to the truth's.

    The gray band is the Poisson error of the truth's bins. Densities that span much are on a log scale.

    Parameters
    ----------
    truth, models : (n,) values.
    kind
        what they are of.
    """
    truth = np.asarray(truth, float)
    edges = _bins(truth, [np.asarray(values, float) for values in models.values()])
    number = np.histogram(truth, edges)[0]
    scale = 1 / (len(truth) * np.diff(edges))
    density = number * scale
    ax.stairs(density, edges, fill=True, color=MATTER, alpha=0.28, linewidth=0)
    ax.stairs(density, edges, color=INK, linewidth=1.3)
    below = _below(ax, kind.label, "model / truth")
    relative = 1 / np.sqrt(np.maximum(number, 1))
    known = number >= _FEWEST
    relative = np.where(known, relative, np.nan)
    band: dict[str, Any] = {"fill": True, "color": MATTER, "alpha": 0.35, "linewidth": 0}
    below.stairs(1 + relative, edges, baseline=1 - relative, **band)
    below.axhline(1, color=INK, linewidth=0.8)
    top, reach = density.max(), 0.4
    for name, values in models.items():
        look = palette[name]
        found = np.histogram(np.asarray(values, float), edges)[0] / (len(np.asarray(values)) * np.diff(edges))
        ax.stairs(found, edges, baseline=None, color=look.color, linestyle=look.line, linewidth=1.2)
        ratio = np.divide(found, density, where=known, out=np.full(len(found), np.nan))
        below.stairs(ratio, edges, baseline=None, color=look.color, linestyle=look.line, linewidth=1.1)
        top = max(top, found.max())
        reach = max(reach, np.nanmax(np.abs(ratio - 1), initial=0))
    reach = min(reach, 1.0)
    below.set_ylim(1 - 1.1 * reach, 1 + 1.1 * reach)
    # None at the ends, beside those of the other panel.
    tick = 0.5 if reach > 0.6 else 0.3
    below.set_yticks((1 - tick, 1, 1 + tick))
    ax.set_ylabel("probability density" + (rf" [{kind.unit}$^{{-1}}$]" if kind.unit else ""))
    ax.set_xlim(edges[0], edges[-1])
    below.set_xlim(edges[0], edges[-1])
    shown = density[number >= _FEWEST]
    if shown.size and top > 100 * shown.min():
        ax.set_yscale("log")
        ax.set_ylim(0.5 * shown.min(), 2.5 * top)
    else:
        ax.set_ylim(0, 1.1 * top)


def beyond(truth: ArrayLike, models: Mapping[str, ArrayLike]) -> dict[str, float]:
    """Fraction of each model's values (n,) that lie beside the frame of `plot_marginal`."""
    values = {name: np.asarray(given, float) for name, given in models.items()}
    low, *_, high = _bins(np.asarray(truth, float), list(values.values()))
    return {name: float(np.mean((given < low) | (given > high))) for name, given in values.items()}


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
    lines around as many of the model's. Of less than `FEW` galaxies the 95% are left to dots, one a galaxy.

    Parameters
    ----------
    truth, model : two arrays (n,) each.
    labels
        of the axes.
    """
    # In two dimensions noise and blur are balanced where the width falls as n^(-1/6) (Scott 1992).
    width = max(1.0, (_SHARP / len(np.asarray(truth[0]))) ** (1 / 6))
    pairs = ([np.asarray(axis, float) for axis in both] for both in zip(truth, model, strict=True))
    edges = [_wider(_edges(true, [drawn]), math.ceil(3 * width)) for true, drawn in pairs]
    centers = [0.5 * (one[1:] + one[:-1]) for one in edges]
    true, drawn = _smooth(truth, edges, width), _smooth(model, edges, width)
    top = true.max() * 2
    look = palette[name]
    masses: Sequence[float] = _MASSES
    if len(np.asarray(truth[0])) < FEW:
        masses = _MASSES[:-1]
        dots: dict[str, Any] = {"linestyle": "", "marker": ".", "markersize": 2.5, "markeredgewidth": 0}
        ax.plot(*truth, color=MATTER, **dots)
        ax.plot(*model, color=look.color, alpha=0.7, **dots)
    for level, shade in zip(reversed(_levels(true, masses)), (0.22, 0.32, 0.45)[-len(masses) :], strict=True):
        ax.contourf(*centers, true.T, levels=[level, top], colors=[MATTER], alpha=shade)
    if drawn.any():  # a model that has gone wrong may draw nothing near the truth
        levels = np.unique(_levels(drawn, masses))
        widths = (0.9, 1.2, 1.5)[-len(levels) :]
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
    low, high = ax.get_ylim()
    ax.set(
        title=title, xlabel="rank of the truth / draws", ylabel="frequency / uniform",
        xlim=(0, 1), ylim=(max(0, min(low, 0.8)), max(high, 1.2)),
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
    low, high = ax.get_ylim()
    ax.set(
        title=title, xlabel="nominal coverage [%]", ylabel="coverage – nominal [%]",
        xlim=(0, 100), ylim=(min(low, -2), max(high, 2)),
    )  # fmt: skip


def plot_points(ax: Axes, truth: ArrayLike, predicted: ArrayLike, title: str, label: str) -> None:
    """Best single values against true ones, as numbers of galaxies on a log scale; dashed: equal."""
    truth, predicted = np.asarray(truth, float), np.asarray(predicted, float)
    low, high = _edges(truth, [predicted])[[0, -1]]
    number = np.histogram2d(truth, predicted, bins=90, range=[[low, high]] * 2)[0]
    shown = ax.imshow(
        np.where(number > 0, number, np.nan).T,
        origin="lower", extent=(low, high, low, high), aspect="auto", interpolation="none",
        norm=LogNorm(1, max(number.max(), 10)), cmap=mpl.colormaps["viridis"],
    )  # fmt: skip
    ax.axline((low, low), slope=1, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
    ax.set_title(title, fontsize=9)
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
    low, high = value[positive].min(initial=np.inf), value[positive].max(initial=0)
    lowest = 0.1 * low  # a power may be next to nothing after shot noise is taken away
    for name, given in models.items():
        look = palette[name]
        power = np.asarray(given, float)
        drawn: dict[str, Any] = {"color": look.color, "linestyle": look.line, "linewidth": 1.2}
        ax.plot(k, np.where(power > 0, power, np.nan), **drawn)
        below.plot(k, np.where(positive, power / np.where(positive, value, 1) - 1, np.nan), **drawn)
        low, high = min(low, power[power > 0].min(initial=low)), max(high, np.nanmax(power, initial=high))
    ax.set_title(title, fontsize=9)
    ax.set(xscale="log", yscale="log", ylabel=r"$P(k)\ \ [h^{-3}\,\mathrm{Mpc}^{3}]$")
    if positive.any():
        ax.set_ylim(0.4 * max(low, lowest), 2.5 * high)
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


def _edges(truth: Array, others: Sequence[Array], bins: int = _BINS) -> Array:
    """``bins`` over nearly all true values, and on over nearly all of the others unless these lie far off."""
    low, high = np.quantile(truth, (0.0005, 0.9995))
    width = (high - low) / bins
    ends = np.array([np.quantile(values, (0.002, 0.998)) for values in others]).reshape(-1, 2)
    reach = np.array([low - ends[:, 0].min(initial=low), ends[:, 1].max(initial=high) - high])
    before, after = np.minimum(np.ceil(reach / width), bins // 2)
    return np.asarray(low + width * np.arange(-before, bins + after + 1))


def _bins(truth: Array, others: Sequence[Array]) -> Array:
    """The same for a histogram of one property: of few galaxies fewer bins (Rice's rule)."""
    return _edges(truth, others, min(_BINS, round(2 * len(truth) ** (1 / 3))))


def _wider(edges: Array, margin: int) -> Array:
    """The same bins, and empty ones around, so that contours close."""
    width = edges[1] - edges[0]
    before, after = edges[0] - width * np.arange(margin, 0, -1), edges[-1] + width * np.arange(1, margin + 1)
    return np.concatenate([before, edges, after])


def _smooth(columns: tuple[ArrayLike, ArrayLike], edges: Sequence[Array], width: float) -> Array:
    """Number of galaxies in bins, blurred by so many bins."""
    x, y = (np.asarray(column, float) for column in columns)
    return np.asarray(gaussian_filter(np.histogram2d(x, y, bins=list(edges))[0], width))


def _levels(density: Array, masses: Sequence[float]) -> list[float]:
    """Densities above which ``masses`` of the galaxies are, falling."""
    ordered = np.sort(density.ravel())[::-1]
    held = np.cumsum(ordered) / ordered.sum()
    return [float(ordered[min(int(np.searchsorted(held, mass)), len(ordered) - 1)]) for mass in masses]


def _coverage(counts: Array) -> tuple[Array, Array]:
    """Nominal and measured coverage of the central intervals between draws, falling."""
    n = len(counts)
    outer = np.arange(1, (n + 1) // 2)  # ranks left out at either end; all of them hold everything
    covered = np.array([counts[i : n - i].sum() for i in outer]) / counts.sum()
    return (n - 2 * outer) / n, covered
