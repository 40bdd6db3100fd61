"""The notebook of the documentation, executed on a small run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from run_fixture import HAS_SPECTRA, write_run

import galdist

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebooks" / "quickstart.ipynb"

# The quickstart, with fewer, coarser and less trained boxes.
SMALL = (
    "universe-a.simulations=3",
    "universe-a.n_particles=32",
    "universe-a.steps=5",
    "universe-b.n_particles=32",
    "universe-b.steps=5",
    "grids-a.split={validation: [CV_1], test: [CV_2]}",
    "catalog-a.split={validation: [CV_1], test: [CV_2]}",
    "grids-a.n_mesh=32",
    "grids-b.n_mesh=32",
    "classifier.model={name: r2unet-classifier, channels: [4, 8], recurrence: 1}",
    "regressor.model={name: r2unet-regressor, channels: [4, 8], recurrence: 1}",
    "classifier.data={crop: 16}",
    "regressor.data={crop: 16}",
    "classifier.epochs=2",
    "regressor.epochs=2",
    "hod.mass=mass",
)

pytestmark = pytest.mark.skipif(not HAS_SPECTRA, reason="nbodykit is not installed")


def _execute(folder: Path) -> list[str]:
    """Run the notebook in ``folder``; the text of all of its outputs."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    return [str(output.get("data", {}).get("text/plain", "")) for output in outputs]


def test_the_notebook_is_stored_without_results() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


def test_the_notebook_runs(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "quickstart", name="quickstart")
    outputs = _execute(tmp_path)
    assert "Run 'quickstart'" in outputs[0]
    assert any("xarray.Dataset" in text for text in outputs)
    assert sum("Figure" in text for text in outputs) == 2


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_notebook_runs_on_the_real_pipeline_at_small_size(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "galdist", "run", "quickstart"]
    for setting in SMALL:
        command += ["--set", setting]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1000,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = galdist.open_run(tmp_path / "runs" / "quickstart")
    assert {step.state for step in run.steps.values()} == {"done"}
    page = (run.path / "report" / "report.html").read_text(encoding="utf-8")
    for section in ("Boxes", "Spectra", "Halo occupation", "Training", "Results", "Provenance"):
        assert f"<h2>{section}</h2>" in page
    assert "../grids-a/dask-report.html" in page
    assert str(run.path / "report" / "report.html") in done.stdout
    assert any("xarray.Dataset" in text for text in _execute(tmp_path))
    shutil.rmtree(run.path)
