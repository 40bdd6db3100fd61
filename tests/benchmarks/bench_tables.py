"""Training on rows of halos.

Rows a second of one process with one thread, 122,000 training and 40,000 validation rows, five inputs and
four targets, batches of 1024, networks of two hidden layers, Adam with weight decay. The plain loop is what
one writes first: tensors in memory, `torch.randperm`, one `for`, validation in big batches, nothing saved.
Ours is the `train` stage as it is, with the same network: gradients clipped, curves, history, checkpoints and
the best weights kept. Steps counts the training steps alone; whole, validation and all that is written too,
but not starting up (reading the table, fitting scales). The two loops take turns; each rate is the best of
three.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from small_tables import make_tables
from torch import Tensor, nn

from galdist.training.train import TrainConfig, train

INPUTS, TARGETS = tuple("abcde"), tuple("pqrs")
N_TRAINING, N_VALIDATION = 122_000, 40_000
BATCH, EPOCHS, ROUNDS = 1024, 6, 3


def columns() -> dict[str, np.ndarray]:
    """Targets that depend on inputs, with noise."""
    random = np.random.default_rng(0)
    x = random.normal(size=(N_TRAINING + N_VALIDATION, len(INPUTS)))
    y = x @ random.normal(size=(len(INPUTS), len(TARGETS))) + random.normal(size=(len(x), len(TARGETS)))
    values = np.concatenate([x, y], axis=1).astype(np.float32).T
    return dict(zip((*INPUTS, *TARGETS), values, strict=True))


def plain(table: dict[str, np.ndarray], hidden: int) -> tuple[float, float]:
    """Rows a second of the steps, and of steps and validation."""
    x, y = (torch.from_numpy(np.stack([table[name] for name in side], 1)) for side in (INPUTS, TARGETS))
    network = nn.Sequential(
        nn.Linear(len(INPUTS), hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, len(TARGETS)),
    )
    log_sigma = nn.Parameter(torch.zeros(len(TARGETS)))
    optimizer = torch.optim.AdamW([*network.parameters(), log_sigma], 1e-3)

    def loss_of(rows: slice | Tensor) -> Tensor:
        deviation = (y[rows] - network(x[rows])) * torch.exp(-log_sigma)
        return (0.5 * deviation.square() + log_sigma).sum(1)

    n_steps = N_TRAINING // BATCH
    began, stepping = time.perf_counter(), 0.0
    for _ in range(EPOCHS):
        epoch = time.perf_counter()
        order = torch.randperm(N_TRAINING)
        for step in range(n_steps):
            loss = loss_of(order[step * BATCH : (step + 1) * BATCH]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        stepping += time.perf_counter() - epoch
        with torch.no_grad():
            for start in range(N_TRAINING, N_TRAINING + N_VALIDATION, 1 << 14):
                loss_of(slice(start, start + (1 << 14))).sum().item()
    n_rows = EPOCHS * n_steps * BATCH
    return n_rows / stepping, n_rows / (time.perf_counter() - began)


def ours(step: Path, hidden: int) -> tuple[float, float]:
    """The same of the `train` stage. What an epoch costs is the difference of a long and a short training."""
    wall, stepping = [], 0.0
    for epochs in (1, 1 + EPOCHS):
        config = TrainConfig(
            model={"name": "gaussian", "inputs": INPUTS, "targets": TARGETS, "hidden": (hidden, hidden)},  # type: ignore[arg-type]
            epochs=epochs,
            batch_size=BATCH,
        )
        with tempfile.TemporaryDirectory() as out:
            began = time.perf_counter()
            train(config, {"catalogs": [step]}, Path(out))
            wall.append(time.perf_counter() - began)
            history = (Path(out) / "history.jsonl").read_text().splitlines()
        stepping = sum(1 / json.loads(row)["samples_per_second"] for row in history[1:])
    n_rows = EPOCHS * (N_TRAINING // BATCH) * BATCH
    return EPOCHS / stepping, n_rows / (wall[1] - wall[0])


def run() -> list[dict[str, Any]]:
    """Rows of the table."""
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        table = columns()
        split = np.repeat(np.array([0, 1], np.int8), [N_TRAINING, N_VALIDATION])
        step = make_tables(Path(folder), (N_TRAINING + N_VALIDATION,), split=split, **table)
        for hidden in (64, 256):
            rounds = [(plain(table, hidden), ours(step, hidden)) for _ in range(ROUNDS)]
            best = np.max(rounds, axis=0)
            for name, (steps, whole) in zip(("plain", "ours"), best.tolist(), strict=True):
                rows.append(
                    {
                        "network": f"5-{hidden}-{hidden}-4",
                        "loop": name,
                        "steps [rows/s]": steps,
                        "x plain": steps / best[0, 0],
                        "whole [rows/s]": whole,
                        "x plain, whole": whole / best[0, 1],
                    }
                )
    return rows


if __name__ == "__main__":
    for row in run():
        print(row)
