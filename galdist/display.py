"""Live progress of a run: a table that moves on a terminal, plain lines everywhere else."""

import os
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, TextIO

from galdist.pipeline import RunView, StepView
from galdist.status import duration

if TYPE_CHECKING:
    from rich.console import RenderableType

_PAUSE = 5.0  # seconds between two lines about one step in a log
_MARKS = {"waiting": " ", "running": ">", "done": "+", "kept": "=", "failed": "x", "blocked": "-"}


class Display(Protocol):
    """Shows a run while it goes on: ``with display: display.show(view)`` again and again."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def show(self, view: RunView) -> None:
        """Show the run as it is now."""


def for_stream(stream: TextIO | None = None) -> Display:
    """The display that fits: live on a terminal, lines in a pipe or a file."""
    stream = stream or sys.stdout
    if stream.isatty() and os.environ.get("TERM") != "dumb":
        return LiveDisplay()
    return LineDisplay(stream)


class LineDisplay:
    """A line at every change of a step, and every few seconds while it runs."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._states: dict[str, str] = {}
        self._links: set[tuple[str, str]] = set()
        self._last: dict[str, tuple[float, str]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stream.flush()

    def show(self, view: RunView) -> None:
        """Print what is new."""
        width = max(len(step.name) for step in view.steps)
        for step in view.steps:
            head = f"{step.name:<{width}}  "
            if step.state != self._states.get(step.name, "waiting"):
                self._states[step.name] = step.state
                self._print(head + _change(step))
            if step.state != "running" or step.progress is None:
                continue
            for name, address in step.progress.links.items():
                if (step.name, name) not in self._links:
                    self._links.add((step.name, name))
                    self._print(f"{head}{name}: {address}")
            when, before = self._last.get(step.name, (step.started, ""))
            text = _progress_text(step)
            if step.progress.total and text != before and time.time() - when >= _PAUSE:
                self._last[step.name] = (time.time(), text)
                left = f"; run: {duration(view.seconds_left)} left" if view.seconds_left is not None else ""
                self._print(f"{head}{text}{left}")

    def _print(self, text: str) -> None:
        print(time.strftime("%H:%M:%S"), text, file=self.stream, flush=True)


def _change(step: StepView) -> str:
    match step.state:
        case "running":
            return f"starts ({step.stage}): {step.detail}"
        case "done":
            return f"done in {duration(step.seconds)}; {step.detail}"
        case "kept":
            return f"not run: {step.detail}"
        case "failed":
            return f"FAILED after {duration(step.seconds)}: {step.detail}"
        case _:
            return f"{step.state}: {step.detail}"


def _progress_text(step: StepView) -> str:
    progress = step.progress
    if progress is None or not progress.total:
        return ""
    left = f", {duration(step.seconds_left)} left" if step.seconds_left is not None else ""
    return f"{100 * progress.done / progress.total:3.0f}% {progress.note}{left}".replace("% ,", "%,")


class LiveDisplay:
    """One line a step, redrawn in place."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console()
        self._live = Live(console=self._console, auto_refresh=False, transient=False)
        self._drawn = 0.0

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def show(self, view: RunView) -> None:
        """Redraw, four times a second at most."""
        over = not any(step.state in ("running", "waiting") for step in view.steps)
        if over or time.monotonic() - self._drawn > 0.25:
            self._drawn = time.monotonic()
            self._live.update(self._draw(view), refresh=True)

    def _draw(self, view: RunView) -> "RenderableType":
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        colors = {"done": "green", "kept": "green", "failed": "red", "blocked": "yellow", "waiting": "dim"}
        table = Table.grid(padding=(0, 2))
        for step in self._visible(view.steps):
            style = colors.get(step.state, "bold")
            bar: RenderableType = ""
            text = step.detail if step.state != "waiting" else ""
            if step.state == "running":
                known = step.progress is not None and step.progress.total > 0
                total = step.progress.total if step.progress and known else None
                done = step.progress.done if step.progress else 0
                bar = ProgressBar(total=total, completed=done, width=20, pulse=not known)
                text = _progress_text(step) or step.detail
                for name, address in step.progress.links.items() if step.progress else ():
                    text += f"  {name} {address}"
            seconds = duration(step.seconds) if step.seconds else ""
            table.add_row(
                Text(_MARKS[step.state], style=style),
                Text(step.name, style=style),
                Text(step.stage, style="dim"),
                bar or Text(step.state, style=style),
                Text(seconds),
                Text(text, overflow="ellipsis", no_wrap=True),
            )
        left = f"about {duration(view.seconds_left)} left" if view.seconds_left is not None else ""
        finished = sum(step.state in ("done", "kept") for step in view.steps)
        footer = Text(f"{view.name}: {finished} of {len(view.steps)} steps  {left}", style="dim")
        return Group(table, footer)

    def _visible(self, steps: list[StepView]) -> list[StepView]:
        """As many steps as the terminal has lines, around those that run."""
        room = max(5, self._console.height - 3)
        if len(steps) <= room:
            return steps
        at = next((n for n, step in enumerate(steps) if step.state in ("running", "waiting")), len(steps))
        first = max(0, min(at - room // 2, len(steps) - room))
        return steps[first : first + room]
