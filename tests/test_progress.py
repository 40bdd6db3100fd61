"""Progress travels by file, costs little, and tells the time left."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_grids import filled, small_disk

from hpc import progress


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "progress.json"
    monkeypatch.setenv(progress.VARIABLE, "")  # is put back afterwards
    progress.start(path)
    return path


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(progress.VARIABLE, raising=False)
    progress.report(1, 2)
    progress.link("dashboard", "http://127.0.0.1:1/status")
    assert list(tmp_path.iterdir()) == []


def test_the_last_report_and_links_are_read(file: Path) -> None:
    assert progress.read(file) is None
    progress.link("dashboard", "http://127.0.0.1:1/status")
    progress.report(3, 3, "chunks")
    found = progress.read(file)
    assert found is not None
    assert (found.done, found.total, found.note) == (3, 3, "chunks")
    assert found.links == {"dashboard": "http://127.0.0.1:1/status"}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The clock of reports, which stands still."""
    clock = SimpleNamespace(now=time.time())
    monkeypatch.setattr(progress, "time", SimpleNamespace(time=lambda: clock.now))
    return clock


def test_reports_of_an_inner_loop_are_not_all_written(file: Path, clock: SimpleNamespace) -> None:
    seen = set()
    for number in range(2000):  # two seconds
        progress.report(number, 10**6)
        found = progress.read(file)
        assert found is not None
        seen.add(found.done)
        clock.now += 1e-3
    assert 5 < len(seen) < 15
    started = time.process_time()
    for number in range(2000):
        progress.report(number, 10**6)
    assert time.process_time() - started < 1.0
    progress.report(10**6, 10**6)
    found = progress.read(file)
    assert found is not None
    assert found.done == 10**6, "the last one is always written"


def test_time_left_counts_only_what_this_job_did(clock: SimpleNamespace) -> None:
    """A job that continues at 80 of 100 and does 5 more in 10 s needs 30 s more, not 1.8 s."""
    now = clock.now
    state = progress.Progress(done=85, total=100, time=now, first_done=80, first_time=now - 10)
    assert state.seconds_left == pytest.approx(30)
    assert progress.Progress(done=80, total=100, time=now, first_done=80, first_time=now).seconds_left is None


def test_a_second_job_starts_from_zero(file: Path) -> None:
    progress.report(5, 5, "first")
    progress.start(file)
    progress.report(0, 7, "second")
    found = progress.read(file)
    assert found is not None
    assert found.first_done == 0


def test_a_file_that_a_crash_of_the_machine_left_empty(tmp_path: Path) -> None:
    (tmp_path / "progress.json").touch()
    assert progress.read(tmp_path / "progress.json") is None


def test_a_full_disk_ends_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(progress.VARIABLE, "")
    with small_disk(tmp_path / "disk", 1 << 16) as disk:
        progress.start(disk / "progress.json")
        progress.report(1, 3)
        with filled(disk):
            progress.report(2, 3, "nobody sees it")
        progress.report(3, 3)
        found = progress.read(disk / "progress.json")
        assert found is not None
        assert found.done == 3
