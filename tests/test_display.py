"""What people see while a run goes on."""

import io
import time
from pathlib import Path

import pytest
from rich.console import Console

from galdist import display
from galdist.display import LineDisplay, LiveDisplay
from galdist.pipeline import RunView, StepView
from hpc.progress import Progress


def view(**states: str) -> RunView:
    steps = [StepView(name, "pieces", state, detail="new") for name, state in states.items()]  # type: ignore[arg-type]
    return RunView("study", Path("runs/study"), steps)


def lines(stream: io.StringIO) -> list[str]:
    """What was printed, without the times of day."""
    return [line.partition(" ")[2] for line in stream.getvalue().splitlines()]


def test_a_log_has_a_line_at_every_change() -> None:
    stream = io.StringIO()
    shown = LineDisplay(stream)
    for states in (
        {"a": "running", "long": "waiting"},
        {"a": "running", "long": "waiting"},
        {"a": "done", "long": "running"},
        {"a": "done", "long": "failed"},
    ):
        shown.show(view(**states))
    assert lines(stream) == [
        "a     starts (pieces): new",
        "a     done in 0:00; new",
        "long  starts (pieces): new",
        "long  FAILED after 0:00: new",
    ]


def test_a_log_has_progress_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    stream = io.StringIO()
    shown = LineDisplay(stream)
    state = view(a="running")
    state.steps[0].started = now
    for second in range(100):  # ten seconds of reports, ten a second
        now += 0.1
        state.steps[0].progress = Progress(done=second, total=100, note="chunks")
        state.steps[0].seconds_left = state.seconds_left = 100.0 - second
        shown.show(state)
    said = lines(stream)
    assert len(said) in (2, 3), "ten seconds: one or two lines of progress"
    assert said[1].startswith("a   49% chunks, 0:51 left; run: 0:51 left") or said[1].startswith("a   50%")


def test_addresses_are_shown_once() -> None:
    stream = io.StringIO()
    shown = LineDisplay(stream)
    state = view(a="running")
    state.steps[0].progress = Progress(links={"dashboard": "http://127.0.0.1:8787/status"})
    for _ in range(3):
        shown.show(state)
    assert lines(stream)[1:] == ["a  dashboard: http://127.0.0.1:8787/status"]


def drawn(state: RunView, width: int = 100, height: int = 30) -> list[str]:
    shown = LiveDisplay()
    shown._console = Console(width=width, height=height, file=io.StringIO(), force_terminal=False)
    with shown._console.capture() as capture:
        shown._console.print(shown._draw(state))
    return capture.get().splitlines()


def test_a_terminal_has_a_line_a_step() -> None:
    state = view(a="kept", b="running", c="waiting")
    state.steps[1].progress = Progress(done=30, total=100, note="chunks", links={"dashboard": "http://x"})
    state.steps[1].seconds, state.steps[1].seconds_left, state.seconds_left = 12.0, 61.0, 75.0
    text = drawn(state)
    assert len(text) == 4
    assert "30% chunks, 1:01 left  dashboard http://x" in text[1]
    assert text[3].strip() == "study: 1 of 3 steps  about 1:15 left"


def test_a_terminal_with_less_lines_than_steps_shows_those_that_run() -> None:
    states = {f"s{number:03}": "done" for number in range(60)} | {"now": "running"}
    text = drawn(view(**states, **{f"t{number}": "waiting" for number in range(40)}), height=20)
    assert len(text) == 18
    assert any("now" in line for line in text)


def test_text_of_a_stage_is_not_markup() -> None:
    state = view(a="running")
    state.steps[0].progress = Progress(done=1, total=2, note="[red]file[/nothing]")
    assert any("[red]file[/nothing]" in line for line in drawn(state))


def test_a_file_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(display.for_stream(io.StringIO()), LineDisplay)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(display.for_stream(Terminal()), LiveDisplay)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(display.for_stream(Terminal()), LineDisplay)
