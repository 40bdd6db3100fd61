"""Parameters of simulations: standardized over the training ones, and without effect until it is learned."""

import numpy as np
import pytest
import torch

from galdist.models.conditioning import Embedding, Modulation, StandardizedParameters


def test_parameters_are_standardized_and_a_constant_one_is_zero() -> None:
    values = {"Omega_m": [0.1, 0.3, 0.5], "h": [0.6711] * 3, "redshift": [0.0, 2e-16, 1e-16]}
    scale = StandardizedParameters(tuple(values))
    scale.fit(lambda name: (np.array([value], np.float32) for value in values[name]))
    found = scale(torch.tensor(list(values.values())).T)
    assert found[:, 0].tolist() == pytest.approx([-(1.5**0.5), 0, 1.5**0.5], abs=1e-6)
    assert torch.equal(found[:, 1:], torch.zeros(3, 2))
    assert scale(torch.tensor([[0.3, 0.8, 3.0]])).tolist()[0] == pytest.approx([0, 0, 0], abs=1e-6)


def test_modulation_starts_as_the_identity_and_scales_and_shifts_channels() -> None:
    torch.manual_seed(0)
    x, features = torch.randn(2, 3, 4, 4, 4), torch.randn(2, 5)
    layer = Modulation(5, 3)
    assert torch.equal(layer(x, features), x)
    torch.nn.init.normal_(layer.linear.weight)
    a, b = layer.linear(features).view(2, 2, 3, 1, 1, 1).unbind(1)
    torch.testing.assert_close(layer(x, features), (1 + a) * x + b)


def test_an_embedding_is_of_each_sample_by_itself() -> None:
    torch.manual_seed(0)
    embedding = Embedding(("Omega_m", "sigma_8"), 8)
    embedding.standardize.fit(lambda name: iter([np.array([0.2]), np.array([0.4])]))
    x = torch.rand(3, 2)
    torch.testing.assert_close(embedding(x)[1:2], embedding(x[1:2]))
    assert (embedding(x)[0] - embedding(x)[1]).abs().max() > 1e-3
