"""Matter of another run, all matter, velocities: what the networks can be given besides dark matter."""

import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from universe import Truth, make_truth, write_camels, write_groups, write_snapshot

from galdist.data.transforms import Normalization
from galdist.grids.ingest import IngestConfig, ingest
from galdist.grids.mass_assignment import assign
from galdist.grids.store import Field, SimulationAttrs, SimulationGrids, create_store, open_store
from galdist.models.r2unet import R2UNetClassifierConfig
from galdist.models.voxels import InputConfig
from galdist.simulations.simulation import SimulationError
from galdist.training.predict import PredictConfig, predict
from galdist.training.train import TrainConfig, train

N_MESH = 8


def config(**given: object) -> IngestConfig:
    values = {"n_mesh": N_MESH, "fields": [{"name": "matter_counts"}, {"name": "galaxy_counts"}], **given}
    return IngestConfig.model_validate({"checksums": False, **values})


def ingested(out: Path, inputs: dict[str, list[Path]] | None = None, **given: object) -> SimulationGrids:
    """The first simulation."""
    ingest(config(**given), inputs or {}, out)
    store = open_store(out / "grids.zarr")
    return store[next(iter(store))]


def add_particles(file: Path, kind: int, truth: Truth) -> None:
    """Particles of another type in a snapshot of one chunk, each with a mass of its own."""
    with h5py.File(file, "r+") as out:
        group = out.create_group(f"PartType{kind}")
        group["Coordinates"] = truth.position * 1e3
        group["Velocities"] = truth.velocity
        group["Masses"] = truth.mass / 1e10
        for name in ("NumPart_ThisFile", "NumPart_Total"):
            counts = out["Header"].attrs[name]
            counts[kind] = len(truth.position)
            out["Header"].attrs[name] = counts


def hydro(root: Path) -> dict[int, Truth]:
    """A tree whose run with galaxies has gas, dark matter, stars and black holes; the truth by type."""
    write_camels(root, 1, 4096)
    truths = {kind: make_truth(50 + kind, n) for kind, n in ((0, 1000), (1, 4096), (4, 50), (5, 3))}
    for kind in (0, 4, 5):
        truths[kind].mass = np.random.default_rng(kind).uniform(1e8, 1e9, len(truths[kind].position))
    folder = root / "Sims" / "MockA" / "L25n16" / "CV" / "CV_0"
    (file,) = write_snapshot(folder, truths[1])
    for kind in (0, 4, 5):
        add_particles(file, kind, truths[kind])
    return truths


def test_matter_of_another_run_with_the_galaxies_of_this_one(tmp_path: Path) -> None:
    galaxies = write_camels(tmp_path / "nbody", 2, 4096)["MockA_CV_0"]
    matter = write_camels(tmp_path / "cola", 2, 1000, suite="Fast", volume="L25n10", seed=7)["Fast_CV_0"]
    write_camels(tmp_path / "cola", 1, 64, suite="Other")
    grids = ingested(
        tmp_path / "a", path=tmp_path / "nbody", matter_of={"path": tmp_path / "cola", "suite": "Fast"}
    )
    assert grids.attrs.name == "MockA_CV_0"
    np.testing.assert_allclose(
        grids.read("matter_counts"), assign(matter.position, 25.0, N_MESH), rtol=1e-5, atol=1e-5
    )
    kept = galaxies.galaxy_position[galaxies.stellar_mass >= 1.3e8]
    np.testing.assert_array_equal(grids.read("galaxy_counts"), assign(kept, 25.0, N_MESH, "ngp"))
    files = {Path(source.file).name: source.file for source in grids.attrs.sources}
    assert str(tmp_path / "cola") in files["snapshot_090.hdf5"]
    assert str(tmp_path / "nbody") in files["groups_090.hdf5"]
    shutil.rmtree(tmp_path / "cola" / "Sims" / "Other_DM")
    steps = {"simulations": [tmp_path / "nbody"], "matter": [tmp_path / "cola"]}
    again = ingested(tmp_path / "b", steps)
    np.testing.assert_array_equal(again.read("matter_counts"), grids.read("matter_counts"))


def test_runs_of_other_universes_are_refused(tmp_path: Path) -> None:
    write_camels(tmp_path / "nbody", 2, 64)
    write_camels(tmp_path / "cola", 1, 64, redshift=1.0)
    write_camels(tmp_path / "cola", 1, 64, suite="Box")
    steps = {"simulations": [tmp_path / "nbody"], "matter": [tmp_path / "cola"]}
    with pytest.raises(SimulationError, match="either `matter_of` in the config or a step"):
        ingested(tmp_path / "out", steps, matter_of={})
    with pytest.raises(SimulationError, match="take the matter of MockA_CV_1 from: 'CV_1'"):
        ingested(
            tmp_path / "out",
            path=tmp_path / "nbody",
            snapshot=90,
            matter_of={"path": tmp_path / "cola", "suite": "MockA"},
        )
    write_camels(tmp_path / "cola", 2, 64, redshift=1.0)
    (file,) = (tmp_path / "cola" / "Sims" / "Box_DM").rglob("*.hdf5")
    with h5py.File(file, "r+") as edited:
        edited["Header"].attrs["BoxSize"] = 5e4
        edited["Header"].attrs["Omega0"] = 0.3175
    (parameters,) = (tmp_path / "cola" / "Parameters").rglob("*Box*.txt")
    parameters.write_text("CV_0 0.3175 0.8 1 1 1 1 77")
    one = {"path": tmp_path / "nbody", "where": {"A_SN1": [None, 1.05]}}
    with pytest.raises(SimulationError, match=r"not of one universe: redshift 0 and 1$"):
        ingested(
            tmp_path / "out", **one, snapshot=90, matter_of={"path": tmp_path / "cola", "suite": "MockA"}
        )
    differs = r"box size \[Mpc/h\] 25 and 50; Omega_m 0.3 and 0.3175; seed 5000 and 77$"
    with pytest.raises(SimulationError, match=differs):
        ingested(tmp_path / "out", **one, matter_of={"path": tmp_path / "cola", "suite": "Box"})
    write_groups(tmp_path / "nbody" / "FOF_Subfind/MockA/L25n16/CV/CV_0", make_truth(0, 64, box_size=50))
    with pytest.raises(SimulationError, match=r"galaxies .* and matter are not of one universe: box size"):
        ingested(tmp_path / "out", **one)


def test_total_matter_is_all_particles_with_their_masses(tmp_path: Path) -> None:
    truths = hydro(tmp_path)
    fields = [{"name": name} for name in ("matter_counts", "matter_mass", "matter_momentum")]
    grids = ingested(tmp_path / "total", path=tmp_path, matter="total", fields=fields)
    mass = sum(assign(truth.position, 25.0, N_MESH, weights=truth.mass) for truth in truths.values())
    np.testing.assert_allclose(grids.read("matter_mass"), mass, rtol=1e-5)
    momentum = sum(
        assign(truth.position, 25.0, N_MESH, weights=truth.mass * truth.velocity[:, 1])
        for truth in truths.values()
    )
    np.testing.assert_allclose(grids.read("matter_momentum")[1], momentum, atol=1e-5 * np.abs(momentum).max())
    dark = assign(truths[1].position, 25.0, N_MESH)
    np.testing.assert_allclose(grids.read("matter_counts"), dark, rtol=1e-5, atol=1e-5)
    only = ingested(tmp_path / "dark", path=tmp_path, matter="hydro", fields=fields)
    np.testing.assert_allclose(only.read("matter_mass"), 6.5e9 * dark, rtol=1e-5, atol=1e5)


def test_the_velocity_of_a_uniform_flow_is_the_flow_and_zero_where_nothing_is(tmp_path: Path) -> None:
    """And of other flows the momentum over the mass, of particles of different masses."""
    truth = write_camels(tmp_path / "flow", 1, 600, masses="field")["MockA_CV_0"]
    rng = np.random.default_rng(3)
    truth.mass = rng.uniform(1e9, 1e10, 600)
    truth.position[:, 2] %= 12  # the other half is empty
    moving = truth.velocity.copy()
    truth.velocity[:] = (100.0, -200.0, 50.0)
    folder = tmp_path / "flow" / "Sims/MockA_DM/L25n16/CV/CV_0"
    write_snapshot(folder, truth, masses="field")
    fields = [{"name": name} for name in ("matter_mass", "matter_velocity", "matter_momentum")]
    flow = ingested(tmp_path / "a", path=tmp_path / "flow", fields=fields)
    velocity, full = flow.read("matter_velocity"), flow.read("matter_mass") > 0
    assert 0.1 < full.mean() < 0.8
    assert (velocity[:, ~full] == 0).all()
    for component, speed in enumerate((100.0, -200.0, 50.0)):
        np.testing.assert_allclose(velocity[component][full], speed, rtol=1e-5)
    assert flow.field("matter_velocity").units == "km/s"
    truth.velocity[:] = moving
    write_snapshot(folder, truth, masses="field")
    grids = ingested(tmp_path / "b", path=tmp_path / "flow", fields=fields)
    mass = grids.read("matter_mass").astype("f8")
    ratio = grids.read("matter_momentum")[:, full] / mass[full]
    np.testing.assert_allclose(grids.read("matter_velocity")[:, full], ratio, rtol=1e-5, atol=1e-3)
    assert np.abs(ratio).max() > 100


def test_a_network_learns_from_velocities(tmp_path: Path) -> None:
    """Galaxies are where flows converge, which a network that sees no velocities cannot know. Crops of the
    training are turned: only what turns with them as a vector still converges there."""
    random = np.random.default_rng(0)
    simulations = [
        SimulationAttrs(name=f"box_{n}", box_size=25.0, redshift=0.0, suite="flow", split=split)
        for n, split in enumerate(("train", "train", "validation", "test"))
    ]
    fields = [
        Field(name="matter_counts"),
        Field(name="galaxy_counts"),
        Field(name="matter_velocity", components=3, units="km/s"),
    ]
    store = create_store(tmp_path / "grids" / "grids.zarr", simulations, fields, 16)
    for name in store:
        velocity = random.normal(0, 300, (3, 16, 16, 16)).astype("f4")
        converging = -sum(np.roll(velocity[i], -1, 2 - i) - np.roll(velocity[i], 1, 2 - i) for i in range(3))
        galaxies = (converging > np.quantile(converging, 0.9)).astype("f4")
        store[name].write("matter_counts", np.ones((16, 16, 16), "f4") + random.random((16, 16, 16), "f4"))
        store[name].write("galaxy_counts", galaxies)
        store[name].write("matter_velocity", velocity)

    inputs = [{"field": "matter_counts"}, {"field": "matter_velocity", "components": 3}]
    training = {
        "model": {
            "name": "inception-regressor",
            "loss": "poisson",
            "branches": [4, 8, 4, 2],
            "inputs": inputs,
        },
        "data": {"crop": 16, "crops_per_box": 16, "workers": 0, "tile": 16},
        "epochs": 8,
        "batch_size": 4,
        "optimizer": {"learning_rate": 1e-2},
    }
    steps = {"grids": [tmp_path / "grids"]}
    train(TrainConfig.model_validate(training), steps, tmp_path / "model")
    predict(PredictConfig(tile=16), {**steps, "model": [tmp_path / "model"]}, tmp_path)
    predicted = open_store(tmp_path / "prediction.zarr")["box_3"].read("galaxy_counts")
    truth = store["box_3"].read("galaxy_counts")
    assert np.corrcoef(predicted.ravel(), truth.ravel())[0, 1] > 0.6


def test_vectors_are_scaled_and_not_shifted() -> None:
    entry = InputConfig(field="matter_velocity", components=3)
    assert entry.normalization == ("scale",)
    assert InputConfig(field="matter_counts").normalization == ("log1p", "standardize")
    velocity = np.random.default_rng(1).normal(100, 300, (3, 8, 8, 8)).astype("f4")
    normalization = Normalization(entry.normalization)
    normalization.fit(lambda: iter([velocity]))
    x = torch.from_numpy(velocity)
    assert normalization(x).square().mean().item() == pytest.approx(1, rel=1e-5)
    assert torch.equal(normalization(-x), -normalization(x))
    torch.testing.assert_close(normalization.inverse(normalization(x)), x)
    with pytest.raises(ValueError, match="'matter_velocity' is a vector"):
        R2UNetClassifierConfig(inputs=({**entry.model_dump(), "normalization": ("log1p",)},))
    with pytest.raises(ValueError, match="zero everywhere"):
        normalization.fit(lambda: iter([np.zeros(8, np.float32)]))
