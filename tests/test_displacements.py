"""COLA corrected by a network: particles go where the displacements say, and nothing else moves them."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_runs import cut_down
from universe import make_truth, write_camels, write_snapshot

from galdist.data.transforms import N_SYMMETRIES, cube_symmetry
from galdist.grids.ingest import IngestConfig, ingest
from galdist.grids.matter import with_matter
from galdist.grids.store import Field, GridStore, SimulationAttrs, create_store, open_store
from galdist.models import build, from_description
from galdist.models.displacements import Displacements, DisplacementsConfig, differences
from galdist.simulations.simulation import SelectionConfig, SimulationError
from galdist.training.predict import PredictConfig, predict
from galdist.training.train import TrainConfig, train

SIDE, BOX = 16, 25.0
FIELDS = [Field(name="displacement", components=3, units="Mpc/h")]
COSMOLOGY = {"Omega_m": 0.3, "Omega_b": 0.049, "h": 0.6711, "n_s": 0.9624, "sigma_8": 0.8}


def smooth_vectors(random: np.random.Generator, power: float = 3.0) -> np.ndarray:
    """Irrotational displacements (3, z, y, x) of a Gaussian field."""
    k = np.fft.fftfreq(SIDE) * SIDE
    waves = np.meshgrid(k, k, k, indexing="ij")
    k2 = sum(wave**2 for wave in waves)
    potential = np.fft.fftn(random.normal(size=(SIDE,) * 3)) * np.where(k2 > 0, 1 / np.maximum(k2, 1), 0)
    potential *= np.exp(-k2 / 2 / power**2)
    field = np.stack([np.fft.ifftn(1j * wave * potential).real for wave in waves[::-1]])
    return (field / field.std()).astype("f4")


def divergence(field: np.ndarray) -> np.ndarray:
    return sum(np.roll(field[i], -1, 2 - i) - np.roll(field[i], 1, 2 - i) for i in range(3))


def make_pairs(step: Path, n_boxes: int = 4) -> GridStore:
    """Displacements, and true ones that differ by what the neighbors' differences decide: the gradient of the
    divergence."""
    random = np.random.default_rng(1)
    splits = ("train",) * (n_boxes - 2) + ("validation", "test")
    simulations = [
        SimulationAttrs(
            name=f"box_{n}", box_size=BOX, redshift=0, suite="waves", split=split, cosmology=COSMOLOGY
        )
        for n, split in enumerate(splits)
    ]
    fields = [*FIELDS, FIELDS[0].model_copy(update={"name": "true_displacement"})]
    store = create_store(step / "grids.zarr", simulations, fields, SIDE)
    for name in store:
        moved = smooth_vectors(random)
        flow = divergence(moved)
        missing = np.stack([np.roll(flow, -1, 2 - i) - np.roll(flow, 1, 2 - i) for i in range(3)])
        store[name].write("displacement", moved)
        store[name].write("true_displacement", moved + 0.3 * missing.astype("f4") / missing.std())
    return store


def batch(seed: int = 0, periodic: bool = True, halo: int = 0, side: int = 8) -> dict[str, object]:
    generator = torch.Generator().manual_seed(seed)
    given = torch.randn(2, 3, side, side, side, generator=generator)
    missing = torch.randn(2, 3, side, side, side, generator=generator)
    truth = given + 0.1 * (missing - missing.mean((2, 3, 4), keepdim=True))
    return {"displacement": given, "true_displacement": truth, "periodic": periodic, "halo": halo}


def prepared(seed: int = 0, trained: bool = True) -> Displacements:
    """As after some training, or before any."""
    torch.manual_seed(seed)
    objective = build(DisplacementsConfig(channels=(4, 4)))
    assert isinstance(objective, Displacements)
    data = batch(seed)
    objective.prepare(lambda field: (box.numpy() for box in data[field]))
    if trained:
        torch.nn.init.normal_(objective.network.head.weight)
    return objective.eval()


def test_an_untrained_network_changes_nothing_and_its_loss_is_one() -> None:
    objective, data = prepared(trained=False), batch()
    with torch.no_grad():
        torch.testing.assert_close(objective.predict(data)["displacement"], data["displacement"])
        assert objective(data)["loss"].item() == pytest.approx(1, rel=1e-5)
        metrics = objective.summarize(objective.evaluate(data)[0])
    assert metrics["loss"] == pytest.approx(1, rel=1e-5)
    assert metrics["displacement_error"] == metrics["uncorrected_error"] == pytest.approx(0.1, rel=0.05)


@given(shift=st.tuples(*[st.integers(0, 3)] * 3), common=st.tuples(*[st.floats(-20, 20)] * 3))
def test_corrections_do_not_depend_on_where_particles_are(
    shift: tuple[int, int, int], common: tuple[float, float, float]
) -> None:
    """Neither on the lattice, by what the network halves, nor in the box."""
    objective, data = prepared(), batch()
    moved = dict(data)
    places = tuple(2 * n for n in shift)
    offset = torch.tensor(common).view(1, 3, 1, 1, 1)
    moved["displacement"] = torch.roll(data["displacement"], places, (2, 3, 4)) + offset
    with torch.no_grad():
        expected = torch.roll(objective.predict(data)["displacement"], places, (2, 3, 4)) + offset
        torch.testing.assert_close(objective.predict(moved)["displacement"], expected, rtol=1e-4, atol=2e-4)
        assert (expected - moved["displacement"]).abs().max() > 0.01


def test_tiles_are_exact_within_the_reach() -> None:
    objective = prepared()
    whole = batch(3, side=64)
    halo = -(-objective.reach // 2) * 2
    part = {**whole, "periodic": False, "halo": halo}
    low = slice(10, 10 + 2 * halo + 4)
    part["displacement"] = whole["displacement"][:, :, low, low, low]
    inside = slice(10 + halo, 14 + halo)
    with torch.no_grad():
        found, expected = (objective.predict(one)["displacement"] for one in (part, whole))
    torch.testing.assert_close(found, expected[:, :, inside, inside, inside], rtol=1e-4, atol=1e-5)


def test_differences_turn_with_the_cube() -> None:
    """Of turned displacements they are the differences, turned as tensors: up to the neighbor on the other
    side."""
    field = np.random.default_rng(2).normal(size=(3, 6, 6, 6)).astype("f4")
    traces = {}
    for symmetry in range(N_SYMMETRIES):
        turned = torch.from_numpy(cube_symmetry(field, symmetry))[None]
        tensor = differences(turned, True).unflatten(1, (3, 3))[0]  # axis (z, y, x), component (x, y, z)
        trace = sum(tensor[2 - i, i].double().square().sum() for i in range(3))
        traces[symmetry] = trace.item(), tensor.double().square().sum().item()
    assert np.ptp([a for a, _ in traces.values()]) < 1e-6 * traces[0][0]
    assert np.ptp([b for _, b in traces.values()]) < 1e-6 * traces[0][1]


def test_what_does_not_fit_is_refused() -> None:
    objective = build(DisplacementsConfig(channels=(4,)))
    pairs = {"displacement": np.ones((3, 4, 4, 4), "f4"), "true_displacement": np.ones((3, 4, 4, 4), "f4")}
    with pytest.raises(ValueError, match="are the same"):
        objective.prepare(lambda field: iter([pairs[field]]))
    pairs["true_displacement"] = pairs["displacement"] + 0.4
    with pytest.raises(ValueError, match="did not start from one lattice"):
        objective.prepare(lambda field: iter([pairs[field]]))
    pairs["displacement"] = np.ones((4, 4, 4), "f4")
    with pytest.raises(ValueError, match="must be vectors"):
        objective.prepare(lambda field: iter([pairs[field]]))
    with pytest.raises(ValueError, match="builds on no other"):
        build(DisplacementsConfig(channels=(4,)), [objective])


def test_a_network_learns_the_correction(tmp_path: Path) -> None:
    store = make_pairs(tmp_path / "pairs")
    training = {
        "model": {"name": "necola", "channels": [16, 16]},
        "data": {"crop": 16, "crops_per_box": 16, "workers": 0, "tile": 16},
        "epochs": 6,
        "batch_size": 2,
        "optimizer": {"learning_rate": 5e-3},
    }
    steps = {"grids": [tmp_path / "pairs"]}
    train(TrainConfig.model_validate(training), steps, tmp_path / "model")
    predict(
        PredictConfig(split="all", tile=16), {**steps, "model": [tmp_path / "model"]}, tmp_path / "corrected"
    )
    corrected = open_store(tmp_path / "corrected" / "prediction.zarr")
    assert list(corrected) == list(store)
    truth, given = (store["box_3"].read(name) for name in ("true_displacement", "displacement"))
    left = corrected["box_3"].read("displacement") - truth
    assert left.std() < 0.7 * (given - truth).std()
    assert from_description(build(DisplacementsConfig()).description()).config == DisplacementsConfig()


def test_displaced_particles_are_the_matter_of_the_run_they_are_of(tmp_path: Path) -> None:
    """Displacements that a step left are those of the particles, whose matter is the run's own."""
    write_camels(tmp_path / "camels", 1, 64)
    sites = np.stack(np.meshgrid(*[np.arange(SIDE)] * 3, indexing="ij"), -1).reshape(-1, 3)
    moved = 3 * smooth_vectors(np.random.default_rng(4))
    truth = make_truth(0, SIDE**3)
    by_site = moved[:, sites[:, 2], sites[:, 1], sites[:, 0]].T
    truth.position = ((sites * BOX / SIDE + by_site) % BOX).astype("f4") % np.float32(BOX)
    truth.mass = np.full(SIDE**3, 0.3 * 2.77536627e11 * BOX**3 / SIDE**3)
    write_snapshot(tmp_path / "camels" / "Sims/MockA_DM/L25n16/CV/CV_0", truth)
    attrs = SimulationAttrs(
        name="MockA_CV_0", box_size=BOX, redshift=0, suite="MockA", set="CV", cosmology=COSMOLOGY, seed=5000
    )
    store = create_store(tmp_path / "step" / "prediction.zarr", [attrs], FIELDS, SIDE)
    store["MockA_CV_0"].write("displacement", moved)
    names = ("matter_counts", "matter_mass", "galaxy_counts", "displacement")
    config = IngestConfig.model_validate(
        {"path": tmp_path / "camels", "n_mesh": SIDE, "fields": [{"name": name} for name in names]}
    )
    ingest(config, {}, tmp_path / "own")
    ingest(config, {"matter": [tmp_path / "step"]}, tmp_path / "displaced")
    own, displaced = (
        open_store(tmp_path / step / "grids.zarr")["MockA_CV_0"] for step in ("own", "displaced")
    )
    np.testing.assert_array_equal(displaced.read("galaxy_counts"), own.read("galaxy_counts"))
    for name, rtol in (("matter_counts", 1e-4), ("matter_mass", 1e-4), ("displacement", 1e-5)):
        np.testing.assert_allclose(
            displaced.read(name), own.read(name), rtol=rtol, atol=rtol * own.read(name).max()
        )
    assert own.read("matter_counts").std() > 0.5
    velocities = config.model_copy(update={"fields": (type(config.fields[0])(name="matter_velocity"),)})
    with pytest.raises(SimulationError, match="have no velocity"):
        ingest(velocities, {"matter": [tmp_path / "step"]}, tmp_path / "out")


def test_a_store_of_displacements_is_opened_once(tmp_path: Path) -> None:
    """Here, and by a worker that the simulation is sent to."""
    write_camels(tmp_path / "camels", 1, 64)
    attrs = SimulationAttrs(name="CV_0", box_size=BOX, redshift=0, suite="", cosmology=COSMOLOGY)
    store = create_store(tmp_path / "step" / "prediction.zarr", [attrs], FIELDS, SIDE)
    moved = smooth_vectors(np.random.default_rng(5))
    store["CV_0"].write("displacement", moved)
    selection = SelectionConfig(path=tmp_path / "camels")
    (one,) = with_matter(
        [simulation for simulation, _ in selection.open({})], selection, None, {"matter": [tmp_path / "step"]}
    )
    sent = pickle.loads(pickle.dumps(one)).matter  # noqa: S301 (made here)
    here = one.matter
    assert sent.n_particles() == SIDE**3  # opened, as `with_matter` did here to compare the universes
    for file in (store.path / "zarr.json", store.path / "CV_0" / "zarr.json"):
        file.unlink()
    for matter in (here, sent):
        assert (matter.box_size, matter.redshift, matter.cosmology) == (BOX, 0, COSMOLOGY)
        position = matter.particles(store.path, ("position",))["position"]
        np.testing.assert_allclose(position[0], moved[:, 0, 0, 0] % BOX, rtol=1e-6)


MOCK = """
name: mock
seed: 1
steps:
  - name: nbody
    stage: simulate
    config: &universe {simulations: 10, seed: 4, box_size: 50.0, n_particles: 32, steps: 60}
  - {name: cola, stage: simulate, config: {<<: *universe, steps: 5}}
  - name: lattice
    stage: ingest
    inputs: {simulations: [nbody], matter: [cola]}
    config: &grids
      n_mesh: 32
      fields: [{name: displacement}, {name: true_displacement}]
      split: {validation: [7], test: [8, 9]}
  - name: correction
    stage: train
    inputs: {grids: [lattice]}
    config:
      model: {name: necola, channels: [8, 16]}
      data: {crop: 32, crops_per_box: 8, workers: 0, tile: 32}
      epochs: 10
      batch_size: 2
      optimizer: {learning_rate: 5.0e-3}
      schedule: {kind: cosine, warmup_steps: 20}
  - name: corrected
    stage: predict
    inputs: {grids: [lattice], model: [correction]}
    config: {tile: 32, split: all}
  - name: of-nbody
    stage: ingest
    inputs: {simulations: [nbody]}
    config: &matter {<<: *grids, n_mesh: 64, fields: [{name: matter_counts}]}
  - {name: of-cola, stage: ingest, inputs: {simulations: [nbody], matter: [cola]}, config: *matter}
  - {name: of-corrected, stage: ingest, inputs: {simulations: [nbody], matter: [corrected]}, config: *matter}
"""


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_corrected_cola_is_nearer_to_nbody_in_power_and_correlation(tmp_path: Path) -> None:
    """In the boxes that took no part in the training: what docs/inputs.md has figures of."""
    (tmp_path / "mock.yaml").write_text(MOCK)
    run = cut_down(str(tmp_path / "mock.yaml"), tmp_path / "run")
    modes = {}
    for name in ("nbody", "cola", "corrected"):
        store = open_store(run.steps[f"of-{name}"].path / "grids.zarr")
        counts = [store[box].read("matter_counts").astype("f8") for box in store.names("test")]
        assert [box.sum() for box in counts] == pytest.approx([32**3, 32**3], rel=1e-6)
        modes[name] = np.stack([np.fft.fftn(box / box.mean() - 1) for box in counts])
    waves = np.fft.fftfreq(64, 50 / 64) * 2 * np.pi
    k = np.sqrt(sum(np.meshgrid(*[waves**2] * 3, indexing="ij")))
    for low, high in ((0.6, 1.0), (1.0, 1.5), (1.5, 2.0)):
        shell = {name: field[:, (k >= low) & (k < high)] for name, field in modes.items()}
        power = {name: (np.abs(field) ** 2).sum() for name, field in shell.items()}
        off = {name: abs(power[name] / power["nbody"] - 1) for name in power}
        cross = {name: (field * shell["nbody"].conj()).real.sum() for name, field in shell.items()}
        apart = {name: 1 - cross[name] / np.sqrt(power[name] * power["nbody"]) for name in power}
        assert off["corrected"] < 0.9 * off["cola"], (low, off)
        assert apart["corrected"] < 0.95 * apart["cola"], (low, apart)
