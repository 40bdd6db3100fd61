"""Quantile regressions: what they learn of known distributions, and how they draw from it."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from scipy.stats import kstest, norm, spearmanr
from sklearn.metrics import mean_pinball_loss
from torch import Tensor

from galdist.models import build, objective_class
from galdist.models.quantiles import (
    AutoregressiveQuantiles,
    SimultaneousQuantiles,
    SumOfQuantiles,
)
from galdist.models.tables import TableObjective
from galdist.training.checkpoint import load_model, save_model
from galdist.training.losses import pinball

INPUTS = ("log_halo_mass", "spin")
TARGETS = ("log_stellar_mass", "color_gi")
FAMILIES = ("src", "sqr", "autoregressive-sqr")

Rows = dict[str, NDArray[Any]]


def model_of(name: str, **changed: Any) -> Any:
    """An untrained model of the small tables below."""
    torch.manual_seed(1)
    small = {"width": 64, "blocks": 1} if name == "autoregressive-sqr" else {}
    settings = {"name": name, "inputs": INPUTS, "targets": TARGETS} | small | changed
    return build(objective_class(name).Config.model_validate(settings))


def columns_of(rows: Rows) -> Callable[[str], Iterator[NDArray[Any]]]:
    """The rows as two simulations."""

    def training(column: str) -> Iterator[NDArray[Any]]:
        yield from np.array_split(rows[column], 2)

    return training


def batch_of(model: TableObjective, rows: Rows) -> dict[str, Tensor]:
    def stack(names: tuple[str, ...]) -> Tensor:
        return torch.from_numpy(np.stack([rows[name] for name in names], -1).astype(np.float32))

    return {"inputs": stack(model.inputs), "targets": stack(model.targets)}


def trained(model: Any, rows: Rows, steps: int, learning_rate: float = 5e-3, size: int = 512) -> Any:
    """The model after so many steps on ``rows``, the learning rate falling as a cosine."""
    torch.manual_seed(2)
    model.prepare(columns_of(rows))
    batch = batch_of(model, rows)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        drawn = torch.randint(len(batch["inputs"]), (size,))
        optimizer.zero_grad()
        model({name: values[drawn] for name, values in batch.items()})["loss"].backward()
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


def widening(n: int, seed: int = 0) -> Rows:
    """Mass normal about the halo's, with a scatter that falls from 0.5 to 0.1; color -0.8 correlated."""
    random = np.random.default_rng(seed)
    mass = random.uniform(11, 14, n)
    first = random.normal(size=n)
    second = -0.8 * first + 0.6 * random.normal(size=n)
    return {
        "log_halo_mass": mass,
        "spin": random.uniform(0, 0.1, n),
        "log_stellar_mass": mass - 2 + scatter(mass) * first,
        "color_gi": 0.7 + 0.1 * second,
    }


def scatter(mass: NDArray[Any]) -> NDArray[Any]:
    """Of the mass, in `widening`."""
    return 0.5 - 0.4 * (mass - 11) / 3


@pytest.mark.parametrize("level", [0.05, 0.25, 0.5, 0.9])
def test_pinball_is_least_at_the_quantile(level: float) -> None:
    values = torch.from_numpy(np.random.default_rng(0).gamma(2, size=2001))
    candidates = values.sort().values
    losses = pinball(candidates[:, None], values, torch.tensor(level)).mean(1)
    assert candidates[losses.argmin()].item() == pytest.approx(np.quantile(values, level), abs=5e-3)
    expected = mean_pinball_loss(values, np.full(len(values), 1.3), alpha=level)
    at = pinball(torch.tensor(1.3), values, torch.tensor(level)).mean()
    assert at.item() == pytest.approx(expected, rel=1e-6)


def test_pinball_over_all_levels_is_half_the_ranked_probability_score() -> None:
    """Of a standard Gaussian, whose score is known (Gneiting & Raftery 2007, eq. 21)."""
    levels = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    for y in (-1.5, 0.0, 0.7):
        score = y * (2 * norm.cdf(y) - 1) + 2 * norm.pdf(y) - 1 / np.sqrt(np.pi)
        twice = 2 * pinball(torch.special.ndtri(levels), torch.tensor(y), levels).mean()
        assert twice.item() == pytest.approx(score, rel=1e-3)


@functools.cache
def learned(name: str) -> Any:
    """A model that has learned `widening`; raw inputs take their time."""
    if name == "src":
        return trained(model_of(name), widening(20_000), 2500, 2e-2, 256)
    return trained(model_of(name), widening(20_000), 1500 if name == "sqr" else 600)


@pytest.mark.parametrize("name", FAMILIES)
def test_quantiles_of_a_scatter_that_depends_on_the_halo_are_found(name: str) -> None:
    model = learned(name)
    mass = np.array([11.5, 12.5, 13.5])
    halos = {"inputs": torch.tensor(np.stack([mass, [0.03, 0.05, 0.07]], -1), dtype=torch.float32)}
    levels = torch.tensor([0.25, 0.5, 0.75] if name == "src" else [0.05, 0.25, 0.5, 0.75, 0.95])
    expected = (mass - 2)[:, None] + scatter(mass)[:, None] * norm.ppf(levels.numpy())
    found = model.quantiles(halos, levels)
    np.testing.assert_allclose(found[..., 0], expected, atol=0.08)
    median = found[:, levels == 0.5][:, 0]
    torch.testing.assert_close(model.point(halos)[:, 0], median[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(model.point(halos), median, rtol=0, atol=5e-3)


@pytest.mark.parametrize("name", ["sqr", "autoregressive-sqr"])
def test_draws_are_calibrated(name: str) -> None:
    model, rows = learned(name), widening(2000, seed=9)
    drawn = model.sample(batch_of(model, rows), 99, torch.Generator().manual_seed(0)).numpy()
    for target, ours in zip(TARGETS, np.moveaxis(drawn, -1, 0), strict=True):
        below = (ours < rows[target][:, None]).mean(1)
        assert abs(np.mean((below > 0.25) & (below < 0.75)) - 0.5) < 0.05
        assert abs(np.mean((below > 0.05) & (below < 0.95)) - 0.9) < 0.05
        assert kstest(below + 0.005, "uniform").statistic < 0.05


def test_src_draws_its_median_and_knows_three_levels() -> None:
    model = trained(model_of("src"), widening(500), 5)
    halos = batch_of(model, widening(7))
    drawn = model.sample(halos, 4, torch.Generator())
    assert drawn.shape == (7, 4, 2)
    assert torch.equal(drawn, model.point(halos)[:, None].expand(-1, 4, -1))
    assert torch.equal(model.quantiles(halos, torch.tensor([0.75, 0.5]))[:, 1], model.point(halos))
    assert model.quantiles(halos, torch.tensor([0.5, 0.9])) is None


def test_a_shared_level_relates_targets_too_tightly_and_the_chain_does_not() -> None:
    """Mass and color of the same halo have correlation -0.8. SQR draws both at one level: +1."""
    one = {name: np.repeat(values[:1], 20_000) for name, values in widening(1).items()}
    correlations = {}
    for name in ("sqr", "autoregressive-sqr"):
        model = learned(name)
        drawn = model.sample(batch_of(model, one), 1, torch.Generator().manual_seed(0))[:, 0]
        correlations[name] = spearmanr(drawn.numpy()).statistic
    assert correlations["sqr"] > 0.99
    expected = 6 / np.pi * np.arcsin(-0.8 / 2)  # rank correlation of a Gaussian of correlation -0.8
    assert correlations["autoregressive-sqr"] == pytest.approx(expected, abs=0.04)


def test_later_targets_have_the_marginal_quantiles_of_the_draws() -> None:
    model = learned("autoregressive-sqr")
    halos = batch_of(model, widening(5, seed=3))
    levels = torch.tensor([0.02, 0.25, 0.5, 0.75, 0.98])
    drawn = model.sample(halos, 40_000, torch.Generator().manual_seed(0))
    expected = torch.quantile(drawn, levels, dim=1).movedim(0, 1)
    error = (model.quantiles(halos, levels) - expected) / drawn.std(1)[:, None]
    assert error[..., 0].abs().max() < 0.08  # noise of the draws
    assert error[..., 1].abs().max() < 0.15
    assert error[:, 1:-1, 1].abs().max() < 0.08
    sums, _ = model.evaluate(halos)
    exact = (model.point(halos) - halos["targets"]).square().sum(0)
    np.testing.assert_allclose(sums["squares"][0], exact[0], rtol=1e-4)
    np.testing.assert_allclose(sums["squares"][1], exact[1], rtol=0.1)


def test_edges_and_gaps_of_a_distribution_are_kept() -> None:
    """Mass has a cut at 8.75 where it is most frequent, sSFR two clumps with a gap between them."""

    def make(n: int, seed: int) -> Rows:
        random = np.random.default_rng(seed)
        halo = random.uniform(11, 14, n)
        null = random.random(n) < (halo - 11) / 4
        return {
            "log_halo_mass": halo,
            "spin": random.uniform(0, 0.1, n),
            "log_stellar_mass": 8.75 + random.exponential(0.3 * (halo - 10.5)),
            "log_ssfr": np.where(null, random.normal(-13.5, 0.5, n), random.normal(-10, 0.3, n)),
        }

    targets = ("log_stellar_mass", "log_ssfr")
    model = trained(model_of("autoregressive-sqr", targets=targets), make(20_000, 0), 1000)
    rows = make(20_000, 1)
    drawn = model.sample(batch_of(model, rows), 1, torch.Generator().manual_seed(0))[:, 0].numpy()
    mass, ssfr = drawn.T
    assert mass.min() >= 8.75
    assert mass.min() < 8.752
    heavy = rows["log_halo_mass"] > 13
    for some in (heavy, ~heavy):
        for ours, target in ((mass, "log_stellar_mass"), (ssfr, "log_ssfr")):
            truth = rows[target][some]
            assert kstest(ours[some], truth).statistic < 0.04
    in_gap = np.mean((ssfr > -12) & (ssfr < -11))
    assert in_gap == pytest.approx(np.mean((rows["log_ssfr"] > -12) & (rows["log_ssfr"] < -11)), abs=6e-3)


@settings(deadline=None, max_examples=25)
@given(
    name=st.sampled_from(["sqr", "autoregressive-sqr"]),
    seed=st.integers(0, 1000),
    levels=st.lists(st.floats(0.001, 0.999), min_size=2, max_size=20),
)
def test_quantiles_never_cross(name: str, seed: int, levels: list[float]) -> None:
    """Whatever the weights."""
    model = model_of(name)
    rows = widening(200)
    model.prepare(columns_of(rows))
    torch.manual_seed(seed)
    with torch.no_grad():
        for weights in model.parameters():
            weights.normal_(0, 0.7)
        rising = model.quantiles(batch_of(model, widening(8)), torch.tensor(levels).sort().values)
    assert rising.shape == (8, len(levels), 2)
    assert rising.isfinite().all()
    assert (rising.diff(dim=1) >= 0).all()


def test_crossing_quantiles_are_rearranged_into_those_of_the_draws() -> None:
    model = model_of("sqr")
    model.prepare(columns_of(widening(200)))
    torch.manual_seed(4)
    with torch.no_grad():
        model.network[-1].weight.normal_()
        halos = batch_of(model, widening(6))
        grid = torch.linspace(0, 1, 200)
        raw = model._at_all(halos, grid)
        assert (raw.diff(dim=1) < 0).any()  # they do cross
        assert (raw.diff(dim=1) > 0).any()
        levels = torch.tensor([0.1, 0.5, 0.8])
        drawn = model.sample(halos, 40_000, torch.Generator().manual_seed(0))
        expected = torch.quantile(drawn, levels, dim=1).movedim(0, 1)
        error = (model.quantiles(halos, levels) - expected) / drawn.std(1)[:, None]
    assert error.abs().max() < 0.05


@pytest.mark.parametrize("kind", ["sliced", "exact"])
def test_wasserstein_penalty_is_the_distance_of_the_batch(kind: str) -> None:
    """One target: the distance of sorted values. Two, exact: the cheapest assignment."""
    penalty = {"weight": 0.5, "kind": kind, "rows": 64}
    for targets in (TARGETS[:1], TARGETS):
        model = model_of("sqr", targets=targets, wasserstein=penalty)
        model.prepare(columns_of(widening(500)))
        batch = batch_of(model, widening(64))
        torch.manual_seed(3)
        losses = model(batch)
        torch.manual_seed(3)
        inputs = model.scaled_inputs(batch)
        ours = model._at(inputs, torch.rand(64, 1)).detach().numpy()
        truth = model.scaled_targets(batch).numpy()
        tolerance = 1e-4
        if len(targets) == 1:
            expected = np.square(np.sort(ours, 0) - np.sort(truth, 0)).mean()
        elif kind == "exact":
            cost = cdist(ours, truth, "sqeuclidean")
            expected = cost[linear_sum_assignment(cost)].mean()
        else:
            angle = np.linspace(0, np.pi, 400, endpoint=False)
            directions = np.stack([np.cos(angle), np.sin(angle)])
            expected = np.square(np.sort(ours @ directions, 0) - np.sort(truth @ directions, 0)).mean()
            tolerance = 0.2  # directions are random
        assert losses["wasserstein"].item() == pytest.approx(float(expected), rel=tolerance)
        total = losses["pinball"] + 0.5 * losses["wasserstein"]
        assert losses["loss"].item() == pytest.approx(total.item())
        losses["wasserstein"].backward()
        assert all(weights.grad.isfinite().all() for weights in model.parameters())


def test_wasserstein_penalty_brings_the_distributions_together() -> None:
    """The pinball loss sees each target by itself; the penalty sees both."""
    rows = widening(4000)
    distances = []
    for penalty in (None, {"weight": 3.0, "kind": "sliced"}):
        model = trained(model_of("sqr", wasserstein=penalty), rows, 300)
        measured = model_of("sqr", wasserstein={"weight": 1.0, "kind": "exact", "rows": 1000})
        measured.load_state_dict(model.state_dict())
        torch.manual_seed(0)
        distances.append(measured(batch_of(model, rows))["wasserstein"].item())
    assert distances[1] < 0.8 * distances[0]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("targets", [("color_gi",), ("color_gi", "log_stellar_mass")])
def test_a_saved_model_gives_the_same_galaxies(tmp_path: Path, name: str, targets: tuple[str, ...]) -> None:
    model = trained(model_of(name, targets=targets), widening(300), 3)
    save_model(tmp_path / "model", model, model.state_dict(), {})
    loaded, _ = load_model(tmp_path)
    assert isinstance(loaded, (SumOfQuantiles, SimultaneousQuantiles, AutoregressiveQuantiles))
    halos = batch_of(model, widening(9))
    ours, theirs = (m.sample(halos, 5, torch.Generator().manual_seed(7)) for m in (model, loaded.eval()))
    assert ours.shape == (9, 5, len(targets))
    assert torch.equal(ours, theirs)
    assert torch.equal(model.point(halos), loaded.point(halos))
    assert torch.equal(model.validation_loss(halos), loaded.validation_loss(halos))
    assert set(model.summarize(model.evaluate(halos)[0])) == {"loss", *(f"rmse_{name}" for name in targets)}


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_do_not_know_of_each_other_and_all_weights_learn(name: str) -> None:
    """What lets two ranks train as one does."""
    model = model_of(name)
    model.prepare(columns_of(widening(300)))
    with torch.no_grad():
        for weights in model.parameters():
            weights.add_(0.1 * torch.randn_like(weights))
    batch = batch_of(model, widening(10))
    model(batch)["loss"].backward()
    assert all(weights.grad is not None and weights.grad.abs().sum() > 0 for weights in model.parameters())
    halves = [{key: values[part] for key, values in batch.items()} for part in (slice(0, 5), slice(5, 10))]
    together = torch.cat([model.validation_loss(half) for half in halves])
    torch.testing.assert_close(together, model.validation_loss(batch))
    torch.testing.assert_close(torch.cat([model.point(half) for half in halves]), model.point(batch))
