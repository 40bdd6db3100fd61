"""Checkpoints are whole or absent, and hold no code."""

import pickle
from pathlib import Path

import pytest
import torch
import yaml

from galdist.models.r2unet import R2UNetClassifier, R2UNetClassifierConfig
from galdist.training.checkpoint import CheckpointError, Checkpoints, load_model, save_model

WEIGHTS = {"layer.weight": torch.arange(6.0).view(2, 3), "constant": torch.tensor(2.0)}
STATE = {
    "optimizer": {"step": torch.tensor(3.0), "betas": (0.9, 0.999)},
    "random": [{"python": (3, (1, 2), None)}],
}


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints")


def test_what_is_written_is_read(checkpoints: Checkpoints) -> None:
    strided = torch.randn(2, 3, 4, 4, 4).contiguous(memory_format=torch.channels_last_3d)
    checkpoints.write("step-00000001", {"weights": WEIGHTS, "ema": {"a": strided, "same": strided}}, STATE)
    assert checkpoints.latest() == "step-00000001"
    loaded = checkpoints.weights("step-00000001")
    assert all(torch.equal(loaded[name], WEIGHTS[name]) for name in WEIGHTS)
    assert torch.equal(checkpoints.weights("step-00000001", "ema")["a"], strided)
    assert checkpoints.state("step-00000001") == STATE


@pytest.mark.parametrize("file", ["weights.safetensors", "state.pt", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "removed"])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_used(
    checkpoints: Checkpoints, file: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        checkpoints.write(f"step-0000000{step}", {"weights": WEIGHTS}, STATE)
    path = checkpoints.folder / "step-00000002" / file
    data = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(data[:-10])
    elif damage == "flipped":
        data[len(data) // 2] ^= 0x10
        path.write_bytes(data)
    else:
        path.unlink()
    assert checkpoints.latest() == "step-00000001"
    assert "step-00000002 cannot be used" in caplog.text


def test_an_unfinished_checkpoint_does_not_count(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints.write("step-00000001", {"weights": WEIGHTS}, STATE)

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        checkpoints.write("step-00000002", {"weights": WEIGHTS}, STATE)
    assert checkpoints.latest() == "step-00000001"


def test_needed_checkpoints_are_checked_and_kept(checkpoints: Checkpoints) -> None:
    for epoch in range(5):
        checkpoints.write(f"best-00000{epoch}", {"weights": WEIGHTS})
        checkpoints.write(f"step-0000000{epoch}", {"weights": WEIGHTS}, STATE, needs=(f"best-00000{epoch}",))
        checkpoints.prune()
    kept = {"best-000003", "best-000004", "step-00000003", "step-00000004"}
    assert {path.name for path in checkpoints.folder.iterdir()} == kept
    (checkpoints.folder / "best-000004" / "weights.safetensors").write_bytes(b"")
    assert checkpoints.latest() == "step-00000003"


def test_no_checkpoint_is_no_checkpoint(checkpoints: Checkpoints) -> None:
    assert checkpoints.latest() is None


def test_code_in_a_state_is_refused(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoints.write("step-00000001", {"weights": WEIGHTS}, STATE)

    class Harm:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "harm",))

    torch.save({"position": Harm()}, checkpoints.folder / "step-00000001" / "state.pt")
    with pytest.raises(pickle.UnpicklingError):
        checkpoints.state("step-00000001")
    assert not (tmp_path / "harm").exists()


@pytest.fixture
def model() -> R2UNetClassifier:
    return R2UNetClassifier(R2UNetClassifierConfig(channels=(2, 3), recurrence=0, recall=0.9))


def test_a_model_comes_back_with_its_constants(tmp_path: Path, model: R2UNetClassifier) -> None:
    model.threshold.fill_(0.125)
    model.nonempty_fraction.fill_(0.01)
    checksum = save_model(tmp_path / "model", model, model.state_dict(), {"epoch": 4})
    loaded, found = load_model(tmp_path)
    assert found == checksum
    assert loaded.config == model.config
    assert not loaded.training
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    described = yaml.safe_load((tmp_path / "model" / "model.yaml").read_text())
    assert (described["sha256"], described["epoch"]) == (checksum, 4)
    assert described["parameters"] == sum(parameter.numel() for parameter in model.parameters())


def test_weights_of_another_model_are_refused(tmp_path: Path, model: R2UNetClassifier) -> None:
    save_model(tmp_path / "model", model, model.state_dict(), {})
    with torch.no_grad():
        model.network.head.bias.add_(1)
    save_model(tmp_path / "other", model, model.state_dict(), {})
    (tmp_path / "other" / "weights.safetensors").rename(tmp_path / "model" / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"is not the file that model\.yaml describes"):
        load_model(tmp_path)
    with pytest.raises(CheckpointError, match="no trained model here"):
        load_model(tmp_path / "nowhere")
