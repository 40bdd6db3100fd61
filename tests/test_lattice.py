"""Displacements of particles from their lattice: known ones are found, whatever the order of IDs."""

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from universe import Truth, make_truth, write_camels, write_snapshot

from galdist.grids.ingest import IngestConfig, ingest
from galdist.grids.store import open_store
from galdist.simulations.camels import open_simulations
from galdist.simulations.lattice import Lattice, find_lattice
from galdist.simulations.simulation import SimulationError

SIDE, BOX = 32, 25.0
PLACE = "Sims/MockA_DM/L25n16/CV/CV_0"
Order = Callable[[np.ndarray], np.ndarray]


def waves(sites: np.ndarray, amplitude: float = 2.0) -> np.ndarray:
    """Displacements (n, 3) [Mpc/h]: a wave along each axis, of an amplitude of several cells."""
    phase = 2 * np.pi * sites / SIDE
    return amplitude * np.stack(
        [np.sin(phase[:, 1] + 1), np.cos(2 * phase[:, 2]), np.sin(phase[:, 0]) * np.cos(phase[:, 1])], axis=1
    )


def rows(sites: np.ndarray) -> np.ndarray:
    return (sites[:, 0] * SIDE + sites[:, 1]) * SIDE + sites[:, 2] + 1


def tiles_of_16(sites: np.ndarray) -> np.ndarray:
    """As GlassTileFac = 2 numbers them, x fastest within a tile."""
    (i, j, k), (a, b, c) = (sites // 16).T, (sites % 16).T
    return ((i * 2 + j) * 2 + k) * 16**3 + (c * 16 + b) * 16 + a + 32769


def write(root: Path, number: Order, displacement: Callable[[np.ndarray], np.ndarray] = waves) -> np.ndarray:
    """A tree whose particles were displaced, in an order that has nothing to do with their IDs; by site
    (x, y, z)."""
    write_camels(root, 1, 64)
    sites = np.stack(np.meshgrid(*[np.arange(SIDE)] * 3, indexing="ij"), -1).reshape(-1, 3)
    moved = displacement(sites)
    order = np.random.default_rng(5).permutation(len(sites))
    truth: Truth = make_truth(0, SIDE**3)
    truth.position = ((sites * BOX / SIDE + moved) % BOX)[order].astype("f4")
    truth.position[truth.position >= BOX] = 0
    ids = number(sites[order]).astype("u8")
    first = 0
    (root / PLACE / "snapshot_090.hdf5").unlink()
    for file in write_snapshot(root / PLACE, truth, n_chunks=3):
        with h5py.File(file, "r+") as out:
            n = len(out["PartType1/ParticleIDs"])
            out["PartType1/ParticleIDs"][:] = ids[first : first + n]
            first += n
    return moved.reshape(SIDE, SIDE, SIDE, 3)


def config(path: Path, **given: object) -> IngestConfig:
    values = {"path": path, "n_mesh": SIDE, "fields": [{"name": "displacement"}], "chunking": {"chunk": 16}}
    return IngestConfig.model_validate({"checksums": False, **values, **given})


@pytest.mark.parametrize("number", [rows, tiles_of_16])
def test_known_displacements_are_found(number: Order, tmp_path: Path) -> None:
    moved = write(tmp_path / "camels", number)
    lattice = find_lattice(open_simulations(tmp_path / "camels")[0])
    assert (lattice.tile, lattice.x_fastest) == ((32, False) if number is rows else (16, True))
    ingest(config(tmp_path / "camels"), {}, tmp_path)
    grids = open_store(tmp_path / "grids.zarr")["MockA_CV_0"]
    found = grids.read("displacement")  # (component, z, y, x)
    np.testing.assert_allclose(found, moved.transpose(3, 2, 1, 0), atol=5e-6)  # float32 of positions
    field = grids.field("displacement")
    assert (field.units, field.assignment, field.components) == ("Mpc/h", "none", 3)


def test_lattices_in_the_middle_of_their_cells_show_as_a_common_displacement(tmp_path: Path) -> None:
    half = BOX / SIDE / 2
    write(tmp_path, rows, lambda sites: np.full(sites.shape, half))
    simulation = open_simulations(tmp_path)[0]
    lattice = find_lattice(simulation)
    particles = simulation.particles(simulation.particle_files[0], ("id", "position"))
    sites = lattice.sites(particles["id"])
    np.testing.assert_allclose(lattice.displacements(sites, particles["position"], BOX), half, atol=5e-6)


def test_sites_are_numbered_row_by_row_or_tile_by_tile() -> None:
    assert Lattice(4, 1, 4).sites(np.array([1, 2, 5, 17, 64], "u8")).tolist() == [
        [0, 0, 0],
        [0, 0, 1],
        [0, 1, 0],
        [1, 0, 0],
        [3, 3, 3],
    ]
    tiled = Lattice(4, 0, 2, x_fastest=True)
    assert tiled.sites(np.array([1, 8, 63])).tolist() == [[1, 0, 0], [0, 0, 2], [3, 3, 3]]


def test_what_is_no_lattice_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "fine", rows)
    with pytest.raises(SimulationError, match=r"a lattice of 32\^3 particles, n_mesh is 16: set it to 32"):
        ingest(config(tmp_path / "fine", n_mesh=16), {}, tmp_path / "out")
    write_camels(tmp_path / "odd", 1, 100)
    with pytest.raises(SimulationError, match="100 particles are no cubic lattice"):
        find_lattice(open_simulations(tmp_path / "odd")[0])
    write(tmp_path / "gaps", lambda sites: 2 * rows(sites))
    with pytest.raises(SimulationError, match="do not follow one another"):
        find_lattice(open_simulations(tmp_path / "gaps")[0])
    write(tmp_path / "any", lambda sites: np.random.default_rng(0).permutation(len(sites)))
    with pytest.raises(SimulationError, match=r"not number a lattice .* 0\.2\d boxes \(rms\) from"):
        find_lattice(open_simulations(tmp_path / "any")[0])
    with pytest.raises(ValueError, match="leave assignment out"):
        config(tmp_path, fields=[{"name": "displacement", "assignment": "ngp"}])

    def twice(sites: np.ndarray) -> np.ndarray:
        return np.where(rows(sites) == 77, 78, rows(sites))

    write(tmp_path / "twice", twice)
    with pytest.raises(SimulationError, match="1 sites of the lattice have no particle"):
        ingest(config(tmp_path / "twice"), {}, tmp_path / "out")
