"""What the spectra stage checks, saves and sums up; what it measures is tested on ranks (tests/parallel)."""

import math
import subprocess
import sys

import numpy as np
import pytest
from pydantic import ValidationError

from galdist import statistics
from galdist.catalogs.catalog import CatalogWriter
from galdist.grids.store import Field, SimulationAttrs, StoreError, create_store
from galdist.statistics.spectra import (
    SpectraConfig,
    _compare,
    _rows,
    load_spectra,
    rows_over_boxes,
    spectra,
)
from hpc import durable


def write_store(
    path, names=("box",), fields=("galaxy_counts", "matter_counts"), n_mesh=32, split="test", box=25.0
):
    simulations = [
        SimulationAttrs(name=name, box_size=box, redshift=0.0, suite="mock", split=split) for name in names
    ]
    create_store(path, simulations, [Field(name=field) for field in fields], n_mesh)
    return path.parent


@pytest.fixture(autouse=True)
def no_nbodykit_here(monkeypatch):
    """Every check comes before nbodykit is loaded, which would change this process (Dask's scheduler)."""
    monkeypatch.setitem(sys.modules, "nbodykit", None)
    monkeypatch.setattr(statistics, "find_spec", lambda package: object())


def check(tmp_path, match, predictions=(), error=ValueError, **config):
    with pytest.raises(error, match=match):
        spectra(
            SpectraConfig(**config),
            {"grids": [tmp_path / "grids"], "predictions": list(predictions)},
            tmp_path / "out",
        )
    assert not (tmp_path / "out").exists()


def test_wrong_inputs_are_refused_before_anything_is_read(tmp_path):
    write_store(tmp_path / "grids" / "grids.zarr")
    check(tmp_path, "no simulation in the train split", split="train")
    check(
        tmp_path,
        r"field 'galaxies'.*did you mean|field 'galaxies' is not there",
        field="galaxies",
        error=StoreError,
    )
    check(tmp_path, r"band 30-40 h/Mpc has no bin of box: its bins lie at 0\.251, 0\.503", band=(30, 40))
    check(tmp_path, "band 0.01-0.1", power_bands=[(0.01, 0.1)])
    other = write_store(tmp_path / "other" / "prediction.zarr", ["elsewhere"], ["galaxy_counts"])
    check(tmp_path, "none of which is in the test split", [other])
    coarse = write_store(tmp_path / "coarse" / "prediction.zarr", fields=["galaxy_counts"], n_mesh=16)
    check(tmp_path, r"16\^3 cells in 25.0 Mpc/h predict 32\^3 cells", [coarse])
    nameless = write_store(tmp_path / "truth" / "prediction.zarr", fields=["galaxy_counts"])
    check(tmp_path, "cannot be called 'truth'", [nameless])
    check(tmp_path, "no grid store here", [tmp_path / "nothing"], error=StoreError)


def test_galaxies_of_another_redshift_are_refused(tmp_path):
    grids = write_store(tmp_path / "grids" / "grids.zarr")
    galaxies = {"galaxies": {"position": np.ones((4, 3)), "velocity": np.ones((4, 3))}}
    for redshift in (0.5, 0.0):
        attrs = SimulationAttrs(name="box", box_size=25.0, redshift=redshift, suite="mock", split="test")
        writer = CatalogWriter(tmp_path / f"z{redshift}" / "catalog.zarr")
        writer.add(attrs, galaxies)
        writer.finish(["box"])
    for redshift, words in (
        (0.5, "box at redshift 0 is in 0 of the catalogs"),
        (0.0, "Omega_m is not known"),
    ):
        inputs = {"grids": [grids], "catalogs": [tmp_path / f"z{redshift}"]}
        with pytest.raises(ValueError, match=words):
            spectra(SpectraConfig(), inputs, tmp_path / "out")


def test_a_band_average_has_the_quadrupole_over_the_monopole():
    found = measured([4.0, 4.0, 4.0], [4.0, 4.0, 4.0], [4.0, 4.0, 4.0], [2, 8, 8])
    poles = {
        "truth": {
            "monopole": np.array([9.0, 5.0, 3.0]),
            "quadrupole": np.array([9.0, 1.0, 2.0]),
            "shot_noise": 1.0,
        },
        "model": {
            "monopole": np.array([9.0, 8.0, 6.0]),
            "quadrupole": np.array([9.0, 0.0, -3.0]),
            "shot_noise": 2.0,
        },
    }
    config = SpectraConfig(band=(0.0, 3.0), power_bands=[(1.0, 3.0)])
    rows = _rows(config, {"a": found | {"multipoles": poles}}, {"a": "x"})
    values = {row["metric"]: row["value"] for row in rows if row["sample"] == "a"}
    assert values["quadrupole/truth/k1-3"] == pytest.approx(1.5 / 3)
    assert values["quadrupole/model/k1-3"] == pytest.approx(-1.5 / 5)
    assert values["monopole_ratio/model/k1-3"] == pytest.approx(5 / 3)
    assert "monopole_ratio/truth/k1-3" not in values


def test_the_same_simulation_twice_is_refused(tmp_path):
    steps = [write_store(tmp_path / step / "grids.zarr") for step in ("a", "b")]
    with pytest.raises(ValueError, match="which is the truth"):
        spectra(SpectraConfig(), {"grids": steps}, tmp_path / "out")


def test_bands_go_from_low_to_high():
    with pytest.raises(ValidationError, match="from low to high"):
        SpectraConfig(band=(3.0, 0.3))
    with pytest.raises(ValidationError, match="from low to high"):
        SpectraConfig(power_bands=[(0.3, 1.0), (1.0, 1.0)])


def test_a_missing_nbodykit_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(statistics, "find_spec", lambda package: None)
    with pytest.raises(statistics.MissingEngine, match="make setup"):
        spectra(SpectraConfig(), {"grids": []}, tmp_path)


def test_importing_the_stage_loads_neither_nbodykit_nor_mpi():
    code = (
        "import sys, galdist.statistics.spectra, galdist.statistics.hod;"
        "sys.exit(any(m in sys.modules for m in ('nbodykit', 'pmesh', 'mpi4py', 'torch', 'matplotlib')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def measured(power_truth, power_prediction, cross, modes, noise=(0.0, 0.0)):
    fields = [
        {"power": np.array(p), "shot_noise_power": np.full(len(p), s), "n": 10.0, "shot_noise": s}
        for p, s in zip((power_truth, power_prediction), noise, strict=True)
    ]
    return {
        "k": np.array([0.5, 1.5, 2.5]),
        "modes": np.array(modes),
        "fields": {"truth": fields[0], "model": fields[1]},
        "cross": {"model": _compare(*fields, np.array(cross), np.array(modes))},
    }


def test_errors_are_those_of_gaussian_modes():
    """Spectra of many realizations of correlated Gaussian modes scatter as the formulas say."""
    rng = np.random.default_rng(0)
    n_modes, rho, amplitude, n = 60, 0.7, 1.5, 20_000
    half = (n, n_modes // 2)  # k and -k are one mode
    a, noise = (rng.normal(size=half) + 1j * rng.normal(size=half) for _ in range(2))
    b = amplitude * (rho * a + math.sqrt(1 - rho**2) * noise)
    p_a, p_b = (np.mean(np.abs(x) ** 2, axis=1) for x in (a, b))
    p_ab = np.mean((a * b.conj()).real, axis=1)
    r, t = p_ab / np.sqrt(p_a * p_b), np.sqrt(p_b / p_a)
    truth, prediction = ({"power": np.array([p.mean()]), "shot_noise_power": 0.0} for p in (p_a, p_b))
    found = _compare(truth, prediction, np.array([p_ab.mean()]), np.array([n_modes]))
    assert found["r"][0] == pytest.approx(rho, rel=0.01)
    assert found["r_error"][0] == pytest.approx(r.std(), rel=0.05)
    assert found["transfer"][0] == pytest.approx(amplitude, rel=0.01)
    assert found["transfer_error"][0] == pytest.approx(t.std(), rel=0.05)
    assert p_a.std() == pytest.approx(p_a.mean() * np.sqrt(2 / n_modes), rel=0.05)


def test_shot_noise_is_subtracted_from_auto_powers():
    found = measured([5.0, 5.0, 1.0], [3.0, 9.0, 2.0], [2.0, 2.0, 2.0], [10, 10, 10], noise=(1.0, 2.0))
    cross = found["cross"]["model"]
    np.testing.assert_allclose(cross["r"], 2 / np.sqrt([15, 45, 2]))
    np.testing.assert_allclose(cross["r_subtracted"], [2 / np.sqrt(4), 2 / np.sqrt(28), np.nan])
    np.testing.assert_allclose(cross["transfer_subtracted"], [np.sqrt(1 / 4), np.sqrt(7 / 4), np.nan])


def test_metrics_are_means_over_bands_and_boxes():
    config = SpectraConfig(band=(1.0, 3.0), power_bands=[(0.0, 1.0)])
    a = measured([4.0, 4.0, 4.0], [4.0, 4.0, 16.0], [0.0, 2.0, 4.0], [2, 8, 8])
    b = measured([4.0, 4.0, 4.0], [4.0, 4.0, 4.0], [0.0, 4.0, 4.0], [2, 8, 8])
    rows = {
        (row["metric"], row["sample"]): row for row in _rows(config, {"a": a, "b": b}, {"a": "x", "b": "x"})
    }
    r = a["cross"]["model"]["r"]
    np.testing.assert_allclose(r, [0, 0.5, 0.5])
    assert rows["r/model/k1-3", "a"]["value"] == pytest.approx(0.5)
    assert rows["r/model/k1-3", "a"]["error"] == pytest.approx(np.sqrt(2) * 0.75 / np.sqrt(8) / 2)
    assert rows["r/model/k1-3", "test"]["value"] == pytest.approx(0.75)
    assert rows["r/model/k1-3", "test"]["error"] == pytest.approx(0.25)  # of the mean of 0.5 and 1
    assert rows["transfer/model/k1-3", "a"]["value"] == pytest.approx(1.5)
    assert rows["power_ratio/model/k0-1", "a"]["value"] == pytest.approx(1)
    assert rows["n/truth", "test"]["value"] == 10


def test_boxes_of_several_steps_have_a_mean_for_each_step():
    """A mean over suites or redshifts is one of no kind of universe."""
    values = {"a": {"r": (0.5, None)}, "b": {"r": (0.7, None)}, "c": {"r": (0.1, 0.02)}}
    rows = rows_over_boxes(values, "test", {"a": "tng", "b": "tng", "c": "simba"})
    found = {row["sample"]: (row["value"], row["error"]) for row in rows}
    assert found.keys() == {"a", "b", "c", "test of tng", "test of simba"}
    assert found["test of tng"] == pytest.approx((0.6, 0.1))
    assert found["test of simba"] == (0.1, 0.02)


def test_metrics_leave_out_what_is_undefined():
    found = measured([4.0, 4.0, 4.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [2, 8, 8])
    metrics = [row["metric"] for row in _rows(SpectraConfig(), {"a": found}, {"a": "x"})]
    assert "r/model/k0.3-3" not in metrics
    assert "n/model" in metrics


def test_spectra_come_back_as_arrays(tmp_path):
    saved = {"simulations": {"box": {"n_mesh": 4, "k": [0.1, 0.2], "cross": {"a": {"r": [1.0, None]}}}}}
    durable.write_json(tmp_path / "spectra.json", saved)
    found = load_spectra(tmp_path)["simulations"]["box"]
    assert found["n_mesh"] == 4
    np.testing.assert_array_equal(found["k"], [0.1, 0.2])
    np.testing.assert_array_equal(found["cross"]["a"]["r"], [1.0, np.nan])


def test_ratios_need_a_band():
    with pytest.raises(ValidationError, match="power_bands"):
        SpectraConfig(power_bands=[])
