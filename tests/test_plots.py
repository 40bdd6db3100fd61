"""Figures: they show what they are given, legibly, on light and on dark ground, to any color vision."""

import io
import itertools
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb

from galdist.report import plots
from galdist.report.plots import Curve, Palette

K = np.geomspace(0.25, 7.8, 31)
NYQUIST = 8.0
PALETTE = Palette(["classifier", "regressor", "occupation"], ["occupation"])
LABELS = ("matter", "classifier", "regressor", "regressor:galaxy_probability", "occupation")


def _curves(scale: float = 1.0) -> dict[str, Curve]:
    return {
        label: Curve(scale * np.exp(-0.1 * n * K), 0.05 * scale * np.exp(-0.1 * n * K))
        for n, label in enumerate(LABELS, start=1)
    }


def _power(ax: Axes) -> None:
    curves = {"truth": Curve(900 / K, 90 / K), **_curves(500.0)}
    plots.plot_power(ax, K, curves, PALETTE, NYQUIST, {"truth": np.full_like(K, 20.0)})


def _correlation(ax: Axes) -> None:
    plots.plot_correlation(ax, K, _curves(), PALETTE, NYQUIST)


def _transfer(ax: Axes) -> None:
    plots.plot_transfer(ax, K, _curves(), PALETTE, NYQUIST)


def _loss(ax: Axes) -> None:
    epoch = np.arange(1, 20)
    plots.plot_loss(ax, epoch, {"training": 1 / epoch, "validation": 1.2 / epoch})


def _scores(ax: Axes) -> None:
    epoch = np.arange(1, 20)
    names = ("accuracy", "recall", "precision", "PR-AUC")
    plots.plot_scores(ax, epoch, {name: 1 - n / (epoch + n) for n, name in enumerate(names)})


def _throughput(ax: Axes) -> None:
    epoch = np.arange(1, 20)
    waiting = {"waiting for data": 0.02 + 0 * epoch, "waiting for the GPU": 0.7 + 0 * epoch}
    plots.plot_throughput(ax, epoch, {"samples/s": 60 + 0 * epoch, **waiting})


def _quadrupole(ax: Axes) -> None:
    curves = {label: Curve(c.value - 0.5, c.error, [c.value - 0.4]) for label, c in _curves().items()}
    plots.plot_quadrupole(ax, K, curves, PALETTE, NYQUIST)


def _slice(ax: Axes) -> None:
    plots.plot_slice(ax, np.arange(64.0).reshape(8, 8), 25.0, "counts", title="cost: 5$ to 10$", vmax=30)


def _occupation(ax: Axes) -> None:
    mass = np.geomspace(1e11, 1e14, 10)
    mean = np.where(mass > 5e11, (mass / 2e12) ** 0.9, 0)
    plots.plot_occupation(ax, mass, Curve(mean, 0.1 * mean), mean, 5e11)


DRAWINGS = [_power, _quadrupole, _correlation, _transfer, _loss, _scores, _throughput, _occupation, _slice]


def _drawn(draw: Callable[[Axes], None]) -> Axes:
    figure, (ax,) = plots.figure()
    draw(ax)
    figure.draw_without_rendering()
    return ax


def _svg(draw: Callable[[Axes], None]) -> str:
    with plots.style():
        figure, (ax,) = plots.figure()
        draw(ax)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


@pytest.mark.parametrize("draw", DRAWINGS)
def test_axes_are_labeled_and_legends_cover_no_data(draw: Callable[[Axes], None]) -> None:
    with plots.style():
        ax = _drawn(draw)
        assert ax.get_xlabel()
        assert ax.get_ylabel()
        legend = ax.get_legend()
        if legend is not None:
            box = legend.get_window_extent()
            assert box.y0 >= ax.get_window_extent().y1
            assert box.x1 <= ax.figure.bbox.x1


def test_spectra_have_units() -> None:
    with plots.style():
        ax = _drawn(_power)
    assert "Mpc" in ax.get_xlabel()
    assert "Mpc" in ax.get_ylabel()


def test_lines_and_bands_are_the_values_and_errors_given() -> None:
    given = _curves()
    with plots.style():
        ax = _drawn(_correlation)
    lines = {line.get_label(): line for line in ax.lines}
    np.testing.assert_array_equal(lines["occupation"].get_ydata(), given["occupation"].value)
    np.testing.assert_array_equal(lines["occupation"].get_xdata(), K)
    band = ax.collections[list(given).index("occupation")].get_paths()[0].vertices
    at = band[np.isclose(band[:, 0], K[10])][:, 1]
    assert at.max() == pytest.approx(given["occupation"].value[10] * 1.05)
    assert at.min() == pytest.approx(given["occupation"].value[10] * 0.95)


def test_quadrupoles_are_drawn_times_the_wavenumber() -> None:
    with plots.style():
        ax = _drawn(_quadrupole)
    (label, curve) = next(iter(_curves().items()))
    drawn = [line.get_ydata() for line in ax.get_lines() if np.size(line.get_ydata()) == K.size]
    assert any(np.allclose(y, K * (curve.value - 0.5)) for y in drawn), label


def test_one_field_looks_the_same_in_every_figure() -> None:
    colors = []
    with plots.style():
        for draw in (_power, _correlation, _transfer):
            ax = _drawn(draw)
            colors.append({str(line.get_label()): line.get_color() for line in ax.lines if line.get_label()})
    for name in ("regressor", "regressor, probability", "occupation"):
        assert len({found[name] for found in colors if name in found}) == 1
    assert PALETTE["occupation"].color == plots.HOD
    assert Palette(["regressor", "classifier", "occupation"], ["occupation"])["truth"] == PALETTE["truth"]


def test_looks_differ_without_color() -> None:
    looks = [PALETTE[label] for label in ("truth", *LABELS)]
    assert len({(look.line, look.marker) for look in looks}) == len(looks)


def test_a_field_that_is_undefined_in_places_is_drawn_where_it_is_not() -> None:
    value = np.where(K > 3, np.nan, 0.5)
    with plots.style():
        figure, (ax,) = plots.figure()
        plots.plot_correlation(ax, K, {"regressor": Curve(value, 0.1 * value)}, PALETTE, NYQUIST)
        plots.plot_power(figure.add_subplot(), K, {"truth": Curve(value, value)}, PALETTE, NYQUIST)
        figure.draw_without_rendering()
    assert np.all(np.isfinite(ax.get_ylim()))


def test_the_nyquist_wavenumber_is_in_view() -> None:
    with plots.style():
        ax = _drawn(_transfer)
    low, high = ax.get_xlim()
    assert low < K[0]
    assert high > NYQUIST


@settings(max_examples=30, deadline=None)
@given(st.floats(1e-9, 1e9), st.floats(1.05, 1e6))
def test_loss_axes_have_ticks_to_read(lowest: float, ratio: float) -> None:
    with plots.style():
        _, (ax,) = plots.figure()
        plots.plot_loss(ax, [1, 2], {"training": [lowest * ratio, lowest], "validation": [lowest, lowest]})
        low, high = ax.get_ylim()
        ticks = [tick for tick in ax.get_yticks() if low <= tick <= high]
        labels = ax.yaxis.get_major_formatter().format_ticks(ticks)
    assert len(ticks) >= 2
    assert all(labels)


def test_a_single_epoch_is_a_point() -> None:
    with plots.style():
        _, (ax,) = plots.figure()
        plots.plot_loss(ax, [1], {"training": [0.5]})
    assert ax.lines[0].get_marker() == "o"


def test_losses_below_zero_are_drawn_on_a_linear_scale() -> None:
    with plots.style():
        _, (ax,) = plots.figure()
        plots.plot_loss(ax, [1, 2], {"training": [0.5, -0.5]})
    assert ax.get_yscale() == "linear"


def test_a_mean_field_is_seen_where_it_is_below_one() -> None:
    with plots.style():
        figure, (ax,) = plots.figure()
        image = np.full((4, 4), 0.01)
        image[2, 1], image[1, 2] = 3.5, 0.1
        plots.plot_slice(ax, image, 25.0, "counts")
        figure.draw_without_rendering()
    black = [0, 0, 0, 1]
    colors = ax.images[0].cmap(ax.images[0].norm(image))
    assert colors[1, 2].tolist() != black
    assert colors[0, 0].tolist() == black


def test_slices_share_their_scale_and_show_where_it_ends() -> None:
    with plots.style():
        figure, (first, second) = plots.figure(columns=2)
        image = np.zeros((4, 4))
        image[2, 1] = 20
        plots.plot_slice(first, image, 25.0, "counts", vmax=40)
        plots.plot_slice(second, 4 * image, 25.0, "counts", vmax=40)
        figure.draw_without_rendering()
    assert first.images[0].get_clim() == second.images[0].get_clim() == (0.5, 40)
    assert first.images[0].colorbar.extend == "neither"
    assert second.images[0].colorbar.extend == "max"
    shown = first.images[0]
    assert shown.cmap(shown.norm(shown.get_array()))[2, 1].tolist() != [
        0,
        0,
        0,
        1,
    ]  # row is y, up; column is x
    assert shown.cmap(shown.norm(shown.get_array()))[1, 2].tolist() == [0, 0, 0, 1]
    assert shown.get_extent() == [0, 25.0, 0, 25.0]


@pytest.mark.parametrize("draw", DRAWINGS)
def test_dark_figures_have_no_color_of_light_ones(draw: Callable[[Axes], None]) -> None:
    svg = _svg(draw)
    dark = plots.on_dark(svg)
    drawing = re.sub(r'xlink:href="data:[^"]*"', "", dark)
    assert plots.INK not in drawing
    assert "fill: none" in svg or "opacity: 0" in svg or "#ffffff" not in svg  # transparent ground
    ElementTree.fromstring(dark)
    # Ink that takes the default of SVG, black, would vanish: every glyph group has a fill of its own.
    if draw is not _slice:
        assert "#000000" not in drawing


def _luminance(color: str) -> float:
    linear = _linear(color)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def _linear(color: str) -> np.ndarray:
    rgb = np.array(to_rgb(color))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def _on_dark(color: str) -> str:
    return plots.on_dark(color)


LINES = (plots.INK, plots.MATTER, plots.HOD, *plots.PREDICTIONS, plots.MODELS[-1])


@pytest.mark.parametrize(("ground", "recolor"), [("#ffffff", str), ("#14171a", _on_dark)])
def test_lines_and_text_stand_out_from_the_ground(ground: str, recolor: Callable[[str], str]) -> None:
    def contrast(color: str) -> float:
        high, low = sorted((_luminance(recolor(color)), _luminance(ground)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    assert contrast(plots.INK) > 12
    assert contrast(plots.MUTED) > 4.5  # text (WCAG 2.2)
    assert min(contrast(color) for color in LINES) > 2.7


# Dichromacies, on linear RGB (Machado, Oliveira & Fernandes 2009, severity 1).
VISIONS = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
}


@pytest.mark.parametrize("recolor", [str, _on_dark])
@pytest.mark.parametrize("vision", VISIONS)
def test_colors_differ_to_any_color_vision(vision: str, recolor: Callable[[str], str]) -> None:
    def lab(color: str) -> np.ndarray:
        seen = np.clip(VISIONS[vision] @ _linear(recolor(color)), 0, 1)
        xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ seen
        ratio = xyz / [0.9505, 1.0, 1.089]
        f = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
        return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])

    # What a figure usually holds: truth, matter, occupation and two predictions; or truth and models.
    for held in (LINES[:5], (plots.INK, *plots.MODELS)):
        for first, second in itertools.combinations(held, 2):
            assert np.linalg.norm(lab(first) - lab(second)) > 11, (first, second)


def test_of_many_boxes_their_range_is_drawn() -> None:
    """Few are thin lines themselves; bins that no box has stay empty."""
    few = [np.full(3, float(n)) for n in range(5)]
    assert Curve(few[2], few[0], few).thin is few
    many = [np.array([float(n), 2.0 * n, np.nan]) for n in range(101)]
    low, high = Curve(many[50], many[0], many).thin
    np.testing.assert_allclose([low, high], [[16, 32, np.nan], [84, 168, np.nan]])
