"""Training on rows of halos.

Rows a second of one process with one thread, 122,000 training and 40,000 validation rows, five inputs and
four targets, batches of 1024. The plain loop is what one writes first: tensors in memory, `torch.randperm`,
one `for`, nothing saved. Ours is the `train` stage as it is: gradients clipped, curves, history, checkpoints
and the best weights kept. Steps counts the training steps alone; whole, validation and all that is written
too, but not starting up (reading the table, fitting scales). Loops take turns; a rate is the best of three.

The first table has one Gaussian network in all loops, with two hidden layers and Adam; that of scikit-learn,
`MLPRegressor` with a fifth of the rows to validate, learns the mean alone. In the second the plain loop has
each family's own network and loss. A graph has no plain loop: neighbors are what it would lack. SMOGN, last,
balances two properties; the `smogn` package does one at a time, and has an environment of its own
(`tests/benchmarks/peers.py`).
"""

import json
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from bench_sampling import columns, families
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPRegressor
from small_tables import make_tables
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from galdist.catalogs.smogn import SmognConfig, balance
from galdist.models import build, objective_class
from galdist.models.tables import TableConfig, TableObjective
from galdist.training.train import TrainConfig, train

INPUTS, TARGETS = TableConfig.model_fields["inputs"].default, TableConfig.model_fields["targets"].default
N_TRAINING, N_VALIDATION = 122_000, 40_000
BATCH, EPOCHS, ROUNDS = 1024, 6, 3
FEW = 1_000
"""Rows that the smogn package is given."""

_SMOGN = """
import time, pandas, smogn
rows = arguments["rows"]
frame = pandas.DataFrame({f"c{i}": column for i, column in enumerate(rows.T)})
began = time.perf_counter()
smogn.smoter(frame, frame.columns[-1], k=7, pert=0.04, rel_coef=1.5)
results["seconds"] = time.perf_counter() - began
"""


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


def scikit_learn(table: dict[str, np.ndarray], hidden: int) -> float:
    """Rows a second of steps and validation."""
    x, y = (np.stack([table[name] for name in side], 1) for side in (INPUTS, TARGETS))
    network = MLPRegressor(
        hidden_layer_sizes=(hidden, hidden),
        batch_size=BATCH,
        early_stopping=True,
        validation_fraction=N_VALIDATION / len(x),
    )
    wall = []
    for epochs in (1, 1 + EPOCHS):
        network.set_params(max_iter=epochs, n_iter_no_change=1 + epochs)
        began = time.perf_counter()
        with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
            network.fit(x, y)
        wall.append(time.perf_counter() - began)
    return EPOCHS * N_TRAINING / (wall[1] - wall[0])


def ours(step: Path, model: dict[str, Any], epochs: int = EPOCHS) -> tuple[float, float]:
    """The same of the `train` stage. What an epoch costs is the difference of a long and a short training."""
    wall, stepping = [], 0.0
    for n in (1, 1 + epochs):
        config = TrainConfig(
            model={"inputs": INPUTS, "targets": TARGETS} | model,  # type: ignore[arg-type]
            data={"kind": "rows"},  # type: ignore[arg-type]
            epochs=n,
            batch_size=BATCH,
        )
        with tempfile.TemporaryDirectory() as out:
            began = time.perf_counter()
            train(config, {"catalogs": [step]}, Path(out))
            wall.append(time.perf_counter() - began)
            history = (Path(out) / "history.jsonl").read_text().splitlines()
        stepping = sum(1 / json.loads(row)["samples_per_second"] for row in history[1:])
    n_rows = epochs * (N_TRAINING // BATCH) * BATCH
    return epochs / stepping, n_rows / (wall[1] - wall[0])


def plain_family(table: dict[str, np.ndarray], chosen: dict[str, Any]) -> float:
    """Rows a second of the steps of a plain loop around a family's network and loss."""
    targets = chosen["targets"]
    model = build(objective_class(chosen["name"]).Config(inputs=INPUTS, **chosen))
    assert isinstance(model, TableObjective)
    model.prepare(lambda column: iter([table[column][:N_TRAINING]]))
    x, y = (
        torch.from_numpy(np.stack([table[name][:N_TRAINING] for name in side], 1))
        for side in (INPUTS, targets)
    )
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    n_steps = N_TRAINING // BATCH
    began = 0.0
    for epoch in range(2):  # the first warms up
        if epoch:
            began = time.perf_counter()
        order = torch.randperm(N_TRAINING)
        for step in range(n_steps):
            rows = order[step * BATCH : (step + 1) * BATCH]
            loss = model({"inputs": x[rows], "targets": y[rows], "seed": rows})["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return n_steps * BATCH / (time.perf_counter() - began)


def smogn_rows(table: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """SMOGN of many rows, and of few by the package too."""
    rows = []
    for n in (FEW, N_TRAINING):
        names = [*INPUTS, *TARGETS[:2]]
        config = SmognConfig(inputs=INPUTS, targets=TARGETS[:2])
        values = np.stack([table[name][:n] for name in names], 1).astype(np.float64)
        began = time.perf_counter()
        balance(values, names, config, np.random.default_rng(0))
        seconds = time.perf_counter() - began
        package = None
        if n <= FEW:
            try:
                package = float(peers.SMOGN.run(_SMOGN, rows=values[:, : len(INPUTS) + 1])["seconds"])
            except peers.PeerMissing as missing:
                print(missing)
        rows.append(
            {
                "rows": n,
                "seconds": seconds,
                "smogn package [s]": package,
                "x package": package and package / seconds,
            }
        )
    return rows


def run() -> dict[str, list[dict[str, Any]]]:
    """Rows of the tables."""
    torch.set_num_threads(1)
    loops: list[dict[str, Any]] = []
    each: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, threadpool_limits(1):
        n = N_TRAINING + N_VALIDATION
        table = columns(n, 0)
        split = np.repeat(np.array([0, 1], np.int8), [N_TRAINING, N_VALIDATION])
        position = np.random.default_rng(1).uniform(0, 205, (n, 3)).astype(np.float32)
        step = make_tables(Path(folder), (n,), box_size=205.0, split=split, position=position, **table)
        for hidden in (64, 256):
            model = {"name": "gaussian", "hidden": (hidden, hidden)}
            rounds = [
                (*plain(table, hidden), *ours(step, model), scikit_learn(table, hidden))
                for _ in range(ROUNDS)
            ]
            plain_steps, plain_whole, our_steps, our_whole, scikit = np.max(rounds, axis=0).tolist()
            for name, steps, whole in (
                ("plain", plain_steps, plain_whole),
                ("ours", our_steps, our_whole),
                ("scikit-learn", None, scikit),
            ):
                loops.append(
                    {
                        "network": f"5-{hidden}-{hidden}-4",
                        "loop": name,
                        "steps [rows/s]": steps,
                        "x plain": steps and steps / plain_steps,
                        "whole [rows/s]": whole,
                        "x plain, whole": whole / plain_whole,
                    }
                )
        for name in families():
            n_targets = len(objective_class(name).Config(name=name).targets)
            chosen = {"name": name, "targets": TARGETS[:n_targets]}
            has_plain = name != "graph-sqr"
            found = [
                (ours(step, chosen, epochs=1)[0], plain_family(table, chosen) if has_plain else np.nan)
                for _ in range(ROUNDS)
            ]
            our, alone = np.max(found, axis=0).tolist()
            each.append(
                {
                    "family": name,
                    "properties": n_targets,
                    "ours, steps [rows/s]": our,
                    "plain [rows/s]": alone if has_plain else None,
                    "x plain": our / alone if has_plain else None,
                }
            )
        return {
            "A Gaussian network in three loops": loops,
            "Each family, with its default network": each,
            "SMOGN": smogn_rows(table),
        }


if __name__ == "__main__":
    for caption, rows in run().items():
        print(caption)
        for row in rows:
            print(row)
