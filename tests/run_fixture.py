"""A small finished run with the quickstart's names, written with the real stores and spectra."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from galdist.grids.store import Field, GridStore, SimulationAttrs, create_store
from galdist.statistics.metrics import Confusion, metric_row, save_metrics
from galdist.statistics.occupation import fit_power_law
from hpc import durable

BOX_SIZE, N_MESH = 25.0, 32
BOXES = {"MockA_CV_0": "train", "MockA_CV_1": "test", "MockB_CV_1": "test"}
_ASKED = {"ranks": 4, "nodes": 2, "min_nodes": 1, "cpus": 2, "gpus": 2, "memory": 8 << 30, "time": 7200}
_USED = {"elapsed": 3600.0, "cpu_seconds": 14400.0, "max_rss": 4 << 30, "cpus": 8, "memory_asked": 16 << 30}
_WORKERS = {"elapsed": 7000.0, "cpu_seconds": 6300.0, "max_rss": 3 << 30, "cpus": 4, "memory_asked": 8 << 30}
RESOURCES: dict[str, dict[str, Any]] = {
    "classifier": {
        "asked": {"launcher": "slurm", **_ASKED},
        "job": {"id": "4711", "nodes": ["n1", "n2"], "restarts": 2},
        "usage": _USED | {"time_limit": 7200.0, "gpus": 4, "gpu_utilization": 83.4, "workers": None},
        "attempts": [
            {"started": "2026-03-01T11:00:00+00:00", "job": "4700", "error": "rank 1: was killed\nits log"}
        ],
    },
    "grids-a": {
        "asked": {"launcher": "slurm", "ranks": 2, "nodes": 2, "cpus": 1, "memory": None, "time": None},
        "job": {"id": "4712", "nodes": ["n3"], "restarts": 0},
        "usage": {"elapsed": 60.0, "cpu_seconds": 30.0, "cpus": 1, "gpus": 0, "workers": _WORKERS},
        "attempts": [],
    },
    "hod": {
        "asked": {"launcher": "local", "ranks": 1, "nodes": None, "cpus": None, "memory": None, "time": None},
        "job": {"id": "pid 99", "nodes": ["node01"], "restarts": 0},
        "usage": {"elapsed": 20.0, "cpu_seconds": 30.0},
        "attempts": [],
    },
}
"""What a cluster, or this machine, tells of some steps; older runs tell nothing."""

HAS_SPECTRA = find_spec("nbodykit") is not None

STAGES = {
    "grids-a": "ingest",
    "classifier": "train",
    "regressor": "train",
    "r2unet": "predict",
    "hod": "hod",
    "spectra": "spectra",
    "report": "report",
}


def write_run(path: Path, name: str = "tiny", description: str = "A tiny run.") -> Path:
    """Write a run of every kind of step but the report, whose folder is there and empty."""
    path.mkdir(parents=True)
    steps = [
        {"name": step, "stage": stage, "config": {}}
        for step, stage in STAGES.items()
        if step != "spectra" or HAS_SPECTRA
    ]
    run = {"name": name, "description": description, "seed": 1, "steps": steps}
    durable.write_text(path / "run.yaml", yaml.safe_dump(run))
    durable.write_json(path / ".plan.json", {step["name"]: _fingerprint(step["name"]) for step in steps})
    for number, step in enumerate(steps):
        (path / step["name"]).mkdir()
        if step["stage"] != "report":
            _state(path / step["name"], step["stage"], number)

    rng = np.random.default_rng(1)
    density = {box: _density(rng) for box in BOXES}
    counts = {box: rng.poisson(0.05 * rho**2) for box, rho in density.items()}
    fields = [Field(name="matter_counts", assignment="cic"), Field(name="galaxy_counts", assignment="ngp")]
    grids = _store(path / "grids-a" / "grids.zarr", fields, BOXES)
    for box, rho in density.items():
        grids[box].write("matter_counts", (8 * rho).astype("f4"))
        grids[box].write("galaxy_counts", counts[box].astype("f4"))
    durable.write_text(path / "grids-a" / "dask-report.html", "<!doctype html><title>Dask</title>")

    tests = {box: split for box, split in BOXES.items() if split == "test"}
    predicted = _store(
        path / "r2unet" / "prediction.zarr",
        [Field(name="galaxy_counts"), Field(name="galaxy_probability"), Field(name="expected_galaxy_counts")],
        tests,
        {"model": "r2unet-regressor", "checkpoint": "0" * 64},
    )
    hod = _store(
        path / "hod" / "prediction.zarr",
        [Field(name="galaxy_counts")],
        tests,
        {"model": "hod", "checkpoint": "1" * 64},
    )
    confusion = Confusion()
    for box in tests:
        mean = 0.05 * density[box] ** 2 * rng.lognormal(-0.05, 0.3, (N_MESH,) * 3)
        drawn = rng.poisson(mean)
        predicted[box].write("galaxy_counts", drawn.astype("f4"))
        predicted[box].write("galaxy_probability", (1 - np.exp(-mean)).astype("f4"))
        predicted[box].write("expected_galaxy_counts", mean.astype("f4"))
        simple = 0.075 * density[box]
        hod[box].write("galaxy_counts", rng.poisson(simple).astype("f4"))
        confusion += Confusion.of(drawn > 0, counts[box] > 0)
    save_metrics(path / "r2unet", [*confusion.rows("test"), metric_row("threshold", "test", 0.5)])
    save_metrics(
        path / "hod",
        [
            metric_row("log10 M_min", "train", 11.52, 0.013, "Msun/h"),
            metric_row("alpha", "train", 1.02, 0.04),
        ],
    )
    _occupation(path / "hod", rng)
    _history(path / "classifier", classifier=True)
    save_metrics(
        path / "classifier",
        [
            metric_row("samples_per_second", "train", 61.8, unit="1/s"),
            metric_row("data_wait_fraction", "train", 0.034),
            metric_row("device_wait_fraction", "train", 0.81),
            metric_row("peak_gpu_memory", "train", 3.21, unit="GB"),
        ],
    )
    _history(path / "regressor", classifier=False)
    if HAS_SPECTRA:
        measure_spectra(path, ["r2unet", "hod"])
    return path


def measure_spectra(run: Path, predictions: list[str]) -> None:
    """The real stage, in a process of its own: importing nbodykit changes Dask's scheduler."""
    code = (
        "import sys; from pathlib import Path\n"
        "from galdist.statistics.spectra import SpectraConfig, spectra\n"
        "run, *predictions = map(Path, sys.argv[1:])\n"
        "spectra(SpectraConfig(), {'grids': [run / 'grids-a'],"
        " 'predictions': [run / p for p in predictions]},"
        " run / 'spectra')"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(run), *predictions],
        check=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def _occupation(folder: Path, rng: np.random.Generator) -> None:
    mass = np.sort(3e11 * (1 + rng.pareto(1.0, 2000)))
    number = rng.poisson(np.where(mass > 5e11, (mass / 2e12) ** 0.9, 0))
    fitted = fit_power_law(mass, number)
    groups = [np.array(group) for group in np.array_split(np.arange(2000), 12)]
    bins = {
        "mass": [mass[group].mean() for group in groups],
        "n_halos": [group.size for group in groups],
        "measured": [number[group].mean() for group in groups],
        "error": [number[group].std() / group.size**0.5 for group in groups],
        "model": [fitted.mean(mass[group]).mean() for group in groups],
    }
    record = {**asdict(fitted), "mass": "mass_200c", "training": ["MockA_CV_0"], "occupation": bins}
    durable.write_json(folder / "hod.json", record)


def _density(rng: np.random.Generator) -> np.ndarray:
    """Lognormal 1 + delta with a red spectrum."""
    k = 2 * np.pi * np.sqrt(sum(np.meshgrid(*[np.fft.fftfreq(N_MESH) ** 2] * 3)))
    k[0, 0, 0] = np.inf
    field = np.fft.ifftn(np.fft.fftn(rng.normal(size=(N_MESH,) * 3)) * k**-1.0).real
    rho = np.exp(1.1 * field / field.std())
    return rho / rho.mean()


def _store(
    path: Path, fields: list[Field], boxes: dict[str, str], attrs: dict[str, Any] | None = None
) -> GridStore:
    simulations = [
        SimulationAttrs(
            name=box, box_size=BOX_SIZE, redshift=0.0, suite=box.split("_")[0], set="CV", split=split
        )
        for box, split in boxes.items()
    ]
    return create_store(path, simulations, fields, N_MESH, attrs=attrs)


def _state(folder: Path, stage: str, number: int) -> None:
    """The pipeline's own files."""
    started = datetime(2026, 3, 1, 12, number, tzinfo=UTC)
    durable.write_text(folder / "config.yaml", yaml.safe_dump({"n_mesh": N_MESH}))
    durable.write_text(folder / "log.txt", "a line\n")
    durable.write_json(
        folder / "provenance.json",
        {
            "step": folder.name,
            "stage": stage,
            "fingerprint": _fingerprint(folder.name),
            "inputs": {},
            "external": {},
            "seed": 1,
            "run_seed": 11,
            "versions": {"numpy": np.__version__, "galdist": "0.1.0"},
            "git_commit": "a" * 40,
            "host": "node01",
            "started": started.isoformat(),
            "finished": (started + timedelta(seconds=20 + 7 * number)).isoformat(),
            "seconds": 20 + 7.0 * number,
            "peak_memory": {"rank 0": 400 << 20, "rank 1": 390 << 20},
            "ranks": 2,
            "command": ["galdist", "run", "tiny"],
            "error": None,
            "runtime": "serial",
            "platform": "Linux x86_64, Python 3.11",
            **RESOURCES.get(folder.name, {}),
        },
    )
    durable.write_json(folder / "done.json", {"bytes": 1000})


def _fingerprint(step: str) -> str:
    return durable.fingerprint({"step": step})


def _history(folder: Path, classifier: bool) -> None:
    rng = np.random.default_rng(2)
    lines = []
    for epoch in range(1, 25):
        loss = 0.6 * epoch**-0.7
        row = {
            "epoch": epoch - 1,
            "seconds": 3.0,
            "train_loss": loss * rng.lognormal(0, 0.05),
            "validation_loss": 1.1 * loss * rng.lognormal(0, 0.1),
            "samples_per_second": 60 + rng.normal(),
            "data_wait_fraction": 0.03 + 0.01 * rng.random(),
            "learning_rate": 1e-3,
        }
        if classifier:
            row |= {
                "accuracy": 0.98 - 0.1 / epoch,
                "recall": 0.95 - 0.3 / epoch,
                "precision": 0.2 - 0.1 / epoch,
                "pr_auc": 0.6 - 0.4 / epoch,
            }
        else:
            row |= {"mean_squared_error": 0.4 / epoch}
        lines.append(json.dumps(row))
    durable.write_text(folder / "model" / "model.yaml", yaml.safe_dump({"epoch": 21}))
    durable.write_text(folder / "history.jsonl", "\n".join(lines) + "\n")
