"""GRPO (DeepSeekMath, Shao et al. 2024, arXiv 2402.03300, eq. 3 and section 4.1.2).

    A_i = (s_i - mean of the group) / (deviation of the group + 1e-4), the same for every token of response i
    loss = mean over responses of the mean over its tokens of -min(ratio_t * A, clip(ratio_t) * A) + beta * k3_t

The deviation divides by n - 1, as TRL's GRPOTrainer has it (the paper does not say). Edge cases: a group of
equal scores, or of one response (the others were dropped), has zero advantage, not NaN.
"""

from torch import Tensor

from rlhf_ray.core.algorithms.groups import group_mean
from rlhf_ray.core.algorithms.spec import Algorithm

EPSILON = 1e-4


def group_normalized(rewards: Tensor, groups: Tensor) -> Tensor:
    """(reward - group mean) / (group deviation + 1e-4): float64 [N]; groups int64 [N]."""
    mean, count = group_mean(rewards, groups)
    variance = group_mean((rewards - mean).square(), groups)[0] * count / (count - 1).clamp(min=1)
    return (rewards - mean) / (variance.sqrt() + EPSILON)


GRPO = Algorithm(group_advantages=group_normalized, mean_over="responses")
