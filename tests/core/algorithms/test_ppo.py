import torch

from rlhf_ray.core.algorithms.ppo import PPO
from rlhf_ray.core.rewards import token_rewards


def test_advantages_are_gae_of_score_and_kl_by_hand():
    """gamma 1, lambda 0.5; score 2, kl 1 and 3, kl_coef 0.5: rewards -0.5 and 2 - 1.5 = 0.5; values 1 and 2.

    delta_1 = 0.5 - 2 = -1.5; delta_0 = -0.5 + 2 - 1 = 0.5, A_0 = 0.5 + 0.5 * -1.5 = -0.25. Returns: A + V.
    """
    mask, values = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[1.0, 2.0]])
    rewards = token_rewards(torch.tensor([2.0]), torch.tensor([[1.0, 3.0]]), mask, 0.5)
    advantages, returns = PPO.advantages(rewards, values, mask, 1.0, 0.5)
    torch.testing.assert_close(advantages, torch.tensor([[-0.25, -1.5]]))
    torch.testing.assert_close(returns, torch.tensor([[0.75, 0.5]]))


def test_a_response_of_one_token_has_its_reward_less_its_value():
    advantages, returns = PPO.advantages(torch.tensor([[3.0]]), torch.tensor([[1.0]]), torch.tensor([[True]]), 0.9, 0.8)
    assert (advantages.item(), returns.item()) == (2, 3)


def test_the_spec_is_the_papers():
    """A critic; whitened if algorithm.whiten_advantages; a mean over all tokens of the step."""
    assert (PPO.critic, PPO.group_advantages, PPO.whiten) == (True, None, "option")
    assert (PPO.ratio, PPO.mean_over) == ("token", "tokens")
