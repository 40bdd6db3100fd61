"""The network is local and sees one sample at a time; the losses teach what the predictions claim."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from galdist.data.datasets import tiles
from galdist.models import build, from_description, objective_class
from galdist.models.layers import RecurrentConv3d, trim, wrap
from galdist.models.r2unet import (
    R2UNet,
    R2UNetClassifier,
    R2UNetClassifierConfig,
    R2UNetRegressor,
    R2UNetRegressorConfig,
)
from galdist.training.losses import (
    unweighted_mean,
    weighted_cross_entropy,
    weighted_squared_error,
)


def network(channels: tuple[int, ...] = (4, 6), recurrence: int = 1, n_in: int = 1) -> R2UNet:
    torch.manual_seed(0)
    return R2UNet(n_in, 1, channels, recurrence)


@pytest.mark.parametrize(("channels", "recurrence"), [((3,), 2), ((3, 4), 0), ((3, 4), 1), ((3, 4, 5), 0)])
def test_outputs_depend_on_nothing_beyond_the_reach(channels: tuple[int, ...], recurrence: int) -> None:
    net = network(channels, recurrence).double()
    n = 2 * net.alignment * (net.reach // net.alignment + 2)
    x = torch.randn(1, 1, 8, 8, n, dtype=torch.float64)
    furthest = 0
    for place in range(n // 2, n // 2 + net.alignment):
        changed = x.clone()
        changed[..., place] += 1
        with torch.no_grad():
            change = (net(changed, periodic=True) - net(x, periodic=True)).abs().amax((0, 1, 2, 3))
        distances = torch.nonzero(change).flatten() - place
        furthest = max(furthest, int(distances.abs().max()))
    assert net.reach - net.alignment <= furthest <= net.reach


@pytest.mark.parametrize(
    ("channels", "recurrence", "n_mesh"), [((4, 6), 1, 48), ((2, 2, 2), 0, 64), ((5,), 2, 24)]
)
def test_tiles_give_the_whole_box(channels: tuple[int, ...], recurrence: int, n_mesh: int) -> None:
    net = network(channels, recurrence)
    mesh = np.random.default_rng(0).normal(size=(n_mesh,) * 3).astype(np.float32)
    blocks = tiles(n_mesh, 8, net.reach, net.alignment)
    assert len(blocks) > 1
    with torch.no_grad():
        whole = net(torch.from_numpy(mesh)[None, None], periodic=True)[0, 0]
        for tile in (blocks[0], blocks[-1]):
            output = trim(net(tile.batch({"x": mesh})["x"], periodic=False), tile.halo)[0, 0]
            assert (output - whole[tile.interior]).abs().max() < 1e-5 * whole.std()


def test_a_shifted_periodic_box_gives_the_shifted_output() -> None:
    net = network()
    x = torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        moved = net(x.roll((2, -4, 6), (2, 3, 4)), periodic=True)
        torch.testing.assert_close(
            moved, net(x, periodic=True).roll((2, -4, 6), (2, 3, 4)), atol=1e-5, rtol=1e-5
        )


def test_samples_of_a_batch_do_not_see_each_other() -> None:
    net = network()
    x = torch.randn(3, 1, 8, 8, 8)
    with torch.no_grad():
        together = net(x, periodic=False)
        for n in range(3):
            torch.testing.assert_close(
                together[n : n + 1], net(x[n : n + 1], periodic=False), atol=1e-6, rtol=1e-5
            )


def test_recurrent_convolution_keeps_the_variance() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 32, 12, 12, 12)
    for recurrence in (0, 2):
        with torch.no_grad():
            y = RecurrentConv3d(32, recurrence)(x, periodic=True)
        assert 0.5 < y.var().item() < 2


def test_recurrent_convolution_is_the_recurrence() -> None:
    layer = RecurrentConv3d(3, 2)
    x = torch.randn(1, 3, 6, 6, 6)
    kernel = layer._kernel()
    kernels = kernel / kernel.flatten(1).norm(dim=1).view(-1, 1, 1, 1, 1)
    assert torch.allclose(kernels.mean((1, 2, 3, 4)), torch.zeros(3), atol=1e-6)  # standardized
    y = torch.relu(torch.conv3d(wrap(x, 1), kernel, layer.bias))
    for _ in range(2):
        y = torch.relu(torch.conv3d(wrap((x + y) / 2**0.5, 1), kernel, layer.bias))
    torch.testing.assert_close(layer(x, periodic=True), y)


@given(width=st.integers(1, 3))
def test_wrap_is_undone_by_trim_and_is_periodic(width: int) -> None:
    x = torch.arange(4**3, dtype=torch.float32).view(1, 1, 4, 4, 4)
    wide = wrap(x, width)
    assert torch.equal(trim(wide, width), x)
    assert torch.equal(
        wide.roll((4,) * 3, (2, 3, 4))[..., 4:, 4:, 4:], wide[..., : 2 * width, : 2 * width, : 2 * width]
    )


@settings(deadline=None)
@given(q=st.floats(0.001, 0.999), w=st.floats(0.5, 200))
def test_weighted_cross_entropy_teaches_odds_times_the_weight(q: float, w: float) -> None:
    p = torch.linspace(1e-6, 1 - 1e-6, 200_001, dtype=torch.float64)
    logits = torch.logit(p)
    ones = torch.ones_like(p)
    loss = q * weighted_cross_entropy(logits, ones, w) + (1 - q) * weighted_cross_entropy(logits, 0 * ones, w)
    config = R2UNetClassifierConfig(positive_weight=w, channels=(1,), recurrence=0)
    best = R2UNetClassifier(config)._probability(logits[loss.argmin()])
    assert best.item() == pytest.approx(q, abs=2e-3)


@settings(deadline=None)
@given(counts=st.lists(st.integers(0, 5), min_size=2, max_size=40).filter(any), w=st.floats(0.2, 100))
def test_weighted_squared_error_teaches_a_mean_that_can_be_unweighted(counts: list[int], w: float) -> None:
    n = torch.tensor(counts, dtype=torch.float64)
    grid = torch.linspace(0, 5, 50_001, dtype=torch.float64)
    best = grid[sum(weighted_squared_error(grid, value, w) for value in n).argmin()]  # type: ignore[union-attr]
    q = (n > 0).double().mean()
    assert unweighted_mean(best, q, w).item() == pytest.approx(n.mean().item(), abs=1e-3)


def batch(n: int = 8, halo: int = 0, seed: int = 0) -> dict:
    random = np.random.default_rng(seed)
    density = random.gamma(0.5, 2.0, (2, 1, n, n, n))
    return {
        "matter_counts": torch.from_numpy(density).float(),
        "galaxy_counts": torch.from_numpy(random.poisson(0.2 * density)).float(),
        "halo": halo,
        "periodic": halo == 0,
    }


def trained_on(batch: dict, recall: float = 0.9) -> R2UNetClassifier:
    torch.manual_seed(1)
    model = R2UNetClassifier(
        R2UNetClassifierConfig(channels=(4, 6), recurrence=1, positive_weight=5, recall=recall)
    )
    model.prepare(lambda field: iter(batch[field].numpy()))
    return model


def test_classifier_starts_at_the_class_balance() -> None:
    data = batch(16)
    model = trained_on(data)
    fraction = (data["galaxy_counts"] > 0).float().mean().item()
    assert model.predict(data)["galaxy_probability"].mean().item() == pytest.approx(fraction, rel=0.3)


def test_losses_ignore_the_halo_and_weigh_voxels_alike() -> None:
    data = batch(12, halo=2)
    model = trained_on(data)
    loss = model(data)["loss"]
    data["galaxy_counts"][..., :2, :, :] = 7
    assert torch.equal(model(data)["loss"], loss)
    # mean over samples: what makes ranks equal one process
    halves = [
        {k: v[n : n + 1] if isinstance(v, torch.Tensor) else v for k, v in data.items()} for n in (0, 1)
    ]
    assert (model(halves[0])["loss"] + model(halves[1])["loss"]).item() / 2 == pytest.approx(
        loss.item(), rel=1e-5
    )


def test_threshold_is_the_one_of_the_wanted_recall_and_summaries_match_the_fields() -> None:
    data = batch(16)
    model = trained_on(data, recall=0.8)
    with torch.no_grad():
        model.network.head.weight.mul_(50)  # scores that differ
        sums, fields = model.evaluate(data)
    model.calibrate(sums)
    metrics = model.summarize(sums)
    labels = data["galaxy_counts"] > 0
    called = fields["galaxy_probability"] >= model.threshold
    assert metrics["recall"] == pytest.approx((called & labels).sum().item() / labels.sum().item())
    assert 0.8 <= metrics["recall"] < 0.82
    assert metrics["accuracy"] == pytest.approx((called == labels).double().mean().item())
    assert metrics["loss"] == pytest.approx(model(data)["loss"].item(), rel=1e-5)


def regressor_on(data: dict, weight: float) -> R2UNetRegressor:
    classifier = trained_on(data)
    with torch.no_grad():
        classifier.calibrate(classifier.evaluate(data)[0])
    config = R2UNetRegressorConfig(channels=(4, 6), recurrence=1, nonempty_weight=weight)
    model = R2UNetRegressor(config, [classifier])
    model.prepare(lambda field: iter(data[field].numpy()))
    return model


def test_regressor_trains_itself_and_leaves_the_classifier() -> None:
    data = batch(8)
    model = regressor_on(data, 10.0)
    model(data)["loss"].backward()
    assert all(parameter.grad is None for parameter in model.classifier.parameters())
    assert all(parameter.grad is not None for parameter in model.network.parameters())


def test_regressor_predicts_nothing_where_the_classifier_does() -> None:
    data = batch(8)
    model = regressor_on(data, 10.0)
    with torch.no_grad():
        sums, fields = model.evaluate(data)
    kept = fields["galaxy_probability"] >= model.classifier.threshold
    assert 0 < kept.sum() < kept.numel()
    assert torch.equal(fields["galaxy_counts"] > 0, kept)
    metrics = model.summarize(sums)
    n, m = data["galaxy_counts"].flatten().numpy(), fields["galaxy_counts"].flatten().numpy()
    assert metrics["rmse"] == pytest.approx(np.sqrt(np.mean((n - m) ** 2)), rel=1e-4)
    assert metrics["correlation"] == pytest.approx(np.corrcoef(n, m)[0, 1], abs=1e-4)
    assert metrics["count_ratio"] == pytest.approx(m.sum() / n.sum(), rel=1e-4)


def test_both_phases_learn_counts_that_follow_the_density() -> None:
    torch.manual_seed(0)
    data = batch(16)
    classifier = trained_on(data, recall=0.95)
    for model in (classifier, None):
        if model is None:
            model = R2UNetRegressor(
                R2UNetRegressorConfig(channels=(4, 6), recurrence=1, nonempty_weight=4), [classifier]
            )
            model.prepare(lambda field: iter(data[field].numpy()))
        before = model(data)["loss"].item()
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
        for _ in range(40):
            optimizer.zero_grad()
            model(data)["loss"].backward()
            optimizer.step()
        with torch.no_grad():
            sums, fields = model.evaluate(data)
            model.calibrate(sums)
        assert model.summarize(sums)["loss"] < 0.9 * before
    assert fields["galaxy_counts"].sum().item() == pytest.approx(data["galaxy_counts"].sum().item(), rel=0.15)
    assert np.corrcoef(fields["galaxy_counts"].flatten(), data["matter_counts"].flatten())[0, 1] > 0.7


def test_a_description_builds_the_same_model() -> None:
    model = regressor_on(batch(8), 10.0)
    other = from_description(model.description())
    other.load_state_dict(model.state_dict())
    data = batch(8)
    for name, field in model.predict(data).items():
        assert torch.equal(field, other.predict(data)[name])


def test_models_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'r2unet-classifier'"):
        objective_class("r2unet-clasifier")
    with pytest.raises(ValueError, match="name the step that trained it"):
        build(R2UNetRegressorConfig())
    classifier = R2UNetClassifier(R2UNetClassifierConfig(channels=(2, 2), target="stellar_mass"))
    with pytest.raises(ValueError, match="was trained on 'stellar_mass'"):
        build(R2UNetRegressorConfig(channels=(2, 2)), [classifier])
    with pytest.raises(ValueError, match="builds on no other"):
        build(R2UNetClassifierConfig(channels=(2, 2)), [classifier])
    vector = R2UNetClassifierConfig(channels=(2, 2), inputs=[{"field": "matter_counts", "components": 3}])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="not the 3"):
        build(vector).predict(batch(8))
    with pytest.raises(ValueError, match="leave it out"):
        R2UNetRegressorConfig(loss="poisson", nonempty_weight=3)
    with pytest.raises(ValueError, match="nothing to learn"):
        build(R2UNetClassifierConfig(channels=(2, 2))).prepare(
            lambda field: iter(batch(8)[field].numpy() * (field == "matter_counts"))
        )
