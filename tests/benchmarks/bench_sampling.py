"""Sampling halos with a trained model.

`galdist predict` from a Parquet file of halos to one of galaxies: five inputs, four properties, one sample a
halo, in a process of its own with one thread. The networks have their default sizes; their weights are
random, which costs the same. The rate is that of drawing and writing; what a run of a thousand halos takes
(the start of Python and torch) is subtracted. Memory is the peak of the process, most of which is there
before the first halo ("start"). The last row but one is 10^7 halos: memory stays where it was.

Plain is a loop around the same network: inputs and draws in memory, batches of 65,536 halos, nothing checked,
marked or written. A graph has none: neighbors are what it would lack. Of scikit-learn, the mean by a fitted
`MLPRegressor` of two hidden layers of 64, all halos at once.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from sklearn.neural_network import MLPRegressor
from threadpoolctl import threadpool_limits

from galdist.models import MODELS, build, objective_class
from galdist.models.tables import TableObjective
from galdist.training.checkpoint import save_model

BATCH = 65_536
FEW, SOME, MANY = 1_000, 1_000_000, 10_000_000
LARGE = "sqr"
"""The family that draws for the largest table."""


_CALL = """
import sys
from galdist.cli import main
try:
    main()
finally:  # what rusage says may be the peak of the process that started this one
    sys.stderr.write(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def columns(n: int, seed: int) -> dict[str, NDArray[np.float32]]:
    """Halos and galaxies with plausible numbers."""
    random = np.random.default_rng(seed)
    mass = 10.5 + random.exponential(0.45, n)
    made = {
        "log_halo_mass": mass,
        "log_concentration": random.normal(1, 0.12, n),
        "formation_redshift": random.gamma(5, 0.27, n),
        "spin": random.gamma(3, 0.016, n),
        "overdensity": random.exponential(3, n),
        "log_stellar_mass": 8.7 + 1.5 * (mass - 10.5) + random.normal(0, 0.2, n),
        "color_gi": random.normal(0.7, 0.25, n),
        "log_ssfr": random.normal(-10.5, 1, n),
        "log_radius": random.normal(0.5, 0.15, n),
    }
    return {name: values.astype(np.float32) for name, values in made.items()}


def families() -> list[str]:
    """Families of tables, without those of the tests."""
    found = [name for name in MODELS if objective_class(name).__module__.startswith("galdist.")]
    return [name for name in found if objective_class(name).Config.learns_from == "rows"]


def make_model(name: str, step: Path) -> TableObjective:
    """An untrained model with the means and ranges of some rows, also saved."""
    model = build(objective_class(name).Config(name=name))
    assert isinstance(model, TableObjective)
    rows = columns(20_000, 0)
    model.prepare(lambda column: iter([rows[column]]))
    save_model(step / "model", model, model.state_dict(), {})
    return model.eval()


def side(n: int) -> float:
    """Side [Mpc/h] of a box with ``n`` halos as dense as those of TNG300 above 10^10.5 Msun/h."""
    return float(205 * (n / 174_527) ** (1 / 3))


def make_halos(path: Path, n: int) -> None:
    """A Parquet file of ``n`` halos, written a million at a time."""
    writer = None
    for seed, start in enumerate(range(0, n, SOME)):
        rows = columns(min(SOME, n - start), seed)
        n_rows = len(rows["spin"])
        positions = np.random.default_rng(seed).uniform(0, side(n), (3, n_rows)).astype(np.float32)
        halos = {name: rows[name] for name in list(rows)[:5]} | dict(zip("xyz", positions, strict=True))
        table = pyarrow.table(halos)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()


def predict(step: Path, halos: Path, out: Path, n: int) -> tuple[float, float]:
    """Seconds, and peak memory [MB]."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", _CALL, "predict", str(step), str(halos), "--out", str(out)]
    if step.name == "graph-sqr":
        command += ["--columns", f"box_size={side(n)}"]
    began = time.perf_counter()
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return time.perf_counter() - began, int(done.stderr.splitlines()[-1].split()[1]) / 1e3


def plain(model: TableObjective, n: int) -> float:
    """Seconds of a loop in this process."""
    inputs = torch.from_numpy(np.stack([columns(n, 0)[name] for name in model.inputs], 1))
    generator = torch.Generator().manual_seed(0)
    began = time.perf_counter()
    with torch.inference_mode():
        torch.cat([model.sample({"inputs": part}, 1, generator) for part in inputs.split(BATCH)])
    return time.perf_counter() - began


def scikit_learn(n: int) -> float:
    """Seconds of a prediction in this process."""
    table = columns(n, 0)
    x, y = (np.stack([table[name] for name in side], 1) for side in (list(table)[:5], list(table)[5:]))
    network = MLPRegressor(hidden_layer_sizes=(64, 64), max_iter=20).fit(x[:FEW], y[:FEW])
    began = time.perf_counter()
    network.predict(x)
    return time.perf_counter() - began


def run() -> list[dict[str, Any]]:
    """A row a family, one of many halos, and scikit-learn."""
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, threadpool_limits(1):
        place = Path(folder)
        for n in (FEW, SOME, MANY):
            make_halos(place / f"{n}.parquet", n)
        for name, n in [*((name, SOME) for name in families()), (LARGE, MANY)]:
            model = make_model(name, place / name)
            alone = plain(model, n) if model.neighborhood is None and n == SOME else None
            start, at_start = predict(place / name, place / f"{FEW}.parquet", place / "few.parquet", FEW)
            seconds, peak = predict(place / name, place / f"{n}.parquet", place / "out.parquet", n)
            rows.append(
                {
                    "model": name,
                    "halos": n,
                    "halos/s": n / (seconds - start),
                    "plain [halos/s]": alone and n / alone,
                    "x plain": alone and alone / (seconds - start),
                    "seconds": seconds,
                    "peak memory [MB]": round(peak),
                    "start [MB]": round(at_start),
                    "file [MB]": (place / "out.parquet").stat().st_size / 1e6,
                }
            )
        empty = dict.fromkeys(rows[0])
        rows.append(
            {**empty, "model": "scikit-learn", "halos": SOME, "plain [halos/s]": SOME / scikit_learn(SOME)}
        )
    return rows


if __name__ == "__main__":
    for row in run():
        print(row)
