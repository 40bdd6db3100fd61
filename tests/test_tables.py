"""Training on rows of halos: the batches, what a model of tables is told, and what it learns."""

import json
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file
from small_grids import CLASSIFIER, make_grids
from small_tables import INPUTS, SIGMA, TARGETS, GaussianConfig, make_tables

from galdist.catalogs.centrals import read_centrals
from galdist.data import tables
from galdist.data.tables import TableData
from galdist.grids.store import StoreError
from galdist.models import build
from galdist.models.tables import TableConfig, TableObjective
from galdist.training import train as loop
from galdist.training.checkpoint import Checkpoints, load_model
from galdist.training.train import TrainConfig, Training, train
from hpc import ddp

CPU = torch.device("cpu")
ALONE = ddp.Group(0, 1, 0, CPU)
GAUSSIAN: dict[str, Any] = {
    "model": {"name": "gaussian"},
    "epochs": 3,
    "batch_size": 64,
    "optimizer": {"learning_rate": 1e-2},
    "seed": 3,
}


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tables(tmp_path_factory.mktemp("tables") / "centrals")


@pytest.fixture(scope="module")
def data(step: Path) -> TableData:
    return TableData([step], INPUTS, TARGETS)


def expected(step: Path, split: str) -> np.ndarray:
    """The rows of a split, inputs before targets."""
    columns = read_centrals([step], [*INPUTS, *TARGETS], split).columns  # type: ignore[arg-type]
    return np.stack([columns[name] for name in (*INPUTS, *TARGETS)], axis=1).astype(np.float32)


def rows_of(batch: dict[str, torch.Tensor]) -> np.ndarray:
    return torch.cat([batch["inputs"], batch["targets"]], 1).numpy()


def steps_of(data: TableData, n_ranks: int, parts: int, epoch: int, first: int = 0) -> list[np.ndarray]:
    """Rows of each step on so many ranks, in the order in which one rank has them."""
    ranks = [data.batches(ddp.Group(rank, n_ranks, rank, CPU), 48, parts, seed=7) for rank in range(n_ranks)]
    for batches in ranks:
        batches.start_at(epoch, first)
        assert batches.wait(0)
    found = []
    for _ in range(first, ranks[0].steps):
        shares = [batches.take() for batches in ranks]
        found.append(np.concatenate([rows_of(share[part]) for part in range(parts) for share in shares]))
    return found


@settings(deadline=None, max_examples=25)
@given(
    n_ranks=st.sampled_from([1, 2, 4]),
    parts=st.sampled_from([1, 2, 3]),
    epoch=st.integers(0, 5),
    data_=st.data(),
)
def test_any_number_of_ranks_sees_the_same_batches_from_any_step_on(
    data: TableData, n_ranks: int, parts: int, epoch: int, data_: st.DataObject
) -> None:
    alone = steps_of(data, 1, 1, epoch)
    first = data_.draw(st.integers(0, len(alone) - 1))
    shared = steps_of(data, n_ranks, parts, epoch, first)
    assert len(shared) == len(alone) - first
    assert all(np.array_equal(a, b) for a, b in zip(shared, alone[first:], strict=True))


def test_an_epoch_takes_every_row_at_most_once_and_the_next_one_in_another_order(
    data: TableData, step: Path
) -> None:
    rows = {row.tobytes() for row in expected(step, "train")}
    epochs = [np.concatenate(steps_of(data, 1, 1, epoch)) for epoch in (0, 1)]
    for epoch in epochs:
        seen = {row.tobytes() for row in epoch}
        assert seen <= rows
        assert len(seen) == len(epoch) == len(rows) // 48 * 48
    assert not np.array_equal(*epochs)


def test_columns_of_training_rows_come_simulation_by_simulation(data: TableData, step: Path) -> None:
    rows = expected(step, "train")
    for column, name in enumerate((*INPUTS, *TARGETS)):
        parts = list(data.training_fields(name))
        assert len(parts) == 2
        assert np.array_equal(np.concatenate(parts), rows[:, column])
    omega = [set(part.tolist()) for part in data.training_fields("Omega_m")]
    assert omega == [{np.float32(0.2)}, {np.float32(0.3)}]


@pytest.mark.parametrize(("n_ranks", "done"), [(1, 0), (2, 0), (3, 1), (2, 3), (4, 5)])
def test_validation_covers_the_rows_whatever_the_ranks(
    data: TableData, step: Path, monkeypatch: pytest.MonkeyPatch, n_ranks: int, done: int
) -> None:
    monkeypatch.setattr(tables, "_VALIDATION_ROWS", 50)
    rows = expected(step, "validation")

    def batches(rank: int) -> Iterator[Any]:
        return data.validation_batches(ddp.Group(rank, n_ranks, rank, CPU), done)

    rounds = list(zip(*[batches(rank) for rank in range(n_ranks)], strict=True))
    found = [rows_of(batch) for each in rounds for batch in each if batch is not None]
    assert np.array_equal(np.concatenate([np.empty((0, 5), np.float32), *found]), rows[50 * done :])
    assert all(each[0] is not None for each in rounds)


def test_batches_that_do_not_fit_are_refused(data: TableData) -> None:
    with pytest.raises(ValueError, match="multiple of ranks x accumulate = 2 x 2"):
        data.batches(ddp.Group(0, 2, 0, CPU), 6, 2, seed=0)
    with pytest.raises(ValueError, match=r"there are \d+ training rows, fewer than the batch_size of 4096"):
        data.batches(ALONE, 4096, 1, seed=0)


@pytest.mark.parametrize(
    ("changed", "inputs", "message"),
    [
        ({}, ("log_halo_mas",), "did you mean 'log_halo_mass'"),
        ({"split": np.full(60, 1, np.int8)}, INPUTS, "no row of `centrals` has the split 'train'"),
        ({"split": np.full(60, 0, np.int8)}, INPUTS, "no row of `centrals` has the split 'validation'"),
        (
            {"spin": np.where(np.arange(60) % 30 == 7, np.nan, 1.0)},
            INPUTS,
            r"column 'spin' is nan in \d of \d+ rows of the split 'train', first in row 7 of box_0",
        ),
    ],
)
def test_tables_that_do_not_fit_are_refused(
    tmp_path: Path, changed: dict[str, np.ndarray], inputs: tuple[str, ...], message: str
) -> None:
    split = {"split": np.arange(60, dtype=np.int8) // 30 % 2}
    make_tables(tmp_path, (60,), **split | changed)
    with pytest.raises((ValueError, StoreError), match=message):
        TableData([tmp_path], inputs, TARGETS)


def prepared(step: Path) -> tuple[TableObjective, np.ndarray]:
    """A model that has seen the training rows, and these."""
    objective = build(GaussianConfig())
    assert isinstance(objective, TableObjective)
    objective.prepare(TableData([step], INPUTS, TARGETS).training_fields)
    return objective, expected(step, "train")


def test_numbers_are_standardized_with_the_training_rows_alone(step: Path) -> None:
    objective, rows = prepared(step)
    batch = {"inputs": torch.from_numpy(rows[:, :3]), "targets": torch.from_numpy(rows[:, 3:])}
    for scaled in (objective.scaled_inputs(batch), objective.scaled_targets(batch)):
        assert torch.allclose(scaled.double().mean(0), torch.zeros(()).double(), atol=1e-4)
        assert torch.allclose(scaled.double().std(0), torch.ones(()).double(), atol=2e-3)
    back = objective.unscaled(objective.scaled_targets(batch))
    assert torch.allclose(back, batch["targets"], atol=1e-5)
    assert np.array_equal(objective.input_low.numpy(), rows[:, :3].min(0))
    assert np.array_equal(objective.input_high.numpy(), rows[:, :3].max(0))
    assert np.array_equal(objective.target_low.numpy(), rows[:, 3:].min(0))
    assert np.array_equal(objective.target_high.numpy(), rows[:, 3:].max(0))


def test_a_constant_input_is_nought_and_a_constant_target_refused(tmp_path: Path) -> None:
    make_tables(tmp_path / "one", (200,))  # of one simulation: one Omega_m
    objective, rows = prepared(tmp_path / "one")
    assert objective.scaled_inputs({"inputs": torch.from_numpy(rows[:, :3])})[:, 2].eq(0).all()
    make_tables(tmp_path / "flat", (200,), color_gi=np.full(200, 0.5, np.float32))
    with pytest.raises(ValueError, match=r"'color_gi' is 0\.5 in all \d+ training rows"):
        prepared(tmp_path / "flat")


def test_evaluation_adds_over_batches(step: Path) -> None:
    objective, rows = prepared(step)
    batch = {"inputs": torch.from_numpy(rows[:, :3]), "targets": torch.from_numpy(rows[:, 3:])}
    with torch.no_grad():
        whole, shown = objective.evaluate(batch)
        halves = [
            objective.evaluate({name: value[part] for name, value in batch.items()})[0]
            for part in (slice(100), slice(100, None))
        ]
        error = (objective.point(batch).numpy().astype(float) - rows[:, 3:]) ** 2
        loss = objective.validation_loss(batch).double().mean().item()
    assert shown == {}
    summary = objective.summarize(whole)
    assert summary == pytest.approx(
        {
            "loss": loss,
            "rmse_log_stellar_mass": error[:, 0].mean() ** 0.5,
            "rmse_color_gi": error[:, 1].mean() ** 0.5,
        },
        rel=1e-6,
    )
    added = {name: halves[0][name] + halves[1][name] for name in whole}
    assert objective.summarize(added) == pytest.approx(summary, rel=1e-12)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"inputs": []}, "at least 1"),
        ({"targets": []}, "at least 1"),
        ({"inputs": ["spin", "spin"]}, "spin: given twice"),
        ({"inputs": ["spin"], "targets": ["spin"]}, "spin: given twice"),
    ],
)
def test_columns_are_inputs_or_targets_once(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TableConfig(name="any", **model)


def test_the_model_says_what_it_learns_from() -> None:
    assert TrainConfig(**GAUSSIAN).data.kind == "rows"
    assert TrainConfig(**CLASSIFIER).data.kind == "crops"
    assert TrainConfig(**CLASSIFIER | {"data": {}}).data.kind == "crops"
    for config in (GAUSSIAN, GAUSSIAN | {"data": {"kind": "rows"}}, CLASSIFIER):
        read = TrainConfig(**config)
        assert TrainConfig.model_validate(read.model_dump(mode="json")) == read
    with pytest.raises(ValidationError, match="gaussian learns from 'rows'"):
        TrainConfig(**GAUSSIAN | {"data": {"kind": "crops"}})
    with pytest.raises(ValidationError, match="r2unet-classifier learns from 'crops'"):
        TrainConfig(**CLASSIFIER | {"data": {"kind": "rows"}})
    with pytest.raises(ValidationError, match="crop"):
        TrainConfig(**GAUSSIAN | {"data": {"crop": 8}})


def test_steps_stand_under_the_role_that_the_model_reads(step: Path, tmp_path: Path) -> None:
    make_grids(tmp_path / "grids")
    grids, out = [tmp_path / "grids"], tmp_path / "out"
    for config, inputs, message in (
        (GAUSSIAN, {}, "gaussian learns from catalogs.*have none"),
        (
            GAUSSIAN,
            {"grids": grids},
            r"gaussian learns from catalogs.*`catalogs` and no others.*grids: \[grids",
        ),
        (GAUSSIAN, {"grids": grids, "catalogs": [step]}, "and no others"),
        (CLASSIFIER, {"catalogs": [step]}, r"r2unet-classifier learns from grids.*catalogs: \[centrals\]"),
    ):
        with pytest.raises(ValueError, match=message):
            train(TrainConfig(**config), inputs, out)
    train(TrainConfig(**CLASSIFIER), {"grids": grids}, tmp_path / "classifier")
    inputs = {"catalogs": [step], "models": [tmp_path / "classifier"]}
    with pytest.raises(ValueError, match="gaussian builds on no other model"):
        train(TrainConfig(**GAUSSIAN), inputs, out)


def history(out: Path) -> list[dict[str, float]]:
    clock = ("seconds", "samples_per_second", "data_wait_fraction")
    rows = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in clock} for row in rows]


def test_training_learns_the_rows_distribution(step: Path, tmp_path: Path) -> None:
    config = TrainConfig(**GAUSSIAN | {"epochs": 40, "model": {"name": "gaussian", "hidden": []}})
    train(config, {"catalogs": [step]}, tmp_path)
    model, _ = load_model(tmp_path)
    assert isinstance(model, TableObjective)
    rows = expected(step, "test")
    batch = {"inputs": torch.from_numpy(rows[:, :3])}
    with torch.no_grad():
        error = model.point(batch).numpy() - rows[:, 3:]
        draws = model.sample(batch, 200, torch.Generator().manual_seed(0))
    assert error.std(0) == pytest.approx([SIGMA] * 2, rel=0.15)
    assert draws.std(1).mean(0).numpy() == pytest.approx([SIGMA] * 2, rel=0.15)
    assert history(tmp_path)[-1]["rmse_color_gi"] == pytest.approx(SIGMA, rel=0.15)


def test_a_training_cut_anywhere_ends_with_the_same_weights(
    step: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The family draws random numbers as it trains."""
    noisy = GAUSSIAN | {"model": {"name": "gaussian", "noise": 0.3}, "ema_decay": 0.9}

    def result(out: Path, **changes: Any) -> dict[str, torch.Tensor]:
        train(TrainConfig(**noisy | changes), {"catalogs": [step]}, out)
        return load_file(out / "model" / "weights.safetensors")

    whole = result(tmp_path / "whole")
    taken = Training._next_step
    for cut in (1, 4, 17, 29):
        left = [cut]

        def until_then(self: Training, left: list[int] = left) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise InterruptedError
            return taken(self)

        out = tmp_path / f"cut-{cut}"
        with monkeypatch.context() as patch:
            patch.setattr(Training, "_next_step", until_then)
            with pytest.raises(InterruptedError):
                result(out, checkpoint_minutes=1e-9)
        resumed = result(out)
        assert resumed.keys() == whole.keys()
        assert all(torch.equal(resumed[name], whole[name]) for name in whole)
        assert history(out) == history(tmp_path / "whole")


def test_checkpoints_around_validations_take_little_of_short_epochs(
    step: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock by which an epoch takes 3 s and a checkpoint 1 s."""
    clock, saved = [0.0], []
    train_epoch, write = Training._train_epoch, Checkpoints.write

    def slow_epoch(self: Training) -> None:
        clock[0] += 3
        train_epoch(self)

    def slow_write(self: Checkpoints, number: int, *rest: Any) -> None:
        saved.append((clock[0], number))
        clock[0] += 1
        write(self, number, *rest)

    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: clock[0], perf_counter=perf_counter))
    monkeypatch.setattr(Training, "_train_epoch", slow_epoch)
    monkeypatch.setattr(Checkpoints, "write", slow_write)
    train(TrainConfig(**GAUSSIAN | {"epochs": 40}), {"catalogs": [step]}, tmp_path)
    moments = [moment for moment, _ in saved]
    assert moments[0] == 3  # nothing is known yet of what it takes
    gaps = np.diff(moments)
    assert gaps[:-1].min() >= 20
    assert gaps[:-1].max() <= 20 + 1 + 3
    n_steps = TableData([step], INPUTS, TARGETS).batches(ALONE, GAUSSIAN["batch_size"], 1, seed=0).steps
    assert saved[-1][1] == 40 * n_steps  # the end is saved in any case
