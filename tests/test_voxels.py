"""Networks on voxels are local, and any of them serves either phase; losses teach what predictions claim."""

from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checkpointing import compare_checkpointed
from hypothesis import given, settings
from hypothesis import strategies as st

from galdist.data.datasets import tiles
from galdist.models import MODELS, GridObjective, build, objective_class
from galdist.models.counts import Likelihood
from galdist.models.inception import Inception, InceptionClassifier, InceptionClassifierConfig
from galdist.models.layers import trim
from galdist.models.r2unet import R2UNet
from galdist.models.voxels import VoxelClassifier, VoxelNetwork, VoxelRegressor
from galdist.statistics.metrics import ScoreHistogram
from galdist.training.losses import dice, dice_sums, focal, focal_log_odds, focal_logit

SIZES: dict[str, dict[str, Any]] = {
    "r2unet": {"channels": [3, 4], "recurrence": 0},
    "inception": {"branches": [2, 3, 2, 1]},
}


def networks(features: int) -> list[VoxelNetwork]:
    torch.manual_seed(0)
    found: list[VoxelNetwork] = [R2UNet(1, 2, (3, 4), 0, features), Inception(1, 2, (2, 3, 2, 1), features)]
    for network in found:
        for name, parameter in network.named_parameters():
            if "modulation" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return found


@pytest.mark.parametrize("which", [0, 1])
def test_tiles_give_the_whole_box_whatever_it_is_conditioned_on(which: int) -> None:
    net = networks(5)[which]
    n_mesh = 4 * net.alignment * (net.reach // net.alignment + 1)
    mesh = np.random.default_rng(0).normal(size=(n_mesh,) * 3).astype(np.float32)
    blocks = tiles(n_mesh, 4 * net.alignment, net.reach, net.alignment)
    assert len(blocks) > 1
    features = torch.randn(1, 5)
    with torch.no_grad():
        whole = net(torch.from_numpy(mesh)[None, None], True, features)[0]
        assert (whole - net(torch.from_numpy(mesh)[None, None], True, -features)[0]).abs().max() > 0.01
        for tile in (blocks[0], blocks[-1]):
            output = trim(net(tile.batch({"x": mesh})["x"], False, features), tile.halo)[0]
            assert (output - whole[:, *tile.interior]).abs().max() < 1e-5 * whole.std()


def test_inception_depends_on_all_within_its_reach_and_nothing_beyond() -> None:
    net = networks(0)[1].double()
    x = torch.randn(1, 1, 6, 6, 24, dtype=torch.float64)
    changed = x.clone()
    changed[..., 12] += 10
    with torch.no_grad():
        change = (net(changed, True) - net(x, True)).abs().amax((0, 1, 2, 3))
    distances = torch.nonzero(change).flatten() - 12
    assert (int(distances.min()), int(distances.max())) == (-net.reach, net.reach)


def test_inception_is_the_published_network() -> None:
    """6, 8, 10 and 3 channels, 27, 13; but for biases and a head of one number."""
    net = Inception(1, 1, (6, 8, 10, 3))
    shapes = [tuple(p.shape) for name, p in net.named_parameters() if name.endswith("weight")]
    assert shapes == [
        (6, 1, 1, 1, 1),
        (8, 1, 3, 3, 3),
        (10, 1, 5, 5, 5),
        (3, 1, 1, 1, 1),
        (27, 27, 3, 3, 3),
        (13, 27, 3, 3, 3),
        (1, 13),
    ]
    x = torch.randn(2, 1, 6, 6, 6)
    one, three, five, mean = (net.get_submodule(f"layers.0.convolutions.{n}") for n in range(4))
    y = torch.cat(
        [
            F.conv3d(x, one.weight, one.bias),
            F.conv3d(x, three.weight, three.bias, padding=1),
            F.conv3d(x, five.weight, five.bias, padding=2),
            F.conv3d(F.avg_pool3d(x, 3, 1, 1), mean.weight, mean.bias),
        ],
        1,
    ).relu()
    for layer in list(net.layers)[1:]:
        y = F.conv3d(y, layer.convolution.weight, layer.convolution.bias, padding=1).relu()  # type: ignore[arg-type,union-attr]
    torch.testing.assert_close(net(x, False), net.head(y.movedim(1, -1)).movedim(-1, 1))


@pytest.mark.parametrize("which", [0, 1])
def test_checkpointed_activations_give_the_same_gradients(which: int) -> None:
    compare_checkpointed(networks(3)[which], torch.randn(2, 1, 8, 8, 8), False, torch.randn(2, 3))


# --- losses


@settings(deadline=None, max_examples=25)
@given(q=st.floats(0.001, 0.999), w=st.floats(0.5, 100), g=st.floats(0, 4))
def test_the_focal_loss_is_least_where_its_log_odds_say(q: float, w: float, g: float) -> None:
    logits = torch.linspace(-12, 12, 100_001, dtype=torch.float64)
    ones = torch.ones_like(logits)
    loss = q * focal(logits, ones, w, g) + (1 - q) * focal(logits, 0 * ones, w, g)
    best = logits[loss.argmin()]
    found = torch.sigmoid(focal_log_odds(best, g) - np.log(w)).item()
    assert found == pytest.approx(q, abs=1e-3 * (1 + g))
    assert focal_logit(focal_log_odds(best, g).item(), g) == pytest.approx(best.item(), abs=1e-9)


def test_the_focal_loss_is_its_formula() -> None:
    logits, labels = torch.tensor([-2.0, 0.3, 40.0]), torch.tensor([1.0, 0.0, 0.0])
    p = torch.where(labels > 0, torch.sigmoid(logits), torch.sigmoid(-logits)).double()
    alpha = torch.where(labels > 0, 3 / 4, 1 / 4)
    expected = -alpha[:2] * (1 - p[:2]) ** 2 * p[:2].log()
    torch.testing.assert_close(focal(logits, labels, 3.0, 2.0)[:2].double(), expected, rtol=1e-5, atol=1e-8)
    assert focal(logits, labels, 3.0, 2.0)[2].item() == pytest.approx(10, rel=1e-6)
    assert torch.isfinite(focal_log_odds(torch.tensor([-200.0, 200.0]), 2.0)).all()


def test_the_dice_loss_is_least_at_probabilities_over_the_coefficient() -> None:
    """Three kinds of voxels, so many that sums are their means."""
    q = torch.tensor([0.02, 0.3, 0.9], dtype=torch.float64)
    n = torch.tensor([1e6, 3e5, 1e5], dtype=torch.float64)
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-14)

    def loss() -> torch.Tensor:
        p = torch.sigmoid(logits)
        return dice(torch.stack([(n * p * q).sum(), (n * p.square()).sum(), (n * q).sum()]))

    def closure() -> float:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value.item()

    optimizer.step(closure)
    coefficient = 1 - loss().item()
    expected = (q / coefficient).clamp(max=1)
    assert torch.sigmoid(logits).tolist() == pytest.approx(expected.tolist(), abs=2e-3)


def test_dice_is_of_each_sample() -> None:
    logits, labels = torch.randn(3, 1, 4, 4, 4), (torch.rand(3, 1, 4, 4, 4) < 0.3).float()
    p = torch.sigmoid(logits)
    for n, value in enumerate(dice(dice_sums(logits, labels))):
        expected = 1 - (2 * (p[n] * labels[n]).sum() + 1) / ((p[n] ** 2).sum() + labels[n].sum() + 1)
        assert value.item() == pytest.approx(expected.item(), rel=1e-5)


def test_platts_line_is_the_one_that_scores_were_moved_by() -> None:
    random = np.random.default_rng(0)
    log_odds = random.normal(-2, 2, 400_000)
    labels = random.uniform(size=log_odds.size) < 1 / (1 + np.exp(-log_odds))
    histogram = ScoreHistogram()
    histogram.add(1 / (1 + np.exp(-(log_odds - 1) / 0.5)), labels)
    assert histogram.platt_line() == pytest.approx((0.5, 1.0), abs=0.02)


# --- phases


def boxes(n: int = 16, seed: int = 0) -> dict[str, Any]:
    """Two samples; galaxies follow the density and, twice as many of them, a parameter."""
    random = np.random.default_rng(seed)
    density = random.gamma(0.5, 2.0, (2, 1, n, n, n))
    boost = np.array([1.0, 2.0])[:, None, None, None, None]
    return {
        "matter_counts": torch.from_numpy(density).float(),
        "galaxy_counts": torch.from_numpy(random.poisson(0.1 * boost * density)).float(),
        "parameters": torch.tensor([[1.0], [2.0]]),
        "halo": 0,
        "periodic": True,
    }


def training(data: dict[str, Any]) -> Any:
    return lambda name: iter(data["parameters"][:, 0].numpy() if name == "A_SN1" else data[name].numpy())


def phase(network: str, kind: str, parts: Any = (), **settings: Any) -> Any:
    torch.manual_seed(0)
    name = f"{network}-{kind}"
    config = objective_class(name).Config.model_validate({"name": name, **SIZES[network], **settings})
    model = build(config, parts)
    model.prepare(training(boxes()))
    return model


def fit(model: GridObjective, data: dict[str, Any], steps: int = 60) -> dict[str, float]:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(data)["loss"].backward()
        optimizer.step()
    with torch.no_grad():
        sums, _ = model.evaluate(data)
        model.calibrate(sums)
    return model.summarize(sums)


def test_every_family_of_voxels_is_registered() -> None:
    for network in SIZES:
        assert issubclass(objective_class(f"{network}-classifier"), VoxelClassifier)
        assert issubclass(objective_class(f"{network}-regressor"), VoxelRegressor)
        assert {f"{network}-classifier", f"{network}-regressor"} <= MODELS.keys()


@pytest.mark.parametrize("below", SIZES)
@pytest.mark.parametrize("above", SIZES)
def test_any_regressor_stands_on_any_classifier(below: str, above: str) -> None:
    data = boxes(8)
    classifier = phase(below, "classifier", positive_weight=4.0, parameters=["A_SN1"])
    with torch.no_grad():
        classifier.calibrate(classifier.evaluate(data)[0])
        expected = classifier.predict(data)["galaxy_probability"]
    model = phase(above, "regressor", [classifier])
    assert model.simulation_parameters == ("A_SN1",)
    assert model.reach == max(model.network.reach, classifier.reach)
    with torch.no_grad():
        fields = model.predict(data)
    assert torch.equal(fields["galaxy_probability"], expected)
    assert torch.equal(fields["galaxy_counts"] > 0, expected >= classifier.threshold)


@pytest.mark.parametrize("loss", ["cross-entropy", "focal", "dice"])
def test_classifiers_start_at_the_balance_and_predict_probabilities(loss: str) -> None:
    data = boxes()
    model = phase("inception", "classifier", loss=loss, positive_weight=5.0, recall=0.8)
    labels = data["galaxy_counts"] > 0
    fraction = labels.float().mean().item()
    assert model.predict(data)["galaxy_probability"].mean().item() == pytest.approx(fraction, rel=0.3)
    metrics = fit(model, data)
    with torch.no_grad():
        score, probability = model.classify(data)
    assert metrics["recall"] == pytest.approx((score >= model.threshold)[labels].float().mean().item())
    assert metrics["loss"] == pytest.approx(
        (1 - 2 * (score[labels].sum() + 0.5) / (score.square().sum() + labels.sum() + 1)).item()
        if loss == "dice"
        else model(data)["loss"].item(),
        rel=1e-4,
    )
    # Where it says q, a fraction q of the voxels holds galaxies.
    order = probability.flatten().argsort()
    said, found = (values.flatten()[order].float().view(8, -1).mean(1) for values in (probability, labels))
    assert (said - found).abs().max() < 0.1
    assert said[-1] > 3 * said[0]


@pytest.mark.parametrize("likelihood", get_args(Likelihood))
def test_a_regressor_with_a_likelihood_stands_alone_and_draws(likelihood: str) -> None:
    data = boxes()
    model = phase("inception", "regressor", loss=likelihood)
    metrics = fit(model, data, 120)
    assert metrics["count_ratio"] == pytest.approx(1, abs=0.1)
    assert metrics["correlation"] > 0.5
    uniforms = torch.from_numpy(np.random.default_rng(0).uniform(size=(2, 8, 16, 16, 16)))
    with torch.no_grad():
        draws = model.draw(data, uniforms)["galaxy_counts"]
        mean = model.predict(data)["galaxy_counts"]
        occupied = model.predict(data)["galaxy_probability"]
    assert draws.shape == uniforms.shape
    assert draws.mean().item() == pytest.approx(mean.mean().item(), rel=0.03)
    assert (draws > 0).double().mean().item() == pytest.approx(occupied.mean().item(), rel=0.03)
    assert torch.equal(draws, draws.round())


def test_draws_are_zero_where_the_classifier_keeps_nothing() -> None:
    data = boxes(8)
    classifier = phase("r2unet", "classifier", positive_weight=4.0)
    with torch.no_grad():
        classifier.calibrate(classifier.evaluate(data)[0])
    model = phase("inception", "regressor", [classifier], loss="poisson")
    kept = classifier.predict(data)["galaxy_probability"] >= classifier.threshold
    with torch.no_grad():
        draws = model.draw(data, torch.full((2, 3, 8, 8, 8), 0.9999, dtype=torch.float64))["galaxy_counts"]
    assert torch.equal(draws > 0, kept.expand_as(draws))
    means = phase("inception", "regressor", [classifier])
    assert means.drawn == ()
    with pytest.raises(NotImplementedError, match="nothing can be drawn"):
        means.draw(data, torch.zeros(2, 1, 8, 8, 8))


@pytest.mark.parametrize("network", SIZES)
def test_a_conditioned_network_starts_as_the_unconditioned_one_and_learns_the_parameter(network: str) -> None:
    data = boxes()
    plain, model = (
        phase(network, "regressor", loss="poisson", parameters=names) for names in ([], ["A_SN1"])
    )
    own = plain.state_dict()
    model.load_state_dict(own, strict=False)
    with torch.no_grad():
        assert torch.equal(model.predict(data)["galaxy_counts"], plain.predict(data)["galaxy_counts"])
    fit(model, data)
    mean = model.predict(data)["galaxy_counts"].mean((1, 2, 3, 4))
    assert (mean[1] / mean[0]).item() == pytest.approx(2, rel=0.25)


def test_other_settings_than_a_network_has_are_refused() -> None:
    with pytest.raises(ValueError, match="channels"):
        InceptionClassifierConfig(channels=(2, 2))  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="parameter 'h' is given twice"):
        InceptionClassifierConfig(parameters=("h", "h"))
    classifier = InceptionClassifier(InceptionClassifierConfig())
    with pytest.raises(ValueError, match="or choose a likelihood"):
        build(objective_class("inception-regressor").Config(name="inception-regressor"))
    with pytest.raises(ValueError, match="builds on no other"):
        build(InceptionClassifierConfig(), [classifier])
