"""Pictures of the page and files for papers: a figure is drawn for light ground, dark ground, and print."""

import base64
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from galdist import __version__
from galdist.run import Run, Step
from hpc import durable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from galdist.report.plots import Palette

FIGURES = "figures"


SINGLE = 8
"""Boxes that are drawn one by one, as thin lines; of more the range is."""


def thin_lines(n_boxes: int) -> str:
    """What thin lines are in figures of several boxes."""
    return "single boxes" if n_boxes <= SINGLE else "between them are two thirds of the boxes"


class Panel(NamedTuple):
    """One picture of the page, one panel of a figure for papers."""

    draw: "Callable[[Axes, Palette], None]"
    alt: str


@dataclass(frozen=True)
class Image:
    """A picture as data URIs for light and for dark ground."""

    light: str
    dark: str
    alt: str
    width: int
    height: int


@dataclass(frozen=True)
class Block:
    """Pictures that belong together: a figure of the page and its files for papers."""

    title: str
    caption: str
    images: list[Image]
    files: list[str]
    key: Image | None = None
    """One legend for all pictures."""


class Artist:
    """Draws panels twice for the page (light, dark) and once for papers."""

    def __init__(self, run: Run, out: Path, palette: "Palette") -> None:
        self.run, self.out, self.palette = run, out, palette
        (out / FIGURES).mkdir(parents=True, exist_ok=True)

    def origin(self, sources: Iterable[Step]) -> str:
        """The run and the steps whose results are shown, in words."""
        made_by = ", ".join(
            f"{step.name} {str(step.provenance.get('fingerprint') or '')[:8]}".strip() for step in sources
        )
        return f"Run {self.run.name}; {made_by}."

    def block(
        self,
        name: str,
        title: str,
        caption: str,
        panels: Sequence[Panel],
        sources: Iterable[Step],
        size: tuple[float, float] | None = None,
        columns: int = 3,
        key: Sequence[str] = (),
    ) -> Block:
        """Draw ``panels`` into files called ``name``.

        ``sources`` are the steps whose results they show, ``key`` the labels of one legend for all of them.
        """
        from galdist.report import plots

        size = size or plots.PANEL
        origin = self.origin(sources)
        images = [self._image(panel.draw, panel.alt, size) for panel in panels]
        strip = None
        if key:
            names = ", ".join(plots.plain(self.palette[label].name) for label in key)
            strip = self._image(
                lambda ax, palette: plots.plot_key(ax, palette, key),
                f"Legend: {names}.",
                plots.key_size(self.palette, key),
            )
        columns = min(columns, len(panels))
        rows = math.ceil(len(panels) / columns)
        with plots.style():
            drawn, axes = plots.figure(columns, rows, size)
            for ax in axes[len(panels) :]:
                ax.remove()
            for ax, panel in zip(axes, panels, strict=False):
                panel.draw(ax, self.palette)
            if key:
                plots.figure_key(drawn, self.palette, key)
            plots.sign(drawn, f"galdist {__version__}. {origin}")
            plots.settle(drawn)
            about = {"Title": title, "Creator": f"galdist {__version__}"}
            files: tuple[tuple[str, dict[str, Any]], ...] = (
                (".pdf", {"Subject": f"{caption} {origin}", "CreationDate": None}),
                (".png", {"Description": f"{caption} {origin}"}),
            )
            for suffix, extra in files:
                path = self.out / FIGURES / f"{name}{suffix}"
                with durable.atomic_path(path) as temporary:
                    drawn.savefig(
                        temporary,
                        format=suffix[1:],
                        metadata=about | extra,
                        facecolor=plots.GROUND if suffix == ".png" else "none",
                    )
                drawn.set_layout_engine("none")  # the layout of the first file serves both
        written = [f"{FIGURES}/{name}{suffix}" for suffix, _ in files]
        return Block(title, f"{caption} {origin}", images, written, strip)

    def _image(self, draw: "Callable[[Axes, Palette], None]", alt: str, size: tuple[float, float]) -> Image:
        from galdist.report import plots

        with plots.style():
            drawn, axes = plots.figure(panel=size)
            draw(axes[0], self.palette)
            plots.settle(drawn)
            file = io.StringIO()
            drawn.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
        light, dark = (
            "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
            for svg in (file.getvalue(), plots.on_dark(file.getvalue()))
        )
        return Image(light, dark, alt, width=round(96 * size[0]), height=round(96 * size[1]))
