"""Tracer spectra on real ranks: 1, 2 and 4 give the same, and what they give is right."""

import functools
import gc
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from tracer_run import BOX, write_centrals, write_samples

from galdist.statistics.spectra import gaussian_variance
from galdist.statistics.tracer_spectra import TracersConfig, load_tracers, tracers

pytest.importorskip("nbodykit", reason="nbodykit is not installed: run `make setup`")

CONFIG = {"n_mesh": 32, "k_max": 0.6, "jackknife": 2}


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """Clustered halos of all tracers, few of tracer 5; seeds of a model, a copy of the truth, a model without
    tracers 1 and 5."""
    folder = tmp_path_factory.mktemp("tracers")
    rng = np.random.default_rng(0)
    centers = rng.uniform(0, BOX, (150, 3))
    position = (centers.repeat(20, axis=0) + rng.normal(0, 3, (3000, 3))) % BOX
    truth = rng.choice(8, 3000, p=[0.01, 0.1, 0.1, 0.1, 0.1, 0.0, 0.39, 0.2])
    truth[[5, 1500, 2990]] = 5
    predictions = folder / "predictions"
    write_centrals(folder / "centrals", position, truth)
    for seed in range(2):
        moved = rng.random(3000) < 0.3
        net = np.where(moved, rng.integers(0, 8, 3000), truth)
        write_samples(predictions / f"net-{seed}", net[:, None], label="net")
    write_samples(predictions / "copy", truth[:, None], label="copy")
    without = np.where(np.isin(truth, [1, 5]), 6, truth)
    write_samples(predictions / "without", without[:, None], label="without")
    return folder, position, truth


def run_stage(folder, out, config):
    """What every rank does: the stage, as the pipeline calls it."""
    inputs = {"catalogs": [folder / "centrals"], "predictions": sorted((folder / "predictions").iterdir())}
    tracers(TracersConfig(**config), inputs, out)
    return load_tracers(out)["simulations"]["box"]


@pytest.fixture(scope="module")
def measured(mpirun, steps):
    """Number of ranks -> the folder of the result, and what each rank read of it."""

    @functools.cache
    def by(ranks):
        out = steps[0] / f"by-{ranks}"
        return out, mpirun(ranks, run_stage, steps[0], out, CONFIG)

    return by


def leaves(value, path=()):
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    else:
        yield path, value


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_agree(measured, ranks):
    alone = measured(1)[1][0]
    for result in measured(ranks)[1]:
        found = dict(leaves(result))
        assert found.keys() == dict(leaves(alone)).keys()
        for path, value in leaves(alone):
            if isinstance(value, np.ndarray):
                scale = np.nanmax(np.abs(value)) if np.isfinite(value).any() else 1.0
                np.testing.assert_allclose(
                    found[path], value, rtol=1e-9, atol=1e-9 * scale, err_msg=str(path)
                )
            elif isinstance(value, float):
                assert found[path] == pytest.approx(value, rel=1e-9, abs=1e-9), path
            else:
                assert found[path] == value, path


def test_the_result_is_that_of_the_galaxies(measured, steps):
    _, position, truth = steps
    result = measured(2)[1][0]
    assert result["k"].size == 9  # 0.0628 h/Mpc wide, centers up to 0.6
    assert result["k_min"][0] == pytest.approx(np.pi / BOX)
    np.testing.assert_array_equal(result["counts"]["truth"], np.bincount(truth, minlength=8))
    for number in range(1, 8):
        entry = result["tracers"][str(number)]
        members = position[truth == number]
        assert entry["truth"]["n"] == len(members)
        assert entry["truth"]["shot_noise"] == pytest.approx(BOX**3 / len(members))
        expected = gaussian_variance(entry["truth"]["power"], result["k"], 2 * np.pi / BOX, len(members), BOX)
        np.testing.assert_allclose(entry["truth"]["error"] ** 2, expected)
        # The same modes by sums over the points, without mesh, window or aliases.
        power, direct, error = (
            entry["truth"]["power"], entry["truth"]["jackknife"]["power"], entry["truth"]["error"]
        )  # fmt: skip
        assert (np.abs(power - direct) / error).max() < 0.02
        copy = entry["labels"]["copy"]
        np.testing.assert_array_equal(copy["power"], power)
        assert copy["chi2"]["value"] == copy["chi2_band"]["value"] == 0
        if number not in (1, 5):
            assert entry["labels"]["net"]["chi2"]["value"] > 0
            assert len(entry["labels"]["net"]["chi2"]["seeds"]) == 2
    for number in ("1", "5"):
        without = result["tracers"][number]["labels"]["without"]
        assert (without["n"], without["empty"]) == (0, 1)
        assert without["chi2"]["value"] is None
        assert number not in result["with_truth"]["without"]
    assert "1x2" not in result["cross"]["without"]
    # A tracer with itself is perfectly correlated once the halos that both have are taken out.
    for number, found in result["with_truth"]["copy"].items():
        defined = np.isfinite(found["r"])
        assert defined.any() or number == "5"
        np.testing.assert_allclose(found["r"][defined], 1, rtol=1e-9)
    np.testing.assert_array_equal(np.diag(result["confusion"]["copy"]["rates"]), 1)
    assert result["confusion"]["net"]["counts"][6, 6] > result["confusion"]["net"]["counts"][6, 7] > 0


def auto_and_cross(first, second, box, n_mesh, n_bins):
    from galdist.statistics.spectra import catalog_modes, power
    from hpc import mpi

    comm = mpi.world()
    a, b = (catalog_modes(x[comm.rank :: comm.size], box, n_mesh, n_bins) for x in (first, second))
    return [
        (power(a.mesh).power["power"].real[:n_bins], a.cross(a)),
        (power(a.mesh, b.mesh).power["power"].real[:n_bins], a.cross(b)),
    ], (a.number, a.shot_noise)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_cross_powers_are_those_of_nbodykit_and_of_an_estimator_of_our_own(mpirun, ranks):
    """Cloud-in-cell counts of a fine mesh, transformed by numpy."""
    rng = np.random.default_rng(6)
    centers = rng.uniform(0, BOX, (40, 3))
    first, second = ((centers.repeat(25, axis=0) + rng.normal(0, 4, (1000, 3))) % BOX for _ in range(2))
    n_bins, fine = 8, 96
    powers, (number, shot_noise) = mpirun(ranks, auto_and_cross, first, second, BOX, 32, n_bins)[0]
    assert (number, shot_noise) == (1000, BOX**3 / 1000)
    for theirs, ours in powers:
        np.testing.assert_allclose(ours, theirs, rtol=1e-9)

    def modes(points):
        x = points / BOX * fine
        low = np.floor(x).astype(int)
        counts = np.zeros((fine,) * 3)
        for corner in np.ndindex(2, 2, 2):
            weight = np.prod(np.where(corner, x - low, 1 - x + low), axis=1)
            np.add.at(counts, tuple(((low + corner) % fine).T), weight)
        wave = np.fft.fftfreq(fine)
        window = (np.sinc(wave)[:, None, None] * np.sinc(wave)[:, None] * np.sinc(wave)) ** 2
        return np.fft.fftn(counts) / len(points) / window

    m = np.fft.fftfreq(fine, 1 / fine)
    shell = np.rint(np.sqrt(m[:, None, None] ** 2 + m[:, None] ** 2 + m**2))
    a, b = modes(first), modes(second)
    for (_, ours), product in zip(powers, (np.abs(a) ** 2, (a * b.conj()).real), strict=True):
        expected = [BOX**3 * product[shell == n].mean() for n in range(1, n_bins + 1)]
        np.testing.assert_allclose(ours, expected, rtol=0.002)


def uniform_powers(n, realizations, n_mesh, n_bins):
    from galdist.statistics.spectra import catalog_modes, power

    gc.freeze()  # nbodykit collects garbage for each mesh
    powers = []
    for seed in range(realizations):
        points = np.random.default_rng(seed).uniform(0, BOX, (n, 3))
        found = catalog_modes(points, BOX, n_mesh, n_bins)
        powers.append(power(found.mesh).power["power"].real[:n_bins] - found.shot_noise)
    return np.array(powers)


def test_uniform_points_have_no_power_and_the_error_of_the_formula(mpirun):
    n, n_bins = 300, 10
    powers = mpirun(1, uniform_powers, n, 60, 32, n_bins)[0]
    width = 2 * np.pi / BOX
    sigma = np.sqrt(gaussian_variance(np.zeros(n_bins), width * np.arange(1, n_bins + 1), width, n, BOX))
    pull = powers / sigma
    assert np.abs(pull.mean(axis=0)).max() < 4 / np.sqrt(60)
    assert np.mean(pull[:, 2:] ** 2) == pytest.approx(1, abs=4 * np.sqrt(2 / pull[:, 2:].size))


def test_an_interrupted_measurement_goes_on(mpirun, measured, steps, tmp_path):
    out = shutil.copytree(measured(2)[0], tmp_path / "out")
    written = (out / "tracers.json").read_bytes()
    parts = out / "parts" / "box"
    kept = parts / "copy.json"
    stamp = kept.stat().st_mtime_ns
    (out / "tracers.json").unlink()
    (parts / "net-0.json").unlink()
    mpirun(2, run_stage, steps[0], out, CONFIG)
    assert kept.stat().st_mtime_ns == stamp
    assert (out / "tracers.json").read_bytes() == written


@pytest.mark.parametrize("cross", ["none", "truth"])
def test_cross_powers_are_measured_where_they_are_asked_for(mpirun, steps, tmp_path, cross):
    config = {**CONFIG, "cross": cross, "jackknife": 0}
    result = mpirun(1, run_stage, steps[0], tmp_path, config)[0]
    assert "with_truth" not in result
    assert list(result.get("cross", {})) == ([] if cross == "none" else ["truth"])
    assert "jackknife" not in result["tracers"]["1"]["truth"]
