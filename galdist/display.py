"""Live progress of a run: a table that moves on a terminal, plain lines everywhere else."""

import getpass
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, TextIO
from urllib.parse import urlsplit

from galdist.pipeline import RunView, StepView
from galdist.status import duration, on_cluster

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

    from hpc.launch import JobInfo

_PAUSE = 5.0  # seconds between two lines about one step in a log
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_NARROW = 100  # columns below which a terminal gets a shorter table
_MARKS = {  # for a terminal that has the character, and for any other
    "waiting": "· ",
    "pending": "· ",
    "stale": "~~",
    "queued": "◌o",
    "running": "●>",
    "done": "✓+",
    "kept": "==",
    "failed": "✗x",
    "stopped": "■!",
    "blocked": "--",
}
_COLORS = {
    "waiting": "dim",
    "pending": "dim",
    "stale": "yellow",
    "queued": "yellow",
    "running": "bold cyan",
    "done": "green",
    "kept": "green",
    "failed": "bold red",
    "stopped": "yellow",
    "blocked": "yellow",
}


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


def tunnel(address: str, node: str | None = None) -> tuple[str, str]:
    """How the reader's own machine reaches a server of this one or, where given, of a node of its cluster.

    Returns
    -------
    command, address
        what to type there, and what to open in a browser then.
    """
    parts = urlsplit(address)
    host, port = parts.hostname or "", parts.port
    user = getpass.getuser()
    # In a job this is the host on which people are logged in; on it, itself.
    login = f"{user}@{os.environ.get('SLURM_SUBMIT_HOST') or socket.gethostname()}"
    node = node or os.environ.get("SLURMD_NODENAME")
    way = f"-L {port}:{host}:{port} {login}"
    if node and host in _LOOPBACK:
        way = f"-J {login} -L {port}:{host}:{port} {user}@{node}"
    return f"ssh -N {way}", parts._replace(netloc=f"127.0.0.1:{port}").geturl()


class LineDisplay:
    """A line at every change of a step, and every few seconds while it runs."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._said: set[tuple[object, ...]] = set()
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
            if (fact := _fact(step)) not in self._said and step.state not in ("waiting", "pending"):
                self._said.add(fact)
                self._print(head + _words(step))
            if step.state != "running" or step.progress is None:
                continue
            for name, address, way in _links(step):
                if (step.name, address) not in self._links:
                    self._links.add((step.name, address))
                    self._print(f"{head}{name}: {address}")
                    if way:
                        self._print(f"{head}{way}")
            when, before = self._last.get(step.name, (step.started, ""))
            text = _progress_text(step)
            if step.progress.total and text != before and time.time() - when >= _PAUSE:
                self._last[step.name] = (time.time(), text)
                left = f"; run: {duration(view.seconds_left)} left" if view.seconds_left is not None else ""
                self._print(f"{head}{text}{left}")

    def _print(self, text: str) -> None:
        print(time.strftime("%H:%M:%S"), text, file=self.stream, flush=True)


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

    def print(self, view: RunView) -> None:
        """Draw the run once, all its steps."""
        self._console.print(self._draw(view))

    def show(self, view: RunView) -> None:
        """Redraw, four times a second at most."""
        over = not any(step.state in ("running", "waiting") for step in view.steps)
        if over or time.monotonic() - self._drawn > 0.25:
            self._drawn = time.monotonic()
            self._live.update(self._draw(view, self._console.height), refresh=True)

    def _draw(self, view: RunView, lines: int | None = None) -> "RenderableType":
        """The table, what stands below it, and, with a limit of ``lines``, as much of it as fits."""
        from rich.console import Group
        from rich.text import Text

        links = [line for step in view.steps if step.state == "running" for line in _link_text(step)]
        links = links if lines is None else links[: lines // 3]
        room = len(view.steps) if lines is None else max(5, lines - 4 - len(links))
        return Group(
            self._table(_visible(view.steps, room)), Text("\n" + _summary(view), style="dim"), *links
        )

    def _table(self, steps: list[StepView]) -> "RenderableType":
        from rich.table import Column, Table
        from rich.text import Text

        wide = self._console.width >= _NARROW
        cluster = any(on_cluster(step.job) for step in steps)
        columns = [Column(no_wrap=True), Column("step", no_wrap=True, max_width=None if wide else 24)]
        columns += [Column("stage", no_wrap=True, style="dim")] if wide else []
        columns += (
            [Column("job", no_wrap=True), Column("node", no_wrap=True, max_width=16)] if cluster else []
        )
        columns += [Column(name, no_wrap=True) for name in ("", "", "time", "left")]
        columns.append(Column())
        table = Table(
            *columns,
            box=None,
            padding=(0, 2 if wide else 1, 0, 0),
            pad_edge=False,
            header_style="dim",
        )
        for step in steps:
            cells: list[RenderableType] = [self._mark(step), Text(step.name, style=_style(step))]
            cells += [step.stage] if wide else []
            if cluster:
                job = step.job if on_cluster(step.job) else None
                cells += [job.id if job else "", Text(nodes_text(job)) if job else ""]
            cells += [
                self._state(step, 20 if wide else 10),
                _percent(step),
                duration(step.seconds) if step.seconds else "",
                duration(step.seconds_left) if step.seconds_left is not None else "",
                Text(_note(step), overflow="ellipsis", no_wrap=True),
            ]
            table.add_row(*cells)
        return table

    def _mark(self, step: StepView) -> "Text":
        from rich.text import Text

        return Text(_MARKS[step.state][self._console.options.ascii_only], style=_style(step))

    def _state(self, step: StepView, width: int) -> "RenderableType":
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        if step.state != "running":
            return Text(step.state, style=_style(step))
        if step.progress is None or not step.progress.total:
            return ProgressBar(total=None, width=width, pulse=True, pulse_style="cyan")
        done, total = step.progress.done, step.progress.total
        return ProgressBar(total=total, completed=done, width=width, complete_style="cyan")


def _visible(steps: list[StepView], room: int) -> list[StepView]:
    """As many steps as there is room for, those that people wait for before others, in their order."""
    ranking = [
        "running",
        "failed",
        "stopped",
        "queued",
        "stale",
        "waiting",
        "pending",
        "blocked",
        "done",
        "kept",
    ]
    chosen = sorted(range(len(steps)), key=lambda n: ranking.index(steps[n].state))[:room]
    return [steps[n] for n in sorted(chosen)]


def _summary(view: RunView) -> str:
    """``"study: 3 of 9 steps, 2 running, 1 queued, about 12:05 left"``."""
    count = Counter(step.state for step in view.steps)
    parts = [f"{view.name}: {count['done'] + count['kept']} of {len(view.steps)} steps"]
    parts += [f"{count[name]} {name}" for name in ("running", "queued", "failed", "stopped") if count[name]]
    parts += [] if view.seconds_left is None else [f"about {duration(view.seconds_left)} left"]
    return ", ".join(parts)


def nodes_text(job: "JobInfo") -> str:
    """``"n1 n2"``, ``"n1 +7"``."""
    names = list(dict.fromkeys(job.nodes))
    return " ".join(names if len(names) <= 2 else [names[0], f"+{len(names) - 1}"])


def _where(job: "JobInfo | None") -> str:
    """``" as job 12 on n1 n2"``; nothing for a process of this machine."""
    if job is None or not job.id or not on_cluster(job):
        return ""
    again = f", restart {job.restarts}" if job.restarts else ""
    return f" as job {job.id}" + (f" on {' '.join(job.nodes)}" if job.nodes else "") + again


def _fact(step: StepView) -> tuple[object, ...]:
    """What is worth a line in a log; the same as long as nothing new is to be said."""
    job = step.job
    if job is None or not on_cluster(job) or step.state not in ("queued", "running"):
        return step.name, step.state
    # How long Slurm has been silent is news at first only.
    return step.name, step.state, job.id, job.nodes, job.restarts, job.reason.partition(" for ")[0]


def _words(step: StepView) -> str:
    match step.state:
        case "queued":
            reason = f" ({step.job.reason})" if step.job and step.job.reason else ""
            return f"queued{_where(step.job)}{reason}"
        case "running" if step.job and step.job.reason:
            return step.job.reason
        case "running":
            why = f": {step.detail}" if step.detail else ""
            return f"starts ({step.stage}){_where(step.job)}{why}"
        case "done":
            what = f"; {step.detail}" if step.detail else ""
            return f"done in {duration(step.seconds)}{what}"
        case "kept":
            return f"not run: {step.detail}"
        case "failed":
            return f"FAILED after {duration(step.seconds)}: {step.detail}"
        case other:
            return f"{other}: {step.detail}" if step.detail else other


def _note(step: StepView) -> str:
    """What the table says at the end of a step's line."""
    again = f"restart {step.job.restarts}; " if step.job and step.job.restarts else ""
    match step.state:
        case "waiting":
            return ""
        case "running" if step.job and step.job.reason:
            return step.job.reason
        case "running":
            return again + (step.progress.note if _percent(step) and step.progress else step.detail)
        case _:
            return step.detail


def _percent(step: StepView) -> str:
    if step.state != "running" or step.progress is None or not step.progress.total:
        return ""
    return f"{100 * step.progress.done / step.progress.total:3.0f}%"


def _progress_text(step: StepView) -> str:
    note = f" {step.progress.note}" if step.progress and step.progress.note else ""
    left = f", {duration(step.seconds_left)} left" if step.seconds_left is not None else ""
    return _percent(step) + note + left


def _style(step: StepView) -> str:
    return _COLORS[step.state]


def _links(step: StepView) -> Iterator[tuple[str, str, str]]:
    """Name, address, and how to reach it from elsewhere, of what may be opened while a step runs."""
    node = step.job.nodes[0] if step.job and on_cluster(step.job) and step.job.nodes else None
    for name, address in step.progress.links.items() if step.progress else ():
        if urlsplit(address).port is None or (node is None and "SSH_CONNECTION" not in os.environ):
            yield name, address, ""  # the reader sits at this machine
        else:
            command, there = tunnel(address, node)
            then = f"  then open {there}" if there != address else ""
            yield name, address, f"from your machine: {command}{then}"


def _link_text(step: StepView) -> "Iterator[Text]":
    from rich.text import Text

    for name, address, way in _links(step):
        yield Text(f"{step.name} {name}: ", style="dim").append(address, style=f"not dim blue link {address}")
        if way:
            yield Text(f"  {way}", style="dim", overflow="fold")
