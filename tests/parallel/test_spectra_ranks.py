"""Spectra on real ranks: 1, 2 and 4 give the same, and what they give is right."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from galdist.catalogs.catalog import CatalogWriter
from galdist.grids.store import Field, SimulationAttrs, create_store
from galdist.statistics.metrics import load_metrics
from galdist.statistics.spectra import SpectraConfig, load_spectra, multipoles, spectra
from hpc import mpi

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import peers

pytest.importorskip("nbodykit", reason="nbodykit is not installed: run `make setup`")

BOX = 25.0
N_MESH = 32


def waves(amplitude, phase=0.0, wave=(1, 2, 3), n_mesh=N_MESH):
    """1 + amplitude cos(k.x + phase) with k = 2 pi wave / L, in order z, y, x."""
    x = np.arange(n_mesh) / n_mesh * 2 * np.pi
    return 1 + amplitude * np.cos(wave[2] * x[:, None, None] + wave[1] * x[:, None] + wave[0] * x + phase)


def write_store(path, fields, name="box", assignment="none", split="test"):
    attrs = SimulationAttrs(name=name, box_size=BOX, redshift=0.5, suite="mock", split=split)
    n_mesh = next(iter(fields.values())).shape[0]
    columns = [Field(name=field, assignment=assignment, dtype="float64") for field in fields]
    store = create_store(path, [attrs], columns, n_mesh)
    for field, values in fields.items():
        store[name].write(field, values)


def run_stage(folder, out, config=None):
    """What every rank does: the stage, as the pipeline calls it."""
    inputs = {"grids": [folder / "grids"], "predictions": sorted((folder / "predictions").iterdir())}
    spectra(SpectraConfig(**(config or {})), inputs, out)
    return load_spectra(out)["simulations"]


@pytest.fixture(scope="module")
def random_fields(tmp_path_factory):
    folder = tmp_path_factory.mktemp("random")
    rng = np.random.default_rng(3)
    shape = (N_MESH,) * 3
    galaxies = rng.poisson(0.4, shape)
    write_store(
        folder / "grids" / "grids.zarr",
        {"galaxy_counts": galaxies, "matter_counts": rng.gamma(2.0, 3.0, shape)},
        assignment="cic",
    )
    write_store(
        folder / "predictions" / "hod" / "prediction.zarr",
        {
            "galaxy_counts": galaxies + rng.poisson(0.1, shape),
            "expected_galaxy_counts": rng.gamma(2, 3, shape),
        },
        assignment="ngp",
    )
    return folder


@pytest.fixture(scope="module")
def alone(mpirun, random_fields):
    """What one rank finds."""
    return mpirun(1, run_stage, random_fields, random_fields / "alone")[0]["box"]


@pytest.fixture(scope="module")
def measured(mpirun, random_fields):
    """The step's folder, and what each of two ranks finds."""
    out = random_fields / "out"
    return out, mpirun(2, run_stage, random_fields, out)


def leaves(value, path=()):
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    else:
        yield path, value


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_agree(mpirun, random_fields, alone, measured, tmp_path, ranks):
    together = measured[1] if ranks == 2 else mpirun(ranks, run_stage, random_fields, tmp_path)
    assert len(together) == ranks
    assert set(alone["fields"]) == {"truth", "matter", "hod", "hod:expected_galaxy_counts"}
    assert set(alone["cross"]) == {"matter", "hod", "hod:expected_galaxy_counts"}
    for result in together:
        found = dict(leaves(result["box"]))
        for path, value in leaves(alone):
            if isinstance(value, str):
                assert found[path] == value
            elif path[-1] in ("r", "power") and path[0] == "cross":
                # Cross powers cross zero: the error is relative to that of the auto powers.
                scale = 1.0
                if path[-1] == "power":
                    scale = np.sqrt(alone["fields"]["truth"]["power"] * alone["fields"][path[1]]["power"])
                assert np.abs((found[path] - value) / scale).max() < 1e-12, path
            elif path[-1].endswith("subtracted"):  # a difference of nearly equal powers: digits are lost
                np.testing.assert_allclose(found[path], value, rtol=1e-9, err_msg=str(path))
            else:
                np.testing.assert_allclose(found[path], value, rtol=1e-12, err_msg=str(path))


def test_a_prediction_that_equals_the_truth_has_all_of_its_power(mpirun, tmp_path):
    """Up to the Nyquist frequency, where the window of the scheme is felt most."""
    counts = {"galaxy_counts": np.random.default_rng(5).poisson(0.3, (N_MESH,) * 3)}
    write_store(tmp_path / "grids" / "grids.zarr", counts, assignment="ngp")
    for name, assignment in (("same", "ngp"), ("unknown", "none")):
        write_store(tmp_path / "predictions" / name / "prediction.zarr", counts, assignment=assignment)
    config = {"matter": None, "band": (0.3, 3), "power_bands": [(0.3, 3)]}
    cross = mpirun(1, run_stage, tmp_path, tmp_path / "out", config)[0]["box"]["cross"]
    assert (cross["same"]["transfer"] == 1).all()
    beyond_noise = np.isfinite(cross["same"]["transfer_subtracted"])
    assert beyond_noise.any()
    assert (cross["same"]["transfer_subtracted"][beyond_noise] == 1).all()
    assert cross["same"]["r"] == pytest.approx(1, abs=1e-12)
    rows = {row["metric"]: row["value"] for row in load_metrics(tmp_path / "out")}
    assert rows["power_ratio/same/k0.3-3"] == 1
    assert cross["unknown"]["transfer"][-1] < 0.9


@pytest.mark.parametrize("ranks", [1, 2])
def test_plane_waves_have_the_power_correlation_and_transfer_of_the_formula(mpirun, tmp_path, ranks):
    amplitude = 0.25
    matter = waves(1.0, wave=(3, 1, 2))
    write_store(
        tmp_path / "grids" / "grids.zarr", {"galaxy_counts": waves(amplitude), "matter_counts": matter}
    )
    for name, field in (
        ("louder", waves(2 * amplitude)),
        ("opposite", waves(amplitude, np.pi)),
        ("shifted", 7 * waves(amplitude, np.pi / 3)),
    ):
        write_store(tmp_path / "predictions" / name / "prediction.zarr", {"galaxy_counts": field})
    result = mpirun(ranks, run_stage, tmp_path, tmp_path / "out")[0]["box"]
    fundamental = 2 * np.pi / BOX
    bin_of_wave = 3  # |(1, 2, 3)| = 3.74 fundamental modes, in the bin around 4
    assert result["k_min"][bin_of_wave] == pytest.approx(3.5 * fundamental)
    truth = result["fields"]["truth"]
    # Two modes of amplitude A/2 among those of the bin, times the volume.
    expected = np.zeros_like(result["k"])
    expected[bin_of_wave] = 2 * BOX**3 * (amplitude / 2) ** 2 / result["modes"][bin_of_wave]
    np.testing.assert_allclose(truth["power"], expected, atol=1e-12 * expected.max())
    assert truth["shot_noise"] == 0
    assert truth["n"] == pytest.approx(N_MESH**3)
    cross = {label: {k: v[bin_of_wave] for k, v in c.items()} for label, c in result["cross"].items()}
    assert cross["louder"]["r"] == pytest.approx(1, abs=1e-12)
    assert cross["louder"]["transfer"] == pytest.approx(2, abs=1e-12)
    assert cross["louder"]["r_error"] == pytest.approx(0, abs=1e-12)
    assert cross["opposite"]["r"] == pytest.approx(-1, abs=1e-12)
    assert cross["shifted"]["r"] == pytest.approx(0.5, abs=1e-12)
    assert cross["shifted"]["transfer"] == pytest.approx(1, abs=1e-12)
    assert cross["matter"]["power"] == pytest.approx(0, abs=1e-12)


def count_modes(n_mesh):
    """Modes in the bins, counted by hand."""
    n = np.fft.fftfreq(n_mesh, 1 / n_mesh)
    radius = np.sqrt(n[:, None, None] ** 2 + n[:, None] ** 2 + n**2)
    return np.histogram(radius, bins=np.arange(0.5, n_mesh // 2))[0]


def bins(n_mesh):
    from galdist.statistics.spectra import field_mesh, power

    field = np.random.default_rng(0).random((n_mesh,) * 3)
    return power(field_mesh(field.__getitem__, n_mesh, BOX, "none")).power["modes"]


@pytest.mark.parametrize(("ranks", "n_mesh"), [(1, 32), (2, 32), (4, 30), (3, 15)])
def test_every_mode_is_in_its_bin(mpirun, ranks, n_mesh):
    for modes in mpirun(ranks, bins, n_mesh):
        np.testing.assert_array_equal(modes, count_modes(n_mesh))


def uniform_power(interlaced):
    from galdist.statistics.spectra import catalog_mesh, power
    from hpc import mpi

    comm = mpi.world()
    position = np.random.default_rng(7).uniform(0, BOX, (40_000, 3))
    result = power(catalog_mesh(position[comm.rank :: comm.size], BOX, N_MESH, interlaced=interlaced))
    return result.power["power"].real, result.power["modes"], result.attrs["shotnoise"]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("interlaced", [True, False])
def test_uniform_catalog_is_flat_at_the_shot_noise(mpirun, ranks, interlaced):
    power, modes, shot_noise = mpirun(ranks, uniform_power, interlaced)[0]
    assert shot_noise == pytest.approx(BOX**3 / 40_000)
    assert_flat(power / shot_noise, modes)


def assert_flat(ratio, modes):
    """The ratio is one within the scatter of its number of modes, in every bin and on the whole."""
    pull = (ratio - 1) / np.sqrt(2 / modes)
    assert np.abs(pull).max() < 4
    assert 0.3 < np.mean(pull**2) < 2
    assert np.average(ratio, weights=modes) == pytest.approx(1, abs=4 * np.sqrt(2 / modes.sum()))


def painted_powers(scheme, n_points):
    """Points on a mesh by a scheme, as a stored field would be: their power, and that of the catalog."""
    from pmesh.pm import ParticleMesh

    from galdist.statistics.spectra import _aliasing, catalog_mesh, field_mesh, power

    rng = np.random.default_rng(11)
    centers = rng.uniform(0, BOX, (n_points // 20, 3))
    position = np.concatenate([rng.uniform(0, BOX, (n_points, 3)), centers.repeat(5, axis=0)])
    position[n_points:] += rng.normal(0, 0.5, (len(position) - n_points, 3))
    position %= BOX
    position[position == BOX] = 0
    answers = {}
    for name, points in (("uniform", position[:n_points]), ("clustered", position)):
        pm = ParticleMesh(Nmesh=[N_MESH] * 3, BoxSize=BOX)
        # A cell of the mesh reaches from i H to (i + 1) H, so its center is half a cell from pmesh's point.
        field = pm.paint(
            points - 0.5 * BOX / N_MESH, resampler={"ngp": "nnb"}.get(scheme, scheme)
        ).value.copy()
        gridded = power(field_mesh(field.__getitem__, N_MESH, BOX, scheme))
        catalog = power(catalog_mesh(points, BOX, N_MESH))
        noise = BOX**3 / len(points)
        answers[name] = (
            gridded.power["power"].real - noise * _aliasing(N_MESH, scheme),
            catalog.power["power"].real - noise,
            gridded.power["modes"],
            noise,
        )
    return answers


@pytest.mark.parametrize("scheme", ["ngp", "cic", "tsc"])
def test_window_and_aliased_shot_noise_are_those_of_the_scheme(mpirun, scheme):
    answers = mpirun(1, painted_powers, scheme, 20_000)[0]
    power, _, modes, noise = answers["uniform"]
    assert np.abs((power / noise)[2:]).max() < 0.3  # a window left in would make it 1.4 (NGP) to 7 (TSC)
    assert np.abs(np.average(power / noise, weights=modes)) < 0.03
    power, catalog, modes, noise = answers["clustered"]
    half = slice(0, N_MESH // 4)  # aliases of the signal grow beyond half the Nyquist frequency
    ratio = np.average((power / catalog)[half], weights=modes[half])
    assert ratio == pytest.approx(1, abs={"ngp": 0.06, "cic": 0.02, "tsc": 0.01}[scheme])


def lognormal_power(n_bar, bias, scheme):
    from nbodykit.lab import LogNormalCatalog, cosmology

    from galdist.grids.mass_assignment import assign
    from galdist.statistics.spectra import _aliasing, catalog_mesh, field_mesh, power

    box, n_mesh = 1000.0, 128
    linear = cosmology.LinearPower(cosmology.Planck15, redshift=0.55, transfer="EisensteinHu")
    catalog = LogNormalCatalog(Plin=linear, nbar=n_bar, BoxSize=box, Nmesh=n_mesh, bias=bias, seed=42)
    position = catalog["Position"].compute() % box
    everywhere = np.concatenate(catalog.comm.allgather(position))
    shot_noise = box**3 / len(everywhere)
    if scheme is None:
        result, noise = power(catalog_mesh(position, box, n_mesh)), shot_noise
    else:
        counts = assign(everywhere, box, n_mesh, scheme)
        result = power(field_mesh(counts.__getitem__, n_mesh, box, scheme))
        noise = shot_noise * _aliasing(n_mesh, scheme)
    k = result.power["k"]
    return k, result.power["power"].real - noise, result.power["modes"], bias**2 * linear(k), shot_noise


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("scheme", [None, "cic"])
def test_lognormal_catalog_recovers_its_input(mpirun, ranks, scheme):
    """From the points themselves, and as stages go: assigned to a mesh that is stored and measured."""
    k, power, modes, expected, shot_noise = mpirun(ranks, lognormal_power, 3e-4, 2.0, scheme)[0]
    sigma = np.sqrt(2 / modes) * (expected + shot_noise)
    # nbodykit moves the points by their linear displacements: beyond k = 0.1 that adds to the linear power.
    pull = ((power - expected) / sigma)[k < 0.1]
    assert np.abs(pull).max() < 4
    assert 0.2 < np.mean(pull**2) < 2
    assert np.abs(pull.mean()) < 3 / np.sqrt(pull.size)


def power_in_bins_of_pylians(field, scheme):
    """Bins from n to n + 1 fundamental modes, lower edges included."""
    from nbodykit.algorithms.fftpower import FFTPower

    from galdist.statistics.spectra import field_mesh

    fundamental = 2 * np.pi / BOX
    mesh = field_mesh(field.__getitem__, len(field), BOX, scheme)
    result = FFTPower(mesh, mode="1d", dk=fundamental, kmin=(1 - 1e-6) * fundamental)
    return result.power["k"], result.power["power"].real, result.power["modes"]


@pytest.mark.parametrize("scheme", ["ngp", "cic", "tsc"])
def test_pylians_measures_the_same_power(mpirun, scheme):
    field = np.random.default_rng(5).gamma(0.3, 2.0, (64,) * 3).astype(np.float32)
    code = """
import Pk_library
delta = arguments["field"] / arguments["field"].mean(dtype="f8") - 1
found = Pk_library.Pk(delta.astype("f4"), float(arguments["box"]), 0, str(arguments["scheme"]), 1, False)
results.update(k=found.k3D, power=found.Pk[:, 0], modes=found.Nmodes3D)
"""
    try:
        theirs = peers.PYLIANS.run(code, field=field, box=BOX, scheme=scheme.upper())
    except peers.PeerMissing as missing:
        pytest.skip(str(missing))
    k, power, modes = mpirun(2, power_in_bins_of_pylians, field, scheme)[0]
    inside = slice(0, 30)  # the bins without modes on the Nyquist planes
    np.testing.assert_array_equal(2 * theirs["modes"][inside], modes[inside])  # they count k and -k once
    np.testing.assert_allclose(theirs["k"][inside], k[inside], rtol=1e-5)
    np.testing.assert_allclose(theirs["power"][inside], power[inside], rtol=1e-4)


def load_with_nbodykit(files):
    from nbodykit.lab import FFTPower

    return [
        (loaded.power["k"], loaded.power["power"], loaded.power["modes"], dict(loaded.attrs))
        for loaded in map(FFTPower.load, files)
    ]


def test_files_load_in_nbodykit(mpirun, measured):
    out, result = measured[0], measured[1][0]["box"]
    folder = out / "spectra" / "box"
    files = [str(folder / "truth.json"), str(folder / "cross" / "hod:expected_galaxy_counts.json")]
    (k, power, modes, attrs), (_, cross, _, _) = mpirun(1, load_with_nbodykit, files)[0]
    np.testing.assert_allclose(k, result["k"])
    np.testing.assert_allclose(modes, result["modes"])
    np.testing.assert_allclose(power.real, result["fields"]["truth"]["power"])
    np.testing.assert_allclose(cross.real, result["cross"]["hod:expected_galaxy_counts"]["power"])
    assert attrs["shotnoise"] == pytest.approx(result["fields"]["truth"]["shot_noise"])
    assert attrs["N1"] == result["fields"]["truth"]["n"]
    assert list(attrs["BoxSize"]) == [BOX] * 3
    assert list(attrs["Nmesh"]) == [N_MESH] * 3
    assert (attrs["interlaced"], attrs["assignment"], attrs["redshift"]) == (False, "cic", 0.5)


def test_shot_noise_is_that_of_counts_only(alone):
    fields = alone["fields"]
    assert fields["truth"]["shot_noise"] == pytest.approx(BOX**3 / fields["truth"]["n"])
    assert fields["hod:expected_galaxy_counts"]["shot_noise"] == 0
    assert np.all(
        fields["hod"]["shot_noise_power"] > fields["hod"]["shot_noise"]
    )  # aliases of the NGP window


def test_an_interrupted_measurement_goes_on(mpirun, random_fields, measured, tmp_path):
    out, once = tmp_path / "out", measured[1][0]
    shutil.copytree(measured[0], out)
    written = (out / "spectra.json").read_bytes()
    part = out / "parts" / "box.json"
    stamp = part.stat().st_mtime_ns
    (out / "spectra.json").unlink()
    again = mpirun(1, run_stage, random_fields, out)[0]
    assert part.stat().st_mtime_ns == stamp
    assert (out / "spectra.json").read_bytes() == written
    assert set(once) == set(again)


def test_metrics_say_how_well_each_prediction_correlates(measured):
    out, result = measured[0], measured[1][0]["box"]
    rows = {(row["metric"], row["sample"]): row for row in load_metrics(out)}
    band = (result["k"] >= 0.3) & (result["k"] < 3)
    r = rows["r/hod/k0.3-3", "box"]
    assert r["value"] == pytest.approx(result["cross"]["hod"]["r"][band].mean())
    assert 0.8 < r["value"] < 1  # the truth, plus a quarter of galaxies at random: r = 1 / sqrt(1.25)
    assert r["value"] == pytest.approx(1 / np.sqrt(1.25), abs=5 * r["error"])
    assert rows["r/hod/k0.3-3", "test"]["value"] == r["value"]
    ratio = rows["power_ratio/hod/k1-3", "box"]
    assert ratio["value"] == pytest.approx(1 / 1.25, abs=5 * ratio["error"] + 0.15)
    assert rows["n/hod", "box"]["value"] > rows["n/truth", "box"]["value"]


def test_response_to_parameters_is_that_of_the_fields(mpirun, tmp_path):
    """Numbers as A_SN1^-0.5, powers as sigma_8^2; the prediction knows nothing of A_SN1."""
    rng = np.random.default_rng(0)
    feedback, amplitude = np.exp(rng.normal(size=(2, 6)) * 0.3)
    attrs = [
        SimulationAttrs(
            name=f"box{i}", box_size=BOX, redshift=0, suite="mock", split="test",
            cosmology={"sigma_8": amplitude[i]}, astrophysics={"A_SN1": feedback[i]},
        )
        for i in range(6)
    ]  # fmt: skip
    columns = [Field(name="galaxy_counts", dtype="float64")]
    truth = create_store(tmp_path / "grids" / "grids.zarr", attrs, columns, N_MESH)
    blind = create_store(tmp_path / "predictions" / "blind" / "prediction.zarr", attrs, columns, N_MESH)
    for i, one in enumerate(attrs):
        field = waves(0.1 * amplitude[i])
        truth[one.name].write("galaxy_counts", 2 * field * feedback[i] ** -0.5)
        blind[one.name].write("galaxy_counts", 3 * field)
    band = (0.9, 1.1)  # that of the wave
    given = {"matter": None, "response": ("A_SN1", "sigma_8"), "band": band, "power_bands": (band,)}
    mpirun(2, run_stage, tmp_path, tmp_path / "out", given)
    rows = {row["metric"]: (row["value"], row["error"]) for row in load_metrics(tmp_path / "out")}
    expected = {
        ("truth", "n"): (-0.5, 0), ("blind", "n"): (0, 0),
        ("truth", "power/k0.9-1.1"): (0, 2), ("blind", "power/k0.9-1.1"): (0, 2),
    }  # fmt: skip
    for (label, quantity), slopes in expected.items():
        for parameter, slope in zip(("A_SN1", "sigma_8"), slopes, strict=True):
            found = rows[f"response/{label}/{quantity}/{parameter}"]
            np.testing.assert_allclose(found, (slope, 0), atol=1e-9)
    np.testing.assert_allclose(rows["response_difference/blind/n/A_SN1"], (0.5, 0), atol=1e-9)
    assert load_spectra(tmp_path / "out")["response"]["parameters"] == ["A_SN1", "sigma_8"]
    for wrong, message in (
        ("A_SN", "response: box0: parameter .A_SN. is not there; did you mean"),
        ("Omega_m", "parameter .Omega_m. is not there"),
    ):
        with pytest.raises(ValueError, match=message):
            run_stage(tmp_path, tmp_path / "wrong", given | {"response": (wrong,)})


def test_an_empty_prediction_is_left_out_and_an_empty_truth_is_an_error(mpirun, tmp_path):
    empty, full = np.zeros((N_MESH,) * 3), waves(0.5)
    write_store(tmp_path / "a" / "grids" / "grids.zarr", {"galaxy_counts": full})
    write_store(tmp_path / "a" / "predictions" / "none" / "prediction.zarr", {"galaxy_counts": empty})
    result = mpirun(2, run_stage, tmp_path / "a", tmp_path / "out-a", {"matter": None})[0]["box"]
    assert list(result["fields"]) == ["truth"]
    assert result["cross"] == {}
    json.loads((tmp_path / "out-a" / "metrics.json").read_text())
    write_store(tmp_path / "b" / "grids" / "grids.zarr", {"galaxy_counts": empty})
    (tmp_path / "b" / "predictions").mkdir()
    with pytest.raises(pytest.fail.Exception, match="box: its field 'galaxy_counts' is empty"):
        mpirun(2, run_stage, tmp_path / "b", tmp_path / "out-b", {"matter": None})


def write_galaxies(step, store_name, rng, redshift=0.5, n=800, speed=300.0, velocities=True):
    """Galaxies of one box in a catalog store."""
    attrs = SimulationAttrs(
        name="box", box_size=BOX, redshift=redshift, suite="mock", split="test", cosmology={"Omega_m": 0.3}
    )
    writer = CatalogWriter(step / store_name)
    table = {"position": rng.uniform(0, BOX, (n, 3)), "velocity": rng.normal(0, speed, (n, 3))}
    writer.add(attrs, {"galaxies": table if velocities else {"position": table["position"]}})
    writer.finish(["box"])
    return attrs, table


def measure_in_redshift_space(folder, out):
    inputs = {
        "grids": [folder / "grids"],
        "predictions": sorted((folder / "predictions").iterdir()),
        "catalogs": [folder / "today", folder / "early"],
    }
    spectra(SpectraConfig(matter=None, power_bands=[(0.3, 3)]), inputs, out)
    return load_spectra(out)["simulations"]["box"]["multipoles"]


def poles_of(position, velocity):
    comm = mpi.world()
    mine = slice(comm.rank, None, comm.size)
    return multipoles(position[mine], velocity[mine], BOX, N_MESH, 0.5, 0.3)


def test_galaxies_of_truth_and_halo_occupation_are_measured_in_redshift_space(mpirun, tmp_path):
    """Those of the grids' redshift, where positions and velocities are known."""
    rng = np.random.default_rng(2)
    counts = Field(name="galaxy_counts", assignment="ngp", dtype="float64")
    attrs, true = write_galaxies(tmp_path / "early", "catalog.zarr", rng)
    write_galaxies(tmp_path / "today", "catalog.zarr", rng, redshift=0.0)
    painted = {}
    for name in ("hod", "network", "older"):
        store = create_store(tmp_path / "predictions" / name / "prediction.zarr", [attrs], [counts], N_MESH)
        store["box"].write("galaxy_counts", rng.poisson(0.1, (N_MESH,) * 3).astype(float))
        if name != "network":
            step = tmp_path / "predictions" / name
            painted[name] = write_galaxies(step, "galaxies.zarr", rng, velocities=name == "hod")[1]
    grids = create_store(tmp_path / "grids" / "grids.zarr", [attrs], [counts], N_MESH)
    grids["box"].write("galaxy_counts", rng.poisson(0.1, (N_MESH,) * 3).astype(float))
    found, _ = mpirun(2, measure_in_redshift_space, tmp_path, tmp_path / "out")
    assert found.keys() == {"truth", "hod"}
    for label, table in (("truth", true), ("hod", painted["hod"])):
        (expected,) = mpirun(1, poles_of, table["position"], table["velocity"])
        for key in ("monopole", "quadrupole", "shot_noise"):
            scale = np.abs(expected["monopole"]).max()
            np.testing.assert_allclose(found[label][key], expected[key], atol=1e-10 * scale)
    metrics = {row["metric"] for row in load_metrics(tmp_path / "out")}
    assert "n/hod" in metrics
