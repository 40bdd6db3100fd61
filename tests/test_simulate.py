"""The simulate stage: complete, resumable sets in files that other codes read."""

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from galdist.constants import CRITICAL_DENSITY
from galdist.simulations import camels as camels_reader
from galdist.simulations import files, formation
from galdist.simulations.simulate import RANGES, SimulateConfig, universes
from hpc import durable

ROOT = Path(__file__).parents[1]
SMALL = {"n_particles": 32, "box_size": 16.0, "steps": 6, "mesh_factor": 2, "n_files": 2, "seed": 3}
needs_nbodykit = pytest.mark.skipif(
    find_spec("nbodykit") is None, reason="nbodykit is not installed: run `make setup`"
)


def run(out, **config):
    """The stage in a process of its own: nbodykit changes Dask's scheduler for the whole process."""
    code = (
        "import sys, pathlib; from galdist.simulations.simulate import SimulateConfig, simulate;"
        "simulate(SimulateConfig.model_validate_json(sys.argv[1]), {}, pathlib.Path(sys.argv[2]))"
    )
    text = SimulateConfig(**{**SMALL, **config}).model_dump_json()
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, text, str(out)], check=True, cwd=ROOT, timeout=300
    )


@pytest.fixture(scope="module")
def camels(tmp_path_factory):
    if find_spec("nbodykit") is None:
        pytest.skip("nbodykit is not installed: run `make setup`")
    out = tmp_path_factory.mktemp("camels")
    run(out, simulations=2, redshifts=[0.0, 0.47])
    return out


@pytest.fixture(scope="module")
def tng(tmp_path_factory):
    if find_spec("nbodykit") is None:
        pytest.skip("nbodykit is not installed: run `make setup`")
    out = tmp_path_factory.mktemp("tng")
    run(out, simulations=1, layout="tng", n_files=3)
    return out / "MockA_L16n32_CV_0" / "output"


def snapshot(out, index=0, number="090"):
    """Concatenated PartType1 of a CAMELS-layout simulation, and its headers."""
    folder = out / "Sims" / "MockA_DM" / "L16n32" / "CV" / f"CV_{index}" / f"snapdir_{number}"
    columns, headers = [], []
    for path in sorted(folder.glob("*.hdf5")):
        with h5py.File(path) as file:
            columns.append({name: value[()] for name, value in file["PartType1"].items()})
            headers.append(dict(file["Header"].attrs))
    return {name: np.concatenate([c[name] for c in columns]) for name in columns[0]}, headers


def catalog(out, suite="MockA", index=0, number="090"):
    folder = out / "FOF_Subfind" / suite / "L16n32" / "CV" / f"CV_{index}"
    with h5py.File(folder / f"groups_{number}.hdf5") as file:
        return (
            {name: value[()] for name, value in file["Group"].items()},
            {name: value[()] for name, value in file["Subhalo"].items()},
            dict(file["Header"].attrs),
        )


class TestSets:
    def test_cv_differs_in_seed_alone(self):
        made = universes(SimulateConfig(simulations=3, seed=2))
        assert len({u.seed for u in made}) == 3
        assert all(u.parameters == made[0].parameters for u in made)
        assert made[0].parameters == {
            "Omega_m": 0.3,
            "sigma_8": 0.8,
            **dict.fromkeys(formation.FEEDBACK, 1.0),
        }

    def test_latin_hypercube(self):
        n = 16
        made = universes(SimulateConfig(set="LH", simulations=n, seed=2))
        for name, (low, high) in RANGES.items():
            values = np.array([u.parameters[name] for u in made])
            if name in formation.FEEDBACK:
                values, low, high = np.log(values), np.log(low), np.log(high)
            strata = np.floor((values - low) / (high - low) * n).astype(int)
            assert sorted(strata) == list(range(n)), name

    def test_selected_ones_are_those_of_the_whole_set(self):
        whole = universes(SimulateConfig(set="LH", simulations=8))
        assert universes(SimulateConfig(set="LH", simulations=8, select=(5, 2))) == [whole[2], whole[5]]

    def test_wrong_settings(self):
        with pytest.raises(ValidationError, match=r"\[7\].*0 to.*2"):
            SimulateConfig(simulations=3, select=(1, 7))
        with pytest.raises(ValidationError, match="Omega_b"):
            SimulateConfig(Omega_b=0.4)
        with pytest.raises(ValidationError, match="Omega_b"):
            SimulateConfig(set="LH", Omega_b=0.12)
        with pytest.raises(ValidationError, match="n_particle"):
            SimulateConfig(n_particle=64)
        with pytest.raises(ValidationError, match=r"no snapshot of camels is at redshift 0\.2;"):
            SimulateConfig(redshifts=(0.0, 0.2))
        with pytest.raises(ValidationError, match=r"two of .* are of one snapshot"):
            SimulateConfig(redshifts=(0.47, 0.468))
        with pytest.raises(ValidationError, match=r"7\.6 is before the start; initial_redshift is 5"):
            SimulateConfig(redshifts=(7.6,), initial_redshift=5)


@needs_nbodykit
class TestCamelsLayout:
    def test_headers(self, camels):
        _, headers = snapshot(camels)
        for header in headers:
            assert header["BoxSize"] == 16_000.0
            assert header["NumFilesPerSnapshot"] == 2
            assert header["Redshift"] == 0.0
            assert header["Omega0"] == 0.3
            assert list(header["NumPart_Total"]) == [0, 32**3, 0, 0, 0, 0]
        assert sum(h["NumPart_ThisFile"][1] for h in headers) == 32**3
        total = headers[0]["MassTable"][1] * 1e10 * 32**3
        assert total == pytest.approx(CRITICAL_DENSITY * 0.3 * 16.0**3)

    def test_particles(self, camels):
        particles, _ = snapshot(camels)
        assert (np.sort(particles["ParticleIDs"]) == np.arange(1, 32**3 + 1)).all()
        assert particles["Coordinates"].min() >= 0
        assert particles["Coordinates"].max() < 16_000
        assert 20 < particles["Velocities"].std() < 300

    def test_particles_come_by_group(self, camels):
        particles, _ = snapshot(camels)
        groups, _, _ = catalog(camels, "MockA_DM")
        assert len(groups["GroupLen"]) > 20
        assert groups["GroupLen"].min() >= 20
        end = np.cumsum(groups["GroupLenType"][:, 1])
        for i, (first, last) in enumerate(zip(end - groups["GroupLen"], end, strict=True)):
            own = particles["Coordinates"][first:last] - groups["GroupPos"][i]
            own = (own + 8000) % 16_000 - 8000
            center = (groups["GroupCM"][i] - groups["GroupPos"][i] + 8000) % 16_000 - 8000
            np.testing.assert_allclose(own.mean(axis=0), center, atol=0.1)
            velocity = particles["Velocities"][first:last].mean(axis=0)
            np.testing.assert_allclose(velocity, groups["GroupVel"][i], atol=0.05)
        assert (np.diff(groups["GroupLen"]) <= 0).all()

    def test_galaxies(self, camels):
        groups, subhalos, header = catalog(camels)
        nbody, nbody_subhalos, _ = catalog(camels, "MockA_DM")
        assert header["Ngroups_Total"] == len(groups["GroupLen"]) == len(nbody["GroupLen"])
        assert header["Nsubgroups_Total"] == len(subhalos["SubhaloGrNr"]) > len(nbody_subhalos["SubhaloGrNr"])
        assert (
            subhalos["SubhaloGrNr"] == np.repeat(np.arange(len(groups["GroupLen"])), groups["GroupNsubs"])
        ).all()
        first = groups["GroupFirstSub"]
        assert (subhalos["SubhaloPos"][first] == groups["GroupPos"]).all()
        assert (subhalos["SubhaloRankInGr"][first] == 0).all()
        assert (subhalos["SubhaloMassType"][:, 4] > 0).all()
        assert (nbody_subhalos["SubhaloMassType"][:, 4] == 0).all()
        stars = np.bincount(subhalos["SubhaloGrNr"], subhalos["SubhaloMassType"][:, 4])
        np.testing.assert_allclose(stars, groups["GroupMassType"][:, 4], rtol=1e-5)
        np.testing.assert_allclose(groups["GroupMass"], nbody["GroupMass"], rtol=0.01)
        rate = np.bincount(subhalos["SubhaloGrNr"], subhalos["SubhaloSFR"])
        np.testing.assert_allclose(rate, groups["GroupSFR"], rtol=1e-5)
        assert subhalos["SubhaloStellarPhotometrics"].shape == (len(subhalos["SubhaloGrNr"]), 8)

    def test_columns_are_those_of_the_public_files(self, camels, shared_data):
        with h5py.File(next((shared_data / "tng100_groupcat").glob("*.hdf5"))) as real:
            groups, subhalos, header = catalog(camels)
            for folder, table in (("Group", groups), ("Subhalo", subhalos)):
                for name, column in table.items():
                    if name != "SubhaloRankInGr":  # of Illustris-1 and CAMELS
                        assert column.dtype == real[folder][name].dtype, name
                        assert column.shape[1:] == real[folder][name].shape[1:], name
            for name, value in real["Header"].attrs.items():
                if not name.startswith("Git"):
                    assert np.asarray(header[name]).dtype.kind == np.asarray(value).dtype.kind, name

    def test_parameter_file(self, camels):
        text = (camels / "Parameters" / "MockA" / "L16n32" / "CosmoAstroSeed_MockA_L16n32_CV.txt").read_text()
        lines = text.splitlines()
        assert lines[0] == "#Name Omega_m sigma_8 A_SN1 A_AGN1 A_SN2 A_AGN2 seed"
        assert [line.split()[0] for line in lines[1:]] == ["CV_0", "CV_1"]
        assert lines[1].split()[1:] == ["0.30000", "0.80000", *["1.00000"] * 4, "30001"]

    def test_an_earlier_snapshot(self, camels):
        particles, headers = snapshot(camels, number="074")
        groups, subhalos, _ = catalog(camels, number="074")
        a = 0.681266
        for header in (*headers, catalog(camels, number="074")[2]):
            assert header["Time"] == pytest.approx(a)
            assert header["Redshift"] == pytest.approx(1 / a - 1)
        end = np.cumsum(groups["GroupLenType"][:, 1])
        for i, (first, last) in enumerate(zip(end - groups["GroupLen"], end, strict=True)):
            peculiar = particles["Velocities"][first:last].mean(axis=0) * np.sqrt(a)
            np.testing.assert_allclose(groups["GroupVel"][i] / a, peculiar, atol=0.05)
        now, galaxies, _ = catalog(camels)
        # Structure has grown since, and the same matter has moved.
        assert 0.3 < groups["GroupMass"].sum() / now["GroupMass"].sum() < 0.95
        stars = [table["SubhaloMassType"][:, 4].sum() for table in (subhalos, galaxies)]
        assert 0.2 < stars[0] / stars[1] < 0.95
        today, _ = snapshot(camels)
        assert (np.sort(particles["ParticleIDs"]) == np.sort(today["ParticleIDs"])).all()

    def test_radii_are_of_the_density_of_their_time(self, camels):
        groups, _, header = catalog(camels, number="074")
        critical = CRITICAL_DENSITY * (0.3 + 0.7 * header["Time"] ** 3)  # comoving
        for name, density in (("Crit200", 200 * critical), ("Mean200", 200 * CRITICAL_DENSITY * 0.3)):
            mass, radius = groups[f"Group_M_{name}"] * 1e10, groups[f"Group_R_{name}"] / 1e3
            found = mass > 0
            assert found.sum() > 10
            np.testing.assert_allclose(mass[found] / (4 / 3 * np.pi * radius[found] ** 3), density, rtol=1e-4)

    def test_what_is_written_does_not_depend_on_other_redshifts(self, camels, tmp_path):
        run(tmp_path, simulations=1)
        written = list(tmp_path.rglob("*.hdf5"))
        assert len(written) == 4
        for path in written:
            assert path.read_bytes() == (camels / path.relative_to(tmp_path)).read_bytes(), path.name

    def test_realizations_differ(self, camels):
        first, second = (snapshot(camels, i)[0]["Coordinates"] for i in (0, 1))
        assert np.abs(first - second).mean() > 100

    def test_only_what_is_missing_is_made(self, camels, tmp_path):
        paths = [files.SimulationFiles(camels, "camels", "MockA", "L16n32", "CV", i, 2) for i in (0, 1)]
        before = {path: path.stat().st_mtime_ns for path in camels.rglob("*.hdf5")}
        content = paths[1].snapshot(0).read_bytes()
        paths[1].last.unlink()  # as if the run had been killed before the end of CV_1
        run(camels, simulations=2, redshifts=[0.0, 0.47])
        after = {path: path.stat().st_mtime_ns for path in camels.rglob("*.hdf5")}
        assert before.keys() == after.keys()
        changed = {path for path in before if before[path] != after[path]}
        assert changed == {path for path in before if "CV_1" in path.parts}
        assert paths[1].snapshot(0).read_bytes() == content


@needs_nbodykit
class TestOtherReaders:
    def test_illustris_python(self, tng):
        il = pytest.importorskip("illustris_python")
        base = str(tng)
        header = il.groupcat.loadHeader(base, 99)
        groups, subhalos = il.groupcat.loadHalos(base, 99), il.groupcat.loadSubhalos(base, 99)
        assert groups["count"] == header["Ngroups_Total"] == len(groups["GroupLen"])
        assert subhalos["count"] == header["Nsubgroups_Total"]
        particles = il.snapshot.loadSubset(base, 99, "dm", ["Coordinates", "ParticleIDs"])
        assert particles["Coordinates"].dtype == "f8"
        assert (np.sort(particles["ParticleIDs"]) == np.arange(1, 32**3 + 1)).all()
        for i in (0, 1, groups["count"] - 1):
            own = il.snapshot.loadHalo(base, 99, i, "dm", ["Coordinates"])
            assert len(own) == groups["GroupLenType"][i, 1]
            offset = (own - groups["GroupPos"][i] + 8000) % 16_000 - 8000
            center = (groups["GroupCM"][i] - groups["GroupPos"][i] + 8000) % 16_000 - 8000
            np.testing.assert_allclose(offset.mean(axis=0), center, atol=0.1)
            central = groups["GroupFirstSub"][i]
            assert len(il.snapshot.loadSubhalo(base, 99, central, "dm", ["ParticleIDs"])) == len(own)
        single = il.groupcat.loadSingle(base, 99, subhaloID=int(groups["GroupFirstSub"][-1]))
        assert single["SubhaloGrNr"] == groups["count"] - 1

    def test_illustris_python_reads_camels_snapshots(self, camels):
        il = pytest.importorskip("illustris_python")
        base = str(camels / "Sims" / "MockA_DM" / "L16n32" / "CV" / "CV_0")
        assert il.snapshot.loadSubset(base, 90, "dm", ["Velocities"]).shape == (32**3, 3)

    def test_yt(self, camels, tng):
        yt = pytest.importorskip("yt")
        yt.set_log_level(50)
        camels_file = (
            camels / "Sims" / "MockA_DM" / "L16n32" / "CV" / "CV_0" / "snapdir_090" / "snapshot_090.0.hdf5"
        )
        dark = 1 - 0.049 / 0.3
        for path, share in ((camels_file, 1.0), (tng / "snapdir_099" / "snap_099.0.hdf5", dark)):
            dataset = yt.load(str(path))
            np.testing.assert_allclose(dataset.domain_width.to("Mpccm/h"), 16.0, rtol=1e-4)
            assert dataset.omega_matter == 0.3
            data = dataset.all_data()
            assert data["PartType1", "Coordinates"].shape == (32**3, 3)
            total = float(data["PartType1", "particle_mass"].sum().to("Msun")) * 0.6711
            assert total == pytest.approx(share * CRITICAL_DENSITY * 0.3 * 16.0**3, rel=1e-2)

    def test_pynbody(self, camels, tng):
        pynbody = pytest.importorskip("pynbody")
        camels_files = (
            camels / "Sims" / "MockA_DM" / "L16n32" / "CV" / "CV_0" / "snapdir_090" / "snapshot_090"
        )
        dark = 1 - 0.049 / 0.3
        for path, share in ((camels_files, 1.0), (tng / "snapdir_099" / "snap_099", dark)):
            data = pynbody.load(str(path))
            assert len(data.dm) == 32**3
            data.physical_units(distance="Mpc a h**-1", mass="Msol h**-1")
            assert float(data.dm["pos"].max()) == pytest.approx(16.0, rel=0.01)
            total = float(data.dm["mass"].sum())
            assert total == pytest.approx(share * CRITICAL_DENSITY * 0.3 * 16.0**3, rel=1e-2)
            assert 20 < float(data.dm["vel"].in_units("km s**-1").std()) < 300


@needs_nbodykit
def test_a_box_without_halos_is_written(tmp_path):
    run(tmp_path, simulations=1, sigma_8=0.05, n_files=1)
    groups, subhalos, header = _empty(tmp_path, "MockA")
    assert header["Ngroups_Total"] == header["Nsubgroups_Total"] == 0
    assert groups == subhalos == set()
    assert (tmp_path / "Sims" / "MockA_DM" / "L16n32" / "CV" / "CV_0" / "snapshot_090.hdf5").exists()


def _empty(out, suite):
    with h5py.File(out / "FOF_Subfind" / suite / "L16n32" / "CV" / "CV_0" / "groups_090.hdf5") as file:
        return set(file["Group"]), set(file["Subhalo"]), dict(file["Header"].attrs)


@given(box_size=st.sampled_from([1e6, 12.5, 25.0]) | st.floats(6.5, 1e9))
def test_the_reader_knows_the_name_of_every_box(box_size):
    volume = SimulateConfig(box_size=box_size).volume
    assert camels_reader._is_volume(volume)
    assert float(volume[1:].partition("n")[0]) == box_size


def test_without_nbodykit_the_error_says_how_to_get_it(monkeypatch, tmp_path):
    import galdist.statistics as statistics
    from galdist.simulations.simulate import simulate

    monkeypatch.setattr(statistics, "find_spec", lambda name: None)
    with pytest.raises(statistics.MissingEngine, match="make setup"):
        simulate(SimulateConfig(**SMALL), {}, tmp_path)
    assert not any(tmp_path.iterdir())


@needs_nbodykit
def test_room_for_the_particles_is_asked_for_first(monkeypatch, tmp_path):
    from galdist.simulations.simulate import simulate

    n_bytes = 3 * 32**3 * (12 + 12 + 8)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=n_bytes - 1))
    with pytest.raises(durable.NotEnoughSpace, match="particles of 3 simulations"):
        simulate(SimulateConfig(n_particles=32, simulations=3), {}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
