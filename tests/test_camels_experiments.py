"""The studies of CAMELS as they ship, on a small tree of its files: planned, and which boxes are for what."""

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
from small_runs import cut_down
from universe import write_camels

from galdist.config import load
from galdist.plan import plan
from galdist.simulations.simulation import SelectionConfig
from hpc.strict import SettingsError

STUDIES = ("camels-r2unet", "camels-study", "camels-cross", "camels-conditioned")
N_LH = 20


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sets CV of two suites and a part of LH, with an earlier snapshot of one, below a folder CAMELS."""
    root = tmp_path_factory.mktemp("downloads") / "CAMELS"
    for suite in ("IllustrisTNG", "SIMBA"):
        write_camels(root, 27, n_particles=64, suite=suite)
    write_camels(root, N_LH, n_particles=64, suite="IllustrisTNG", set="LH")
    feedback = np.geomspace(0.25, 4, N_LH)
    lines = [f"LH_{i} 0.3 0.8 {a} 1 1 1 {i}" for i, a in enumerate(feedback)]
    (parameters,) = root.rglob("*_LH.txt")
    parameters.write_text("\n".join(lines))
    for kind in ("Sims", "FOF_Subfind"):
        for file in sorted((root / kind).glob("IllustrisTNG*/*/CV/*/*_090.hdf5")):
            earlier = Path(shutil.copy(file, file.with_name(file.name.replace("090", "074"))))
            with h5py.File(earlier, "r+") as hdf5:
                hdf5["Header"].attrs["Redshift"] = 0.468
    return root


def selections(name: str) -> Iterator[tuple[str, SelectionConfig]]:
    for step, config in load(name).configs.items():
        if isinstance(config, SelectionConfig):
            yield step, config


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_is_planned_on_downloads(
    name: str, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the run file is: it says that they are in a folder CAMELS."""
    monkeypatch.chdir(tree.parent)
    run = load(name)
    assert [step.name for step in plan(run, tmp_path) if step.runs] == list(run.order)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match=r"there is nothing at .*CAMELS"):
        plan(load(name), tmp_path)


@pytest.mark.parametrize("name", STUDIES)
def test_halos_are_of_the_boxes_of_the_grids(name: str, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree.parent)
    splits = {
        step: {(one.name, one.redshift): split for one, split in config.open({})}
        for step, config in selections(name)
    }
    run = load(name)
    grids = {step for step, entry in run.steps.items() if entry.stage == "ingest"}
    catalogs = splits.keys() - grids
    assert catalogs
    assert all(splits[step] in [splits[grid] for grid in grids] for step in catalogs)
    for step in grids:
        assert "test" in splits[step].values(), step


def test_domains_do_not_share_boxes(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree.parent)
    opened = {step: config.open({}) for step, config in selections("camels-cross")}
    weak, strong = ([one for one, _ in opened[step]] for step in ("weak", "strong"))
    assert len(weak) + len(strong) == N_LH
    assert max(one.astrophysics["A_SN1"] for one in weak) < 2
    assert min(one.astrophysics["A_SN1"] for one in strong) >= 2
    assert {split for _, split in opened["strong"]} == {"test"}
    assert Counter(split for _, split in opened["weak"]) == {"train": 13, "validation": 1, "test": 1}
    tested = {step: {one.name for one, split in opened[step] if split == "test"} for step in ("tng", "early")}
    assert tested["tng"] == tested["early"] == {"IllustrisTNG_CV_25", "IllustrisTNG_CV_26"}
    assert all(one.particle_files[0].name == "snapshot_074.hdf5" for one, _ in opened["early"])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_study_runs_on_mock_universes(tmp_path: Path) -> None:
    """From simulation to the table of slopes, with networks that have learned next to nothing."""
    pytest.importorskip("nbodykit", reason="nbodykit is not installed: run `make setup`")
    small = {"simulations": 9, "box_size": 12.5, "n_particles": 24, "mesh_factor": 2}
    mock = cut_down(
        "camels-mock",
        tmp_path / "mock",
        **{f"lh_a__{key}": value for key, value in small.items()},
        **{
            f"{cv}__{key}": value
            for cv in ("cv_a", "cv_b", "large")
            for key, value in (small | {"simulations": 1}).items()
        },
    )
    selection = {
        "path": mock.steps["lh-a"].path,
        "suite": "MockA",
        "min_stellar_mass": 1e9,
        "split": "{validation: 0.12, test: 0.34}",
    }
    training = {
        "model__channels": "[4, 8]",
        "epochs": 1,
        "batch_size": 4,
        "data": "{crop: 8, crops_per_box: 4, halo: 4}",
    }
    run = cut_down(
        "camels-conditioned",
        tmp_path / "run",
        grids__n_mesh=16,
        **{f"{step}__{key}": value for step in ("grids", "catalog") for key, value in selection.items()},
        **{f"{step}__{key}": value for step in ("told", "untold") for key, value in training.items()},
        **{f"draws_{step}__halo": 4 for step in ("told", "untold")},
        **{f"draws_{step}__tile": 16 for step in ("told", "untold")},
        spectra__band="[0.5, 3]",
        spectra__power_bands="[[0.5, 3]]",
        spectra__response="[A_SN1]",
        field_statistics__cells="[1, 2, 4]",
        field_statistics__void_radii="[1, 2]",
        field_statistics__bins=4,
        field_statistics__coverage_cells=4,
        report__boxes=1,
    )
    slopes = run.spectra()["response"]["quantities"]["n"]
    assert set(slopes) == {"truth", "draws-told", "draws-untold", "hod"}
    page = (Path(run.steps["report"].path) / "report.html").read_text()
    assert "Response to parameters" in page
    assert "Sether &amp; Giusarma (2024)" in page
