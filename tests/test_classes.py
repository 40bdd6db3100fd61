"""Classifiers of galaxies: bins, Voronoi cells, what they draw."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError
from scipy.stats import chisquare, kstest

from galdist.models import build
from galdist.models.classes import (
    BinClassifier,
    BinClassifierConfig,
    Bins,
    VoronoiClassifier,
    VoronoiConfig,
    voronoi_centers,
)
from galdist.training.checkpoint import load_model, save_model

INPUTS = ("log_halo_mass",)
UNEVEN = {
    "log_stellar_mass": Bins(low=8.0, high=12.0, number=4),
    "color_gi": Bins(low=0.0, high=1.5, number=3),
}


def bin_model(*targets: str) -> BinClassifier:
    """A model of few bins whose probabilities are uneven and do not depend on the halo."""
    model = build(BinClassifierConfig(inputs=INPUTS, targets=targets, bins=UNEVEN))
    assert isinstance(model, BinClassifier)
    return uniform_inputs(model, torch.linspace(-1, 1, model.network[-1].out_features))


def uniform_inputs(model: Any, logits: torch.Tensor) -> Any:
    """The model, giving ``logits`` to any halo."""
    model.requires_grad_(False)
    model.network[-1].weight.zero_()
    model.network[-1].bias.copy_(logits)
    return model.eval()


def halos(n: int) -> dict[str, torch.Tensor]:
    return {"inputs": torch.linspace(11, 14, n)[:, None]}


def galaxies(n: int, seed: int = 0) -> NDArray[np.float64]:
    """Two clumps of galaxies in (mass, color) and a tail: density varies by orders of magnitude."""
    random = np.random.default_rng(seed)
    red = random.random(n) < 0.3
    mass = np.where(red, random.normal(10.8, 0.3, n), 8.75 + random.exponential(0.5, n))
    color = np.where(red, random.normal(1.1, 0.05, n), random.normal(0.6, 0.15, n))
    return np.stack([mass, color], -1)


def voronoi_model(points: NDArray[Any], **settings: Any) -> VoronoiClassifier:
    config = VoronoiConfig(inputs=INPUTS, targets=("log_stellar_mass", "color_gi"), hidden=(8,), **settings)
    model = build(config)
    assert isinstance(model, VoronoiClassifier)
    columns = {"log_halo_mass": points.sum(1), "log_stellar_mass": points[:, 0], "color_gi": points[:, 1]}

    def training(column: str) -> Iterator[NDArray[Any]]:
        yield from np.array_split(columns[column], 2)  # two simulations

    model.prepare(training)
    return model


def test_default_bins_are_the_published_ones(shared_data: Path) -> None:
    edges = np.genfromtxt(shared_data / "tng300_hival" / "bin_edges.csv", delimiter=",", names=True)
    for target, column in {
        "log_stellar_mass": "smass",
        "color_gi": "color",
        "log_ssfr": "sSFR",
        "log_radius": "radius",
    }.items():
        bins = BinClassifierConfig().bins[target]
        ours = np.linspace(bins.low, bins.high, bins.number + 1)
        np.testing.assert_allclose(ours, edges[column], rtol=1e-12)
    assert build(BinClassifierConfig()).network[-1].out_features == 2500  # type: ignore[union-attr, index]


def test_a_value_is_in_its_bin_and_one_outside_in_the_outermost() -> None:
    mass = torch.tensor([8.0, 8.99, 9.01, 11.5, 7.0, 13.0])
    color = torch.tensor([0.2, 0.6, 1.2, 1.4, -1.0, 9.0])
    expected_mass, expected_color = [0, 0, 1, 3, 0, 3], [0, 1, 2, 2, 0, 2]
    one = bin_model("log_stellar_mass").labels({"targets": mass[:, None]})
    both = bin_model("log_stellar_mass", "color_gi").labels({"targets": torch.stack([mass, color], -1)})
    assert one.tolist() == expected_mass
    assert both.tolist() == [3 * i + j for i, j in zip(expected_mass, expected_color, strict=True)]


@pytest.mark.parametrize(
    "targets", [("log_stellar_mass",), ("log_stellar_mass", "color_gi"), ("color_gi", "log_stellar_mass")]
)
def test_draws_have_the_classes_probabilities_and_are_uniform_within(targets: tuple[str, ...]) -> None:
    model = bin_model(*targets)
    batch = halos(4)
    drawn = model.sample(batch, 20_000, torch.Generator().manual_seed(1))
    assert drawn.shape == (4, 20_000, len(targets))
    rows = drawn.flatten(0, 1)
    counts = torch.bincount(model.labels({"targets": rows}), minlength=model.network[-1].out_features)
    expected = model.probabilities(batch).double().sum(0) * 20_000
    assert chisquare(counts.numpy(), expected.numpy() * 80_000 / expected.sum().item()).pvalue > 1e-3
    for bins, column in zip(model.bins, rows.double().unbind(-1), strict=True):
        within = ((column - bins.low) / bins.width).frac()
        assert kstest(within.numpy(), "uniform").pvalue > 1e-3
    torch.testing.assert_close(drawn.mean(1), model.point(batch), rtol=0, atol=0.03)
    again = model.sample(batch, 20_000, torch.Generator().manual_seed(1))
    assert torch.equal(drawn, again)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=20), st.floats(0.1, 8))
def test_quantiles_rise_and_invert_the_distribution(levels: Sequence[float], contrast: float) -> None:
    model = bin_model("log_stellar_mass", "color_gi")
    uniform_inputs(model, contrast * torch.sin(torch.arange(12.0)))
    level = torch.tensor(levels, dtype=torch.float32).sort().values
    quantiles = model.quantiles(halos(2), level)
    assert quantiles.shape == (2, len(level), 2)
    assert (quantiles.diff(dim=1) >= 0).all()
    joint = model.probabilities(halos(2))[0].double().unflatten(0, (4, 3))
    for bins, p, values in zip(
        model.bins, (joint.sum(1), joint.sum(0)), quantiles[0].unbind(-1), strict=True
    ):
        edges = np.linspace(bins.low, bins.high, bins.number + 1)
        cdf = np.interp(values.numpy(), edges, np.append(0, p.cumsum(0).numpy()))
        np.testing.assert_allclose(cdf, level.numpy(), atol=2e-5)


def test_density_of_bins_integrates_to_one() -> None:
    model = bin_model("log_stellar_mass", "color_gi")
    mass, color = torch.meshgrid(torch.arange(8.05, 12, 0.1), torch.arange(0.05, 1.5, 0.1), indexing="ij")
    targets = torch.stack([mass.flatten(), color.flatten()], -1)
    density = model.log_density({"inputs": torch.zeros(len(targets), 1), "targets": targets}).exp()
    assert density.sum().item() * 0.01 == pytest.approx(1, rel=1e-4)


def test_more_targets_than_two_and_targets_without_bins_are_refused() -> None:
    with pytest.raises(ValidationError, match="voronoi"):
        BinClassifierConfig(targets=("log_stellar_mass", "color_gi", "log_ssfr"))
    with pytest.raises(ValidationError, match="none are given for metallicity"):
        BinClassifierConfig(targets=("metallicity",))
    with pytest.raises(ValidationError, match="must be below"):
        Bins(low=1.0, high=1.0)


def test_training_finds_the_classes_frequencies() -> None:
    """Light halos hold blue galaxies with probability 0.8, massive ones with 0.1."""
    torch.manual_seed(0)
    bins = {"color_gi": Bins(low=0.0, high=1.0, number=2)}
    model = build(BinClassifierConfig(inputs=INPUTS, targets=("color_gi",), bins=bins, dropout=0.0))
    massive = torch.rand(4000) < 0.5
    blue = torch.rand(4000) < torch.where(massive, 0.1, 0.8)
    batch = {"inputs": massive.float()[:, None], "targets": torch.where(blue, 0.2, 0.7)[:, None]}
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(200):
        optimizer.zero_grad()
        model(batch)["loss"].backward()
        optimizer.step()
    p = model.probabilities({"inputs": torch.tensor([[0.0], [1.0]])})[:, 0]  # type: ignore[operator]
    truth = torch.tensor([blue[~massive].float().mean(), blue[massive].float().mean()])
    torch.testing.assert_close(p, truth, rtol=0, atol=0.01)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(30, 400),
    st.integers(1, 4),
    st.integers(2, 60),
    st.integers(1, 30),
    st.sampled_from([0, 1, 3]),
    st.integers(0, 1000),
)
def test_every_cell_holds_enough_of_any_points(
    n: int, d: int, n_cells: int, min_rows: int, decimals: int, seed: int
) -> None:
    points = np.random.default_rng(seed).standard_normal((n, d)).round(decimals)  # with many equal ones
    centers = voronoi_centers(points, n_cells, min_rows)
    nearest = ((points[:, None] - centers) ** 2).sum(-1).argmin(1)
    assert 1 <= len(centers) <= n_cells
    if decimals == 3:  # equal centers and ties aside
        assert np.bincount(nearest, minlength=len(centers)).min() >= min_rows
    assert np.array_equal(centers, voronoi_centers(points, n_cells, min_rows))


def test_cells_are_as_many_as_asked_and_smaller_where_galaxies_are_many() -> None:
    points = galaxies(20_000)
    points = (points - points.mean(0)) / points.std(0)
    centers = voronoi_centers(points, 200, 20)
    assert len(centers) == 200
    distance = np.sqrt(((points[:, None] - centers) ** 2).sum(-1).min(1))
    crowded = np.abs(points - np.median(points, 0)).max(1) < 0.3
    far = points[:, 0] > 2.5
    assert np.median(distance[crowded]) < 0.6 * np.median(distance[far])
    # k-means is meant to leave less scatter within cells than bins of a grid do: 14 x 14 of them.
    grid = [np.digitize(column, np.linspace(column.min(), column.max(), 15)[1:-1]) for column in points.T]
    label = grid[0] * 14 + grid[1]
    means = np.stack([np.bincount(label, column, 196) for column in points.T], -1)
    means /= np.maximum(np.bincount(label, minlength=196), 1)[:, None]
    assert (distance**2).mean() < 0.5 * ((points - means[label]) ** 2).sum(1).mean()


def test_too_few_rows_for_a_cell_are_refused() -> None:
    with pytest.raises(ValueError, match="there are 5 training rows, fewer than the 20"):
        voronoi_centers(np.zeros((5, 2)), 10, 20)


def test_rows_belong_to_the_nearest_center_and_cells_know_their_rows() -> None:
    points = galaxies(3000)
    model = voronoi_model(points, cells=40, min_rows=10)
    rows = torch.from_numpy(points).float()
    label = model.labels({"targets": rows}).numpy()
    scaled = model.scaled_targets({"targets": rows}).double().numpy()
    nearest = ((scaled[:, None] - model.centers.numpy()) ** 2).sum(-1).argmin(1)
    assert np.array_equal(label, nearest)
    assert model.occupancy.tolist() == np.bincount(label, minlength=40).tolist()
    assert model.occupancy.min() >= 10
    for cell in range(40):
        np.testing.assert_allclose(model.means[cell], scaled[label == cell].mean(0), atol=1e-5)
        np.testing.assert_allclose(model.dispersions[cell], scaled[label == cell].std(0), atol=1e-5)


def test_cells_that_do_not_exist_are_never_drawn() -> None:
    model = voronoi_model(galaxies(300), cells=64, min_rows=30)
    used = int((model.occupancy > 0).sum())
    assert used <= 10
    batch = {**halos(300), "targets": torch.from_numpy(galaxies(300)).float()}
    model(batch)["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert (model.probabilities(batch)[:, used:] == 0).all()
    assert model.sample(batch, 10, torch.Generator().manual_seed(0)).isfinite().all()


def test_draws_of_a_perfect_classifier_have_the_distribution_of_the_training_rows() -> None:
    points = galaxies(4000)
    model = voronoi_model(points, cells=50, min_rows=10, spread=0.0)
    uniform_inputs(model, (model.occupancy / 4000).log())
    drawn = model.sample(halos(4), 2000, torch.Generator().manual_seed(3)).flatten(0, 1)
    rows = {tuple(row) for row in points.astype(np.float32).round(3).tolist()}
    assert {tuple(row) for row in drawn.numpy().round(3).tolist()} <= rows
    for i in range(2):
        assert kstest(drawn[:, i].numpy(), points[:, i]).pvalue > 1e-3
    torch.testing.assert_close(drawn.mean(0), model.point(halos(1))[0], rtol=0, atol=0.03)


def test_spread_adds_the_dispersion_of_the_cell() -> None:
    """A member of the cell plus noise of its dispersion: twice the cell's variance."""
    model = voronoi_model(galaxies(2000), cells=20, min_rows=30)
    cell = 7
    uniform_inputs(model, torch.where(torch.arange(20) == cell, 0.0, -1e4))
    drawn = model.sample(halos(1), 40_000, torch.Generator().manual_seed(3))[0]
    variance = ((drawn - model.target_mean) / model.target_std).var(0)
    torch.testing.assert_close(variance, 2 * model.dispersions[cell] ** 2, rtol=0.03, atol=0)


@pytest.mark.parametrize("family", ["nn-class", "voronoi"])
def test_saved_models_are_the_same(family: str, tmp_path: Path) -> None:
    points = galaxies(500)
    model = bin_model("log_stellar_mass") if family == "nn-class" else voronoi_model(points, cells=9).eval()
    save_model(tmp_path / "model", model, model.state_dict(), {})
    loaded, _ = load_model(tmp_path)
    draws = [m.eval().sample(halos(3), 5, torch.Generator().manual_seed(0)) for m in (model, loaded)]  # type: ignore[operator]
    assert torch.equal(*draws)


@pytest.mark.slow
def test_cells_of_tng300_resolve_as_the_published_ones_do(shared_data: Path) -> None:
    """The 857 cells of HiVAl (A&A 698, A3): 264 of them hold one galaxy at the edge, the others 176 on
    average. Ours, without the former, are as small where the galaxies are."""
    pandas = pytest.importorskip("pandas")
    table = pandas.read_parquet(shared_data / "tng300_centrals.parquet")
    folder = shared_data / "tng300_hival"
    points = table[["smass", "color", "sSFR", "radius"]].to_numpy()[::2]
    stats = np.loadtxt(folder / "stats.csv", delimiter=",", skiprows=1)
    dispersions = np.loadtxt(folder / "dispersions.csv", delimiter=",", skiprows=1)
    occupancy = np.loadtxt(folder / "occupancy.csv", delimiter=",", skiprows=1)
    scaled = (points - stats[0]) / (stats[1] - stats[0])
    z = (points - points.mean(0)) / points.std(0)
    centers = voronoi_centers(z, 857, 20)
    assert len(centers) > 850
    from scipy.spatial import cKDTree

    cell = cKDTree(centers).query(z)[1]
    assert np.bincount(cell).min() >= 20
    ours = np.stack([scaled[cell == i].std(0) for i in range(len(centers))])
    weights = np.bincount(cell)
    typical = np.sqrt(np.average(ours**2, axis=0, weights=weights))
    published = np.sqrt(np.average(dispersions**2, axis=0, weights=occupancy))
    assert (typical < 1.1 * published).all()
