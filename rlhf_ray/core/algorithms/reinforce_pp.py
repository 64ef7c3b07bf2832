"""REINFORCE++ (Hu 2025, arXiv 2501.03262, eq. 4 to 6): PPO's loss and KL reward without a critic or groups.

    r_t as in PPO        A_t = sum over s >= t of gamma^(s - t) * r_s, whitened over the whole batch, always

Normalising over the batch, not the prompt, keeps the baseline from leaning on the few responses of one group.
Edge case: a batch whose returns are all equal has zero advantages.
"""

import torch
from torch import Tensor

from rlhf_ray.core.advantages import gae
from rlhf_ray.core.algorithms.spec import Algorithm


def discounted_returns(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """The rewards still to come, twice: as advantages and as returns [N, L]. values and lam are not used."""
    return gae(rewards, torch.zeros_like(values), mask, gamma, 1.0)  # GAE without a critic, lambda 1, is just that


REINFORCE_PP = Algorithm(advantages=discounted_returns, whiten="always")
