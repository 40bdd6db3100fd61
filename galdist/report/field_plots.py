"""Figures of statistics of fields: arrays in, matplotlib Axes out, in the style of `galdist.report.plots`.

They have no legends of their own: `plots.figure_key` is for all. Rank histograms are those of
`galdist.report.halo_plots`.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from galdist.report.plots import INK, K_LABEL, LENGTH_UNIT, MATTER, MUTED, Curve, Palette, decimal_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = NDArray[np.float64]


def plot_distribution(
    ax: "Axes", edges: ArrayLike, distributions: Mapping[str, Curve], palette: Palette, side: float
) -> None:
    """Fractions of cubes (bins,) by the number that they hold, over the width of each bin; both axes log.

    Parameters
    ----------
    edges : (bins + 1,), half-integers. The bin of none is drawn left of the others, at one half.
    side
        of the cubes [Mpc/h].
    """
    edges = np.asarray(edges, float)
    width = np.diff(edges)
    center = np.maximum(np.sqrt(np.maximum(edges[:-1], 0) * edges[1:]), 0.5)
    center[width == 1] = np.maximum((edges[:-1] + 0.5)[width == 1], 0.5)
    first, last, least = len(width), 0, np.inf
    for label, (value, error, _) in distributions.items():
        look = palette[label]
        known = value > 0
        density, scatter = value / width, np.nan_to_num(error) / width
        ax.fill_between(
            center[known],
            np.maximum(density - scatter, density / 10)[known],
            (density + scatter)[known],
            color=look.color,
            alpha=0.18,
            linewidth=0,
        )
        ax.plot(center[known], density[known], color=look.color, linestyle=look.line, marker=look.marker)
        places = np.flatnonzero(known)
        first, last = min(first, int(places[0])), max(last, int(places[-1]))
        least = min(least, float(density[known].min()))
    ax.set(
        xscale="log",
        yscale="log",
        xlabel=rf"galaxies in a cube of {side:.2g} $h^{{-1}}\,\mathrm{{Mpc}}$",
        ylabel="fraction of cubes",
        xlim=(0.8 * center[first], 1.25 * max(center[last], 2)),
        ylim=(least / 2, None),
    )
    ticks = [tick * 10**power for power in range(6) for tick in (1, 2, 5)]
    ticks = [0.5, *(tick for tick in ticks if tick <= center[last])]
    shown = [tick for tick in ticks if tick >= center[first]]
    ax.set_xticks(shown, ["0" if tick == 0.5 else f"{tick:g}" for tick in shown])
    ax.minorticks_off()


def plot_variance(
    ax: "Axes", side: ArrayLike, variances: Mapping[str, Curve], palette: Palette, poisson: ArrayLike
) -> None:
    """Variance of counts in cubes of ``side`` [Mpc/h], without its Poisson part, which is dotted."""
    _scales(ax, side, variances, palette)
    ax.plot(side, poisson, ":", color=MUTED, linewidth=1.1)
    ax.set(xlabel=f"side of cubes {LENGTH_UNIT}", ylabel=r"$\sigma^2$ without Poisson part (dotted)")


def plot_voids(ax: "Axes", radius: ArrayLike, densities: Mapping[str, Curve], palette: Palette) -> None:
    """Number densities of voids [(h/Mpc)^3] of each ``radius`` [Mpc/h]; radii without any are not drawn."""
    _scales(ax, radius, densities, palette)
    ax.set(xlabel=f"radius of voids {LENGTH_UNIT}", ylabel=r"number density $[h^3\,\mathrm{Mpc}^{-3}]$")


def plot_bispectrum(
    ax: "Axes", k: ArrayLike, bispectra: Mapping[str, Curve], palette: Palette, shape: str
) -> None:
    """Bispectra [(Mpc/h)^6] of triangles of one shape against ``k`` [h/Mpc]; only where positive."""
    _scales(ax, k, bispectra, palette)
    arguments = {"equilateral": "k, k, k", "squeezed": r"k, k, k_\mathrm{min}"}[shape]
    ax.set(xlabel=K_LABEL, ylabel=rf"$B({arguments})\ \ [h^{{-6}}\,\mathrm{{Mpc}}^{{6}}]$", title=shape)


def plot_expected_coverage(
    ax: "Axes", levels: ArrayLike, coverages: Mapping[str, ArrayLike], number: float, palette: Palette
) -> None:
    """Fraction of truths in regions of the samples' credibility ``levels``; the gray band is the scatter of
    ``number`` truths of a calibrated model."""
    levels = np.asarray(levels, float)
    scatter = np.sqrt(levels * (1 - levels) / number)
    ax.fill_between(levels, levels - scatter, levels + scatter, color=MATTER, alpha=0.35, linewidth=0)
    ax.plot(levels, levels, color=INK, linewidth=0.8)
    for label, covered in coverages.items():
        look = palette[label]
        ax.plot(levels, covered, color=look.color, linestyle=look.line)
    ax.set(xlabel="credibility", ylabel="expected coverage", xlim=(0, 1), ylim=(0, 1))


def _scales(ax: "Axes", x: ArrayLike, curves: Mapping[str, Curve], palette: Palette) -> None:
    """Positive curves with bands of one standard deviation, and their thin lines. Both axes log."""
    x = np.asarray(x, float)
    low, high = np.inf, 0.0
    for label, curve in curves.items():
        look, value, error = palette[label], curve.value, curve.error
        for line in curve.thin:
            one = np.asarray(line, float)
            ax.plot(x, np.where(one > 0, one, np.nan), color=look.color, linewidth=0.5, alpha=0.45)
        known = value > 0
        if not known.any():
            continue
        shown = np.where(known, value, np.nan)
        error = np.nan_to_num(error)
        ax.fill_between(
            x, np.maximum(shown - error, shown / 10), shown + error, color=look.color, alpha=0.18, linewidth=0
        )
        ax.plot(x, shown, color=look.color, linestyle=look.line, marker=look.marker)
        low, high = min(low, float(value[known].min())), max(high, float(value[known].max()))
    ax.set(xscale="log", yscale="log")
    decimal_ticks(ax.xaxis, x.max() / x.min())
    if high > 0:
        ax.set_ylim(low / 2, high * 2)
        if high / low < 300:
            decimal_ticks(ax.yaxis, high / low)
