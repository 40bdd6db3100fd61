"""Matter of another run, all matter, velocities: what the networks can be given besides dark matter."""

import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from universe import Truth, make_truth, write_camels, write_groups, write_snapshot

from galdist.grids.ingest import IngestConfig, ingest
from galdist.grids.mass_assignment import assign
from galdist.grids.store import SimulationGrids, open_store
from galdist.simulations.simulation import SimulationError

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
            tmp_path / "out", path=tmp_path / "nbody", matter_of={"path": tmp_path / "cola", "suite": "MockA"}
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
        ingested(tmp_path / "out", **one, matter_of={"path": tmp_path / "cola", "suite": "MockA"})
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
