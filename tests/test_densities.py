"""Densities of galaxies: the Gaussian and the spline flow against what is known analytically."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import kstest, multivariate_normal, norm

from galdist.models import build, densities
from galdist.models.densities import Flow, FlowConfig, GaussConfig, Gaussianization, GaussRegressor
from galdist.training.checkpoint import load_model, save_model

INPUTS = ("log_halo_mass", "spin")
TARGETS = ("log_stellar_mass", "color_gi", "log_ssfr", "log_radius")
COVARIANCE = np.array([[0.04, 0.015], [0.015, 0.01]])
ENTROPY = 0.5 * math.log((2 * math.pi * math.e) ** 2 * np.linalg.det(COVARIANCE))


def linear_galaxies(n: int, seed: int) -> dict[str, torch.Tensor]:
    """Mass and color linear in the halo's, with correlated Gaussian scatter of `COVARIANCE`."""
    random = np.random.default_rng(seed)
    inputs = np.stack([random.normal(12, 0.5, n), random.normal(0.05, 0.02, n)], -1)
    means = np.stack([inputs[:, 0] - 2, 0.6 + 4 * (inputs[:, 1] - 0.05)], -1)
    targets = means + random.multivariate_normal([0, 0], COVARIANCE, n)
    return {
        name: torch.from_numpy(value).float()
        for name, value in {"inputs": inputs, "targets": targets}.items()
    }


def prepared(model: Any, batch: dict[str, torch.Tensor]) -> Any:
    def training(column: str) -> Iterator[NDArray[Any]]:
        side, names = ("inputs", model.inputs) if column in model.inputs else ("targets", model.targets)
        yield from np.array_split(batch[side][:, names.index(column)].numpy(), 2)

    model.prepare(training)
    return model


def trained(model: Any, batch: dict[str, torch.Tensor], steps: int, learning_rate: float) -> Any:
    optimizer = torch.optim.Adam(model.parameters(), learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    random = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(batch["inputs"]), (256,), generator=random)
        optimizer.zero_grad()
        model({key: value[rows] for key, value in batch.items()})["loss"].backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def wild_flow(t: int, transforms: int = 2, size: float = 0.5) -> Flow:
    """A flow that nobody trained, with weights large enough to be far from Gaussian."""
    torch.manual_seed(t)
    model = build(FlowConfig(inputs=INPUTS, targets=TARGETS[:t], hidden=(16, 16), transforms=transforms))
    assert isinstance(model, Flow)
    rows = {"inputs": torch.randn(500, 2), "targets": torch.randn(500, t).exp()}
    prepared(model, rows).requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(0, size)
    return model.eval()


@pytest.mark.parametrize("family", ["nn-gauss", "flow"])
def test_likelihood_of_a_gaussian_reaches_its_entropy(family: str) -> None:
    torch.manual_seed(1)
    config = (
        GaussConfig(inputs=INPUTS, targets=TARGETS[:2], hidden=(32,))
        if family == "nn-gauss"
        else FlowConfig(inputs=INPUTS, targets=TARGETS[:2], hidden=(16, 16), transforms=1, knots=16)
    )
    batch, unseen = linear_galaxies(20_000, 0), linear_galaxies(10_000, 1)
    model = trained(prepared(build(config), batch), batch, 400, 1e-2)
    with torch.no_grad():
        loss = model.validation_loss(unseen).double().mean().item()
        point = model.point(unseen)
        drawn = model.sample(unseen, 8, torch.Generator().manual_seed(2))
        sums, _ = model.evaluate(unseen)
    assert loss == pytest.approx(ENTROPY, abs=0.03)
    truth = torch.stack([unseen["inputs"][:, 0] - 2, 0.6 + 4 * (unseen["inputs"][:, 1] - 0.05)], -1)
    assert ((point - truth).square().mean(0).sqrt() < torch.tensor([0.04, 0.02])).all()
    scatter = np.cov((drawn - truth[:, None]).flatten(0, 1).numpy().T)
    np.testing.assert_allclose(scatter, COVARIANCE, rtol=0.15)
    metrics = model.summarize(sums)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-6)
    assert metrics["rmse_log_stellar_mass"] == pytest.approx(0.2, rel=0.03)
    assert metrics["rmse_color_gi"] == pytest.approx(0.1, rel=0.04)


@pytest.mark.parametrize("t", [1, 2, 4])
def test_gaussian_is_scipys_in_the_columns_units(t: int) -> None:
    torch.manual_seed(t)
    model = build(GaussConfig(inputs=INPUTS, targets=TARGETS[:t], hidden=(8,)))
    assert isinstance(model, GaussRegressor)
    batch = {"inputs": torch.randn(50, 2), "targets": 3 + 2 * torch.randn(50, t)}
    prepared(model, batch).requires_grad_(False)
    mean, factor = model.gaussian(batch)
    scale = model.target_std.double().numpy()
    levels = torch.tensor([0.05, 0.5, 0.9])
    log_p, quantiles, point = model.log_density(batch), model.quantiles(batch, levels), model.point(batch)
    drawn = model.sample({"inputs": batch["inputs"][:1]}, 50_000, torch.Generator().manual_seed(1))[0]
    for row in range(5):
        center = mean[row].double().numpy() * scale + model.target_mean.double().numpy()
        covariance = scale[:, None] * (factor[row] @ factor[row].T).double().numpy() * scale
        truth = multivariate_normal(center, covariance)
        assert log_p[row].item() == pytest.approx(truth.logpdf(batch["targets"][row].numpy()), abs=1e-4)
        marginal = norm.ppf(levels.numpy()[:, None], center, np.sqrt(np.diag(covariance)))
        np.testing.assert_allclose(quantiles[row], marginal, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(point[row], center, rtol=1e-5, atol=1e-5)
        if row == 0:
            np.testing.assert_allclose(drawn.mean(0), center, atol=0.05)
            np.testing.assert_allclose(np.cov(drawn.numpy().T), covariance.squeeze(), rtol=0.05, atol=0.05)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 500), st.integers(2, 80), st.sampled_from([0, 1, 6]), st.integers(0, 1000))
def test_gaussianization_rises_and_turns_back(n: int, knots: int, decimals: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    values = np.stack([random.exponential(1.0, n), random.standard_cauchy(n)], -1).round(decimals)
    values[:2] = [[0, -1], [1, 1]]  # so that no column is constant
    standard = (values - values.mean(0)) / values.std(0)
    transform = Gaussianization(2, knots)
    transform.fit(standard)
    y = torch.linspace(-6, 6, 400)[:, None].repeat(1, 2)
    z, log_slope = transform(y)
    assert log_slope.isfinite().all()
    assert (z.diff(dim=0) > 0).all()
    torch.testing.assert_close(transform.inverse(z), y, rtol=1e-4, atol=1e-4)


def test_gaussianization_makes_training_rows_gaussian_and_knows_its_derivative() -> None:
    values = np.random.default_rng(0).exponential(1.0, (20_000, 1))
    transform = Gaussianization(1, 64).double()
    transform.fit(values)
    z, _ = transform(torch.from_numpy(values))
    assert kstest(z[:, 0].numpy(), "norm").pvalue > 0.01
    y = torch.linspace(0.1, 5, 50, dtype=torch.float64, requires_grad=True)
    mapped, slope = transform(y[:, None])
    (derivative,) = torch.autograd.grad(mapped.sum(), y)
    torch.testing.assert_close(slope[:, 0].exp().detach(), derivative)


def test_density_of_a_flow_integrates_to_one() -> None:
    model = wild_flow(2, size=0.25)
    levels = torch.cat([torch.tensor([-7.0]), model.gaussianization.levels, torch.tensor([7.0])])
    parts = torch.linspace(0, 1, 9)[:-1]  # of each stretch between two knots, where the map is a line
    edges = (levels[:-1, None] + levels.diff()[:, None] * parts).flatten()
    y_edges = model.unscaled(model.gaussianization.inverse(edges[:, None].repeat(1, 2)))
    y = (y_edges[1:] + y_edges[:-1]) / 2
    grid = torch.stack(torch.meshgrid(y[:, 0], y[:, 1], indexing="ij"), -1).flatten(0, 1)
    areas = (y_edges[:, 0].diff()[:, None] * y_edges[:, 1].diff()).flatten()
    for halo in torch.randn(2, 2):
        density = model.log_density({"inputs": halo.expand(len(grid), 2), "targets": grid}).double().exp()
        assert (density * areas).sum().item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("t", [1, 2, 4])
@pytest.mark.parametrize("transforms", [1, 2, 3])
def test_draws_are_zukos_inverse_and_map_back_to_their_noise(t: int, transforms: int) -> None:
    model = wild_flow(t, transforms)
    batch = {"inputs": torch.randn(40, 2)}
    noise = torch.randn(40, 5, t)
    drawn = model._draw(batch, noise)
    assert drawn.shape == noise.shape
    context = model.scaled_inputs(batch).repeat_interleave(5, 0)
    theirs = model.flow(context).transform.inv(noise.flatten(0, 1))
    torch.testing.assert_close(drawn.flatten(0, 1), model.unscaled(model.gaussianization.inverse(theirs)))
    z, _ = model.gaussianization((drawn.flatten(0, 1) - model.target_mean) / model.target_std)
    back = model.flow(context).transform(z)
    assert (back - noise.flatten(0, 1)).abs().median() < 1e-4


def test_draws_follow_the_density() -> None:
    model = wild_flow(1)
    halo = {"inputs": torch.tensor([[0.3, -0.2]])}
    drawn = model.sample(halo, 20_000, torch.Generator().manual_seed(0)).flatten().sort().values
    edges = model.unscaled(model.gaussianization.inverse(torch.linspace(-6, 6, 20_001)[:, None]))[:, 0]
    targets = ((edges[1:] + edges[:-1]) / 2)[:, None]
    density = model.log_density({"inputs": halo["inputs"].expand(len(targets), 2), "targets": targets}).exp()
    cdf = (density * edges.diff()).cumsum(0).numpy()
    assert kstest(drawn.numpy(), lambda y: np.interp(y, edges[1:].numpy(), cdf)).pvalue > 1e-3


def test_draws_do_not_depend_on_how_many_are_made_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wild_flow(3)
    batch = {"inputs": torch.randn(30, 2)}
    whole = model.sample(batch, 7, torch.Generator().manual_seed(5))
    monkeypatch.setattr(densities, "_ROWS", 20)
    torch.testing.assert_close(model.sample(batch, 7, torch.Generator().manual_seed(5)), whole)


def test_point_of_a_flow_is_its_mean_whatever_the_other_rows() -> None:
    model = wild_flow(2)
    batch = {"inputs": torch.randn(10, 2)}
    point = model.point(batch)
    drawn = model.sample(batch, 4000, torch.Generator().manual_seed(0))
    assert ((point - drawn.mean(1)).abs() < 0.15 * drawn.std(1)).all()
    torch.testing.assert_close(model.point({"inputs": batch["inputs"][3:4]}), point[3:4])


def test_a_cut_in_mass_stays_a_cut() -> None:
    """Masses above 8.75 only, as steeply falling as the mass function: draws do not spill over the cut."""
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    inputs = random.normal(0, 1, (10_000, 2))
    mass = 8.75 + random.exponential(0.3 + 0.2 * ndtr_like(inputs[:, 0]))
    batch = {"inputs": torch.from_numpy(inputs).float(), "targets": torch.from_numpy(mass).float()[:, None]}
    config = FlowConfig(inputs=INPUTS, targets=TARGETS[:1], hidden=(16, 16), transforms=1)
    model = trained(prepared(build(config), batch), batch, 150, 1e-2)
    with torch.no_grad():
        drawn = model.sample(batch, 5, torch.Generator().manual_seed(0)).flatten().numpy()
    assert drawn.min() > 8.745
    assert (drawn < 8.75).mean() < 2e-3
    assert kstest(drawn[::5], mass).pvalue > 1e-3


def ndtr_like(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1 / (1 + np.exp(-2 * x))


@pytest.mark.parametrize("t", [1, 3])
@pytest.mark.parametrize("family", ["nn-gauss", "flow"])
def test_every_parameter_is_trained_and_saved_models_are_the_same(
    family: str, t: int, tmp_path: Path
) -> None:
    config = (GaussConfig if family == "nn-gauss" else FlowConfig)(
        inputs=INPUTS, targets=TARGETS[:t], hidden=(8, 8)
    )
    batch = {"inputs": torch.randn(200, 2), "targets": torch.randn(200, t)}
    model = prepared(build(config), batch)
    losses = model(batch)
    losses["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())
    torch.testing.assert_close(losses["loss"], model.validation_loss(batch).mean())
    save_model(tmp_path / "model", model, model.state_dict(), {})
    loaded: Any = load_model(tmp_path)[0]
    with torch.no_grad():
        draws = [m.eval().sample(batch, 3, torch.Generator().manual_seed(0)) for m in (model, loaded)]
        assert torch.equal(*draws)
        assert torch.equal(model.point(batch), loaded.point(batch))
