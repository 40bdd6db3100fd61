"""Rates, and what they make of the large simulations.

Rates are of one process with one thread on this machine. The ingest reads a box of 16.8 million particles in
64 HDF5 chunks; its start (Dask, imports) is measured with 4096 particles and taken off. The network is the
R2U-Net of the `camels-r2unet` run file; its operations are counted by PyTorch's `FlopCounterMode` on the
training step of one crop and on the prediction of one tile. Spectra are those of the `spectra` benchmark,
and the memory of a cell is the difference between two meshes.

The tables after it are arithmetic on these rates, on one core and without waiting for disks; what was not
measured (a GPU's speed) is left as operations.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

if __name__ == "__main__":
    sys.path[:0] = [str(folder) for folder in Path(__file__).parents[:2]]
import bench_spectra
from bench_ingest import write_tree

from galdist import config as run_file
from galdist.data.datasets import Tile
from galdist.models import Objective, build
from galdist.training.predict import PredictConfig
from galdist.training.train import TrainConfig
from hpc import durable, launch
from hpc.resources import Resources

PAGE = "scaling"
N_PARTICLES = 256**3
HOUR = 3600.0


def ingest(tree: Path, out: Path) -> tuple[float, int]:
    """Seconds of the stage with one worker, and its peak memory."""
    config = {"path": str(tree), "n_mesh": 256, "fields": [{"name": "matter_counts"}], "checksums": False}
    arguments = {"function": "galdist.grids.ingest:ingest", "config": config, "inputs": {}, "out": str(out)}
    start = time.perf_counter()
    task = launch.Task("galdist.stages:call", arguments, out, "dask", Resources(ranks=1))
    job = launch.submit(task)
    while (outcome := job.poll()) is None:
        time.sleep(0.02)
    if outcome.failures:
        raise RuntimeError(outcome.describe())
    return time.perf_counter() - start, max(outcome.peak_memory.values())


def network() -> tuple[Objective, TrainConfig, PredictConfig]:
    """The regressor of the CAMELS study, with the classifier in it."""
    study = run_file.load("camels-r2unet", ("grids.path=.", "catalog.path="))
    found = {}
    for step in ("classifier", "regressor"):
        settings = study.configs[step]
        assert isinstance(settings, TrainConfig)
        found[step] = build(settings.model, list(found.values()))
    settings, prediction = study.configs["regressor"], study.configs["r2unet"]
    assert isinstance(settings, TrainConfig)
    assert isinstance(prediction, PredictConfig)
    return found["regressor"], settings, prediction


def operations(model: Objective, crop: int, tile: Tile) -> tuple[float, float]:
    """Floating-point operations of a training step of one crop, and of the prediction of one tile."""
    random = np.random.default_rng(0)
    model.prepare(lambda field: iter([random.poisson(4, (crop,) * 3).astype(np.float32)]))
    with FlopCounterMode(display=False) as step:
        model.train()(crops(model, crop, 1))["loss"].backward()
    whole = {
        field: random.poisson(4, [side + 2 * tile.halo for side in tile.shape]).astype(np.float32)
        for field in model.inputs
    }
    inner = Tile((tile.halo,) * 3, tile.shape, tile.halo, periodic=False)
    with FlopCounterMode(display=False) as prediction, torch.no_grad():
        model.eval().predict(inner.batch(whole))
    return float(step.get_total_flops()), float(prediction.get_total_flops())


def crops(model: Objective, side: int, number: int) -> dict[str, Any]:
    """A batch of training crops."""
    fields = {field: torch.ones((number, 1, side, side, side)) for field in model.fields}
    return {"halo": 0, "periodic": False, **fields}


def seconds_of_a_step(model: Objective, crop: int, batch_size: int) -> float:
    """Shortest of three training steps of a crop, bf16, without an optimizer's."""
    best = np.inf
    for _ in range(3):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.train()(crops(model, crop, batch_size))["loss"]
        loss.backward()
        best = min(best, time.perf_counter() - start)
    return best / batch_size


def bytes_a_cell() -> float:
    """Peak memory that a cell costs the power spectrum."""
    peaks = []
    with tempfile.TemporaryDirectory() as folder:
        for n_mesh in (128, 256):
            path = Path(folder) / f"{n_mesh}.npy"
            np.save(path, np.ones((n_mesh,) * 3, np.float32))
            done = subprocess.run(
                [sys.executable, __file__, str(path)],
                check=True,
                capture_output=True,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "HPC_WORLD_SIZE": "1"},
            )
            peaks.append(int(done.stdout.splitlines()[-1]))
    return (peaks[1] - peaks[0]) / (256**3 - 128**3)


def run() -> dict[str, list[dict[str, Any]]]:
    """The rates, and what they say about TNG300-1 and 1000 boxes of CAMELS."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tree(folder / "box", N_PARTICLES)
        write_tree(folder / "idle", 4096)
        start, idle = ingest(folder / "idle", folder / "out-idle")
        plain, memory = ingest(folder / "box", folder / "out")
        files = list((folder / "box").rglob("*.hdf5"))
        began = time.perf_counter()
        for file in files:
            durable.sha256(file)
        hashed = sum(file.stat().st_size for file in files) / (time.perf_counter() - began)
        random = np.random.default_rng(0).gamma(0.5, 2.0, (256,) * 3).astype(np.float32)
        np.save(folder / "field.npy", random)
        spectrum = bench_spectra.ours(folder / "field.npy", 1)
    model, training, prediction = network()
    crop, halo = training.data.crop, prediction.halo or 0
    tile = Tile((0, 0, 0), (prediction.tile,) * 3, halo, periodic=False)
    step_flop, tile_flop = operations(model, crop, tile)
    step_seconds = seconds_of_a_step(model, crop, 4)
    weights = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    rate = {
        "particles": N_PARTICLES / (plain - start),
        "hash": hashed,
        "base": float(idle),
        "samples": 1 / step_seconds,
        "voxel": tile_flop / prediction.tile**3,
        "flops": step_flop / step_seconds,
        "cell": bytes_a_cell(),
        "spectrum": spectrum / (256**3 * np.log2(256**3)),
    }
    rates = [
        {"what": "ingest: read, bin, assign, write [million particles/s]", "rate": rate["particles"] / 1e6},
        {"what": "ingest: start and end of a step [s]", "rate": start},
        {"what": "ingest: peak memory of a worker, 256^3 [MB]", "rate": memory / 1e6},
        {"what": "ingest: the same without particles [MB]", "rate": idle / 1e6},
        {"what": "checksums of source files [GB/s]", "rate": rate["hash"] / 1e9},
        {"what": f"R2U-Net: operations of a training step, {crop}^3 crop [GFLOP]", "rate": step_flop / 1e9},
        {"what": "R2U-Net: training, bf16 on one core [samples/s]", "rate": rate["samples"]},
        {"what": "R2U-Net: the same [GFLOP/s]", "rate": rate["flops"] / 1e9},
        {"what": "R2U-Net: gradients that ranks exchange a step [MB]", "rate": 4 * weights / 1e6},
        {
            "what": f"R2U-Net: prediction of a voxel, tiles {prediction.tile}^3 + halo {halo} [MFLOP]",
            "rate": rate["voxel"] / 1e6,
        },
        {"what": "spectrum of 256^3 cells on one rank [s]", "rate": spectrum},
        {"what": "spectrum: memory of a cell [bytes]", "rate": rate["cell"]},
    ]
    return {
        "Rates": rates,
        "TNG300-1, one snapshot: 2500^3 particles in 600 chunks, 2.3 TB, on 2048^3 cells": tng300(rate),
        "CAMELS LH, 1000 boxes: 256^3 particles each, on 256^3 cells": camels(rate, training, step_flop),
    }


def tng300(rate: dict[str, float]) -> list[dict[str, Any]]:
    """One snapshot on cells of the size that CAMELS networks know (205 / 2048 Mpc/h)."""
    particles, cells, slab = 2500**3, 2048**3, 64 * 2048**2
    return [
        row(
            "ingest, without checksums",
            600 + 32,
            particles / rate["particles"],
            rate["base"] + 8 * slab,
            4 * cells,
            32**3,
        ),
        row("its scattered positions (removed)", 600, None, None, 24 * particles * (1 + 4 / 64), 1200),
        row("checksums, where wanted", 600, 2.3e12 / rate["hash"], None, None, None),
        row("predict", 32**3, None, 2e9, 2 * 4 * cells, 2 * 32**3, rate["voxel"] * cells),
        row(
            "spectra, three fields",
            1,
            3 * rate["spectrum"] * cells * np.log2(cells),
            rate["cell"] * cells,
            None,
            None,
        ),
    ]


def camels(rate: dict[str, float], training: TrainConfig, step_flop: float) -> list[dict[str, Any]]:
    """A Latin hypercube, 700 boxes of it for training."""
    boxes, cells = 1000, 256**3
    samples = 700 * training.data.crops_per_box
    return [
        row(
            "ingest, without checksums",
            5000,
            boxes * cells / rate["particles"],
            rate["base"] + 8 * 64 * 256**2,
            8 * cells * boxes,
            128 * boxes,
        ),
        row("the same in shards of 256", 5000, None, None, 8 * cells * boxes, 8 * boxes),
        row(
            f"train, an epoch ({samples:,} crops)",
            1,
            samples / rate["samples"],
            None,
            8 * cells * 700,
            1400,
            samples * step_flop,
        ),
        row(
            "predict 150 boxes",
            150,
            None,
            2e9,
            2 * 4 * cells * 150,
            2 * 64 * 150,
            rate["voxel"] * cells * 150,
        ),
        row(
            "spectra of 150 boxes, three fields",
            1,
            450 * rate["spectrum"] * cells * np.log2(cells),
            rate["cell"] * cells,
            None,
            None,
        ),
    ]


def row(
    step: str,
    tasks: int,
    seconds: float | None,
    memory: float | None,
    disk: float | None,
    files: int | None,
    operations: float | None = None,
) -> dict[str, Any]:
    """A row: absent values are not known or nothing."""
    return {
        "step": step,
        "tasks": tasks,
        "core hours": None if seconds is None else seconds / HOUR,
        "PFLOP": None if operations is None else operations / 1e15,
        "memory [GB]": None if memory is None else memory / 1e9,
        "disk [GB]": None if disk is None else disk / 1e9,
        "files": files,
    }


def _peak_of_a_spectrum(path: str) -> int:
    from galdist.statistics.spectra import field_mesh, power

    field = np.load(path, mmap_mode="r")
    power(field_mesh(field.__getitem__, len(field), 25.0, "cic"))
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(_peak_of_a_spectrum(sys.argv[1]))
    else:
        print(json.dumps(run(), indent=1))
