"""Training of an R2U-Net.

Samples a second of one process with one thread, on 32^3 crops with batches of 4. The plain loop is what one
writes first: the R2U-Net of Alom et al. with batch normalization, float32, PyTorch's default memory order,
Adam, crops from an array in memory. Ours is the `train` stage as it is (crops under the cube's symmetries
from a worker process, validation and checkpoints not counted), once in float32 and once with bf16 autocast.
Both networks have the same channels and recurrence. Wait is the fraction of our step time in which data were
waited for; the first epoch is not counted.
"""

import json
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from small_grids import make_grids
from torch import Tensor, nn

from galdist.grids.store import GridStore
from galdist.training.losses import weighted_cross_entropy
from galdist.training.train import TrainConfig, train

CROP, BATCH = 32, 4


class _Recurrent(nn.Module):
    def __init__(self, channels: int, recurrence: int) -> None:
        super().__init__()
        self.recurrence = recurrence
        self.convolve = nn.Sequential(
            nn.Conv3d(channels, channels, 3, padding=1), nn.BatchNorm3d(channels), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.convolve(x)
        for _ in range(self.recurrence):
            y = self.convolve(x + y)
        return y


class _Block(nn.Module):
    def __init__(self, n_in: int, n_out: int, recurrence: int) -> None:
        super().__init__()
        self.project = nn.Conv3d(n_in, n_out, 1)
        self.branch = nn.Sequential(_Recurrent(n_out, recurrence), _Recurrent(n_out, recurrence))

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(x)
        return x + self.branch(x)


class _PlainR2UNet(nn.Module):
    def __init__(self, channels: tuple[int, ...], recurrence: int) -> None:
        super().__init__()
        pairs = list(pairwise(channels))
        self.down = nn.ModuleList(
            _Block(a, b, recurrence) for a, b in zip((1, *channels[:-1]), channels, strict=True)
        )
        self.expand = nn.ModuleList(nn.ConvTranspose3d(b, a, 2, stride=2) for a, b in pairs)
        self.up = nn.ModuleList(_Block(2 * a, a, recurrence) for a, _ in pairs)
        self.head = nn.Conv3d(channels[0], 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else F.max_pool3d(x, 2))
            skips.append(x)
        x = skips.pop()
        for expand, block in zip(reversed(self.expand), reversed(self.up), strict=True):
            x = block(torch.cat([expand(x), skips.pop()], 1))
        return self.head(x)


def plain(store: GridStore, channels: tuple[int, ...], recurrence: int, steps: int) -> float:
    """Samples a second of the plain loop; two steps come first that are not counted."""
    matter, galaxies = (store["box_0"].read(field) for field in ("matter_counts", "galaxy_counts"))
    model = _PlainR2UNet(channels, recurrence)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    random = np.random.default_rng(0)
    began = 0.0
    for step in range(steps + 2):
        if step == 2:
            began = time.perf_counter()
        origins = random.integers(store.n_mesh - CROP, size=(BATCH, 3))
        crops = [tuple(slice(start, start + CROP) for start in origin) for origin in origins]
        x = torch.from_numpy(np.stack([matter[crop] for crop in crops]))[:, None]
        y = torch.from_numpy(np.stack([galaxies[crop] for crop in crops]))[:, None]
        loss = weighted_cross_entropy(model((x - 4) / 4), (y > 0).float(), 80).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return steps * BATCH / (time.perf_counter() - began)


def ours(
    grids: Path, out: Path, channels: tuple[int, ...], recurrence: int, steps: int, precision: str
) -> tuple[float, float]:
    """Samples a second of the `train` stage, and the fraction of its time that is spent waiting for data."""
    config = TrainConfig(
        model={"name": "r2unet-classifier", "channels": channels, "recurrence": recurrence},  # type: ignore[arg-type]
        data={"crop": CROP, "crops_per_box": steps * BATCH, "tile": CROP, "halo": 0},  # type: ignore[arg-type]
        epochs=2,
        batch_size=BATCH,
        precision=precision,  # type: ignore[arg-type]
    )
    train(config, {"grids": [grids]}, out)
    last = json.loads((out / "history.jsonl").read_text().splitlines()[-1])
    return last["samples_per_second"], last["data_wait_fraction"]


def run() -> list[dict[str, Any]]:
    """Rows of the table."""
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        grids = Path(folder) / "grids"
        store = make_grids(grids, 48, ("train", "validation"))
        for name, channels, steps in (
            ("8-16", (8, 16), 20),
            ("16-32-64", (16, 32, 64), 10),
            ("32-64-128-256 (papers)", (32, 64, 128, 256), 3),
        ):
            before = plain(store, channels, 2, steps)
            found = {
                precision: ours(grids, Path(folder) / f"{name} {precision}", channels, 2, steps, precision)
                for precision in ("fp32", "bf16")
            }
            reference = max(before, plain(store, channels, 2, steps))  # the machine may have been busy
            rows.append(
                {
                    "channels": name,
                    "loop": "plain, fp32",
                    "samples/s": reference,
                    "x plain": 1.0,
                    "wait": None,
                }
            )
            for precision, (rate, wait) in found.items():
                rows.append(
                    {
                        "channels": name,
                        "loop": f"ours, {precision}",
                        "samples/s": rate,
                        "x plain": rate / reference,
                        "wait": wait,
                    }
                )
    return rows


if __name__ == "__main__":
    for row in run():
        print(row)
