"""Universes on real ranks: 1, 2 and 4 give the same particles, halos and galaxies."""

from importlib.util import find_spec

import h5py
import numpy as np
import pytest

from galdist.simulations.simulate import SimulateConfig, simulate

pytestmark = pytest.mark.skipif(
    find_spec("nbodykit") is None, reason="nbodykit is not installed: run `make setup`"
)
BOX = 16.0
CONFIG = {"n_particles": 32, "box_size": BOX, "steps": 8, "mesh_factor": 2, "simulations": 1, "seed": 3}


def make(out, config):
    """What every rank does: the stage, as the pipeline calls it."""
    simulate(SimulateConfig(**config), {}, out)


def read(out):
    root = out / "Sims" / "MockA_DM" / "L16n32" / "CV" / "CV_0"
    chunks = sorted(root.rglob("*.hdf5"))
    particles = []
    for path in chunks:
        with h5py.File(path) as file:
            particles.append({name: value[()] for name, value in file["PartType1"].items()})
    particles = {name: np.concatenate([p[name] for p in particles]) for name in particles[0]}
    with h5py.File(out / "FOF_Subfind" / "MockA" / "L16n32" / "CV" / "CV_0" / "groups_090.hdf5") as file:
        groups, subhalos = (
            {name: value[()] for name, value in file[kind].items()} for kind in ("Group", "Subhalo")
        )
    return chunks, particles, groups, subhalos


@pytest.fixture(scope="module")
def alone(mpirun, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    mpirun(1, make, out, {**CONFIG, "n_files": 3})
    return read(out)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_give_the_same_universe(mpirun, tmp_path, alone, ranks):
    mpirun(ranks, make, tmp_path / str(ranks), {**CONFIG, "n_files": 3})
    chunks, particles, groups, subhalos = read(tmp_path / str(ranks))
    assert [path.name for path in chunks] == [path.name for path in alone[0]]
    assert len(chunks) == 3
    assert (particles["ParticleIDs"] == alone[1]["ParticleIDs"]).all()  # even in the same order
    offset = (particles["Coordinates"] - alone[1]["Coordinates"] + 500 * BOX) % (1000 * BOX) - 500 * BOX
    assert np.abs(offset).max() < 1e-6 * 1000 * BOX  # of the box; the file's single precision
    np.testing.assert_allclose(particles["Velocities"], alone[1]["Velocities"], atol=1e-2)
    assert len(groups["GroupLen"]) > 20
    for mine, theirs in ((groups, alone[2]), (subhalos, alone[3])):
        assert mine.keys() == theirs.keys()
        for name in mine:
            np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-4, atol=1e-2, err_msg=name)


@pytest.mark.parametrize("precision", ["f4"])
def test_single_precision_ranks_agree_too(mpirun, tmp_path, alone, precision):
    mpirun(2, make, tmp_path / "f4", {**CONFIG, "precision": precision})
    _, particles, _, _ = read(tmp_path / "f4")
    order, other = np.argsort(particles["ParticleIDs"]), np.argsort(alone[1]["ParticleIDs"])
    offset = particles["Coordinates"][order] - alone[1]["Coordinates"][other]
    offset = (offset + 500 * BOX) % (1000 * BOX) - 500 * BOX
    assert np.abs(offset).max() < 1e-4 * 1000 * BOX
