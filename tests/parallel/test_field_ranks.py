"""Bispectra and the stage `field-statistics` on real ranks: right, and the same on 1 and 2."""

import itertools

import numpy as np
import pytest
from test_spectra_ranks import write_store

from galdist.grids.store import open_store
from galdist.statistics.fields import FieldStatisticsConfig, field_statistics, load_field_statistics
from galdist.statistics.metrics import load_metrics

pytest.importorskip("nbodykit", reason="nbodykit is not installed: run `make setup`")

BOX = 25.0


def measured(values, n_bins):
    from galdist.statistics.bispectrum import bispectrum, shells
    from galdist.statistics.spectra import field_mesh

    n_mesh = values.shape[0]
    mesh = field_mesh(values.__getitem__, n_mesh, BOX, "none")
    return bispectrum(mesh, shells(n_mesh, n_bins))


def direct_sum(values, edges):
    """Every closed triangle of three modes, one by one."""
    n = values.shape[0]
    delta = np.fft.fftn(values / values.mean() - 1) / n**3
    m = np.rint(np.fft.fftfreq(n, 1 / n)).astype(int)
    wave = np.stack(np.meshgrid(m, m, m, indexing="ij"), axis=-1).reshape(-1, 3)
    radius = np.sqrt((wave**2).sum(axis=1))
    bins = [wave[(radius > a) & (radius < b)] for a, b in itertools.pairwise(edges)]
    reach = int(edges[-1])

    def mean(first, second, third):
        allowed = {tuple(q) for q in third}
        products = [
            delta[tuple(a)] * delta[tuple(b)] * delta[tuple(-a - b)]
            for a in first
            for b in second
            if np.abs(a + b).max() <= reach and tuple(-a - b) in allowed
        ]
        return BOX**6 * np.mean(products).real

    return (
        [mean(one, one, one) for one in bins],
        [np.nan] + [mean(one, one, bins[0]) for one in bins[1:]],
    )


def test_bispectrum_is_the_sum_over_triangles(mpirun):
    values = np.random.default_rng(0).gamma(1.0, 1.0, (10,) * 3)
    equilateral, squeezed = direct_sum(values, np.array([0.5, 1.5, 2.5]))
    for found in (*mpirun(1, measured, values, 3), *mpirun(2, measured, values, 3)):
        np.testing.assert_allclose(found["equilateral"], equilateral, rtol=1e-9)
        np.testing.assert_allclose(found["squeezed"], squeezed, rtol=1e-9)


def gaussian(n_mesh, rng, power):
    """A field of mean 0, and its powers P / V of each mode."""
    m = np.fft.fftfreq(n_mesh, 1 / n_mesh)
    radius = np.sqrt(m[:, None, None] ** 2 + m[:, None] ** 2 + m**2)
    p = np.where(radius > 0, power(np.maximum(radius, 1)), 0.0)
    white = np.fft.fftn(rng.normal(size=(n_mesh,) * 3)) / n_mesh**1.5
    return np.fft.ifftn(white * np.sqrt(p)).real * n_mesh**3, p, radius


def local_type(n_boxes, f, n_mesh=24):
    """Bispectra of x + f x^2, half the difference from those of x - f x^2, and what is expected of it."""
    from galdist.statistics.bispectrum import shells

    rng = np.random.default_rng(5)
    edges = shells(n_mesh, 3)
    differences = []
    for _ in range(n_boxes):
        x, p, radius = gaussian(n_mesh, rng, lambda m: 1e-4 * m**-1.5)
        x *= 0.02 / x.std()
        p *= 0.02**2 / p.sum()
        square = x**2 - np.mean(x**2)
        found = [measured(1 + x + sign * f * square, 3) for sign in (1, -1)]
        differences.append([(found[0][shape] - found[1][shape]) / 2 for shape in ("equilateral", "squeezed")])

    def back(values, i):
        return np.fft.ifftn(values * ((radius > edges[i]) & (radius < edges[i + 1]))).real

    def expected(i, j):
        ones, powers = ([back(v, b) for b in (i, i, j)] for v in (np.ones_like(p), p))
        pairs = sum((powers[a] * powers[b] * ones[c]).sum() for a, b, c in ((0, 1, 2), (1, 2, 0), (2, 0, 1)))
        return 2 * f * pairs / np.prod(ones, axis=0).sum() * BOX**6

    theory = [[expected(i, i) for i in range(3)], [np.nan, expected(1, 0), expected(2, 0)]]
    return np.array(differences), np.array(theory)


def test_bispectrum_of_local_type_is_that_of_tree_level(mpirun):
    differences, theory = mpirun(1, local_type, 24, 0.5)[0]
    mean, error = differences.mean(axis=0), differences.std(axis=0) / np.sqrt(len(differences))
    known = np.isfinite(theory)
    assert np.all(np.abs(mean - theory)[known] < 4 * error[known])
    assert np.all(error[known] < 0.35 * theory[known])


def gaussian_scatter(n_boxes, n_mesh=24):
    rng = np.random.default_rng(6)
    found = []
    for _ in range(n_boxes):
        x = gaussian(n_mesh, rng, lambda m: m**-1.0)[0]
        found.append(measured(1 + 0.02 * x / x.std(), 3))
    return {
        shape: (
            np.std([one[shape] for one in found], axis=0),
            np.sqrt(np.mean([one[f"{shape}_error"] ** 2 for one in found], axis=0)),
        )
        for shape in ("equilateral", "squeezed")
    }


def test_errors_are_those_of_gaussian_modes(mpirun):
    for scatter, error in mpirun(1, gaussian_scatter, 80)[0].values():
        # The first bin has few modes: its own power, in the formula, scatters with it.
        np.testing.assert_allclose(scatter[1:], error[1:], rtol=0.35)


def poisson(n_boxes, n_mesh=24):
    rng = np.random.default_rng(7)
    found = [measured(rng.poisson(0.3, (n_mesh,) * 3), 3) for _ in range(n_boxes)]
    return {
        shape: np.array([one[shape] - one[f"{shape}_shot_noise"] for one in found])
        for shape in ("equilateral", "squeezed")
    }


def test_poisson_counts_have_shot_noise_alone(mpirun):
    for shape, rest in mpirun(1, poisson, 40)[0].items():
        rest = rest[:, 1:] if shape == "squeezed" else rest
        pull = rest.mean(axis=0) / (rest.std(axis=0) / np.sqrt(40))
        assert np.abs(pull).max() < 4


def seen_and_true(growth, n=32):
    """Points displaced a little by a linear field: multipoles in redshift space, the power in real space."""
    from galdist.statistics.spectra import catalog_mesh, multipoles, power
    from hpc import mpi

    rng = np.random.default_rng(9)
    x = gaussian(n, rng, lambda m: m**-2.0 * np.exp(-((m / 8) ** 2)))[0]
    m = np.fft.fftfreq(n, 1 / n) * 2 * np.pi / BOX
    k = np.meshgrid(m, m, m, indexing="ij")
    k2 = sum(one**2 for one in k)
    k2[0, 0, 0] = 1
    modes = np.fft.fftn(0.01 * x / x.std())
    shift = np.stack([np.fft.ifftn(1j * one / k2 * modes).real for one in k], axis=-1).reshape(-1, 3)
    lattice = (np.stack(np.indices((n,) * 3), axis=-1).reshape(-1, 3) + 0.5) * BOX / n
    comm = mpi.world()
    mine = slice(comm.rank, None, comm.size)
    position = ((lattice + shift) % BOX)[mine]
    # At redshift 1 and Omega_m = 0.3, H / (1 + z) = 88.03 km/s h/Mpc: what moves points by growth * shift.
    velocity = growth * shift[mine] * 100 * np.sqrt(0.3 * 8 + 0.7) / 2
    found = multipoles(position, velocity, BOX, n, 1.0, 0.3)
    return found, power(catalog_mesh(position, BOX, n)).power["power"].real


@pytest.mark.parametrize("ranks", [1, 2])
def test_multipoles_of_a_linear_field_are_those_of_kaiser(mpirun, ranks):
    f = 0.6
    for found, real in mpirun(ranks, seen_and_true, f):
        use = slice(1, 8)
        weight = found["modes"][use]
        monopole = np.average(found["monopole"][use] / real[use], weights=weight)
        quadrupole = np.average(found["quadrupole"][use] / real[use], weights=weight)
        assert monopole == pytest.approx(1 + 2 * f / 3 + f**2 / 5, rel=0.02)
        assert quadrupole == pytest.approx(4 * f / 3 + 4 * f**2 / 7, rel=0.05)


def still(n_points):
    from galdist.statistics.spectra import multipoles

    position = np.random.default_rng(10).uniform(0, BOX, (n_points, 3))
    return multipoles(position, np.zeros_like(position), BOX, 24, 0.0, 0.3)


def test_points_at_rest_have_no_quadrupole(mpirun):
    found = mpirun(1, still, 5000)[0]
    pull = found["quadrupole"] / (found["shot_noise"] * np.sqrt(2 * 5 / (3 * found["modes"])))
    assert np.abs(pull).max() < 4.5
    assert np.average(found["monopole"], weights=found["modes"]) == pytest.approx(BOX**3 / 5000, rel=0.05)


# The stage


@pytest.fixture(scope="module")
def boxes(tmp_path_factory):
    """A truth that is one more draw of the model, whose five draws are five stores, and a smoother model."""
    folder = tmp_path_factory.mktemp("boxes")
    rng = np.random.default_rng(8)
    x = gaussian(32, rng, lambda m: m**-1.5)[0]
    rate = np.exp(x / x.std()) * 0.3
    write_store(folder / "grids" / "grids.zarr", {"galaxy_counts": rng.poisson(rate)}, assignment="ngp")
    for number in range(5):
        write_store(
            folder / f"draw{number}" / "prediction.zarr",
            {"galaxy_counts": rng.poisson(rate)},
            assignment="ngp",
        )
        label(folder / f"draw{number}" / "prediction.zarr", "diffusion")
    write_store(
        folder / "flat" / "prediction.zarr",
        {
            "galaxy_counts": rng.poisson(np.full_like(rate, rate.mean())),
            "expected_galaxy_counts": np.full_like(rate, rate.mean()),
            **{f"galaxy_counts_sample_{n}": rng.poisson(rate) for n in range(2)},
        },
        assignment="ngp",
    )
    return folder


def label(path, name):
    import zarr

    zarr.open_group(path, mode="r+").attrs["label"] = name


def run_stage(folder, out, config):
    inputs = {
        "grids": [folder / "grids"],
        "predictions": [*sorted(folder.glob("draw*")), folder / "flat"],
    }
    field_statistics(FieldStatisticsConfig(**config), inputs, out)


CONFIG = {"seed": 1, "cells": (1, 2, 4), "void_radii": (1.6, 2.4, 4.0), "bins": 4, "coverage_cells": 4}


def test_stage_on_ranks(mpirun, boxes, tmp_path):
    for n_ranks in (1, 2):
        mpirun(n_ranks, run_stage, boxes, tmp_path / str(n_ranks), CONFIG)
    alone, together = (load_field_statistics(tmp_path / str(n))["simulations"]["box"] for n in (1, 2))
    assert set(alone["fields"]) == {"truth", "diffusion", "flat", "flat:samples"}
    for name, found in alone["fields"].items():
        for key, values in found.items():
            np.testing.assert_allclose(together["fields"][name][key], values, rtol=1e-9, err_msg=key)
    truth, drawn, flat = (alone["fields"][name] for name in ("truth", "diffusion", "flat"))
    clustered = truth["variance"] - truth["poisson"]
    scatter = alone["samples"]["diffusion"]["scatter"]
    assert np.all(np.abs(truth["variance"] - drawn["variance"]) < 6 * scatter["variance"])
    assert np.all(flat["variance"] - flat["poisson"] < 0.2 * clustered)
    assert flat["voids"][-1] == 0
    assert truth["voids"].sum() > 0
    assert np.all(truth["equilateral"][1:] > 5 * np.abs(flat["equilateral"][1:]))

    samples = alone["samples"]
    assert {label: found["number"] for label, found in samples.items()} == {"diffusion": 5, "flat:samples": 2}
    assert samples["diffusion"]["number"] == 5
    assert samples["diffusion"]["ranks"].sum() == pytest.approx(8**3)
    assert samples["diffusion"]["coverage_ranks"].sum() == 4**3
    # Truth and draws are alike: six ranks, each equally likely, within the scatter of 512 cubes.
    expected = 8**3 / 6
    assert np.all(np.abs(samples["diffusion"]["ranks"] - expected) < 5 * np.sqrt(expected))

    rows = {(row["metric"], row["sample"]): row["value"] for row in load_metrics(tmp_path / "1")}
    assert rows["variance_ratio/diffusion/0.781", "box"] == pytest.approx(1, abs=0.2)
    assert rows["n_voids/truth", "test"] == pytest.approx(truth["voids"].sum() * BOX**3)
    assert rows["coverage_distance/diffusion", "box"] < 0.25

    held = open_store(boxes / "grids" / "grids.zarr")["box"].read("galaxy_counts") > 0
    called = open_store(boxes / "flat" / "prediction.zarr")["box"].read("galaxy_counts") > 0
    right, wrong = np.sum(held & called), np.sum(called & ~held)
    np.testing.assert_array_equal(flat["confusion"][:2], [right, wrong])
    assert flat["confusion"].sum() == 32**3
    assert rows["precision/flat", "box"] == pytest.approx(right / (right + wrong))
    assert rows["recall/flat", "box"] == pytest.approx(right / held.sum())
    assert "confusion" not in truth


def test_a_box_that_is_done_is_not_measured_again(mpirun, boxes, tmp_path):
    part = tmp_path / "out" / "parts" / "box.json"
    mpirun(1, run_stage, boxes, tmp_path / "out", CONFIG)
    part.write_text(part.read_text().replace('"redshift": 0.5', '"redshift": 0.25'))
    mpirun(1, run_stage, boxes, tmp_path / "out", CONFIG)
    found = load_field_statistics(tmp_path / "out")["simulations"]["box"]
    assert found["redshift"] == 0.25


@pytest.mark.parametrize(
    ("match", "config"),
    [
        ("cells: cubes of 5 cells do not tile the 32", {"cells": (5,)}),
        ("coverage_cells: cubes of 24 cells", {"coverage_cells": 12}),
        ("void_radii: .* are not all between a cell and a quarter", {"void_radii": (7.0,)}),
    ],
)
def test_scales_that_do_not_fit_are_refused(boxes, tmp_path, match, config):
    with pytest.raises(ValueError, match=match):
        run_stage(boxes, tmp_path / "out", CONFIG | config)
    assert not (tmp_path / "out").exists()
