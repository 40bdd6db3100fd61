"""Training of voxel models beside loops as they were published.

Samples a second of one process, on 32^3 crops. The plain loops follow the papers' descriptions: R2U-Net
with batch normalization after every convolution (Alom et al. 2018, Zhang et al. 2019); a U-Net that
predicts noise, with groups normalized, circular padding and attention of all cells to all at its coarsest
level, given the matter as another channel (Kingma et al. 2021, Ono et al. 2024). Both in float32 and
PyTorch's memory order, crops from arrays in memory, Adam, and the loss of every step logged as a number
(`.item()`). Ours is the loop of the `train` stage, with crops from its store under the cube's symmetries,
gradients clipped and curves written; channels and recurrence are the same. The networks differ as said, so
that a ratio is of network and loop together. On a GPU the sizes are the papers', and there is a row of ours
compiled; on a CPU they are small, with one thread.

The loops take turns; a rate is the best of the rounds, on CPUs in seconds of the processor, for other work
may run beside.

Ranks: strong scaling (one batch, shared by the ranks) as `galdist bench train` measures it, by the clock on
the wall, the best of the rounds. A large matrix product on all ranks at once tells what the machine had for
them in that moment ("machine's"): on cores with other work two ranks get up to twice the share of one, on
idle ones no more than there are cores. "Kept" is the speed-up over it: what is left after the exchange of
gradients, votes and waiting for one another. It says nothing of a network.

Exchange of gradients: on paper. Parameters and operations are counted (on 16^3 cells, and taken to the crop
in proportion to its cells). Assumed are GPUs that do 30% of the 312 TFLOP/s of an A100 in bf16; rings of
NVLink at 300 GB/s each way among 8 of them (600 GB/s both ways, NVIDIA's data sheet), beyond of one HDR
InfiniBand of 200 Gbit/s a GPU (25 GB/s, as in a DGX A100); 5 microseconds a hop. Each GPU sends 2 (n - 1)/n
of the gradients, float32. The efficiency is first that with nothing hidden, then that with the exchange
behind the backward pass, two thirds of a step.
"""

import math
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

if __name__ == "__main__":
    sys.path[:0] = [str(folder) for folder in Path(__file__).parents[:2]]
from small_grids import make_grids

from galdist import bench
from galdist import config as run_file
from galdist.grids.store import GridStore
from galdist.models import build
from galdist.training.losses import weighted_cross_entropy
from galdist.training.train import TrainConfig, Training
from hpc import ddp
from hpc.site import Site

CROP, ROUNDS = 32, 4
GPU = torch.cuda.is_available()
SIZES: dict[str, list[tuple[tuple[int, ...], int, int]]] = {
    "r2unet-classifier": [((32, 64, 128, 256), 16, 20)] if GPU else [((16, 32, 64), 4, 3)],
    "vdm": [((48, 96, 192, 384, 768), 8, 20)] if GPU else [((8, 16, 32), 4, 6)],
}
"""Model -> channels, batch, steps of a round."""


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

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return weighted_cross_entropy(self(x), (y > 0).float(), 80).mean()


class _NoiseBlock(nn.Module):
    def __init__(self, n_in: int, n_out: int, width: int) -> None:
        super().__init__()
        self.first = _normalized(n_in, n_out)
        self.second = _normalized(n_out, n_out)
        self.time = nn.Linear(width, n_out)
        self.skip = nn.Conv3d(n_in, n_out, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = self.first(x) + self.time(time)[:, :, None, None, None]
        return self.skip(x) + self.second(y)


def _normalized(n_in: int, n_out: int) -> nn.Sequential:
    convolution = nn.Conv3d(n_in, n_out, 3, padding=1, padding_mode="circular")
    return nn.Sequential(nn.GroupNorm(math.gcd(8, n_in), n_in), nn.SiLU(), convolution)


class _PlainDiffusion(nn.Module):
    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        width, pairs = 4 * channels[0], list(pairwise(channels))
        self.time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.register_buffer("frequencies", torch.logspace(-1, 1, 32))
        self.enter = nn.Conv3d(2, channels[0], 1)
        self.down = nn.ModuleList(_NoiseBlock(n, n, width) for n in channels)
        self.reduce = nn.ModuleList(nn.Conv3d(fine, coarse, 2, stride=2) for fine, coarse in pairs)
        self.attention = nn.MultiheadAttention(channels[-1], max(channels[-1] // 32, 1), batch_first=True)
        self.middle = _NoiseBlock(channels[-1], channels[-1], width)
        self.expand = nn.ModuleList(nn.ConvTranspose3d(coarse, fine, 2, stride=2) for fine, coarse in pairs)
        self.up = nn.ModuleList(_NoiseBlock(2 * fine, fine, width) for fine, _ in pairs)
        self.head = nn.Conv3d(channels[0], 1, 1)

    def forward(self, x: Tensor, gamma: Tensor) -> Tensor:
        waves = gamma[:, None] * self.frequencies
        time = self.time(torch.cat([waves.sin(), waves.cos()], 1))
        x, skips = self.enter(x), []
        for level, block in enumerate(self.down):
            x = block(self.reduce[level - 1](x) if level else x, time)
            skips.append(x)
        cells = skips.pop().flatten(2).movedim(1, 2)
        cells = cells + self.attention(cells, cells, cells, need_weights=False)[0]
        x = self.middle(cells.movedim(2, 1).view_as(x), time)
        for expand, block in zip(reversed(self.expand), reversed(self.up), strict=True):
            x = block(torch.cat([expand(x), skips.pop()], 1), time)
        return self.head(x)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        gamma = -13.3 + 26.6 * torch.rand(len(x), device=x.device)
        noise = torch.randn_like(y)
        variance = torch.sigmoid(gamma)[:, None, None, None, None]
        noisy = (1 - variance).sqrt() * y + variance.sqrt() * noise
        return F.mse_loss(self(torch.cat([noisy, x], 1), gamma), noise)


def plain(store: GridStore, name: str, channels: tuple[int, ...], batch: int) -> Callable[[int], None]:
    """Some steps of the plain loop."""
    matter, galaxies = (store["box_0"].read(field) for field in ("matter_counts", "galaxy_counts"))
    device = torch.device("cuda" if GPU else "cpu")
    model = _PlainDiffusion(channels) if name == "vdm" else _PlainR2UNet(channels, 2)
    model.to(device)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    random = np.random.default_rng(0)
    logged: list[float] = []

    def steps(number: int) -> None:
        for _ in range(number):
            origins = random.integers(store.n_mesh - CROP, size=(batch, 3))
            crops = [tuple(slice(start, start + CROP) for start in origin) for origin in origins]
            x = torch.from_numpy(np.stack([matter[crop] for crop in crops]))[:, None].to(device)
            y = torch.from_numpy(np.stack([galaxies[crop] for crop in crops]))[:, None].to(device)
            loss = model.loss((x - 4) / 4, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            logged.append(loss.item())

    return steps


def settings(name: str, channels: tuple[int, ...], batch: int, **more: Any) -> TrainConfig:
    """Ours. Batches are made by the process itself on CPUs, so that its time is all there is."""
    return TrainConfig(
        model={"name": name, "channels": channels},  # type: ignore[arg-type]
        data={"crop": CROP, "crops_per_box": 64 * batch, "workers": 4 if GPU else 0},  # type: ignore[arg-type]
        epochs=1,
        batch_size=batch,
        **more,
    )


def seconds_of(steps: Callable[[int], Any], number: int) -> float:
    """Time of some steps: the processor's, or where there is a GPU, that which passes until it is done."""
    clock = time.perf_counter if GPU else time.process_time
    began = clock()
    steps(number)
    if GPU:
        torch.cuda.synchronize()
    return clock() - began


def loops(grids: Path, scratch: Path) -> list[dict[str, Any]]:
    """Ours beside the plain ones."""
    store, rows = make_grids(grids, 48, ("train", "validation")), []
    variants: dict[str, dict[str, Any]] = {"fp32": {}, "bf16": {"precision": "bf16"}}
    if GPU:
        variants["bf16, compiled"] = {"precision": "bf16", "compile": True}
    for name, sizes in SIZES.items():
        for channels, batch, number in sizes:
            size = "-".join(map(str, channels))
            with ddp.group() as group, ddp.stop_requests() as stop:
                takers: dict[str, Callable[[int], Any]] = {"plain, fp32": plain(store, name, channels, batch)}
                for variant, more in variants.items():
                    out = scratch / f"{name} {size} {variant}"
                    training = Training(
                        settings(name, channels, batch, **more), {"grids": [grids]}, out, group, stop
                    )
                    takers[f"ours, {variant}"] = training.pace
                best = dict.fromkeys(takers, math.inf)
                for steps in takers.values():
                    steps(1)
                for _ in range(ROUNDS):
                    for loop, steps in takers.items():
                        best[loop] = min(best[loop], seconds_of(steps, number))
            rows += [
                {
                    "model": name,
                    "channels": size,
                    "batch": batch,
                    "loop": loop,
                    "samples/s": number * batch / seconds,
                    "x plain": best["plain, fp32"] / seconds,
                }
                for loop, seconds in best.items()
            ]
    return rows


def ranks(scratch: Path) -> list[dict[str, Any]]:
    """Strong scaling, by the command's own function."""
    rows = []
    for name in SIZES if GPU else ["r2unet-classifier"]:
        channels, batch, _ = SIZES[name][-1]
        steps = [
            {"name": "grids", "stage": "ingest", "config": {"path": ".", "n_mesh": 64}},
            {
                "name": "model",
                "stage": "train",
                "inputs": {"grids": ["grids"]},
                "config": settings(name, channels, batch, precision="bf16").model_dump(mode="json"),
            },
        ]
        path = scratch / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"name": name, "steps": steps}))
        run = run_file.load(str(path))
        numbers = [1, 2] if not GPU else [2**n for n in range(4) if 2**n <= torch.cuda.device_count()]
        best: dict[int, bench.Speed] = {}
        for _ in range(ROUNDS // 2):
            for found in bench.measure(run, "model", scratch / "out", Site(), numbers, 5.0, scratch):
                if found.ranks not in best or found.samples > best[found.ranks].samples:
                    best[found.ranks] = found
        one = best[1]
        for number, found in best.items():
            faster = found.samples / one.samples
            machine = None if found.peak is None or one.peak is None else found.peak / one.peak
            rows.append(
                {
                    "model": name,
                    "channels": "-".join(map(str, channels)),
                    "ranks": number,
                    "samples/s": found.samples,
                    "of peak": None if found.peak is None else found.flops / found.peak,
                    "waits for data": found.waited,
                    "speed-up": faster,
                    "machine's": machine,
                    "kept": None if machine is None else faster / machine,
                }
            )
    return rows


ACHIEVED = 0.3 * 312e12  # operations a second of a GPU
NVLINK, INFINIBAND, HOP = 300e9, 25e9, 5e-6  # bytes a second each way, seconds


def exchange() -> list[dict[str, Any]]:
    """Gradients on 8 to 64 GPUs."""
    rows = []
    for name, channels, crop, batches in (
        ("r2unet-classifier", (32, 64, 128, 256), 32, (16, 2)),
        ("vdm", (48, 96, 192, 384), 64, (8, 1)),
        ("vdm", (48, 96, 192, 384, 768), 64, (8, 1)),
    ):
        model = build(settings(name, channels, 1).model)
        random = np.random.default_rng(0)
        model.prepare(lambda _: iter([random.poisson(1, (16,) * 3).astype(np.float32)]))  # noqa: B023
        fields = {field: torch.ones((1, 1, 16, 16, 16)) for field in model.fields}
        batch = {"halo": 0, "periodic": False, "seed": torch.zeros(1, dtype=torch.int64), **fields}
        with FlopCounterMode(display=False) as counter:
            model(batch)["loss"].backward()
        sample = counter.get_total_flops() * (crop / 16) ** 3
        parameters = sum(each.numel() for each in model.parameters() if each.requires_grad)
        for each in batches:
            step = each * sample / ACHIEVED
            row: dict[str, Any] = {
                "model": f"{name} {'-'.join(map(str, channels))}",
                "million parameters": parameters / 1e6,
                "gradients [MB]": 4 * parameters / 1e6,
                "in bf16 [MB]": 2 * parameters / 1e6,
                "crops a GPU": f"{each} of {crop}^3",
                "step [ms]": 1e3 * step,
            }
            for n in (8, 16, 64):
                speed = NVLINK if n <= 8 else INFINIBAND
                sent = 2 * (n - 1) / n * 4 * parameters
                lasts = sent / speed + 2 * (n - 1) * HOP
                hidden = max(0.0, lasts - step * 2 / 3)
                row[f"{n} GPUs: exchange [ms]"] = 1e3 * lasts
                row[f"{n}: efficiency"] = f"{step / (step + lasts):.0%} .. {step / (step + hidden):.0%}"
            rows.append(row)
    return rows


def run() -> dict[str, list[dict[str, Any]]]:
    """The tables."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        device = torch.cuda.get_device_name() if GPU else "one CPU thread"
        return {
            f"Loops, {device}": loops(place / "grids", place),
            "Ranks": ranks(place),
            "Exchange of gradients, on paper": exchange(),
        }


if __name__ == "__main__":
    for caption, rows in run().items():
        print(caption, *rows, sep="\n")
