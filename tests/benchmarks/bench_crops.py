"""Random 32^3 crops of a 256^3 field, by codec and chunking.

Training reads random crops. Each candidate holds the same two float32 fields: numbers of dark-matter
particles in a cell (256^3 clustered particles, CIC: no two alike) and numbers of galaxies (20,000, NGP:
nearly all zero). Crops are read one by one, in one process, the files in the page cache; the rate is the
best of three rounds. "zarrs" and "zarr" are the Rust and the Python codec pipeline of zarr-python. Through
zarr-python, layouts without compression read by zarrs come out ahead, since parts of such chunks are read
without the rest; among them, chunks of 64^3 and 128^3 and shards differ by less than two runs of this page
do. The store's default is the plainest of these: chunks of 64^3, no shards. Training decodes each chunk once
and crops it many times, as the row "memory" does.
"""

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from clustered import clustered_particles
from zarr.codecs import BloscCodec, ZstdCodec

from galdist.grids.mass_assignment import assign

N_MESH, CROP, BOX = 256, 32, 25.0
PIPELINES = {"zarrs": "zarrs.ZarrsCodecPipeline", "zarr": "zarr.core.codec_pipeline.BatchedCodecPipeline"}
CODECS = {
    "zstd 1": ZstdCodec(level=1),
    "blosc zstd 1, bit shuffle": BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle", typesize=4),
    "none": None,
}
LAYOUTS = ((32, None), (64, None), (128, None), (32, 128), (64, 256))


def rate(read: Callable[[tuple[slice, ...]], Any], seconds: float = 0.7) -> float:
    """Crops a second."""
    rng = np.random.default_rng(0)
    corners = rng.integers(0, N_MESH - CROP, (20_000, 3))
    crops = [tuple(slice(int(i), int(i) + CROP) for i in corner) for corner in corners]
    best = 0.0
    for _ in range(3):
        start, n = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            read(crops[n % len(crops)])
            n += 1
        best = max(best, n / (time.perf_counter() - start))
    return best


def run() -> dict[str, list[dict[str, Any]]]:
    """Crops a second and bytes on the disk of every candidate, for both fields."""
    rng = np.random.default_rng(1)
    fields = {
        "dark matter": assign(clustered_particles(N_MESH, BOX), BOX, N_MESH).astype("f4"),
        "galaxies": assign(rng.uniform(0, BOX, (20_000, 3)), BOX, N_MESH, "ngp").astype("f4"),
    }
    return {f"{name}, {CROP}^3 crops": candidates(values) for name, values in fields.items()}


def candidates(values: np.ndarray) -> list[dict[str, Any]]:
    """One row for each layout, codec and reader."""
    rows = [row("memory", None, None, "", rate(lambda crop: values[crop].copy()), values.nbytes)]
    folder = Path(tempfile.mkdtemp())
    try:
        for chunk, shard in LAYOUTS:
            for name, codec in CODECS.items():
                path = folder / "array.zarr"
                array = zarr.create_array(
                    path,
                    shape=values.shape,
                    chunks=(chunk,) * 3,
                    shards=None if shard is None else (shard,) * 3,
                    dtype="f4",
                    compressors=codec,
                    overwrite=True,
                )
                array[...] = values
                size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
                for pipeline, module in PIPELINES.items():
                    with zarr.config.set({"codec_pipeline.path": module}):
                        opened = zarr.open_array(path, mode="r")
                        rows.append(row(pipeline, chunk, shard, name, rate(opened.__getitem__), size))
                if shard is None:
                    rows.append(row("tensorstore", chunk, shard, name, rate(tensorstore_reader(path)), size))
    finally:
        shutil.rmtree(folder)
    return rows


def tensorstore_reader(path: Path) -> Callable[[tuple[slice, ...]], Any]:
    """Reads crops with tensorstore, which keeps no chunks in memory unless told to."""
    import tensorstore

    store = tensorstore.open({"driver": "zarr3", "kvstore": f"file://{path}/"}).result()
    return lambda crop: store[crop].read().result()


def row(
    reader: str, chunk: int | None, shard: int | None, codec: str, crops: float, size: int
) -> dict[str, Any]:
    """A row of the table."""
    return {
        "reader": reader,
        "chunk": chunk,
        "shard": shard,
        "codec": codec,
        "crops/s": round(crops),
        "MB": size / 1e6,
    }
