"""What people see while a run goes on."""

import io
import time
from pathlib import Path

import pytest
from rich.console import Console

from galdist import display
from galdist.display import LineDisplay, LiveDisplay
from galdist.pipeline import RunView, StepView
from hpc.launch import JobInfo
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


def job(id: str = "12", *nodes: str, reason: str = "", restarts: int = 0) -> JobInfo:
    return JobInfo(id, "running" if nodes else "pending", nodes, reason, restarts)


def test_a_log_tells_where_a_job_is() -> None:
    stream = io.StringIO()
    shown = LineDisplay(stream)
    state = view(a="running")
    for now in (
        job(reason="Priority"),
        job(reason="Priority"),
        job(reason="Resources"),
        job("12", "n1", "n2"),
        job("12", "n1", "n2", reason="Slurm has not answered for 0:31"),
        job("12", "n1", "n2", reason="Slurm has not answered for 0:32"),
        job("12", "n1", "n2"),
        job(reason="BeginTime", restarts=1),
        job("12", "n3", restarts=1),
    ):
        state.steps[0].job, state.steps[0].state = now, "running" if now.nodes else "queued"
        shown.show(state)
    assert lines(stream) == [
        "a  queued as job 12 (Priority)",
        "a  queued as job 12 (Resources)",
        "a  starts (pieces) as job 12 on n1 n2: new",
        "a  Slurm has not answered for 0:31",
        "a  queued as job 12, restart 1 (BeginTime)",
        "a  starts (pieces) as job 12 on n3, restart 1: new",
    ]


def test_the_tunnel_to_a_dashboard(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server on a node's loopback is reached through that node, one on its interface through the login
    host."""
    monkeypatch.setenv("LOGNAME", "me")
    monkeypatch.setenv("SLURM_SUBMIT_HOST", "login1")
    monkeypatch.delenv("SLURMD_NODENAME", raising=False)
    there = "http://127.0.0.1:8787/status"
    assert display.tunnel(there, "n3") == ("ssh -N -J me@login1 -L 8787:127.0.0.1:8787 me@n3", there)
    assert display.tunnel("http://10.1.0.3:8787/status", "n3") == (
        "ssh -N -L 8787:10.1.0.3:8787 me@login1",
        there,
    )
    assert display.tunnel(there) == ("ssh -N -L 8787:127.0.0.1:8787 me@login1", there)
    monkeypatch.setenv("SLURMD_NODENAME", "n4")
    assert display.tunnel(there)[0].endswith("me@n4"), "inside a job the server is on its node"


def test_addresses_on_a_cluster_come_with_a_tunnel() -> None:
    stream = io.StringIO()
    state = view(a="running")
    state.steps[0].job = job("12", "n3")
    state.steps[0].progress = Progress(links={"dashboard": "http://127.0.0.1:8787/status"})
    LineDisplay(stream).show(state)
    assert "-L 8787:127.0.0.1:8787" in lines(stream)[-1]
    assert any("-L 8787:127.0.0.1:8787" in line for line in drawn(state))


def drawn(state: RunView, width: int = 120, height: int | None = None) -> list[str]:
    shown = LiveDisplay()
    shown._console = Console(width=width, file=io.StringIO(), force_terminal=False)
    with shown._console.capture() as capture:
        shown._console.print(shown._draw(state, height))
    return [line.rstrip() for line in capture.get().splitlines()]


def test_a_terminal_has_a_line_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSH_CONNECTION", raising=False)
    state = view(a="kept", b="running", c="waiting")
    state.steps[1].progress = Progress(done=30, total=100, note="chunks", links={"dashboard": "http://x:1"})
    state.steps[1].seconds, state.steps[1].seconds_left, state.seconds_left = 12.0, 61.0, 75.0
    text = drawn(state)
    assert text[0].split() == ["step", "stage", "time", "left"], "no job, no node on one machine"
    assert text[2].split()[-4:] == ["30%", "0:12", "1:01", "chunks"]
    assert text[4:] == ["", "study: 1 of 3 steps, 1 running, about 1:15 left", "b dashboard: http://x:1"]


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_shows_jobs_and_nodes(width: int) -> None:
    state = view(a="running", b="queued", c="running")
    state.steps[0].job, state.steps[1].job = job("12_0", "n1", "n2", "n3"), job("12_1")
    state.steps[1].detail = "Resources"
    state.steps[0].progress = Progress(done=1, total=4, note="epoch 1 of 4, " + "loss " * 20)
    state.steps[2].job = job("pid 4711", "here")
    text = drawn(state, width)
    assert all(len(line) <= width for line in text)
    assert {"12_0", "n1", "+2", "25%"} <= set(text[1].split())
    assert text[1].endswith("…")
    assert text[2].split()[-3:] == ["12_1", "queued", "Resources"]
    assert "4711" not in text[3]
    assert text[-1] == "study: 0 of 3 steps, 2 running, 1 queued"


def test_a_terminal_with_less_lines_than_steps_shows_those_that_run() -> None:
    states = {f"s{number:03}": "done" for number in range(60)} | {"now": "running"}
    state = view(**states, **{f"t{number}": "waiting" for number in range(40)}, z="failed")
    text = drawn(state, height=20)
    assert len(text) <= 19, "a table that fills the terminal would scroll"
    assert any("now" in line for line in text)
    assert any("failed" in line for line in text)
    assert text[-1] == "study: 60 of 102 steps, 1 running, 1 failed"
    assert len(drawn(state)) == 1 + 102 + 2, "once, nothing is left out"


def test_many_links_leave_room_for_steps() -> None:
    state = view(**{f"s{number}": "running" for number in range(50)})
    for step in state.steps:
        step.job = job("1", "n1")
        step.progress = Progress(done=1, total=2, links={"dashboard": "http://127.0.0.1:1/status"})
    text = drawn(state, height=24)
    assert len(text) <= 23
    assert sum("50%" in line for line in text) >= 10


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
