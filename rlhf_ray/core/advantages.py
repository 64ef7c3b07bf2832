"""Generalised advantage estimation on padded responses."""

import torch
from torch import Tensor


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """(advantages, returns), both [N, L] and 0 outside the mask, without gradients.

    rewards, values [N, L]: values[t] is predicted before token t is chosen; mask bool [N, L]. With t' the
    next token of the mask after t (J. Schulman et al. 2016, "High-Dimensional Continuous Control Using GAE",
    eq. 16):

        delta_t = r_t + gamma * V_t' - V_t          A_t = delta_t + gamma * lam * A_t'

    Tokens outside the mask, in the middle too, are skipped as if they were not there. After the last token V
    and A are 0: an episode ends there, whether by EOS or by the length limit. returns = advantages + values,
    the target of the critic; whiten the advantages afterwards, never the returns.
    """
    advantages = torch.zeros_like(rewards)
    next_value = rewards.new_zeros(len(rewards))
    next_advantage = next_value
    for t in reversed(range(rewards.shape[1])):
        here = mask[:, t]
        advantage = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * next_advantage
        next_advantage = torch.where(here, advantage, next_advantage)
        next_value = torch.where(here, values[:, t], next_value)
        advantages[:, t] = torch.where(here, advantage, 0)
    return advantages, torch.where(mask, advantages + values, 0)
