"""Timed training steps: real ones, on real stores, whatever the run has done already."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_grids import CLASSIFIER, make_grids
from typer.testing import CliRunner

from galdist import bench, config
from galdist.cli import app
from galdist.grids.store import open_store
from hpc.resources import Resources
from hpc.site import Site
from hpc.strict import SettingsError

REGRESSOR = {"name": "r2unet-regressor", "channels": [4, 8], "recurrence": 1}
FIELDS = [{"name": name} for name in ("matter_counts", "matter_momentum", "galaxy_counts")]


def run_file(folder: Path, **changes: Any) -> Path:
    steps = [
        {"name": "grids", "stage": "ingest", "config": {"path": ".", "n_mesh": 16, "fields": FIELDS}},
        {
            "name": "classifier",
            "stage": "train",
            "inputs": {"grids": ["grids"]},
            "config": CLASSIFIER | changes,
        },
        {
            "name": "regressor",
            "stage": "train",
            "inputs": {"grids": ["grids"], "models": ["classifier"]},
            "resources": {"ranks": 1},
            "config": CLASSIFIER | changes | {"model": REGRESSOR},
        },
        {"name": "predict", "stage": "predict", "inputs": {"grids": ["grids"], "model": ["regressor"]}},
    ]
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({"name": "small", "steps": steps}))
    return path


def measure(
    file: Path, step: str, ranks: tuple[int, ...] = (), site: Site | None = None
) -> list[bench.Speed]:
    run = config.load(str(file))
    found = bench.measure(run, step, file.parent / "out", site or Site(), ranks, 0.2, file.parent)
    return list(found)


def test_ranks_of_a_step_without_data_or_model_are_measured_and_nothing_stays(tmp_path: Path) -> None:
    file = run_file(tmp_path)
    one, two = measure(file, "regressor", (1, 2))
    assert (one.ranks, two.ranks) == (1, 2)
    for found in (one, two):
        assert found.samples > 0
        assert found.peak is not None
        assert 0 < found.flops < found.peak
        assert 0 <= found.waited <= 1
        assert found.memory is not None
        assert found.memory > 5e7
        # The operations of a sample do not depend on ranks.
        assert found.flops / found.samples == pytest.approx(one.flops / one.samples, rel=1e-9)
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_grids_that_are_done_are_read(tmp_path: Path) -> None:
    file = run_file(tmp_path)
    grids = tmp_path / "out" / "grids"
    make_grids(grids)
    run = config.load(str(file))
    made = bench._inputs(run, "classifier", tmp_path / "out", tmp_path / "made")["grids"]
    assert made == [tmp_path / "made" / "classifier-grids"]
    (grids / "done.json").write_text("{}")
    assert bench._inputs(run, "classifier", tmp_path / "out", tmp_path / "made")["grids"] == [grids]
    (found,) = measure(file, "classifier", (1,), Site(launcher="debug"))
    assert found.samples > 0


def test_boxes_have_the_fields_components_parameters_and_mesh_of_the_step(tmp_path: Path) -> None:
    inputs = [
        {"field": "matter_counts"},
        {"field": "matter_momentum", "components": 3, "normalization": ["standardize"]},
    ]
    model = {**CLASSIFIER["model"], "inputs": inputs, "parameters": ["Omega_m", "A_SN1"]}
    run = config.load(str(run_file(tmp_path, model=model)))
    (folder,) = bench._inputs(run, "classifier", tmp_path / "out", tmp_path)["grids"]
    store = open_store(folder / "grids.zarr")
    assert store.n_mesh == 16
    assert store.names("validation")
    (name,) = store.names("train")
    box = store[name]
    assert box.read("matter_momentum").shape == (3, 16, 16, 16)
    assert 0 < (box.read("galaxy_counts") > 0).mean() < 0.1
    assert {"Omega_m", "A_SN1"} <= box.attrs.cosmology.keys()


def test_operations_are_those_of_the_convolutions(tmp_path: Path) -> None:
    """A network of one level without recurrence: a 1^3 and two 3^3 convolutions and a linear layer,
    forward and twice backward; data have no gradient."""
    model = {"name": "r2unet-classifier", "channels": [4], "recurrence": 0}
    (found,) = measure(run_file(tmp_path, model=model), "classifier", (1,))
    voxels, c = 8**3, 4
    kernels = 2 * voxels * 27 * c * c
    project, head = 2 * voxels * c, 2 * voxels * c
    assert found.flops / found.samples == pytest.approx(3 * 2 * kernels + 2 * project + 3 * head, rel=1e-6)


@pytest.mark.parametrize(
    ("step", "ranks", "message"),
    [
        ("predict", (), "step 'predict' has stage predict.*choose one of classifier, regressor"),
        ("classifer", (), "there is no step 'classifer'; did you mean classifier"),
        ("classifier", (3,), "batch_size is 4.*ranks x accumulate = 3 x 1"),
    ],
)
def test_what_cannot_be_measured_is_refused_first(
    tmp_path: Path, step: str, ranks: tuple[int, ...], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        measure(run_file(tmp_path), step, ranks)
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_a_rank_that_fails_is_told_with_its_log(tmp_path: Path) -> None:
    data = CLASSIFIER["data"] | {"tile": 7}
    with pytest.raises(bench.BenchError, match=r"(?s)data\.tile is 7.*multiple of 2"):
        measure(run_file(tmp_path, data=data), "classifier", (1,))


def test_the_command_prints_a_table(tmp_path: Path) -> None:
    words = ["bench", "train", str(run_file(tmp_path)), "--step", "classifier", "--ranks", "1"]
    result = CliRunner().invoke(app, [*words, "--seconds", "0.2", "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    header, row = result.stdout.splitlines()[-2:]
    assert header.split()[:2] == ["ranks", "samples/s"]
    assert row.split()[0] == "1"
    assert row.split()[-2:] == ["1.00", "100%"]


def test_ctrl_c_ends_the_ranks_and_leaves_nothing(tmp_path: Path) -> None:
    file = run_file(tmp_path)
    command = [sys.executable, "-m", "galdist", "bench", "train", str(file), "--step", "classifier"]
    command += ["--ranks", "1", "--seconds", "600", "--out", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob(".bench-*/1-ranks/tensorboard")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert output.rstrip().endswith("galdist: stopped")
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize(
    ("device", "precision", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA H100 80GB HBM3", "fp32", 494.7e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA RTX A6000", "bf16", 154.8e12),
        ("NVIDIA GeForce GTX 1080", "bf16", None),
        ("NVIDIA L4", "bf16", None),
    ],
)
def test_peaks_go_by_the_name_of_the_device(device: str, precision: str, peak: float | None) -> None:
    assert bench.gpu_peak(device, precision) == peak


def test_the_rate_of_products_is_that_of_a_product() -> None:
    began = time.perf_counter()
    rate = bench.matmul_rate(torch.float32, 256, 3)
    assert 3 * 2 * 256**3 / rate <= time.perf_counter() - began


def test_tables_are_not_made_up(tmp_path: Path) -> None:
    run = config.load("mock-halos")
    step = next(step for step in run.steps.values() if step.stage == "train")
    (table,) = step.inputs["catalogs"]
    with pytest.raises(SettingsError, match=f"learns from tables, and {table} is not done.*--only {table}"):
        list(bench.measure(run, step.name, tmp_path / "out", Site(), (1,), 0.2, tmp_path))
    assert not list(tmp_path.iterdir())


def test_other_ranks_take_the_nodes_and_gpus_that_they_need() -> None:
    asked = Resources(nodes=2, gpus=4, cpus=8)
    found = {ranks: bench._resources(asked, ranks) for ranks in (1, 2, 4, 6, 8, 16)}
    assert {n: (r.nodes, r.gpus, r.ranks) for n, r in found.items()} == {
        1: (1, 1, 1),
        2: (1, 2, 2),
        4: (1, 4, 4),
        6: (2, 4, 6),
        8: (2, 4, 8),
        16: (4, 4, 16),
    }
    assert all(r.cpus == 8 for r in found.values())
    assert bench._resources(Resources(), 4) == Resources(ranks=4)
