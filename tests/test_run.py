"""A run folder as Python objects."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from run_fixture import BOXES, HAS_SPECTRA, N_MESH, write_run

import galdist
from galdist.grids.store import StoreError
from galdist.run import Run, RunError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(folder, tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    return galdist.open_run(folder)


def test_importing_galdist_loads_nothing_heavy() -> None:
    code = (
        "import sys, galdist\n"
        "heavy = {'torch', 'zarr', 'matplotlib', 'numpy', 'pandas', 'xarray', 'yaml', 'pydantic'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
        "galdist.open_run\n"
        "print(sorted({'torch', 'zarr', 'matplotlib', 'pandas', 'xarray'} & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["[]", "[]"]
    assert "open_run" in galdist.__all__
    with pytest.raises(AttributeError, match="no attribute 'open_ran'"):
        galdist.open_ran  # noqa: B018


def test_steps(run: Run) -> None:
    assert run.name == "tiny"
    assert list(run.steps)[:3] == ["grids-a", "classifier", "regressor"]
    grids = run.steps["grids-a"]
    assert (grids.stage, grids.state, grids.config) == ("ingest", "done", {"n_mesh": N_MESH})
    assert grids.provenance["host"] == "node01"
    assert run.steps["report"].state == "pending"
    assert run.steps["report"].config == {}
    assert run.steps["report"].provenance == {}
    assert "regressor" in repr(run)
    assert "done" in repr(grids)


def test_metrics_are_a_table(run: Run) -> None:
    table = run.metrics
    assert list(table.columns) == ["step", "metric", "sample", "value", "error", "unit"]
    occupation = table[table["step"] == "hod"].set_index("metric")
    assert tuple(occupation.loc["alpha", ["value", "error"]]) == (1.02, 0.04)
    assert occupation.loc["log10 M_min", "unit"] == "Msun/h"
    recall = table[(table["step"] == "r2unet") & (table["metric"] == "recall")].iloc[0]
    assert 0 < recall["value"] < 1
    assert np.isnan(recall["error"])


def test_history_is_a_table_by_epoch(run: Run, copy: Path) -> None:
    history = run.history("classifier")
    assert list(history.index) == list(range(24))
    assert history["validation_loss"].iloc[-1] < history["validation_loss"].iloc[0]
    with open(copy / "classifier" / "history.jsonl", "a") as stream:
        stream.write('{"epoch": 24, "train_lo')  # being written now
    assert len(galdist.open_run(copy).history("classifier")) == 24
    with open(copy / "classifier" / "history.jsonl", "a") as stream:
        stream.write("\n")
    with pytest.raises(RunError, match=r"history\.jsonl, line 25: not JSON"):
        galdist.open_run(copy).history("classifier")


def test_grids_know_dimensions_coordinates_and_units(run: Run) -> None:
    grids = run.grids()
    assert list(grids) == list(BOXES)
    counts = grids["MockA_CV_0"]["galaxy_counts"]
    assert counts.dims == ("z", "y", "x")
    assert counts.shape == (N_MESH,) * 3
    assert counts.coords["x"].attrs["units"] == "Mpc/h"
    assert float(counts.coords["x"][-1]) == pytest.approx(25.0 * (1 - 0.5 / N_MESH))
    assert grids["MockA_CV_0"].attrs["suite"] == "MockA"
    assert float(counts.sum()) > 0


def test_predictions_carry_model_and_checkpoint(run: Run) -> None:
    predicted = run.predictions("r2unet")["MockA_CV_1"]
    assert predicted.attrs["model"] == "r2unet-regressor"
    assert predicted.attrs["checkpoint"] == "0" * 64
    assert set(predicted.data_vars) == {"galaxy_counts", "galaxy_probability", "expected_galaxy_counts"}
    assert float(predicted["galaxy_probability"].max()) <= 1


@pytest.mark.skipif(not HAS_SPECTRA, reason="nbodykit is not installed")
def test_spectra_are_arrays(run: Run) -> None:
    box = run.spectra()["simulations"]["MockA_CV_1"]
    assert isinstance(box["k"], np.ndarray)
    assert box["cross"]["r2unet"]["r"].shape == box["k"].shape


def test_a_result_of_several_steps_needs_a_name(run: Run) -> None:
    with pytest.raises(RunError, match="several steps have a training history: classifier, regressor"):
        run.history()
    with pytest.raises(RunError, match="no step 'clasifier'; the run has grids-a, classifier"):
        run.history("clasifier")
    with pytest.raises(RunError, match=r"step 'grids-a' \(ingest, done\) has no history.jsonl.*regressor"):
        run.history("grids-a")


def test_an_unfinished_run_opens(copy: Path) -> None:
    for step in ("classifier", "regressor", "r2unet", "hod", "spectra"):
        shutil.rmtree(copy / step, ignore_errors=True)
    (copy / "grids-a" / "done.json").unlink()
    run = galdist.open_run(copy)
    assert run.steps["grids-a"].state == "stopped"
    assert run.steps["classifier"].state == "pending"
    assert run.metrics.empty
    with pytest.raises(
        RunError, match=r"no step has predictions \(prediction.zarr\) yet; steps: grids-a \(sto"
    ):
        run.predictions()
    (copy / "grids-a" / "grids.zarr" / "zarr.json").unlink()
    with pytest.raises(StoreError, match=r"grids\.zarr"):
        run.grids()


def test_steps_are_looked_up_anew(copy: Path) -> None:
    run = galdist.open_run(copy)
    (copy / "grids-a" / "done.json").unlink()
    assert run.steps["grids-a"].state == "stopped"


def test_where_there_is_no_run_the_message_says_what_is_there(folder: Path) -> None:
    with pytest.raises(RunError, match=r"tiyn: there is no such folder; .* holds tiny"):
        galdist.open_run(folder.parent / "tiyn")
    with pytest.raises(RunError, match=r"this is a step; its run is .*tiny"):
        galdist.open_run(folder / "grids-a")
    with pytest.raises(RunError, match=r"there is no run here .*; runs in it: tiny"):
        galdist.open_run(folder.parent)


def test_files_that_are_not_what_they_should_be_are_named(copy: Path) -> None:
    (copy / "grids-a" / "config.yaml").write_text("a: [")
    with pytest.raises(RunError, match=r"grids-a/config\.yaml: not YAML"):
        print(galdist.open_run(copy).steps["grids-a"].config)
    (copy / "grids-a" / "config.yaml").write_text("- 1")
    with pytest.raises(RunError, match=r"config\.yaml: a mapping was expected, not list"):
        print(galdist.open_run(copy).steps["grids-a"].config)


def test_yaml_is_loaded_safely(copy: Path) -> None:
    (copy / "grids-a" / "config.yaml").write_text("a: !!python/object/apply:os.getpid []")
    with pytest.raises(RunError, match="not YAML"):
        print(galdist.open_run(copy).steps["grids-a"].config)


def test_history_rows_are_what_was_written(folder: Path, run: Run) -> None:
    lines = (folder / "regressor" / "history.jsonl").read_text().splitlines()
    assert run.steps["regressor"].history == [json.loads(line) for line in lines]
