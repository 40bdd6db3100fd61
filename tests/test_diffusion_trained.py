"""Trained networks draw from Wiener's posterior, in the box of training and in larger ones.

Draws are compared with those of the exact denoiser from the same noise, so that what they have in common
scatters out; the exact ones' own variance, a function of the steps, is counted in.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from gaussian_fields import GaussianFields
from numpy.typing import NDArray
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from galdist.models.diffusion import DiffusionConfig, VariationalDiffusion
from galdist.models.noise import LinearConfig, signal_and_noise
from galdist.models.samplers import Drawing, Sampler

GAMMA = (-8.0, 10.0)
MARGIN = 4


def trained(
    fields: GaussianFields, steps: int, b: int, generator: torch.Generator, crop: int | None = None
) -> VariationalDiffusion:
    """Two levels, whose reach of 13 cells is that of the filter; learns from boxes, or from crops of them."""
    model = VariationalDiffusion(
        DiffusionConfig.model_validate(
            {
                "inputs": [{"field": "seen", "normalization": []}],
                "targets": [{"field": "field", "normalization": []}],
                "channels": [16, 16],
                "attention": 0,
                "spatial": fields.spatial,
                "schedule": {"kind": "linear", "learned": False, "gamma": GAMMA},
            }
        )
    )

    def batch() -> dict[str, Any]:
        x, y = (boxed(field) for field in fields.draw(b, generator))
        if crop is not None:
            x, y = (field[..., :crop, :crop].expand(-1, -1, 2 * MARGIN + 1, -1, -1) for field in (x, y))
        halo = 0 if crop is None else MARGIN
        return {"field": x, "seen": y, "halo": halo, "periodic": crop is None}

    return learned(model, batch, steps)


def learned(
    model: VariationalDiffusion, batch: Callable[[], dict[str, Any]], steps: int
) -> VariationalDiffusion:
    """The average of the weights over a training on batches of fields."""
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3, weight_decay=0.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    for step in range(steps):
        data = batch()
        b = len(data["seen"])
        model(data | {"seed": torch.arange(b) + step * b})["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        cosine.step()
        average.update_parameters(model)
    mean = average.module.eval()
    assert isinstance(mean, VariationalDiffusion)
    return mean


def boxed(fields: Tensor) -> Tensor:
    """Fields of two dimensions as boxes of one plane."""
    return fields if fields.ndim == 5 else fields[:, :, None]


def drawn(
    model: VariationalDiffusion, fields: GaussianFields, y: Tensor, seed: int, drawing: Drawing
) -> tuple[Tensor, Tensor]:
    """A sample for each observation (n, 1, *mesh), by the network and by the exact denoiser from the same
    noise."""
    generator = torch.Generator().manual_seed(seed)
    batch = {"seen": boxed(y), "halo": 0, "periodic": True}
    ours = model.sample(batch, generator, drawing)["field"].view_as(y)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(y.shape, generator=generator)
    mean = fields.modes(fields.posterior_mean(y))

    def exact(z: Tensor, gamma: Tensor) -> Tensor:
        return fields.modes(fields.denoised_modes(fields.modes(z), gamma, mean))

    with torch.no_grad():
        return ours, drawing.sampler.draw(exact, model.schedule, noise, generator)


def exact_variance(sampler: Sampler) -> float:
    """Of the samples of a unit Gaussian that a sampler gives with the exact denoiser."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 200_000, generator=generator)
    noise /= noise.std()
    schedule = LinearConfig(gamma=GAMMA).build().requires_grad_(False)
    x = sampler.draw(lambda z, gamma: signal_and_noise(gamma[0])[0] * z, schedule, noise, generator)
    return x.var().item()


@pytest.fixture(scope="module", params=[(32, 2, 3000), (8, 3, 3300)], ids=["32-squared", "8-cubed"])
def network(request: pytest.FixtureRequest) -> tuple[VariationalDiffusion, GaussianFields]:
    """Trained on boxes: a minute and a half of one core."""
    n_mesh, spatial, steps = request.param
    torch.manual_seed(0)
    fields, generator = GaussianFields(n_mesh, spatial), torch.Generator().manual_seed(0)
    return trained(fields, steps, 8, generator), fields


@pytest.mark.slow
def test_its_bound_is_the_entropy(network: tuple[VariationalDiffusion, GaussianFields]) -> None:
    model, fields = network
    x, y = (boxed(field) for field in fields.draw(100, torch.Generator().manual_seed(1)))
    with torch.no_grad():
        sums, _ = model.evaluate({"field": x, "seen": y, "halo": 0, "periodic": True})
    bound = model.summarize(sums)["loss"]
    entropy = 0.5 * math.log2(2 * math.pi * math.e) + 0.5 * fields.posterior_variance.log2().mean().item()
    assert entropy - 0.01 < bound < entropy + 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampler",
    [
        Sampler(kind="ancestral", steps=500),
        Sampler(kind="ddim", steps=250),
        Sampler(kind="dpm-solver++", steps=30),
    ],
    ids=["ancestral", "ddim", "dpm-solver++"],
)
def test_it_draws_from_wieners_posterior(
    network: tuple[VariationalDiffusion, GaussianFields], sampler: Sampler
) -> None:
    model, fields = network
    m, n = 8, 4
    _, y = fields.draw(m, torch.Generator().manual_seed(1))
    drawing = Drawing(sampler=sampler, crops_at_once=64)
    samples = drawn(model, fields, y.repeat_interleave(n, 0), 2, drawing)
    (transfer, variance), (transfer_exact, exact) = (
        fields.compare(x.view(m, n, *x.shape[2:]), y) for x in samples
    )
    mean, spread = 1 + transfer - transfer_exact, variance / exact * exact_variance(sampler)
    print(sampler, mean.round(3), spread.round(3))
    np.testing.assert_allclose(mean, 1, atol=0.05)
    np.testing.assert_allclose(spread, 1, atol=0.05)


def binned(fields: GaussianFields, values: Tensor) -> NDArray[np.float64]:
    """Means over k = 1, 2, ... below half of Nyquist's, and over fields."""
    return fields.binned(values.double().mean((0, 1)))


@pytest.mark.slow
def test_a_box_four_times_as_large_a_side_has_its_power() -> None:
    """Trained on crops of 24 cells of boxes of 32, a minute and a half of one core; boxes of 128 are drawn in
    such crops."""
    torch.manual_seed(0)
    generator, crop = torch.Generator().manual_seed(0), 24
    model = trained(GaussianFields(32, 2), 2250, 16, generator, crop)
    fields = GaussianFields(128, 2, scale=4)
    x, y = fields.draw(8, generator)
    drawing = Drawing(sampler=Sampler(steps=30), crop=crop, overlap=12, crops_at_once=64)
    ours, theirs = drawn(model, fields, y, 3, drawing)
    mean = fields.posterior_mean(y)
    power, exact, truth = (binned(fields, fields.modes(field).square()) for field in (ours, theirs, x))
    own, exact_own = (binned(fields, fields.modes(field - mean).square()) for field in (ours, theirs))
    ratio, scatter = power / exact, own / exact_own
    print(ratio.round(3), scatter.round(3))
    at = round(fields.n_mesh / crop) - 1  # the bin of waves as long as a crop
    assert ratio[at] == pytest.approx(ratio[[at - 2, at - 1, at + 1, at + 2]].mean(), rel=0.02)
    # Up to waves longer than the box of training.
    np.testing.assert_allclose(ratio[:16], 1, atol=0.03)
    np.testing.assert_allclose(scatter[:16], 1, atol=0.1)
    np.testing.assert_allclose(power / truth, 1, atol=0.25)


@pytest.mark.slow
def test_its_bound_of_counts_is_their_entropy() -> None:
    """Poisson's, given the Gaussian field whose smoothed exponential is their mean: a minute of a core."""
    torch.manual_seed(0)
    fields, generator = GaussianFields(16, 2), torch.Generator().manual_seed(0)
    model = VariationalDiffusion(
        DiffusionConfig.model_validate(
            {
                "inputs": [{"field": "seen", "normalization": []}],
                "targets": [{"field": "counts", "quantum": 1, "most": 12, "normalization": ["standardize"]}],
                "channels": [16, 16],
                "attention": 0,
                "spatial": 2,
                "schedule": {"kind": "linear", "learned": False, "gamma": (-4.0, 10.0)},
            }
        )
    )

    def batch(b: int = 16) -> dict[str, Any]:
        seen, _ = fields.draw(b, generator)
        mean = 0.2 * torch.exp(fields.filter(seen, fields.window).float())
        counts = torch.poisson(mean, generator=generator).clamp(max=12)
        return {"counts": boxed(counts), "seen": boxed(seen), "mean": mean, "halo": 0, "periodic": True}

    model.prepare(lambda name: iter(batch(100)[name].numpy()))
    model = learned(model, batch, 700)
    data = batch(400)
    with torch.no_grad():
        sums, _ = model.evaluate(data)
    n = torch.arange(13.0)
    log = n * data["mean"].log()[..., None] - data["mean"][..., None] - torch.lgamma(n + 1)
    entropy = -(log.exp() * log).sum(-1).mean().item() / math.log(2)
    terms = model.summarize(sums)
    print(entropy, terms)
    assert entropy - 0.01 < terms["loss"] < entropy + 0.05
