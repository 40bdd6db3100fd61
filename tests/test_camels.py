"""CAMELS trees, new and old: what was put into the files comes out; what is wrong is said."""

from pathlib import Path

import h5py
import numpy as np
import pytest
from universe import Truth, write_camels

from galdist.simulations.camels import open_simulations, read_parameters
from galdist.simulations.simulation import Simulation, SimulationError


def all_particles(simulation: Simulation) -> dict[str, np.ndarray]:
    parts = [simulation.particles(file) for file in simulation.particle_files]
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def assert_holds(simulation: Simulation, truth: Truth) -> None:
    particles = all_particles(simulation)
    np.testing.assert_allclose(particles["position"], truth.position, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(particles["velocity"], truth.velocity, rtol=1e-6)
    np.testing.assert_allclose(particles["mass"], truth.mass, rtol=1e-6)
    assert simulation.n_particles() == len(truth.position)
    halos = simulation.halos()
    np.testing.assert_allclose(halos["position"], truth.halo_position, rtol=1e-5)
    np.testing.assert_allclose(halos["mass"], truth.halo_mass, rtol=1e-6)
    np.testing.assert_allclose(halos["mass_200c"], 0.8 * truth.halo_mass, rtol=1e-6)
    galaxies = simulation.galaxies(1e10)
    keep = truth.stellar_mass >= 1e10
    np.testing.assert_allclose(galaxies["position"], truth.galaxy_position[keep], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(galaxies["stellar_mass"], truth.stellar_mass[keep], rtol=1e-6)
    np.testing.assert_allclose(galaxies["color_gi"], 0.9, rtol=1e-5)
    np.testing.assert_array_equal(galaxies["halo"], truth.galaxy_halo[keep])
    np.testing.assert_array_equal(galaxies["is_central"], truth.is_central[keep])
    everything = simulation.galaxies(0.0)
    v_max = np.zeros(len(truth.halo_mass), "f4")
    central = everything["is_central"]
    v_max[everything["halo"][central]] = everything["v_max"][central]
    np.testing.assert_array_equal(halos["v_max"], v_max)
    assert len(simulation.halos(nbody=True)["mass"]) == len(truth.halo_mass)


@pytest.mark.parametrize("n_chunks", [1, 5])
@pytest.mark.parametrize("old_names", [False, True])
def test_files_give_what_was_put_in(tmp_path: Path, n_chunks: int, old_names: bool) -> None:
    truths = write_camels(tmp_path, n_chunks=n_chunks, old_names=old_names)
    simulations = open_simulations(tmp_path, suite="MockA", set="CV")
    assert [simulation.name for simulation in simulations] == list(truths)
    for simulation in simulations:
        assert len(simulation.particle_files) == n_chunks
        assert_holds(simulation, truths[simulation.name])


def test_metadata(tmp_path: Path) -> None:
    write_camels(tmp_path)
    simulation = open_simulations(tmp_path)[1]
    assert (simulation.name, simulation.suite, simulation.set) == ("MockA_CV_1", "MockA", "CV")
    assert (simulation.box_size, simulation.redshift, simulation.seed) == (25.0, 0.0, 5001)
    assert simulation.cosmology == {
        "Omega_m": 0.3,
        "Omega_b": 0.049,
        "h": 0.6711,
        "n_s": 0.9624,
        "sigma_8": 0.8,
    }
    # A_AGN1 comes before A_SN2 in the file.
    assert simulation.astrophysics == {"A_SN1": 1.1, "A_AGN1": 2.1, "A_SN2": 3.1, "A_AGN2": 4.1}


def test_compressed_nbody_files_with_masses_in_the_header_only(tmp_path: Path) -> None:
    truths = write_camels(tmp_path, n_simulations=1, n_chunks=2, compressed=True)
    simulation = open_simulations(tmp_path)[0]
    with h5py.File(simulation.particle_files[0]) as file:
        assert sorted(file["PartType1"]) == ["Coordinates", "ParticleIDs", "Velocities"]
        assert file["PartType1/Coordinates"].compression == "unknown", "no filter that h5py has by itself"
    assert_holds(simulation, truths[simulation.name])


def test_masses_in_a_field(tmp_path: Path) -> None:
    truths = write_camels(tmp_path, n_simulations=1, masses="field")
    simulation = open_simulations(tmp_path)[0]
    np.testing.assert_allclose(all_particles(simulation)["mass"], truths[simulation.name].mass, rtol=1e-6)


def test_a_chunk_is_read_in_parts(tmp_path: Path) -> None:
    write_camels(tmp_path, n_simulations=1)
    simulation = open_simulations(tmp_path)[0]
    file = simulation.particle_files[0]
    whole = simulation.particles(file, ("position",))
    assert set(whole) == {"position"}
    parts = [
        simulation.particles(file, ("position",), start, start + 1000)["position"]
        for start in range(0, 5000, 1000)
    ]
    np.testing.assert_array_equal(np.concatenate(parts), whole["position"])


def test_peculiar_velocities_at_higher_redshift(tmp_path: Path) -> None:
    truths = write_camels(tmp_path, n_simulations=1, redshift=1.0)
    simulation = open_simulations(tmp_path)[0]
    assert simulation.redshift == 1.0
    np.testing.assert_allclose(
        all_particles(simulation)["velocity"], truths[simulation.name].velocity, rtol=1e-5
    )


def test_simulations_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    write_camels(tmp_path, n_simulations=11, n_particles=64)
    assert [s.name for s in open_simulations(tmp_path)][-2:] == ["MockA_CV_9", "MockA_CV_10"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"suite": "MockB"}, r"no suite in .* 'MockB'; did you mean 'MockA'\? Available: MockA"),
        ({"set": "LH"}, r"no set in .* 'LH'\. Available: CV"),
        ({"volume": "L25n256"}, r"no volume in .* did you mean 'L25n16'"),
        ({"matter": "hydro"}, r"there is no snapshot snapshot_090 or snap_033|no such folder"),
        ({"snapshot": 50}, r"CV_0: there is no snapshot snapshot_050"),
    ],
)
def test_names_that_are_not_there(tmp_path: Path, given: dict, message: str) -> None:
    write_camels(tmp_path, n_simulations=1)
    with pytest.raises(SimulationError, match=message):
        open_simulations(tmp_path, **given)


def test_a_suite_must_be_named_among_several(tmp_path: Path) -> None:
    write_camels(tmp_path, n_simulations=1, n_particles=64)
    write_camels(tmp_path, n_simulations=1, n_particles=64, suite="MockB")
    with pytest.raises(SimulationError, match=r"suite: name one of those in .*: MockA, MockB"):
        open_simulations(tmp_path)
    assert open_simulations(tmp_path, suite="MockB")[0].name == "MockB_CV_0"


def test_a_missing_chunk_is_named(tmp_path: Path) -> None:
    write_camels(tmp_path, n_simulations=1, n_chunks=5)
    open_simulations(tmp_path)[0].particle_files[2].unlink()
    with pytest.raises(SimulationError, match=r"snapshot_090\.2\.hdf5: chunk 2 is missing"):
        open_simulations(tmp_path)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    write_camels(tmp_path, n_simulations=1, n_chunks=2)
    file = open_simulations(tmp_path)[0].particle_files[1]
    simulation = open_simulations(tmp_path)[0]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(
        SimulationError, match=r"snapshot_090\.1\.hdf5: cannot be read as HDF5; it may be cut short"
    ):
        simulation.particles(file)


def edit(file: Path, change: object) -> None:
    with h5py.File(file, "r+") as hdf5:
        change(hdf5)  # type: ignore[operator]


def test_what_a_file_lacks_is_named(tmp_path: Path) -> None:
    write_camels(tmp_path, n_simulations=1)
    simulation = open_simulations(tmp_path)[0]
    file, groups = simulation.particle_files[0], simulation.group_files[0]
    edit(file, lambda f: f["PartType1"].move("Coordinates", "Coords"))
    with pytest.raises(SimulationError, match=r"PartType1/Coordinates is missing; did you mean Coords\?"):
        simulation.particles(file)
    edit(file, lambda f: f["Header"].attrs.__setitem__("MassTable", np.zeros(6)))
    with pytest.raises(SimulationError, match=r"MassTable\[1\] is 0 and there is no PartType1/Masses"):
        simulation.particles(file, ("mass",))
    edit(groups, lambda f: f["Group"].pop("Group_M_Crit200"))
    with pytest.raises(SimulationError, match=r"groups_090\.hdf5: field Group/Group_M_Crit200 is missing"):
        simulation.halos()
    edit(file, lambda f: f["Header"].attrs.pop("BoxSize"))
    with pytest.raises(SimulationError, match="attribute Header/BoxSize is missing"):
        _ = open_simulations(tmp_path)[0].box_size


@pytest.mark.parametrize("value", [26e3, -1.0, np.nan])
def test_positions_outside_the_box(tmp_path: Path, value: float) -> None:
    write_camels(tmp_path, n_simulations=1)
    simulation = open_simulations(tmp_path)[0]

    def change(file: h5py.File) -> None:
        file["PartType1/Coordinates"][5, 1] = value

    edit(simulation.particle_files[0], change)
    with pytest.raises(
        SimulationError, match=r"snapshot_090\.hdf5: field PartType1/Coordinates .* outside the box"
    ):
        simulation.particles(simulation.particle_files[0])


def test_positions_on_the_upper_face_are_on_the_lower_one(tmp_path: Path) -> None:
    write_camels(tmp_path, n_simulations=1)
    simulation = open_simulations(tmp_path)[0]

    def change(file: h5py.File) -> None:
        file["PartType1/Coordinates"][5, 1] = 25e3
        file["PartType1/Coordinates"][6, 1] = -1e-9

    edit(simulation.particle_files[0], change)
    position = simulation.particles(simulation.particle_files[0], ("position",))["position"]
    assert position[5, 1] == 0
    assert (position >= 0).all()
    assert (position < 25).all()


def test_parameters_that_contradict_the_snapshot(tmp_path: Path) -> None:
    write_camels(tmp_path, n_simulations=1)
    file = next((tmp_path / "Parameters").rglob("*.txt"))
    file.write_text(file.read_text().replace("CV_0 0.3", "CV_0 0.2"))
    with pytest.raises(
        SimulationError, match=r"Header/Omega0 is 0\.3, but the parameter file says Omega_m = 0\.2"
    ):
        open_simulations(tmp_path)
    file.write_text("#Name Omega_m sigma_8 A_SN1 A_AGN1 A_SN2 A_AGN2 seed\nCV_7 0.3 0.8 1 1 1 1 5\n")
    with pytest.raises(SimulationError, match="'CV_0'; did you mean 'CV_7'"):
        open_simulations(tmp_path)


def test_parameter_file_lines(tmp_path: Path) -> None:
    file = tmp_path / "CosmoAstroSeed.txt"
    file.write_text("LH_0 0.1 0.6 1 2 3 4 5\n")
    assert read_parameters(file)["LH_0"]["A_AGN1"] == 2
    file.write_text("LH_0 0.1 0.6 1 2 3 4\n")
    with pytest.raises(SimulationError, match=r"line 1: 7 columns, expected 8"):
        read_parameters(file)


def test_without_parameters_the_snapshot_speaks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_camels(tmp_path, n_simulations=1)
    next((tmp_path / "Parameters").rglob("*.txt")).unlink()
    simulation = open_simulations(tmp_path)[0]
    assert simulation.astrophysics == {}
    assert simulation.cosmology["Omega_m"] == 0.3
    assert "no parameter file" in caplog.text
