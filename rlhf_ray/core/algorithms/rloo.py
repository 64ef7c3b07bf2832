"""RLOO (Ahmadian et al. 2024, "Back to Basics", arXiv 2402.14740, eq. 8).

    R_i = s_i - beta * KL of the whole response        A_i = R_i - mean of the group's other R
    loss = mean over responses of -min(ratio_i * A_i, clip(ratio_i) * A_i), ratio_i that of the whole response

The whole response is one action, so the ratio is the product over its tokens; before the first update of a
batch it is 1, and the gradient is that of REINFORCE with a leave-one-out baseline. Edge cases: equal rewards
give zero; the only response of a group has no baseline, and gets zero advantage.
"""

import torch
from torch import Tensor

from rlhf_ray.core.algorithms.groups import group_mean
from rlhf_ray.core.algorithms.spec import Algorithm


def leave_one_out(rewards: Tensor, groups: Tensor) -> Tensor:
    """reward - mean of the other rewards of its group: float64 [N]; groups int64 [N]."""
    mean, count = group_mean(rewards, groups)
    # r - (n m - r) / (n - 1) = n / (n - 1) * (r - m)
    return torch.where(count > 1, count / (count - 1).clamp(min=1), 0) * (rewards - mean)


RLOO = Algorithm(group_advantages=leave_one_out, ratio="response", mean_over="responses")
