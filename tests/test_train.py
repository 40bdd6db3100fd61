"""The loop: what it writes, what it refuses, and that a killed run ends with the same weights."""

import json
import re
import shutil
import signal
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from moments import Moment, stopped_at
from pydantic import ValidationError
from safetensors.torch import load_file
from small_grids import CLASSIFIER, Ranks, filled, make_grids, small_disk

from galdist.statistics.metrics import load_metrics
from galdist.training.checkpoint import Checkpoints, load_model
from galdist.training.train import (
    CosineSchedule,
    HalvingSchedule,
    TrainConfig,
    Training,
    _DeviceClock,
    train,
)
from hpc import ddp, durable, strict


@pytest.fixture(scope="module")
def grids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    step = tmp_path_factory.mktemp("train") / "grids"
    make_grids(step)
    return step


def run(grids: Path, out: Path, models: tuple[Path, ...] = (), **changes: Any) -> dict[str, torch.Tensor]:
    train(TrainConfig(**CLASSIFIER | changes), {"grids": [grids], "models": list(models)}, out)
    return weights(out)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "weights.safetensors")


def last_weights(out: Path) -> dict[str, torch.Tensor]:
    """Weights after the last step; those of `weights` are the best epoch's."""
    checkpoints = Checkpoints(out / "checkpoints")
    name = checkpoints.latest()
    assert name is not None
    return checkpoints.weights(name)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def history(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]


def test_training_lowers_the_loss_and_leaves_model_history_and_metrics(grids: Path, tmp_path: Path) -> None:
    run(grids, tmp_path, epochs=4, optimizer={"learning_rate": 1e-2}, ema_decay=0.5)
    rows = history(tmp_path)
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3]
    assert rows[-1]["validation_loss"] < rows[0]["validation_loss"]
    for row in rows:
        assert 0 <= row["data_wait_fraction"] <= 1
        assert row["samples_per_second"] > 0
        assert {
            "seconds",
            "train_loss",
            "accuracy",
            "recall",
            "precision",
            "pr_auc",
            "learning_rate",
        } <= row.keys()
    best = min(rows, key=lambda row: row["validation_loss"])
    metrics = {row["metric"]: row["value"] for row in load_metrics(tmp_path)}
    assert metrics["recall"] == best["recall"] >= 0.95
    assert metrics["validation_loss"] == best["validation_loss"]
    model, _ = load_model(tmp_path)
    assert model.threshold.item() == best["threshold"]
    assert list((tmp_path / "tensorboard").iterdir())
    assert not (tmp_path / "cache").exists()


def test_tensorboard_holds_curves_and_images(grids: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(grids, tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"train/loss", "epoch/validation_loss", "epoch/pr_auc"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["validation/galaxy_probability"]
    losses = [event.value for event in events.Scalars("epoch/validation_loss")]
    assert losses == pytest.approx([row["validation_loss"] for row in history(tmp_path)])


def test_a_finished_training_is_not_done_again(grids: Path, tmp_path: Path) -> None:
    first = run(grids, tmp_path)
    before = history(tmp_path)
    assert same(run(grids, tmp_path), first)
    assert history(tmp_path) == before


def test_parts_of_a_batch_add_up_to_the_batch(grids: Path, tmp_path: Path) -> None:
    whole = run(grids, tmp_path / "whole")
    parts = run(grids, tmp_path / "parts", accumulate=4)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, atol=1e-5, rtol=1e-5)


def test_the_regressor_trains_on_top_of_the_classifier(grids: Path, tmp_path: Path) -> None:
    run(grids, tmp_path / "classifier", epochs=4, optimizer={"learning_rate": 1e-2})
    model = {"name": "r2unet-regressor", "channels": [4, 8], "recurrence": 1}
    run(grids, tmp_path / "regressor", models=(tmp_path / "classifier",), model=model, ema_decay=0.5)
    assert {"rmse", "correlation", "count_ratio"} <= history(tmp_path / "regressor")[-1].keys()
    regressor, _ = load_model(tmp_path / "regressor")
    classifier = weights(tmp_path / "classifier")
    assert same(dict(regressor.classifier.state_dict()), classifier)
    with pytest.raises(ValueError, match="name the step that trained it"):
        run(grids, tmp_path / "other", model=model)


def test_training_stops_when_validation_no_longer_improves(
    grids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a learning rate that is far too large: after the first epochs nothing gets better
    run(grids, tmp_path, epochs=30, early_stopping=2, optimizer={"learning_rate": 0.3})
    rows = history(tmp_path)
    best = min(range(len(rows)), key=lambda n: rows[n]["validation_loss"])
    assert len(rows) == best + 3 < 30
    described = load_model(tmp_path)[0]
    assert described.threshold.item() == rows[best]["threshold"]


def test_a_loss_that_is_no_number_ends_the_run(grids: Path, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"lower optimizer\.learning_rate"):
        run(grids, tmp_path, optimizer={"learning_rate": 1e30}, clip_norm=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"name": "r2unet"}}, "did you mean 'r2unet-"),
        ({"model": {"name": "r2unet-classifier", "chanels": [4]}}, "chanels"),
        ({"model": {"channels": [4]}}, "a model has a name"),
        ({"schedule": {"kind": "cosine", "every": 3}}, "every"),
        ({"batch_size": 6, "accumulate": 4}, "not a multiple"),
        ({"precision": "fp16"}, "fp32"),
        ({"keep_checkpoints": 1}, "greater than or equal to 2"),
    ],
)
def test_wrong_settings_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TrainConfig(**CLASSIFIER | changes)


def test_settings_survive_the_run_file() -> None:
    config = TrainConfig(**CLASSIFIER | {"schedule": {"kind": "halving", "every": 4}})
    dumped = config.model_dump(mode="json")
    assert dumped["model"]["positive_weight"] == 20
    assert TrainConfig.model_validate(dumped) == config


def test_data_and_network_must_fit(grids: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.crop is 9.*multiple of 2"):
        run(grids, tmp_path, data={"crop": 9, "workers": 0})


def test_schedules() -> None:
    halving = HalvingSchedule(kind="halving", every=4)
    assert [halving.factor(10 * epoch + 9, 10, 20) for epoch in (0, 3, 4, 8)] == [1, 1, 0.5, 0.25]
    cosine = CosineSchedule(kind="cosine", warmup_steps=10, floor=0.1)
    factors = [cosine.factor(step, 10, 11) for step in range(111)]
    assert factors[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
    assert factors[60] == pytest.approx(0.55)
    assert factors[110] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(factors[10:]))


LONG = {
    "epochs": 3,
    "ema_decay": 0.9,
    "checkpoint_minutes": 1e-6,
    "data": {"crop": 8, "crops_per_box": 32, "tile": 8},
}


@pytest.fixture(scope="module")
def uninterrupted(grids: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("train") / "uninterrupted"
    with Ranks("train", CLASSIFIER | LONG, {"grids": [grids]}, out) as ranks:
        ranks.succeed()
    return out


def comparable(out: Path) -> list[dict[str, float]]:
    """The history without what depends on the clock."""
    clock = {"seconds", "samples_per_second", "data_wait_fraction"}
    return [{name: value for name, value in row.items() if name not in clock} for row in history(out)]


@pytest.mark.parametrize("step", [5, 37])
def test_a_killed_training_ends_with_the_same_weights(
    grids: Path, uninterrupted: Path, tmp_path: Path, step: int
) -> None:
    out = tmp_path / "out"
    moment = Moment(signal.SIGKILL, f"checkpoints/step-000000{step:02d}", rank=0)
    with Ranks("train", CLASSIFIER | LONG, {"grids": [grids]}, out, at=moment) as ranks:
        assert ranks.wait() == [-signal.SIGKILL]
    assert not (out / "model").exists()
    with Ranks("train", CLASSIFIER | LONG, {"grids": [grids]}, out) as ranks:
        ranks.succeed()
    assert "continues from step-" in ranks.log.read_text()
    assert same(last_weights(out), last_weights(uninterrupted))
    assert same(weights(out), weights(uninterrupted))
    assert comparable(out) == comparable(uninterrupted)


def test_a_damaged_checkpoint_costs_only_the_steps_since_the_one_before(
    grids: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    moment = Moment(signal.SIGKILL, "checkpoints/step-00000020", rank=0)
    with Ranks("train", CLASSIFIER | LONG, {"grids": [grids]}, out, at=moment) as ranks:
        ranks.wait()
    newest = max((out / "checkpoints").glob("step-*"))
    (newest / "state.pt").write_bytes((newest / "state.pt").read_bytes()[:-100])
    with Ranks("train", CLASSIFIER | LONG, {"grids": [grids]}, out) as ranks:
        ranks.succeed()
    assert f"checkpoint {newest.name} cannot be used" in ranks.log.read_text()
    assert same(last_weights(out), last_weights(uninterrupted))


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_training_saves_its_step(
    grids: Path, uninterrupted: Path, tmp_path: Path, signum: signal.Signals
) -> None:
    out = tmp_path / "out"
    long = LONG | {"checkpoint_minutes": 60}
    moment = Moment(signum, "cache/*/*.npy", number=2, rank=0)  # training has begun, no epoch is done
    with Ranks("train", CLASSIFIER | long, {"grids": [grids]}, out, at=moment) as ranks:
        assert ranks.wait() == [128 + signum]
    saved = sorted((out / "checkpoints").glob("step-*"))
    assert saved
    assert int(saved[-1].name[5:]) < 48
    assert ddp.Stopped(signum).code == 128 + signum
    with Ranks("train", CLASSIFIER | long, {"grids": [grids]}, out) as ranks:
        ranks.succeed()
    assert same(last_weights(out), last_weights(uninterrupted))


def test_a_training_killed_in_validation_loses_no_step(
    grids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(grids, tmp_path / "whole")
    steps = int(max((tmp_path / "whole" / "checkpoints").glob("step-*")).name[5:]) // CLASSIFIER["epochs"]
    with monkeypatch.context() as patch:
        patch.setattr(Training, "_validate", lambda self: sys.exit(1))
        with pytest.raises(SystemExit):
            run(grids, tmp_path / "out")
    checkpoints = Checkpoints(tmp_path / "out" / "checkpoints")
    newest = checkpoints.latest()
    assert newest is not None
    assert checkpoints.state(newest)["position"]["step"] == steps
    assert same(run(grids, tmp_path / "out"), whole)
    assert comparable(tmp_path / "out") == comparable(tmp_path / "whole")


def test_room_for_checkpoints_is_asked_for_first(
    grids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = {"crop": 16, "crops_per_box": 8, "workers": 0}
    config = TrainConfig(**CLASSIFIER | {"data": whole})
    cached = 2 * 2 * 16**3 * 4  # decoded boxes, which are asked for on their own
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=cached))
    with pytest.raises(durable.NotEnoughSpace, match="checkpoints and the model"):
        train(config, {"grids": [grids]}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def steps_saved(out: Path) -> int:
    """Global step of the newest checkpoint; 0 for none."""
    return max((int(path.name[5:]) for path in (out / "checkpoints").glob("step-*")), default=0)


def test_as_many_checkpoints_stay_as_are_asked_for(grids: Path, tmp_path: Path) -> None:
    run(grids, tmp_path, checkpoint_minutes=1e-6, keep_checkpoints=3)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == [
        f"step-0000000{step}" for step in (6, 7, 8)
    ]


BEGUN = stopped_at("checkpoints/step-0000000[4-9]")


def test_training_goes_on_while_the_disk_is_full(grids: Path, uninterrupted: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "out", 4 << 20) as out:
        with Ranks("train", CLASSIFIER | LONG, {"grids": [grids]}, out, at=BEGUN) as ranks:
            ranks.wait_until_stopped()
            assert len(list(out.glob("cache/*/*.npy"))) == 4
            with filled(out):
                ranks.signal_all(signal.SIGCONT)
                ranks.when(lambda: "no room for the row of epoch" in ranks.log.read_text())
                saved = steps_saved(out)
                ranks.when(lambda: ranks.log.read_text().count("no room for checkpoint") > 3)
                assert steps_saved(out) == saved
            ranks.succeed()
        said = ranks.log.read_text()
        assert re.search(
            rf"no room for checkpoint step-\d+ \(0\.\d MB\) in {out}/checkpoints: No space left on device, "
            r"0\.0 MB are free there\. Training goes on; the next checkpoint is tried when it is due",
            said,
        )
        assert same(last_weights(out), last_weights(uninterrupted))
        assert same(weights(out), weights(uninterrupted))
        assert comparable(out) == comparable(uninterrupted)


@pytest.mark.parametrize("ending", ["stopped", "finished"])
def test_what_a_full_disk_costs_is_said_and_made_up_for(
    grids: Path, uninterrupted: Path, tmp_path: Path, ending: str
) -> None:
    with small_disk(tmp_path / "out", 4 << 20) as out:
        with Ranks("train", CLASSIFIER | LONG, {"grids": [grids]}, out, at=BEGUN) as ranks:
            ranks.wait_until_stopped()
            assert len(list(out.glob("cache/*/*.npy"))) == 4
            with filled(out):
                ranks.signal_all(signal.SIGCONT)
                ranks.when(lambda: "no room for checkpoint" in ranks.log.read_text())
                if ending == "stopped":
                    ranks.signal_all(signal.SIGTERM)
                assert ranks.wait() == [1]
        # On a slow machine the signal may come when the last step is done.
        what = "(checkpoint step|the trained model)" if ending == "stopped" else "the trained model"
        assert re.search(
            rf"CheckpointError: no room for {what}.* in {out}/.*: No space left on device, 0\.0 MB are free "
            r"there\. Make room there and run the same command again: training then goes on from the last "
            r"whole checkpoint, step-\d+ of \d+ steps",
            ranks.log.read_text(),
        )
        with Ranks("train", CLASSIFIER | LONG, {"grids": [grids]}, out) as ranks:
            ranks.succeed()
        assert same(last_weights(out), last_weights(uninterrupted))
        assert same(weights(out), weights(uninterrupted))
        assert comparable(out) == comparable(uninterrupted)


def test_workers_outlive_a_signal_to_all_processes(grids: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """Even while they start, long before they could say what they do with signals."""
    out = tmp_path / "out"
    with Ranks("train", CLASSIFIER | LONG, {"grids": [grids]}, out) as ranks:
        ranks.when(ranks.has_workers)
        ranks.signal_all(signal.SIGTERM)
        assert ranks.wait() == [128 + signal.SIGTERM], ranks.log.read_text()
        assert "DataLoader worker" not in ranks.log.read_text()
        ranks.signal_all(signal.SIGKILL)
    moment = Moment(signal.SIGTERM, "history.jsonl")
    with Ranks("train", CLASSIFIER | LONG, {"grids": [grids]}, out, at=moment) as ranks:
        assert ranks.wait() == [128 + signal.SIGTERM], ranks.log.read_text()
    with Ranks("train", CLASSIFIER | LONG, {"grids": [grids]}, out) as ranks:
        ranks.succeed()
    assert same(last_weights(out), last_weights(uninterrupted))
    assert comparable(out) == comparable(uninterrupted)


def test_a_gpu_is_not_there_to_be_waited_for() -> None:
    clock = _DeviceClock(torch.device("cpu"))
    clock.start()
    assert clock.wait() == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_the_history_knows_the_gpu(grids: Path, tmp_path: Path) -> None:
    run(grids, tmp_path)
    for row in history(tmp_path):
        assert 0 <= row["device_wait_fraction"] <= 1
        assert 0 < row["peak_gpu_memory"] < 1
    assert {"device_wait_fraction", "peak_gpu_memory"} <= {row["metric"] for row in load_metrics(tmp_path)}


def test_compiling_is_for_crops_and_needs_a_compiler(
    grids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValidationError, match=r"compile is for crops.*sqr learns from rows"):
        TrainConfig(model={"name": "sqr", "inputs": ["a"], "targets": ["b"]}, epochs=1, compile=True)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "/no/compiler"))
    with pytest.raises(ValueError, match=r"compile is true, but torch\.compile fails here.*C\+\+ compiler"):
        run(grids, tmp_path / "out", compile=True)


@pytest.mark.slow  # compiling takes most of a minute
def test_a_compiled_training_is_the_same_and_goes_on_without(grids: Path, tmp_path: Path) -> None:
    small = CLASSIFIER["model"] | {"channels": [4], "recurrence": 0}
    plain = run(grids, tmp_path / "plain", model=small)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "_validate", lambda self: sys.exit(1))
        with pytest.raises(SystemExit):
            run(grids, tmp_path / "compiled", model=small, compile=True)
    for name, value in last_weights(tmp_path / "compiled").items():
        assert name in plain, name
        assert value.shape == plain[name].shape
    whole = run(grids, tmp_path / "compiled", model=small)  # the rest is not compiled
    assert whole.keys() == plain.keys()
    for name, value in whole.items():
        torch.testing.assert_close(value, plain[name], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_two_ranks_compile_what_one_does(grids: Path, tmp_path: Path) -> None:
    small = CLASSIFIER["model"] | {"channels": [4], "recurrence": 0}
    changes = {"model": small, "epochs": 1}
    plain = run(grids, tmp_path / "plain", **changes)
    with Ranks(
        "train", CLASSIFIER | changes | {"compile": True}, {"grids": [grids]}, tmp_path / "two", 2
    ) as ranks:
        ranks.succeed()
    for name, value in weights(tmp_path / "two").items():
        torch.testing.assert_close(value, plain[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("data", [{}, {"data": {"crop": 16}}])
def test_what_is_wrong_with_a_model_is_said_alone(data: dict[str, Any]) -> None:
    """What the data are of only the model would say."""
    config = {"model": {"name": "vdm", "unknwon": 0.1}, "epochs": 1, **data}
    _, problems = strict.validate(TrainConfig, config)
    assert [(problem.location, problem.message) for problem in problems] == [
        (("model", "unknwon"), "unknown key; did you mean unknown?")
    ]


def test_keys_that_are_offered_are_of_the_family_that_is_named() -> None:
    """Not those of another, which has the very key that is wrong here."""
    _, problems = strict.validate(TrainConfig, {"model": {"name": "vdm", "loss": "focal"}, "epochs": 1})
    (problem,) = problems
    assert problem.message.startswith("unknown key; known: attention, channels, ")
    assert "recall" not in problem.message
