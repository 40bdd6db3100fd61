"""Checkpoints are whole or absent, and hold no code."""

import pickle
from pathlib import Path

import pytest
import torch
import yaml
from linear_galaxies import INPUTS, SOURCE, TARGETS, make_centrals, make_model
from small_grids import filled, small_disk

import galdist
from galdist.catalogs.catalog import open_catalog
from galdist.models.r2unet import R2UNetClassifier, R2UNetClassifierConfig
from galdist.models.tables import TableObjective
from galdist.training.checkpoint import (
    CheckpointError,
    Checkpoints,
    describe_model,
    load_model,
    save_model,
    table_facts,
)
from hpc import durable

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
    checkpoints.write(1, {"weights": WEIGHTS, "ema": {"a": strided, "same": strided}}, STATE)
    assert checkpoints.latest() == "step-00000001"
    loaded = checkpoints.weights("step-00000001")
    assert all(torch.equal(loaded[name], WEIGHTS[name]) for name in WEIGHTS)
    assert torch.equal(checkpoints.weights("step-00000001", "ema")["a"], strided)
    assert checkpoints.weights("step-00000001", "best") == {}
    assert checkpoints.state("step-00000001") == STATE


@pytest.mark.parametrize("file", ["weights.safetensors", "state.pt", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "emptied", "flipped", "removed"])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_used(
    checkpoints: Checkpoints, file: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        checkpoints.write(step, {"weights": WEIGHTS}, STATE)
    path = checkpoints.folder / "step-00000002" / file
    data = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(data[:-10])
    elif damage == "emptied":
        path.write_bytes(b"")
    elif damage == "flipped":
        data[len(data) // 2] ^= 0x10
        path.write_bytes(data)
    else:
        path.unlink()
    assert checkpoints.latest() == "step-00000001"
    assert "step-00000002 cannot be used" in caplog.text


def test_a_checkpoint_that_does_not_fit_leaves_nothing(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        checkpoints = Checkpoints(disk / "checkpoints")
        small, large = {"weights": WEIGHTS}, {"weights": {"a": torch.zeros(150_000)}}
        checkpoints.write(1, small, STATE)
        with pytest.raises(
            durable.NotEnoughSpace,
            match=rf"no room for checkpoint step-00000002 \(1\.2 MB\) in {disk}/checkpoints: No space left "
            r"on device, \d\.\d MB are free there",
        ):
            checkpoints.write(2, large | {"ema": large["weights"]}, STATE)
        assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000001"]
        checkpoints.write(2, large, STATE)
        with filled(disk), pytest.raises(durable.NotEnoughSpace):
            checkpoints.write(2, large, {**STATE, "history": []})  # in the place of the first one
        assert checkpoints.latest() == "step-00000002"
        assert torch.equal(checkpoints.weights("step-00000002")["a"], large["weights"]["a"])


def test_an_unfinished_checkpoint_does_not_count(checkpoints: Checkpoints) -> None:
    checkpoints.write(1, {"weights": WEIGHTS}, STATE)
    killed = checkpoints.folder / ".step-00000002.0123abcd"
    killed.mkdir()
    (killed / "weights.safetensors").write_bytes(b"half")
    assert checkpoints.latest() == "step-00000001"
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("kept", [2, 3])
def test_the_newest_are_kept(tmp_path: Path, kept: int) -> None:
    checkpoints = Checkpoints(tmp_path, kept)
    for step in range(5):
        checkpoints.write(step, {"weights": WEIGHTS}, STATE)
    checkpoints.write(4, {"weights": WEIGHTS}, {"again": True})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"step-0000000{step}" for step in range(5 - kept, 5)
    ]
    assert checkpoints.state("step-00000004") == {"again": True}


def test_no_checkpoint_is_no_checkpoint(checkpoints: Checkpoints) -> None:
    assert checkpoints.latest() is None


def test_code_in_a_state_is_refused(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoints.write(1, {"weights": WEIGHTS}, STATE)

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


def test_a_model_that_does_not_fit_is_told_of(tmp_path: Path, model: R2UNetClassifier) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        save_model(disk / "model", model, model.state_dict(), {"epoch": 1})
        with filled(disk), pytest.raises(durable.NotEnoughSpace, match=f"the trained model in {disk}/model"):
            save_model(disk / "model", model, model.state_dict(), {"epoch": 2})
        assert "epoch: 1\n" in (disk / "model" / "model.yaml").read_text()
        load_model(disk)


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


def test_an_error_of_the_file_server_is_not_the_checkpoints(checkpoints: Checkpoints) -> None:
    checkpoints.write(1, {"weights": WEIGHTS}, STATE)
    manifest = checkpoints.folder / "step-00000001" / "manifest.json"
    kept = manifest.read_bytes()
    manifest.unlink()
    manifest.symlink_to(manifest)  # too many levels of symbolic links: an OSError that is no missing file
    with pytest.raises(OSError, match="Too many levels"):
        checkpoints.latest()
    manifest.unlink()
    manifest.write_bytes(kept)
    assert checkpoints.latest() == "step-00000001"


def test_a_saved_table_model_is_one_folder_that_says_what_it_is(tmp_path: Path) -> None:
    facts = {"columns": SOURCE, "citation": "Somebody (2020)"}
    catalogs = make_centrals(tmp_path / "catalogs", {"one": 300, "two": 200}, facts=facts)
    make_model(tmp_path / "step", catalogs)
    folder = (tmp_path / "step" / "model").rename(tmp_path / "sent")
    assert {path.name for path in folder.iterdir()} == {"weights.safetensors", "model.yaml"}
    objective, checksum = load_model(folder)
    assert isinstance(objective, TableObjective)
    about = describe_model(folder)
    assert about["sha256"] == checksum
    assert about["galdist"] == galdist.__version__
    assert about["license"] == "GPL-3.0-or-later"
    assert about["citation"] == ["Somebody (2020)"]
    assert list(about["columns"]) == [*INPUTS, *TARGETS]
    mass, color = about["columns"]["log_halo_mass"], about["columns"]["color_gi"]
    assert (mass["role"], mass["units"], mass["source"]) == ("input", "log10 Msun/h", SOURCE["log_halo_mass"])
    assert (color["role"], color["units"]) == ("target", "mag")
    store = open_catalog(catalogs / "catalog.zarr")
    tables = [store.table(name, "centrals") for name in store.names()]
    for name, column in about["columns"].items():
        training = [table[name][table["split"] == 0] for table in tables]
        ends = [min(part.min() for part in training), max(part.max() for part in training)]
        assert column["range"] == pytest.approx(ends, rel=1e-6)
    assert objective.input_high.tolist() == [about["columns"][name]["range"][1] for name in INPUTS]


def test_tables_that_differ_have_no_common_source(tmp_path: Path) -> None:
    one = make_centrals(tmp_path / "one", {"one": 300})
    other = make_centrals(tmp_path / "other", {"other": 300}, facts={"columns": {"spin": SOURCE["spin"]}})
    objective, _ = load_model(make_model(tmp_path / "step", one))
    columns = table_facts(objective, [one, other])["columns"]
    assert "source" not in columns["log_halo_mass"]
    assert columns["spin"]["source"] == SOURCE["spin"]


def test_a_model_of_boxes_has_no_columns(model: R2UNetClassifier) -> None:
    assert table_facts(model, []) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "is damaged"),
        ("just words", "describes no model"),
        ("{model: {name: r2unet-classifier}}", "lacks model, parts or sha256"),
        ("!!python/object/apply:os.system ['touch harm']", "is damaged: could not determine a constructor"),
    ],
)
def test_a_description_that_is_none_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "model.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)
    assert not Path("harm").exists()


def test_a_model_of_another_galdist_says_so(tmp_path: Path, model: R2UNetClassifier) -> None:
    save_model(tmp_path / "model", model, model.state_dict(), {})
    path = tmp_path / "model" / "model.yaml"
    described = yaml.safe_load(path.read_text())
    described["model"]["depth"] = 3
    path.write_text(yaml.safe_dump(described | {"galdist": "9.1"}))
    with pytest.raises(CheckpointError, match=r"cannot build this model, which 9\.1 made: (.|\n)*depth"):
        load_model(tmp_path)
    path.write_text(yaml.safe_dump(described))
    (tmp_path / "model" / "weights.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"weights\.safetensors is missing"):
        load_model(tmp_path)


def test_models_beside_are_named(tmp_path: Path, model: R2UNetClassifier) -> None:
    for name in ("sqr", "src"):
        save_model(tmp_path / name / "model", model, model.state_dict(), {})
    with pytest.raises(CheckpointError, match=f"There are: {tmp_path}/sqr, {tmp_path}/src"):
        load_model(tmp_path)
