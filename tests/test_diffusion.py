"""The bound is one, and tight where the denoiser is exact; what is drawn are fields of the targets."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from gaussian_fields import GaussianFields
from pydantic import ValidationError
from small_grids import make_grids
from torch import Tensor

from galdist import config as run_files
from galdist import pipeline, plan
from galdist.data.datasets import to_device
from galdist.grids.store import open_store
from galdist.models import Objective, build, from_description
from galdist.models.diffusion import DiffusionConfig, VariationalDiffusion, _evenly, bound
from galdist.models.inception import InceptionClassifierConfig, InceptionRegressorConfig
from galdist.models.noise import LinearConfig, MonotoneConfig, signal_and_noise
from galdist.models.samplers import Crops, Drawing, Sampler
from galdist.models.voxels import VoxelRegressor
from galdist.stages import STAGES, Stage
from galdist.training.checkpoint import load_model
from galdist.training.predict import PredictConfig, predict
from galdist.training.train import TrainConfig, train
from hpc.site import Site
from hpc.strict import StrictModel

COUNTS = {"field": "galaxy_counts", "quantum": 1.0, "normalization": ["standardize"]}


def objective(**config: Any) -> VariationalDiffusion:
    """A small one."""
    torch.manual_seed(0)
    return VariationalDiffusion(DiffusionConfig.model_validate({"channels": [2], "attention": 0} | config))


def batch(n: int = 8, b: int = 2, halo: int = 0, seed: int = 0) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    density = random.gamma(0.5, 2.0, (b, 1, n, n, n))
    return {
        "matter_counts": torch.from_numpy(density).float(),
        "galaxy_counts": torch.from_numpy(random.poisson(0.2 * density)).float(),
        "momentum": torch.from_numpy(random.normal(size=(b, 3, n, n, n))).float(),
        "seed": torch.arange(b) + 7,
        "halo": halo,
        "periodic": halo == 0,
    }


def prepared(data: dict[str, Any], **config: Any) -> VariationalDiffusion:
    """On ``data``, with weights of its own in the layers that give nothing at first."""
    model = objective(**config)
    model.prepare(lambda name: iter(data[name].numpy()))
    with torch.no_grad():
        model.network.head.weight.normal_(0, 0.1)
    return model


class Exact(VariationalDiffusion):
    """With a formula in the network's place."""

    posterior_mean: Callable[[Tensor, Tensor], Tensor]

    def _look(self, z: Tensor, gamma: Tensor, *_: Any, **__: Any) -> Tensor:
        return self.posterior_mean(z, gamma)


def bound_and_error(model: VariationalDiffusion, data: dict[str, Any]) -> tuple[float, float]:
    """Of the samples of ``data`` [bits/dim], and its Monte-Carlo error."""
    model.eval()
    with torch.no_grad():
        t = _evenly(data["seed"])
        terms = model._terms(data, model._chances(data), data["seed"], t)
    each = torch.stack(list(terms.values())).sum(0).flatten(1).mean(1)
    # Neighbors in time, which have the same mean, say how much a sample scatters.
    scatter = each.double()[t.argsort()].diff().square().mean() / 2
    return each.double().mean().item(), (scatter / len(each)).sqrt().item()


@pytest.mark.parametrize("kind", ["linear", "monotone"])
def test_the_bound_of_a_gaussian_field_is_its_entropy(kind: str) -> None:
    fields, generator = GaussianFields(8, 2), torch.Generator().manual_seed(0)
    x, y = fields.draw(4000, generator)
    x, mean = fields.modes(x), fields.modes(fields.posterior_mean(y))
    torch.manual_seed(0)
    schedule = (LinearConfig() if kind == "linear" else MonotoneConfig(kind="monotone")).build()
    with torch.no_grad():
        t = _evenly(torch.arange(4000))
        noise = torch.randn(x.shape, generator=generator)
        terms = bound(x, lambda z, gamma: fields.denoised_modes(z, gamma, mean), schedule, t, noise)
    error = (x - mean).square() / fields.posterior_variance + fields.posterior_variance.log()
    surprise = 0.5 * (error + math.log(2 * math.pi))  # -ln p(x | y)
    excess = (torch.stack(list(terms.values())).sum(0) - surprise).flatten(1).mean(1) / math.log(2)
    assert -3 * excess.std().item() / 4000**0.5 < excess.mean().item() < 0.05
    assert terms["prior"].mean() < 1e-4


@pytest.mark.parametrize("normalization", [["standardize"], ["log1p", "standardize"]])
def test_the_bound_of_counts_is_their_entropy(normalization: list[str]) -> None:
    """Pairs of voxels that depend on each other, whose posterior given a noisy pair is known."""
    table = torch.tensor([[0.75, 0.06, 0.01], [0.04, 0.05, 0.03], [0.0, 0.02, 0.04]], dtype=torch.float64)
    entropy = -(table[table > 0] * table[table > 0].log2()).sum().item() / 2
    b, pairs = 4181, 120
    places = torch.multinomial(table.flatten(), b * pairs, True, generator=torch.Generator().manual_seed(0))
    counts = torch.stack([places // 3, places % 3], 1).float().view(b, 1, 1, pairs, 2)
    target = COUNTS | {"normalization": normalization}
    model = Exact(DiffusionConfig.model_validate({"channels": [1], "attention": 0, "targets": [target]}))
    data = of_counts(counts)
    model.prepare(lambda name: iter(data[name].numpy()[:20]))
    values = model.of_targets[0](torch.arange(3.0)).double()

    def posterior_mean(z: Tensor, gamma: Tensor) -> Tensor:
        alpha, sigma = (a.view(-1, 1, 1, 1) for a in signal_and_noise(gamma.double()))
        distance = (z.double().view(len(z), pairs, 2, 1) - alpha * values) / sigma  # from each value
        log = -0.5 * distance.square()
        joint = table.log() + log[:, :, 0, :, None] + log[:, :, 1, None, :]
        joint = joint.flatten(-2).softmax(-1).unflatten(-1, (3, 3))
        means = [joint.sum(-1) @ values, joint.sum(-2) @ values]
        return torch.stack(means, -1).view_as(z).to(z)

    model.posterior_mean = posterior_mean
    value, error = bound_and_error(model, data)
    assert entropy - 3 * error < value < entropy + 0.05
    assert error < 0.01


def of_counts(counts: Tensor) -> dict[str, Any]:
    """A batch of boxes of them."""
    return {
        "matter_counts": torch.rand(counts.shape),
        "galaxy_counts": counts,
        "seed": torch.arange(len(counts)),
        "halo": 0,
        "periodic": True,
    }


@pytest.mark.parametrize("gamma", [(-3.0, 10.0), (-13.3, 13.3)])
def test_counts_of_voxels_that_know_nothing_of_each_other_need_no_training(
    gamma: tuple[float, float],
) -> None:
    """Where `most` builds in how often each number occurs: the bound is the entropy, and what is drawn has
    the shares, other than with a standard Gaussian in their place."""
    shares = torch.tensor([0.9, 0.06, 0.03, 0.01])
    generator = torch.Generator().manual_seed(0)
    counts = torch.multinomial(shares, 1597 * 512, True, generator=generator).view(1597, 1, 8, 8, 8)
    data = of_counts(counts.float())
    entropy = -(shares * shares.log2()).sum().item()
    bounds = []
    for most in (3, None):
        schedule = {"kind": "linear", "gamma": gamma}
        model = objective(targets=[COUNTS | {"most": most}], schedule=schedule)
        model.prepare(lambda name: iter(data[name].numpy()))
        bounds.append(bound_and_error(model, data))
    (value, error), (plain, _) = bounds
    assert entropy - 3 * error < value < entropy + 3 * error
    assert error < 0.01
    assert plain > value + 0.1


def test_the_surprise_is_least_at_the_posterior_mean() -> None:
    """Its slope is what the mean is off by, over the variance of the noise: for counts and for densities."""
    data = batch(8)
    targets = [COUNTS | {"most": 5}, {"field": "momentum", "components": 3, "normalization": ["standardize"]}]
    model = prepared(data, targets=targets)
    x, _ = model._normalized(data, torch.zeros(2, 4, 8, 8, 8))
    look, gamma = torch.randn(x.shape).requires_grad_(), torch.tensor([-1.0, 3.0])
    (slope,) = torch.autograd.grad(model._surprise(look, gamma, x).sum(), look)
    variance = torch.sigmoid(gamma).view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(slope, (model._mean(look, gamma) - x) / variance, rtol=1e-4, atol=1e-4)


def test_draws_of_an_untrained_model_have_the_shares_of_counts() -> None:
    shares = torch.tensor([0.9, 0.06, 0.03, 0.01])
    counts = torch.multinomial(shares, 2 * 32**3, True, generator=torch.Generator().manual_seed(0))
    data = of_counts(counts.view(2, 1, 32, 32, 32).float())
    schedule = {"kind": "linear", "gamma": (-4.0, 10.0)}
    model = objective(targets=[COUNTS | {"most": 3}], schedule=schedule)
    model.prepare(lambda name: iter(data[name].numpy()))
    drawing = Drawing(sampler=Sampler(steps=50))
    drawn = model.sample(data, torch.Generator().manual_seed(1), drawing)["galaxy_counts"]
    found = torch.bincount(drawn.int().flatten(), minlength=4) / drawn.numel()
    torch.testing.assert_close(found, shares, rtol=0.15, atol=0.0)


def of_matter(likelihood: str, parts: Sequence[Objective] = (), **config: Any) -> VoxelRegressor:
    """A regressor of galaxies whose distribution differs from voxel to voxel, and was never trained."""
    torch.manual_seed(1)
    values = {"name": "inception-regressor", "loss": likelihood} | config
    regressor = build(InceptionRegressorConfig.model_validate(values), parts)
    assert isinstance(regressor, VoxelRegressor)
    data = batch(8, 4)
    regressor.prepare(lambda name: iter(data[name].numpy()))
    with torch.no_grad():
        regressor.network.head.weight.mul_(15)
    return regressor


@pytest.mark.parametrize("likelihood", ["poisson", "zero-inflated-negative-binomial"])
def test_on_a_regressor_it_starts_from_its_distribution(likelihood: str) -> None:
    """Untrained, its bound is the regressor's -ln P, and what it draws the regressor draws."""
    data = batch(8, 987)
    regressor = of_matter(likelihood)
    target, schedule = COUNTS | {"most": 12}, {"kind": "linear", "gamma": (-4.5, 10.0)}
    model = VariationalDiffusion(
        DiffusionConfig.model_validate(
            {"channels": [2], "attention": 0, "targets": [target], "schedule": schedule}
        ),
        [regressor],
    )
    model.prepare(lambda name: iter(data[name].numpy()))
    with torch.no_grad():
        # Numbers as the regressor has them, not as the matter has them.
        uniforms = torch.rand(data["galaxy_counts"].shape, dtype=torch.float64)
        data["galaxy_counts"] = regressor.draw(data, uniforms)["galaxy_counts"].float()
        expected = -regressor.log_chances(data, 12).gather(1, data["galaxy_counts"].long()).mean().item()
        mean = regressor.predict(data)["galaxy_counts"]
    value, error = bound_and_error(model, data)
    assert value == pytest.approx(expected / math.log(2), abs=3 * error)
    assert error < 0.02
    some = {name: field[:256] if isinstance(field, Tensor) else field for name, field in data.items()}
    drawing = Drawing(sampler=Sampler(steps=30))
    drawn = model.sample(some, torch.Generator().manual_seed(3), drawing)["galaxy_counts"]
    many = mean[:256] > mean[:256].median()
    for part in (many, ~many):
        assert drawn[part].mean().item() == pytest.approx(mean[:256][part].mean().item(), rel=0.08)
    assert drawn[many].mean() > 1.5 * drawn[~many].mean()


def test_on_a_regressor_boxes_are_drawn_in_crops_too() -> None:
    """The distribution of each voxel is the same in a crop that shows enough around it."""
    data = batch(32, 1)
    regressor = of_matter("negative-binomial")
    settings = {"channels": [2], "attention": 0, "targets": [COUNTS | {"most": 5}]}
    model = VariationalDiffusion(DiffusionConfig.model_validate(settings), [regressor])
    whole, parts = (Crops(32, 3, crop, 16, model.alignment) for crop in (32, 24))
    of_all, of_parts = (model._chances_of_boxes(data, crops, 4) for crops in (whole, parts))
    torch.testing.assert_close(of_parts, of_all, rtol=1e-4, atol=1e-4)
    again = from_description(model.description())
    assert isinstance(again, VariationalDiffusion)
    again.load_state_dict(model.state_dict())
    assert not any(parameter.requires_grad for parameter in again.parts[0].parameters())
    torch.testing.assert_close(again._chances_of_boxes(data, whole, 4), of_all)


def test_what_it_stands_on_finds_its_parameters() -> None:
    """Also a classifier that the regressor stands on, wherever they are among all that are known."""
    data = batch(8)
    known = {"A": torch.tensor([[1.0], [2.0]]), "B": torch.tensor([[3.0], [5.0]]), "C": torch.ones(2, 1)}

    def training(name: str) -> Iterator[Any]:
        return iter((known | data)[name].numpy())

    parts: list[Objective] = []
    for config in (
        InceptionClassifierConfig(name="inception-classifier", parameters=("A",)),
        InceptionRegressorConfig(name="inception-regressor", loss="poisson", parameters=("B",)),
    ):
        parts = [build(config, parts)]
        parts[0].prepare(training)
        for parameter in parts[0].parameters():
            torch.nn.init.normal_(parameter, 0, 0.1, generator=torch.Generator().manual_seed(4))
    (regressor,) = parts
    assert isinstance(regressor, VoxelRegressor)
    assert regressor.simulation_parameters == ("B", "A")
    alone = data | {"parameters": torch.cat([known["B"], known["A"]], 1)}
    expected = regressor.log_chances(alone, 4), regressor.predict(alone)["galaxy_probability"]
    target = COUNTS | {"most": 4}
    settings = {"channels": [2], "attention": 0, "targets": [target], "parameters": ["A", "C"]}
    model = VariationalDiffusion(DiffusionConfig.model_validate(settings), [regressor])
    assert model.simulation_parameters == ("A", "C", "B")
    together = torch.cat([known["A"], known["C"], known["B"]], 1)
    seen = data | {"parameters": together}
    torch.testing.assert_close(model._chances(seen), expected[0])
    torch.testing.assert_close(regressor.predict(seen)["galaxy_probability"], expected[1])


def test_fields_of_any_units_have_the_bound_of_the_field() -> None:
    """A lognormal field, whose logarithm is Gaussian: what the transforms add is what the densities differ
    by."""
    width, scale, b = 0.8, 3.0, 4181
    g = width * torch.randn(b, 1, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    target = {"field": "mass", "normalization": ["log1p", "standardize"]}
    model = Exact(DiffusionConfig.model_validate({"channels": [1], "attention": 0, "targets": [target]}))
    log1p, standardize = model.of_targets[0].transforms  # type: ignore[union-attr, misc]
    log1p.scale.fill_(scale)
    standardize.std.fill_(width)
    model.posterior_mean = lambda z, gamma: signal_and_noise(gamma)[0].view(-1, 1, 1, 1, 1) * z
    field = scale * torch.expm1(g)
    data = {
        "matter_counts": torch.zeros_like(g),
        "mass": field,
        "seed": torch.arange(b),
        "halo": 0,
        "periodic": True,
    }
    value, error = bound_and_error(model, data)
    # ln of a lognormal's density, at 1 + field / scale
    surprise = 0.5 * (g / width).square() + math.log(width * math.sqrt(2 * math.pi)) + g + math.log(scale)
    entropy = surprise.double().mean().item() / math.log(2)
    assert entropy - 3 * error - 0.01 < value < entropy + 0.05


def test_times_are_evenly_spread_over_any_run_of_seeds() -> None:
    for start, length in ((0, 4), (12345678901, 16), (77, 64)):
        t = _evenly(torch.arange(start, start + length)).sort().values.double()
        gaps = torch.cat([t.diff(), t[:1] + 1 - t[-1:]])
        assert (t >= 0).all()
        assert (t < 1).all()
        assert gaps.max() < 2.7 / length


def test_the_loss_of_a_sample_does_not_depend_on_its_batch() -> None:
    """So ranks, and parts of a batch, add up to the whole."""
    data = batch(b=4)
    data["parameters"] = torch.randn(4, 1)
    model = prepared(data | {"Omega_m": data["parameters"]}, parameters=["Omega_m"], unknown=0.5)
    loss = model(data)["loss"]
    halves = [
        {k: v[part] if isinstance(v, Tensor) else v for k, v in data.items()}
        for part in (slice(0, 2), slice(2, 4))
    ]
    assert sum(model(half)["loss"].item() for half in halves) / 2 == pytest.approx(loss.item(), rel=1e-5)
    assert torch.equal(model(data)["loss"], loss)


def test_losses_ignore_the_halo_and_are_the_sum_of_their_terms() -> None:
    data = batch(12, halo=2)
    for config in ({}, {"spatial": 2}):
        model = prepared(data, **config)
        losses = model(data)
        other = {**data, "galaxy_counts": data["galaxy_counts"].clone()}
        other["galaxy_counts"][..., :2] += 7
        assert losses["loss"].item() == pytest.approx(
            sum(value.item() for name, value in losses.items() if name != "loss"), rel=1e-5
        )
        for term in ("prior", "reconstruction"):
            assert torch.equal(model(other)[term], losses[term])


def test_the_shape_of_the_schedule_learns_to_lower_the_variance() -> None:
    """Its gradient is that of the loss squared, the others' that of the loss."""
    torch.manual_seed(0)
    schedule = MonotoneConfig(kind="monotone", hidden=8).build()
    x, noise, t = torch.randn(6, 1, 4, 4), torch.randn(6, 1, 4, 4), _evenly(torch.arange(6))

    def gradients(power: int) -> list[Tensor]:
        terms = bound(x, lambda z, gamma: 0.3 * z, schedule, t, noise)
        loss = terms["diffusion"].flatten(1).mean(1)
        return list(torch.autograd.grad((loss**power).mean(), list(schedule.parameters())))

    def plain(power: int) -> list[Tensor]:
        gamma_0, span = schedule.first, schedule.span
        s, slope = schedule.shape(t)
        alpha, sigma = (a.view(-1, 1, 1, 1) for a in signal_and_noise(gamma_0 + span * s))
        squares = (
            torch.exp(-gamma_0 - span * s).view(-1, 1, 1, 1) * (x - 0.3 * (alpha * x + sigma * noise)) ** 2
        )
        terms = squares - alpha.square() * (noise.square() - 1)
        loss = 0.5 * span * slope * terms.flatten(1).mean(1)
        return list(torch.autograd.grad((loss**power).mean(), list(schedule.parameters())))

    learned = gradients(1)
    for ours, ends in zip(learned[:2], plain(1)[:2], strict=True):
        torch.testing.assert_close(ours, ends)
    for ours, shape in zip(learned[2:], plain(2)[2:], strict=True):
        torch.testing.assert_close(ours, shape, rtol=1e-4, atol=0)


def test_evaluation_is_the_same_each_time_and_near_the_training_loss() -> None:
    data = batch(b=8)
    model = prepared(data).eval()
    with torch.no_grad():
        sums, _ = model.evaluate(data)
        again, _ = model.evaluate(data)
        losses = [model({**data, "seed": torch.arange(8) + 8 * n})["loss"].item() for n in range(20)]
    assert all(torch.equal(sums[name], again[name]) for name in sums)
    metrics = model.summarize(sums)
    assert metrics["loss"] == pytest.approx(np.mean(losses), abs=5 * np.std(losses) / 20**0.5)
    assert metrics["loss"] == pytest.approx(
        sum(metrics[term] for term in ("prior", "reconstruction", "diffusion"))
    )


@pytest.mark.parametrize("spatial", [2, 3])
def test_samples_are_fields_of_the_targets_and_a_function_of_the_seed(spatial: int) -> None:
    data = batch(8)
    targets = [COUNTS, {"field": "momentum", "components": 3, "normalization": ["standardize"]}]
    config = {"targets": targets, "spatial": spatial, "channels": [2, 3], "attention": 1}
    model = prepared(data, **config)
    drawing = Drawing(sampler=Sampler(kind="ancestral", steps=3))

    def draw(seed: int) -> dict[str, Tensor]:
        return model.sample(data, torch.Generator().manual_seed(seed), drawing)

    drawn = draw(0)
    assert {name: field.shape for name, field in drawn.items()} == {
        "galaxy_counts": (2, 1, 8, 8, 8),
        "momentum": (2, 3, 8, 8, 8),
    }
    counts = drawn["galaxy_counts"]
    assert torch.equal(counts, counts.round())
    assert (counts >= 0).all()
    assert torch.equal(draw(0)["momentum"], drawn["momentum"])
    assert not torch.equal(draw(1)["momentum"], drawn["momentum"])


def test_a_box_drawn_in_crops_is_the_box_where_these_share_enough() -> None:
    data = batch(24, b=1)
    model = prepared(data, channels=[2])
    assert model.reach == 4
    with torch.no_grad():
        model.of_targets[0].transforms[1].std.fill_(0.01)  # type: ignore[union-attr, index]
    few = Sampler(steps=3)
    ours, theirs = (
        model.sample(data, torch.Generator().manual_seed(3), drawing)
        for drawing in (Drawing(sampler=few, crop=20, overlap=16), Drawing(sampler=few))
    )
    assert (ours["galaxy_counts"] != theirs["galaxy_counts"]).float().mean() < 1e-3


def test_the_stages_train_it_and_draw_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A count, a vector and a mass; then the same stages with a formula in the network's place, in crops."""
    store = make_grids(tmp_path / "grids", n_mesh=8)
    config = {
        "model": {
            "name": "vdm",
            "inputs": [{"field": "matter_counts", "normalization": []}],
            "targets": [
                COUNTS | {"most": 8},
                {"field": "momentum", "components": 3, "normalization": ["standardize"]},
            ],
            "channels": [2, 3],
            "attention": 0,
            "parameters": ["redshift"],
            "schedule": {"kind": "monotone", "hidden": 8},
        },
        "data": {"crop": 8, "crops_per_box": 4, "workers": 0, "tile": 8},
        "epochs": 1,
        "batch_size": 4,
    }
    inputs = {"grids": [tmp_path / "grids"]}
    train(TrainConfig.model_validate(config), inputs, tmp_path / "train")
    inputs["model"] = [tmp_path / "train"]
    drawing = Drawing(sampler=Sampler(steps=2), crop=4, overlap=2)
    predict(PredictConfig(samples=2, drawing=drawing), inputs, tmp_path / "predict")
    drawn = open_store(tmp_path / "predict" / "prediction.zarr")["box_3"]
    names = [f"{field}{n}" for field in ("galaxy_counts", "momentum") for n in ("", "_sample_0", "_sample_1")]
    assert drawn.fields == names
    for name in names:
        field = "momentum" if "momentum" in name else "galaxy_counts"
        assert drawn.field(name).components == store["box_3"].field(field).components
        assert drawn.read(name).shape == store["box_3"].read(field).shape
        if field == "galaxy_counts":
            assert np.array_equal(drawn.read(name), np.maximum(drawn.read(name).round(), 0))
    for one, other in ((0, 1), (1, 2), (3, 4), (4, 5)):
        assert not np.array_equal(drawn.read(names[one]), drawn.read(names[other]))
    metrics = (tmp_path / "predict" / "metrics.json").read_text()
    assert all(term in metrics for term in ("prior", "reconstruction", "diffusion"))

    def formula(
        self: VariationalDiffusion, z: Tensor, gamma: Tensor, seen: Tensor, *_: Any, **__: Any
    ) -> Tensor:
        return seen * torch.tensor([3.0, -1.0, 1.0, 2.0]).view(-1, 1, 1, 1)

    monkeypatch.setattr(VariationalDiffusion, "_denoise", formula)
    predict(PredictConfig(drawing=drawing), inputs, tmp_path / "formula")
    drawn = open_store(tmp_path / "formula" / "prediction.zarr")["box_3"]
    model = load_model(tmp_path / "train")[0]
    assert isinstance(model, VariationalDiffusion)
    noise = 4 * math.exp(model.schedule.first.item() / 2)  # in what is drawn, of unit variance
    matter = store["box_3"].read("matter_counts")
    counts, momentum = (part.transforms[0] for part in model.of_targets)  # type: ignore[union-attr, index]
    for values, factor, normalized in (
        (drawn.read("galaxy_counts"), 3.0, counts),
        *((drawn.read("momentum")[n], factor, momentum) for n, factor in enumerate((-1.0, 1.0, 2.0))),
    ):
        expected = normalized.inverse(factor * torch.from_numpy(matter)).numpy()
        off = values - (np.maximum(np.round(expected), 0) if factor == 3.0 else expected)
        assert np.mean(np.abs(off) > noise * normalized.std.item()) < 0.01


class BoxesConfig(StrictModel):
    """Of the stage `boxes`."""


def boxes(config: BoxesConfig, inputs: dict[str, list[Path]], out: Path) -> None:
    """A stage that makes small grids."""
    make_grids(out, 8)


def test_another_drawing_needs_no_training(tmp_path: Path) -> None:
    """One model is drawn from in two ways in a run; a change of one way draws these boxes anew, and no
    others."""
    stages = STAGES | {"boxes": Stage("test_diffusion:boxes", "serial")}
    target = {"field": "momentum", "components": 3, "normalization": ["standardize"]}
    training = {
        "model": {"name": "vdm", "targets": [target], "channels": [2], "attention": 0},
        "data": {"crop": 8, "crops_per_box": 4, "workers": 0, "tile": 8},
        "epochs": 1,
        "batch_size": 4,
    }
    drawn = {
        "coarse": {"sampler": {"kind": "ddim", "steps": 1}},
        "fine": {"sampler": {"steps": 3}, "crop": 4, "overlap": 2},
    }

    def run() -> dict[str, str]:
        """Runs what is not done; why each of these steps was run."""
        steps: list[dict[str, Any]] = [
            {"name": "grids", "stage": "boxes"},
            {"name": "vdm", "stage": "train", "inputs": {"grids": "grids"}, "config": training},
            *(
                {
                    "name": name,
                    "stage": "predict",
                    "inputs": {"grids": "grids", "model": "vdm"},
                    "config": {"samples": 1, "tile": 8, "drawing": drawing},
                }
                for name, drawing in drawn.items()
            ),
        ]
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({"name": "drawn", "seed": 1, "steps": steps}))
        file = run_files.load(str(tmp_path / "run.yaml"), (), stages)
        why = {step.name: step.why for step in plan.plan(file, tmp_path / "out", stages=stages) if step.runs}
        pipeline.execute(file, tmp_path / "out", Site(launcher="debug"), lambda view: None, stages=stages)
        return why

    def draws(name: str) -> list[Any]:
        box = open_store(tmp_path / "out" / name / "prediction.zarr")["box_3"]
        return [box.read(field) for field in ("momentum", "momentum_sample_0")]

    assert list(run()) == ["grids", "vdm", "coarse", "fine"]
    for one, other in zip(draws("coarse"), draws("fine"), strict=True):
        assert not np.allclose(one, other, atol=0.01)
    drawn["coarse"] = drawn["fine"]
    assert [(name, "config changed: drawing" in why) for name, why in run().items()] == [("coarse", True)]
    for one, other in zip(draws("coarse"), draws("fine"), strict=True):
        assert np.array_equal(one, other)


def test_seeds_are_read_without_waiting_for_a_device() -> None:
    data = to_device(batch(), torch.device("meta"))  # whose tensors cannot be read
    assert data["matter_counts"].is_meta
    assert data["seed"].tolist() == [7, 8]


def test_checkpointed_activations_give_the_same_loss_and_gradients() -> None:
    data = batch(8)
    found = []
    for again in (False, True):
        torch.manual_seed(0)
        model = prepared(data, channels=[2, 2], attention=1, checkpoint_activations=again)
        assert model.network.checkpoint_activations is again
        loss = model(data)["loss"]
        loss.backward()
        found.append([loss, *(parameter.grad for parameter in model.parameters())])
    for kept, recomputed in zip(*found, strict=True):
        assert kept is not None
        assert torch.equal(kept, recomputed)


def test_a_description_builds_the_same_model() -> None:
    data = batch(8)
    model = prepared(data, schedule={"kind": "monotone"}, channels=[2, 2], attention=1)
    other = from_description(model.description())
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(data)["loss"], other(data)["loss"])


def test_what_does_not_fit_is_refused() -> None:
    data = batch(8)
    with pytest.raises(ValueError, match="'matter_counts' is given twice"):
        objective(targets=[{"field": "matter_counts"}])
    with pytest.raises(ValueError, match=r"'momentum' is a vector.*\[standardize\]"):
        objective(targets=[{"field": "momentum", "components": 3, "normalization": ["log1p"]}])
    with pytest.raises(ValueError, match="set quantum, or leave it out"):
        objective(targets=[{"field": "momentum", "most": 3}])
    with pytest.raises(ValueError, match="parameter 'Omega_m' is given twice"):
        objective(parameters=["Omega_m", "A_SN1", "Omega_m"])
    with pytest.raises(
        ValueError, match=r"builds on one trained regressor with a likelihood, or on nothing; .*vdm"
    ):
        build(DiffusionConfig(channels=(2,)), [objective()])
    with pytest.raises(ValueError, match="among its targets, with quantum: 1 and most, and spatial: 3"):
        build(DiffusionConfig(channels=(2,)), [of_matter("poisson")])
    with pytest.raises(ValueError, match="has 3 components, not the 1"):
        objective(inputs=[{"field": "momentum"}]).sample(data, torch.Generator(), Drawing())
    with pytest.raises(ValueError, match="leave `quantum` out"):
        objective(inputs=[{"field": "matter_counts"}], targets=[COUNTS | {"field": "momentum"}]).prepare(
            lambda name: iter(data[name].numpy())
        )
    with pytest.raises(ValueError, match="draws whole boxes"):
        objective().sample(batch(8, halo=2), torch.Generator(), Drawing())


def test_counts_are_not_hidden_by_the_least_noise() -> None:
    """Few values have even steps by default, and a schedule that hides them is refused before training."""
    few = {"field": "galaxy_counts", "quantum": 1, "most": 15}
    assert DiffusionConfig.model_validate({"targets": [few]}).targets[0].normalization == ("standardize",)
    counts = torch.zeros(32, 32, 32)
    counts.view(-1)[:30] = torch.arange(30) % 3 + 1.0
    fields = {"galaxy_counts": counts, "matter_counts": torch.rand(32, 32, 32)}
    logarithm = few | {"normalization": ["log1p", "standardize"]}
    for target, gamma, said in (
        (few, 0.8, None),
        (few, 6.0, "start at 1.8 or below"),
        (logarithm, 0.8, "or below"),
    ):
        schedule = {"kind": "linear", "gamma": (gamma, 10.0)}
        model = VariationalDiffusion(
            DiffusionConfig.model_validate({"channels": [2], "targets": [target], "schedule": schedule})
        )
        with nullcontext() if said is None else pytest.raises(ValueError, match=said):
            model.prepare(lambda name: iter([fields[name].numpy()]))


def test_a_field_without_steps_needs_little_noise() -> None:
    """It would keep what is left of it."""
    given = {"targets": [{"field": "stellar_mass"}], "schedule": {"kind": "linear", "gamma": (0.8, 10.0)}}
    with pytest.raises(ValidationError, match="'stellar_mass' keeps the least noise"):
        DiffusionConfig.model_validate(given)
