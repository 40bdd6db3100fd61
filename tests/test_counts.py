"""Counts: likelihoods are SciPy's, and draws follow them."""

from typing import Any, get_args

import numpy as np
import pytest
import torch
from scipy import stats

from galdist.models.counts import Counts, Likelihood

RATES, DISPERSIONS, EXCESS = (0.003, 0.7, 12.0), (0.02, 1.5), (-3.0, 0.4)


def each(likelihood: Likelihood) -> list[tuple[Counts, Any, float]]:
    """Distributions, SciPy's without the excess of zeros, and the probability of that."""
    found = []
    for rate in RATES:
        for a in DISPERSIONS if "binomial" in likelihood else (None,):
            for excess in EXCESS if likelihood.startswith("zero") else (None,):
                values = [
                    None if v is None else torch.tensor([v], dtype=torch.float64) for v in (rate, a, excess)
                ]
                known = stats.poisson(rate) if a is None else stats.nbinom(1 / a, 1 / (1 + a * rate))
                pi = 0.0 if excess is None else 1 / (1 + np.exp(-excess))
                found.append((Counts(*values), known, pi))  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("likelihood", get_args(Likelihood))
def test_likelihoods_moments_and_quantiles_are_those_of_scipy(likelihood: Likelihood) -> None:
    n = np.arange(60)
    u = torch.from_numpy(np.random.default_rng(0).uniform(size=500))
    for counts, known, pi in each(likelihood):
        p = (1 - pi) * known.pmf(n) + pi * (n == 0)
        assert counts.log_prob(torch.from_numpy(n)).exp().numpy() == pytest.approx(p, rel=1e-8, abs=1e-14)
        assert counts.mean().item() == pytest.approx((1 - pi) * known.mean(), rel=1e-9)
        assert counts.occupied().item() == pytest.approx(1 - p[0], rel=1e-8)
        cumulative = pi + (1 - pi) * known.cdf(np.arange(2000))
        expected = np.searchsorted(cumulative, u.numpy(), side="right")
        assert np.array_equal(counts.quantile(u).numpy(), expected)


@pytest.mark.parametrize("likelihood", get_args(Likelihood))
def test_probabilities_of_the_first_numbers(likelihood: Likelihood) -> None:
    raw = torch.randn(
        (5, Counts.n_parameters(likelihood), 3, 1, 2), generator=torch.Generator().manual_seed(2)
    )
    counts = Counts.of(3 * raw, likelihood)
    n = torch.arange(8.0).view(1, 8, 1, 1, 1)
    torch.testing.assert_close(counts.log_probs(7), counts.log_prob(n), rtol=1e-9, atol=1e-9)


def test_draws_end_where_the_sum_of_probabilities_is_rounded() -> None:
    almost_one = torch.tensor([1 - 2**-53], dtype=torch.float64)
    for counts, _, _ in each("zero-inflated-negative-binomial"):
        assert counts.quantile(almost_one).item() < 2000


@pytest.mark.parametrize("likelihood", get_args(Likelihood))
def test_networks_start_at_the_mean_and_learn_through_any_output(likelihood: Likelihood) -> None:
    start = torch.tensor(Counts.start(likelihood, 0.01)).view(1, -1, 1, 1, 1)
    assert Counts.of(start, likelihood).mean().item() == pytest.approx(0.01, rel=0.15)
    raw = (torch.tensor([-1e4, -50.0, 0.0, 50.0]).view(4, 1, 1, 1, 1)).repeat(
        1, Counts.n_parameters(likelihood), 1, 1, 1
    )
    raw.requires_grad_(True)
    loss = sum(-Counts.of(raw, likelihood).log_prob(torch.full((4, 1, 1, 1, 1), n)).sum() for n in (0, 1, 9))
    assert torch.isfinite(loss)  # type: ignore[arg-type]
    loss.backward()  # type: ignore[union-attr]
    assert raw.grad is not None
    assert torch.isfinite(raw.grad).all()
