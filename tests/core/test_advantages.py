import math

import pytest
import torch

from rlhf_ray.core.advantages import gae


def test_by_hand():
    """gamma 0.5, lam 0.5, rewards (1, 0, 2), values (4, 2, 1).

    delta_2 = 2 - 1 = 1                       A_2 = 1
    delta_1 = 0 + 0.5 * 1 - 2 = -1.5          A_1 = -1.5 + 0.25 * 1 = -1.25
    delta_0 = 1 + 0.5 * 2 - 4 = -2            A_0 = -2 + 0.25 * -1.25 = -2.3125
    """
    rewards, values = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[4.0, 2.0, 1.0]])
    advantages, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), 0.5, 0.5)
    torch.testing.assert_close(advantages, torch.tensor([[-2.3125, -1.25, 1.0]]))
    torch.testing.assert_close(returns, torch.tensor([[1.6875, 0.75, 2.0]]))


def quadratic(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """A_t = sum over l of (gamma lam)^l delta_{t+l}, term by term (Schulman et al. 2016, eq. 16)."""
    n = len(rewards)
    deltas = [rewards[t] + gamma * (values[t + 1] if t + 1 < n else 0.0) - values[t] for t in range(n)]
    return [sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, n)) for t in range(n)]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.0), (0.99, 1.0)])
def test_equals_the_explicit_sum_with_gaps_closed_up(gamma, lam):
    """Masked tokens, in front, in the middle and behind, count as if they were not there (here NaN)."""
    g = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 6, 9, generator=g, dtype=torch.float64)
    mask = torch.rand(6, 9, generator=g) < 0.6
    mask[0], mask[1] = True, False
    rewards, values = (torch.where(mask, x, math.nan) for x in (rewards, values))
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for i in range(6):
        expected = quadratic(rewards[i][mask[i]].tolist(), values[i][mask[i]].tolist(), gamma, lam)
        torch.testing.assert_close(advantages[i][mask[i]], torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(returns[mask], advantages[mask] + values[mask])
    assert not advantages[~mask].any() and not returns[~mask].any()


def test_lambda_one_gives_monte_carlo_returns():
    """lam 1, gamma 1: returns are the rewards still to come, whatever the critic says: 6, 5, 3."""
    rewards, values = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[7.0, -5.0, 0.5]])
    _, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), 1.0, 1.0)
    torch.testing.assert_close(returns, torch.tensor([[6.0, 5.0, 3.0]]))


def test_no_gradient_flows_to_the_critic():
    values = torch.ones(1, 2, requires_grad=True)
    advantages, returns = gae(torch.ones(1, 2), values, torch.ones(1, 2, dtype=torch.bool), 1.0, 0.9)
    assert not advantages.requires_grad and not returns.requires_grad


def test_an_empty_batch_is_none():
    empty = torch.zeros(0, 0)
    assert [x.shape for x in gae(empty, empty, empty.bool(), 1.0, 0.9)] == [(0, 0), (0, 0)]
