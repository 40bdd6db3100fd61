"""Which snapshot is at which redshift, and reading one by its redshift."""

import shutil
from contextlib import suppress
from pathlib import Path

import h5py
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from universe import write_camels, write_tng

from galdist.simulations.simulation import SelectionConfig, SimulationError
from galdist.simulations.snapshots import possible_numbers, snapshot_at


@pytest.mark.parametrize(
    ("redshift", "numbers"),
    [
        (0, (90, 33)),
        (0.47, (74, 25)),
        (0.5, (73,)),
        (1.05, (60, 18)),
        (1, (61,)),
        (2, (44, 10)),
        (6.01, (14, 0)),
    ],
)
def test_numbers_are_those_of_the_documentation_of_camels(redshift: float, numbers: tuple[int, ...]) -> None:
    """Rows of its table of redshifts, of 91 and of 34 snapshots."""
    assert possible_numbers("camels", redshift) == numbers


@pytest.mark.parametrize(("redshift", "number"), [(0, 99), (0.1, 91), (0.5, 67), (1, 50), (2, 33), (12, 2)])
def test_numbers_are_those_of_the_full_snapshots_of_tng(redshift: float, number: int) -> None:
    assert possible_numbers("tng", redshift) == (number,)
    assert snapshot_at("tng", redshift)[1] == pytest.approx(1 / (1 + redshift), abs=1e-15)


@given(st.floats(0, 14))
def test_a_snapshot_is_at_the_redshift_or_there_is_none(redshift: float) -> None:
    with suppress(ValueError):
        assert abs(snapshot_at("camels", redshift)[1] - 1 / (1 + redshift)) <= 0.003


def at(file: Path, redshift: float) -> None:
    with h5py.File(file, "r+") as hdf5:
        hdf5["Header"].attrs["Redshift"] = redshift
        hdf5["Header"].attrs["Time"] = 1 / (1 + redshift)


def renamed(root: Path, old: str, new: str) -> None:
    for file in sorted(root.rglob(f"*_{old}*.hdf5")):
        there = file.with_name(file.name.replace(old, new))
        shutil.move(file, there)
        at(there, 0.4663)  # the times of 34 snapshots are not quite those of 91


@pytest.mark.parametrize(("old_names", "number"), [(False, "074"), (True, "025")])
def test_a_redshift_is_read_whatever_its_number(tmp_path: Path, old_names: bool, number: str) -> None:
    write_camels(tmp_path, 1, 64, old_names=old_names)
    renamed(tmp_path, "033" if old_names else "090", number)
    ((found, _),) = SelectionConfig(path=tmp_path, redshift=0.47).open({})
    assert found.redshift == 0.4663
    assert number in found.particle_files[0].name
    assert number in found.group_files[0].name


def test_a_number_of_another_row_is_not_taken_for_the_redshift(tmp_path: Path) -> None:
    """Of 91 snapshots the 25th is at z = 3.87, of 34 at z = 0.47."""
    write_camels(tmp_path, 1, 64)
    renamed(tmp_path, "090", "025")
    at(next(tmp_path.rglob("snapshot_025.hdf5")), 3.87)
    with pytest.raises(SimulationError, match=r"is at redshift 3\.87, 0\.47 was asked for"):
        SelectionConfig(path=tmp_path, redshift=0.47).open({})


@pytest.mark.parametrize(("old_names", "number"), [(False, "090"), (False, "033"), (True, "033")])
def test_another_time_is_not_taken_for_today(tmp_path: Path, old_names: bool, number: str) -> None:
    """Of 91 snapshots the 33rd is at z = 2.90, of 34 at z = 0: where the 90th was not downloaded."""
    write_camels(tmp_path, 2, 64, old_names=old_names)
    for file in sorted(tmp_path.rglob("*CV_1/*.hdf5")):
        there = file.with_name(f"{file.stem[:-3]}{number}.hdf5")
        shutil.move(file, there)
        at(there, 2.9)
    wrong = rf"CV_1/\w+_{number}\.hdf5 is at redshift 2\.90, 0 is the default: .*`snapshot`.*`redshift`"
    with pytest.raises(SimulationError, match=wrong):
        SelectionConfig(path=tmp_path).open({})
    (file,) = (tmp_path / "Sims").rglob(f"CV_1/sna*_{number}.hdf5")
    at(file, 0.005)  # simulations write the time step next to it
    assert [one.redshift for one, _ in SelectionConfig(path=tmp_path).open({})] == [0, 0.005]
    at(file, 2.9)
    shutil.rmtree(file.parents[1] / "CV_0")
    ((found, _),) = SelectionConfig(path=tmp_path, snapshot=int(number)).open({})
    assert found.redshift == 2.9


def test_another_time_of_tng_is_not_taken_for_today(tmp_path: Path) -> None:
    write_tng(tmp_path, n_particles=64, redshift=0.5)
    with pytest.raises(SimulationError, match=r"snap_099\.0\.hdf5 is at redshift 0\.50, 0 is the default"):
        SelectionConfig(format="tng", path=tmp_path).open({})


def test_tng_by_redshift(tmp_path: Path) -> None:
    write_tng(tmp_path, n_particles=64, redshift=0.5)
    output = tmp_path / "TNG10-1" / "output"
    for folder in sorted(output.iterdir()):
        for file in sorted(folder.iterdir()):
            file.rename(file.with_name(file.name.replace("099", "067")))
        folder.rename(folder.with_name(folder.name.replace("099", "067")))
    ((found, _),) = SelectionConfig(format="tng", path=tmp_path, redshift=0.5).open({})
    assert found.redshift == 0.5


def test_what_says_no_snapshot_is_refused_before_anything_is_read() -> None:
    with pytest.raises(ValidationError, match=r"no snapshot of camels is at redshift 0\.2; .* 0\.21 \(082\)"):
        SelectionConfig(redshift=0.2)
    with pytest.raises(ValidationError, match=r"snapshot \(74\) and redshift \(0\.47\)"):
        SelectionConfig(redshift=0.47, snapshot=74)
