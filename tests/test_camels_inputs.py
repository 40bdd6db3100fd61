"""The study of inputs as it ships, on a small tree of CAMELS' files: which boxes and matter are read."""

import shutil
from pathlib import Path

import pytest
from small_runs import cut_down
from universe import write_camels

from galdist.config import load
from galdist.grids.ingest import IngestConfig
from galdist.grids.matter import with_matter
from galdist.plan import plan
from hpc.strict import SettingsError


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Below one folder CAMELS, with runs with and without galaxies, and COLA."""
    root = tmp_path_factory.mktemp("downloads")
    write_camels(root / "CAMELS", 27, n_particles=64, suite="IllustrisTNG")
    write_camels(root / "COLA", 27, n_particles=64, suite="IllustrisTNG")
    sims = root / "CAMELS" / "Sims"
    shutil.copytree(sims / "IllustrisTNG_DM", sims / "IllustrisTNG")
    return root


def test_the_study_is_planned_on_downloads(
    downloads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(downloads)
    run = load("camels-inputs")
    assert [step.name for step in plan(run, tmp_path) if step.runs] == list(run.order)
    (downloads / "COLA").rename(downloads / "elsewhere")
    with pytest.raises(SettingsError, match=r"there is nothing at .*COLA"):
        plan(load("camels-inputs"), tmp_path)
    (downloads / "elsewhere").rename(downloads / "COLA")


def test_all_inputs_have_the_same_boxes_for_the_same_purpose(
    downloads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(downloads)
    steps = {
        name: config
        for name, config in load("camels-inputs").configs.items()
        if isinstance(config, IngestConfig)
    }
    opened = {name: config.open({}) for name, config in steps.items()}
    splits = [[(one.name, split) for one, split in boxes] for boxes in opened.values()]
    assert all(each == splits[0] for each in splits)
    folders = {}
    for name, config in steps.items():
        (first, *_) = with_matter([one for one, _ in opened[name]], config, config.matter_of, {})
        folders[name] = first.matter.particle_files[0].relative_to(downloads).parts[:3]
        assert "FOF_Subfind/IllustrisTNG/" in str(first.group_files[0])
    assert folders == {
        "grids-nbody": ("CAMELS", "Sims", "IllustrisTNG_DM"),
        "grids-cola": ("COLA", "Sims", "IllustrisTNG_DM"),
        "grids-total": ("CAMELS", "Sims", "IllustrisTNG"),
        "lattice": ("COLA", "Sims", "IllustrisTNG_DM"),
        "grids-corrected": ("CAMELS", "Sims", "IllustrisTNG_DM"),  # without the step before
    }


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_study_runs_on_mock_universes(tmp_path: Path) -> None:
    """From two simulations of the same initial conditions to the report, with networks that have learned next
    to nothing. There is no gas in the mock universes: N-body stands for all matter."""
    universe = "simulations: 4, box_size: 25.0, n_particles: 32, mesh_factor: 2"
    file = tmp_path / "mock.yaml"
    file.write_text(
        "name: mock\nsteps:\n"
        f"  - {{name: nbody, stage: simulate, config: {{{universe}, steps: 30}}}}\n"
        f"  - {{name: cola, stage: simulate, config: {{{universe}, steps: 5}}}}\n"
    )
    mock = cut_down(str(file), tmp_path / "mock")
    universes = {name: step.path for name, step in mock.steps.items()}
    selection = {
        "path": universes["nbody"],
        "suite": "MockA",
        "n_mesh": 32,
        "min_stellar_mass": 1e9,
        "split": "{validation: [2], test: [3]}",
    }
    inputs = ("grids_nbody", "grids_cola", "grids_total", "grids_corrected", "lattice")
    counts = ("nbody", "velocities", "cola", "corrected", "total")
    training = {"model__channels": "[4, 8]", "epochs": 1, "batch_size": 4}
    predictions = (*(f"from_{name}" for name in counts), "nbody_on_cola", "nbody_on_corrected")
    run = cut_down(
        "camels-inputs",
        tmp_path / "run",
        **{f"{step}__{key}": value for step in inputs for key, value in selection.items()},
        **{f"{step}__matter_of__path": universes["cola"] for step in ("grids_cola", "lattice")},
        grids_total__matter="nbody",
        **{f"correction__{key}": value for key, value in training.items()},
        correction__data="{crop: 32, crops_per_box: 8}",
        corrected__tile=32,
        **{f"counts_{name}__{key}": value for name in counts for key, value in training.items()},
        **{f"counts_{name}__data": "{crop: 16, crops_per_box: 8, halo: 4}" for name in counts},
        **{f"{step}__{key}": value for step in predictions for key, value in {"tile": 32, "halo": 4}.items()},
        report__boxes=1,
    )
    metrics = {(row["metric"], row["sample"]) for row in run.steps["corrected"].metrics}
    assert ("displacement_error", "MockA_CV_3") in metrics
    labels = run.spectra()["simulations"]["MockA_CV_3"]["fields"]
    assert {"truth", "matter", *(step.replace("_", "-") for step in predictions)} <= set(labels)
    assert (Path(run.steps["report"].path) / "report.html").is_file()
