"""The U-Net of diffusion is local, in two dimensions and in three: what it gives is that of the whole box."""

import pytest
import torch
from checkpointing import compare_checkpointed
from torch import Tensor

from galdist.models.layers import trim
from galdist.models.unet import Features, NeighborAttention, UNet


def network(spatial: int, channels: tuple[int, ...] = (4, 6), attention: int = 1) -> UNet:
    """One with weights of its own everywhere: some are zero at first."""
    torch.manual_seed(0)
    net = UNet(2, 1, channels, spatial, 3, attention)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return net


@pytest.mark.parametrize(
    ("spatial", "channels", "attention"), [(2, (4,), 2), (2, (3, 4), 1), (2, (2, 3, 4), 0), (3, (2, 3), 1)]
)
def test_outputs_depend_on_nothing_beyond_the_reach(
    spatial: int, channels: tuple[int, ...], attention: int
) -> None:
    net = network(spatial, channels, attention).double()
    n = 2 * net.alignment * (net.reach // net.alignment + 2)
    features = torch.randn(1, 3, dtype=torch.float64)
    x = torch.randn(1, 2, *(8,) * (spatial - 1), n, dtype=torch.float64)
    furthest = 0
    with torch.no_grad():
        before = net(x, features, periodic=True)
        for place in range(n // 2, n // 2 + net.alignment):
            changed = x.clone()
            changed[..., place] += 1
            change = (net(changed, features, periodic=True) - before).abs().flatten(0, -2).amax(0)
            furthest = max(furthest, int((torch.nonzero(change) - place).abs().max()))
    assert net.reach - net.alignment <= furthest <= net.reach


@pytest.mark.parametrize(("spatial", "n_mesh"), [(2, 64), (3, 48)])
def test_tiles_give_the_whole_box(spatial: int, n_mesh: int) -> None:
    net = network(spatial, (2, 2))
    halo = 2 * -(-net.reach // 2)
    x, features = torch.randn(1, 2, *(n_mesh,) * spatial), torch.randn(1, 3)
    with torch.no_grad():
        whole = net(x, features, periodic=True)
        tile = net(x[(..., *(slice(0, 8 + 2 * halo),) * spatial)], features, periodic=False)
    inside = whole[(..., *(slice(halo, halo + 8),) * spatial)]
    assert (trim(tile, halo, spatial) - inside).abs().max() < 1e-5 * whole.std()


@pytest.mark.parametrize("spatial", [2, 3])
def test_checkpointed_activations_give_the_same_gradients(spatial: int) -> None:
    net = network(spatial)
    compare_checkpointed(net, torch.randn(2, 2, *(8,) * spatial), torch.randn(2, 3), False)


def test_samples_of_a_batch_do_not_see_each_other() -> None:
    net = network(2)
    x, features = torch.randn(3, 2, 8, 8), torch.randn(3, 3)
    with torch.no_grad():
        together = net(x, features, periodic=True)
        alone = net(x[1:2], features[1:2], periodic=True)
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=1e-5)


def test_the_untrained_network_gives_zero() -> None:
    assert not UNet(1, 2, (3, 4), 2, 5, 1)(torch.randn(2, 1, 8, 8), torch.randn(2, 5), True).any()


@pytest.mark.parametrize("spatial", [2, 3])
def test_attention_is_a_softmax_over_neighbors(spatial: int) -> None:
    """Beside the layer, all pairs of cells of a periodic mesh at once, those too far apart masked."""
    torch.manual_seed(0)
    n_mesh, channels = 5, 64
    layer = NeighborAttention(channels, 1, spatial).double()
    with torch.no_grad():
        layer.preference.normal_()
    x = torch.randn(1, channels, *(n_mesh,) * spatial, dtype=torch.float64)
    cells = torch.stack(torch.meshgrid(*[torch.arange(n_mesh)] * spatial, indexing="ij")).flatten(1)
    offset = (cells[:, None, :] - cells[:, :, None] + 1) % n_mesh  # of the second from the first, plus one
    near = (offset < 3).all(0)
    number = sum(offset[axis] * 3 ** (spatial - 1 - axis) for axis in range(spatial))

    def heads(t: Tensor) -> Tensor:
        return t.reshape(layer.heads, -1, n_mesh**spatial)

    query, key, value = map(heads, layer.project(x)[0].chunk(3))
    scores = 32**0.5 * torch.nn.functional.cosine_similarity(query[..., None], key[..., None, :], dim=1)
    scores = scores + layer.preference[:, torch.where(near, number, 0)]  # type: ignore[call-overload]
    weights = scores.masked_fill(~near, -torch.inf).softmax(-1)
    attended = torch.einsum("hij,hcj->hci", weights, value).reshape_as(x)
    torch.testing.assert_close(layer(x, periodic=True), x + 0.5 * layer.output(attended))


def test_parameters_that_are_not_known_do_not_matter() -> None:
    torch.manual_seed(0)
    features = Features((-5.0, 5.0), ("Omega_m", "sigma_8"), 8)
    assert features.embedding is not None
    features.embedding.standardize.factor.fill_(1.0)
    gamma, parameters = torch.zeros(2), torch.randn(2, 2)
    known = torch.tensor([True, False])
    with torch.no_grad():
        assert features.unknown is not None
        features.unknown.normal_()
        given = features(gamma, parameters, known)
        other = features(gamma, parameters + 1, known)
        none = features(gamma, None)
    assert not torch.allclose(given[0], other[0])
    assert torch.equal(given[1], other[1])
    torch.testing.assert_close(given[1], none[1])
