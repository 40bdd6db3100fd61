"""IllustrisTNG trees in many chunks, and an original chunk of a TNG100-1 group catalogue."""

from pathlib import Path

import h5py
import numpy as np
import pytest
from universe import write_tng

from galdist.catalogs.structure import bullock_spin, nfw_concentration
from galdist.constants import GRAVITY
from galdist.simulations.simulation import SimulationError, read_galaxies, read_halos
from galdist.simulations.tng import open_simulations


def test_chunks_give_what_was_put_in(tmp_path: Path) -> None:
    truth = write_tng(tmp_path)
    simulation = open_simulations(tmp_path)[0]
    assert (simulation.name, simulation.set, len(simulation.particle_files)) == ("TNG10-1", "", 5)
    assert simulation.n_particles() == sum(map(simulation.n_particles_in, simulation.particle_files)) == 4096
    position = np.concatenate(
        [simulation.particles(f, ("position",))["position"] for f in simulation.particle_files[:-1]]
    )
    assert position.dtype == np.float64
    np.testing.assert_allclose(position, truth.position, rtol=1e-12)
    galaxies = simulation.galaxies(0)
    np.testing.assert_array_equal(galaxies["halo"], truth.galaxy_halo)
    np.testing.assert_array_equal(galaxies["is_central"], truth.is_central)
    assert simulation.particles(simulation.particle_files[-1])["position"].shape == (0, 3), "an empty chunk"


def test_a_simulation_folder_itself(tmp_path: Path) -> None:
    write_tng(tmp_path)
    assert open_simulations(tmp_path / "TNG10-1")[0].name == "TNG10-1"
    assert open_simulations(tmp_path, suite="TNG10-1")[0].name == "TNG10-1"


def test_wrong_names(tmp_path: Path) -> None:
    write_tng(tmp_path)
    with pytest.raises(SimulationError, match=r"'TNG100-1'; did you mean 'TNG10-1'"):
        open_simulations(tmp_path, suite="TNG100-1")
    with pytest.raises(SimulationError, match="'TNG10-1-Dark'"):
        open_simulations(tmp_path, matter="nbody")
    with pytest.raises(SimulationError, match="there is no snapshot 050"):
        open_simulations(tmp_path, snapshot=50)
    with pytest.raises(SimulationError, match="has no sets"):
        open_simulations(tmp_path, set="CV")


def test_a_missing_chunk_of_the_catalog(tmp_path: Path) -> None:
    write_tng(tmp_path)
    open_simulations(tmp_path)[0].group_files[1].unlink()
    with pytest.raises(SimulationError, match=r"fof_subhalo_tab_099\.1\.hdf5: chunk 1 is missing"):
        open_simulations(tmp_path)


def test_some_chunks_of_a_catalog_agree_with_all_of_it(tmp_path: Path) -> None:
    truth = write_tng(tmp_path)
    files = open_simulations(tmp_path)[0].group_files
    with pytest.raises(SimulationError, match="a chunk is missing"):
        read_halos(files[1:2])
    whole, part = read_galaxies(files, 0), read_galaxies(files[1:2], 0, complete=False)
    halos = read_halos(files[1:2], complete=False)
    start = len(read_halos(files[:1], complete=False)["mass"])
    rows = (whole["halo"] >= start) & (whole["halo"] < start + len(halos["mass"]))
    assert 0 < rows.sum() < len(truth.stellar_mass)
    np.testing.assert_array_equal(part["halo"], whole["halo"][rows] - start)
    np.testing.assert_array_equal(part["is_central"], whole["is_central"][rows])


def test_original_chunk_of_tng100(shared_data: Path) -> None:
    """Chunk 174 of 448: values against the file's own, units against what is known of TNG100-1."""
    file = shared_data / "tng100_groupcat" / "fof_subhalo_tab_099.174.hdf5"
    halos = read_halos([file], complete=False)
    galaxies = read_galaxies([file], 1e9, complete=False)
    with h5py.File(file) as hdf5:
        group, subhalo = hdf5["Group"], hdf5["Subhalo"]
        np.testing.assert_allclose(halos["position"], group["GroupPos"][:] / 1e3, rtol=1e-6)
        np.testing.assert_allclose(halos["velocity"], group["GroupVel"][:], rtol=1e-6)
        stars = subhalo["SubhaloMassType"][:, 4]
        keep = (stars >= 0.1) & subhalo["SubhaloFlag"][:]
        np.testing.assert_allclose(galaxies["stellar_mass"], stars[keep] * 1e10, rtol=1e-6)
        groups = subhalo["SubhaloGrNr"][:][keep]
    assert len(halos["mass"]) == 12
    # Halos of this chunk are the 617th to 628th most massive: 2.9e12 Msun/h or so, r200c of 0.2 Mpc/h.
    assert ((halos["mass"] > 2e12) & (halos["mass"] < 4e12)).all()
    assert ((halos["radius_200c"] > 0.1) & (halos["radius_200c"] < 0.3)).all()
    np.testing.assert_array_equal(galaxies["halo"], groups - 617)
    assert galaxies["is_central"].sum() == 12, "the most massive galaxy of each of these halos"
    central = galaxies["is_central"]
    distance = np.abs(galaxies["position"][central] - halos["position"][galaxies["halo"][central]]).max()
    assert distance < 1e-6, "GroupPos is where the central subhalo is"
    mass, radius = (halos[f"{name}_200c"][galaxies["halo"][central]] for name in ("mass", "radius"))
    # Without baryons, which draw halos together, 8 to 10 (Prada et al. 2012), and 0.035 or so.
    concentration = nfw_concentration(galaxies["v_max"][central], np.sqrt(GRAVITY * mass / radius))
    assert 8 < np.median(concentration) < 15
    assert 0.03 < np.median(bullock_spin(galaxies["angular_momentum"][central], mass, radius)) < 0.08
    assert (
        (halos["mass_vir"] > 1.1 * halos["mass_200c"]) & (halos["radius_vir"] > halos["radius_200c"])
    ).all()
    assert ((galaxies["color_gi"] > -0.5) & (galaxies["color_gi"] < 2)).all()
    with pytest.raises(SimulationError, match=r"12 rows of Group, the header says 6291349"):
        read_halos([file])
