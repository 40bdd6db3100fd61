"""Sampling halos with a trained model.

`galdist predict` from a Parquet file of halos to one of galaxies: five inputs, four properties, one sample a
halo, in a process of its own with one thread. The networks have their default sizes; their weights are
random, which costs the same. The rate is that of drawing and writing; what a run of a thousand halos takes
(the start of Python and torch) is subtracted. Memory is the peak of the process, most of which is there
before the first halo ("start"). The last row is 10^7 halos: memory stays where it was.
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
from numpy.typing import NDArray

from galdist.models import MODELS, build, objective_class
from galdist.models.tables import TableObjective
from galdist.training.checkpoint import save_model

FEW, SOME, MANY = 1_000, 1_000_000, 10_000_000
LARGE = "sqr"
"""The family that draws for the largest table."""


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
    """Families of tables."""
    return [name for name in MODELS if objective_class(name).Config.learns_from == "rows"]


def make_model(name: str, step: Path) -> None:
    """An untrained model with the means and ranges of some rows."""
    model = build(objective_class(name).Config(name=name))
    assert isinstance(model, TableObjective)
    rows = columns(20_000, 0)
    model.prepare(lambda column: iter([rows[column]]))
    save_model(step / "model", model, model.state_dict(), {})


def make_halos(path: Path, n: int) -> None:
    """A Parquet file of ``n`` halos, written a million at a time."""
    writer = None
    for seed, start in enumerate(range(0, n, SOME)):
        rows = columns(min(SOME, n - start), seed)
        table = pyarrow.table({name: rows[name] for name in list(rows)[:5]})
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()


def predict(step: Path, halos: Path, out: Path) -> tuple[float, float]:
    """Seconds, and peak memory [MB]."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "galdist", "predict", str(step), str(halos), "--out", str(out)]
    began = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, command
    return time.perf_counter() - began, usage.ru_maxrss / 1e3


def run() -> list[dict[str, Any]]:
    """A row a family, and one of many halos."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for n in (FEW, SOME, MANY):
            make_halos(place / f"{n}.parquet", n)
        for name, n in [*((name, SOME) for name in families()), (LARGE, MANY)]:
            make_model(name, place / name)
            start, at_start = predict(place / name, place / f"{FEW}.parquet", place / "few.parquet")
            seconds, peak = predict(place / name, place / f"{n}.parquet", place / "out.parquet")
            rows.append(
                {
                    "model": name,
                    "halos": n,
                    "halos/s": n / (seconds - start),
                    "seconds": seconds,
                    "peak memory [MB]": round(peak),
                    "start [MB]": round(at_start),
                    "file [MB]": (place / "out.parquet").stat().st_size / 1e6,
                }
            )
    return rows


if __name__ == "__main__":
    for row in run():
        print(row)
