import math

import torch

from rlhf_ray.core.algorithms.reinforce_pp import REINFORCE_PP, discounted_returns
from rlhf_ray.core.masked import moments, whiten
from rlhf_ray.core.rewards import token_rewards


def test_returns_by_hand():
    """gamma 0.5. Row 0: 1, 0, 2: 2; 0 + 0.5 * 2 = 1; 1 + 0.5 * 1 = 1.5. Row 1 has a gap: 4; 6 + 0.5 * 4 = 8.

    Neither the values nor lambda matter.
    """
    rewards = torch.tensor([[1.0, 0.0, 2.0], [6.0, math.nan, 4.0]])
    mask = torch.tensor([[True, True, True], [True, False, True]])
    for values, lam in ((torch.zeros(2, 3), 1.0), (torch.full((2, 3), 9.0), 0.3)):
        advantages, returns = discounted_returns(rewards, values, mask, 0.5, lam)
        torch.testing.assert_close(advantages, torch.tensor([[1.5, 1.0, 2.0], [8.0, 0.0, 4.0]]))
        torch.testing.assert_close(returns, advantages)


def test_with_gamma_one_a_token_gets_the_score_less_the_penalties_still_to_come():
    """Score 3, kl 1, 2, 4, kl_coef 0.1: rewards -0.1, -0.2, 2.6; to come 2.3, 2.4, 2.6."""
    mask = torch.ones(1, 3, dtype=torch.bool)
    rewards = token_rewards(torch.tensor([3.0]), torch.tensor([[1.0, 2.0, 4.0]]), mask, 0.1)
    torch.testing.assert_close(discounted_returns(rewards, rewards, mask, 1.0, 1.0)[0], torch.tensor([[2.3, 2.4, 2.6]]))


def test_equal_returns_whiten_to_zero():
    mask = torch.tensor([[True, False], [True, False]])
    advantages, _ = discounted_returns(torch.full((2, 2), 0.1), torch.zeros(2, 2), mask, 1.0, 1.0)
    torch.testing.assert_close(whiten(advantages, mask, moments(advantages, mask)), torch.zeros(2, 2))


def test_the_spec_is_the_papers():
    """No critic, no groups; whitened over the whole batch whatever algorithm.whiten_advantages says."""
    assert (REINFORCE_PP.critic, REINFORCE_PP.group_advantages, REINFORCE_PP.whiten) == (False, None, "always")
    assert (REINFORCE_PP.ratio, REINFORCE_PP.mean_over) == ("token", "tokens")
