"""Site checks that need no Slurm; those that do are in tests/slurm."""

import time
from pathlib import Path

import pytest

from hpc import launch
from hpc.check import Line, check
from hpc.resources import Resources
from hpc.site import Site


def by_name(site: Site, folder: Path) -> dict[str, Line]:
    lines = list(check(site, folder))
    assert all(line.mend for line in lines if not line.ok), "each failure says what to mend"
    assert not list(folder.glob(".site-check-*")), "nothing is left behind"
    return {line.name: line for line in lines}


def test_this_machine(tmp_path: Path) -> None:
    lines = by_name(Site(), tmp_path)
    assert all(line.ok for line in lines.values()), lines
    assert "2 ranks on" in lines["ddp"].detail
    assert "a world of 2 ranks" in lines["mpi"].detail
    assert "2 workers on" in lines["dask"].detail


def test_ranks_that_meet_again(tmp_path: Path) -> None:
    """A job that is started again does not take the addresses of its first attempt for those of its peers."""
    task = launch.Task(
        "hpc.probe:meet", {"folder": str(tmp_path), "interface": None}, tmp_path, "ddp", Resources(ranks=2)
    )
    for _ in range(2):
        job = launch.submit(task)
        while (outcome := job.poll()) is None:
            time.sleep(0.05)
        assert outcome.describe() == "done"


def test_nothing_to_check_for_debuggers(tmp_path: Path) -> None:
    assert [line.ok for line in check(Site(launcher="debug"), tmp_path)] == [True]


def test_no_slurm_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    lines = by_name(Site(launcher="slurm"), tmp_path)
    assert list(lines) == ["commands"]
    assert "not on PATH: sbatch, srun" in lines["commands"].detail
    assert "login node" in lines["commands"].mend


def test_folder_that_takes_no_files() -> None:
    (line,) = check(Site(), Path("/proc"))
    assert (line.name, line.ok) == ("folder", False)
    assert "cannot write in /proc" in line.detail


def test_without_an_mpi(tmp_path: Path) -> None:
    """One thing that is missing does not hide how the others are."""
    lines = by_name(Site(mpirun=tmp_path / "mpirun"), tmp_path)
    assert [line.name for line in lines.values() if not line.ok] == ["mpi"]
    assert f"mpirun of the site file does not exist: {tmp_path / 'mpirun'}" in lines["mpi"].detail
    assert lines["dask"].ok
