"""Samplers give Wiener's posterior where the denoiser is exact; crops give the box where they see enough."""

import numpy as np
import pytest
import torch
from gaussian_fields import GaussianFields
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from galdist.models.noise import LinearConfig, MonotoneConfig, signal_and_noise
from galdist.models.samplers import Crops, Drawing, Sampler, joint

SCHEDULE = LinearConfig().build().requires_grad_(False)
SAMPLERS = [
    Sampler(kind="ancestral", steps=500),
    Sampler(kind="ddim", steps=250),
    Sampler(kind="dpm-solver++", steps=30),
]


@pytest.mark.parametrize(("n_mesh", "spatial", "samples"), [(16, 2, 300), (8, 3, 150)], ids=["2d", "3d"])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler.kind)
def test_an_exact_denoiser_gives_wieners_posterior(
    sampler: Sampler, n_mesh: int, spatial: int, samples: int
) -> None:
    fields, generator = GaussianFields(n_mesh, spatial), torch.Generator().manual_seed(0)
    _, y = fields.draw(4, generator)
    mean = fields.modes(fields.posterior_mean(y)).repeat_interleave(samples, 0)
    noise = torch.randn(mean.shape, generator=generator)

    def denoiser(z: Tensor, gamma: Tensor) -> Tensor:
        return fields.denoised_modes(z, gamma, mean)

    drawn = fields.modes(sampler.draw(denoiser, SCHEDULE, noise, generator))
    transfer, variance = fields.compare(drawn.view(4, samples, *drawn.shape[2:]), y)
    np.testing.assert_allclose(transfer, 1, atol=0.05)
    np.testing.assert_allclose(variance, 1, atol=0.05)


@pytest.mark.parametrize("sampler", SAMPLERS[1:], ids=lambda sampler: sampler.kind)
def test_flows_are_of_their_order(sampler: Sampler) -> None:
    """Without fresh noise a mode of a Gaussian is its noise times a number, the posterior's width."""
    width = torch.tensor([0.1, 0.5, 1.0, 2.0], dtype=torch.float64)
    noise = torch.ones(1, 4, dtype=torch.float64)

    def denoiser(z: Tensor, gamma: Tensor) -> Tensor:
        alpha, sigma = signal_and_noise(gamma[:, None].double())
        return alpha * width**2 / (alpha**2 * width**2 + sigma**2) * z

    def error(steps: int) -> Tensor:
        drawn = sampler.model_copy(update={"steps": steps}).draw(denoiser, SCHEDULE, noise, torch.Generator())
        return (drawn / width - 1).abs()

    order = torch.log2(error(100) / error(200))
    assert (order > {"ddim": 0.9, "dpm-solver++": 1.7}[sampler.kind]).all()


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler.kind)
def test_samples_are_a_function_of_noise_and_seed(sampler: Sampler) -> None:
    noise = torch.randn(2, 1, 4, 4)

    def draw(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return sampler.draw(lambda z, gamma: 0.5 * z, SCHEDULE, noise, generator)

    assert torch.equal(draw(0), draw(0))
    assert torch.equal(draw(0), draw(1)) == (sampler.kind != "ancestral")


@settings(deadline=None, max_examples=50)
@given(
    blocks=st.integers(1, 12),
    crop=st.integers(1, 12),
    overlap=st.integers(0, 20),
    alignment=st.sampled_from([1, 2, 4]),
)
def test_weights_of_crops_add_to_one(blocks: int, crop: int, overlap: int, alignment: int) -> None:
    n_mesh, side = blocks * alignment, crop * alignment
    if side < n_mesh and side - overlap < alignment:
        with pytest.raises(ValueError, match="lower overlap"):
            Crops(n_mesh, 2, side, overlap, alignment)
        return
    crops = Crops(n_mesh, 2, side, overlap, alignment)
    total = torch.zeros(1, n_mesh, n_mesh)
    for number in range(len(crops)):
        total[crops.index(number)] += crops.weight(number)
    torch.testing.assert_close(total, torch.ones_like(total))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"overlap": 8}, "overlap is 8, but of what"),
        ({"crop": 8, "overlap": 8}, "crops of 8 cells cannot share 8: raise crop or lower overlap"),
        ({"crop": 16, "overlap": 32}, "crops of 16 cells cannot share 32"),
    ],
)
def test_crops_share_less_than_all(given: dict[str, int], said: str) -> None:
    assert Drawing(crop=9, overlap=8).crop == 9
    with pytest.raises(ValueError, match=said):
        Drawing.model_validate(given)


@pytest.mark.parametrize("spatial", [2, 3])
def test_overlapping_crops_give_the_whole_box(spatial: int) -> None:
    """A denoiser that sees two cells, on crops that share eight: nothing in the middle of these knows."""
    generator = torch.Generator().manual_seed(0)
    kernel = torch.randn(1, 2, *(5,) * spatial, generator=generator)
    convolve = torch.conv2d if spatial == 2 else torch.conv3d
    shape = (3, 1, *(24,) * spatial)
    z, condition = (torch.randn(shape, generator=generator) for _ in range(2))
    strength = torch.tensor([1.0, 2.0, 3.0])

    def denoise(z: Tensor, gamma: Tensor, condition: Tensor, boxes: Tensor) -> Tensor:
        x = convolve(torch.cat([z, condition], 1), kernel, padding=2)
        return x * (strength[boxes] * gamma).view(-1, *(1,) * (spatial + 1))

    gamma = torch.tensor([0.1, 0.2, 0.3])
    crops = Crops(24, spatial, 16, 8, 2)
    blended = joint(denoise, condition, crops, 4, z.device)(z, gamma)
    wide = torch.nn.functional.pad(torch.cat([z, condition], 1), (2,) * 2 * spatial, mode="circular")
    whole = convolve(wide, kernel) * (strength * gamma).view(-1, *(1,) * (spatial + 1))
    torch.testing.assert_close(blended, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [LinearConfig(), MonotoneConfig(kind="monotone", hidden=64)])
def test_noise_rises_between_its_ends(config: LinearConfig | MonotoneConfig) -> None:
    torch.manual_seed(0)
    schedule = config.build().double()
    with torch.no_grad():
        for parameter in list(schedule.parameters())[2:]:
            parameter.mul_(torch.randn_like(parameter).exp())
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    with torch.no_grad():
        gamma, (shape, slope) = schedule(t), schedule.shape(t)
    assert (gamma.diff() > 0).all()
    assert gamma[[0, -1]].tolist() == pytest.approx([-13.3, 13.3], abs=1e-5)
    torch.testing.assert_close((shape[2:] - shape[:-2]) / 0.002, slope[1:-1], atol=1e-3, rtol=1e-3)


def test_a_schedule_that_falls_is_refused() -> None:
    with pytest.raises(ValueError, match="noise grows"):
        LinearConfig(gamma=(3, 3))
