"""Dr. GRPO (Liu et al. 2025, "Understanding R1-Zero-Like Training", arXiv 2503.20783, section 3.2).

    A_i = s_i - mean of the group        loss = sum over all tokens / (responses * max_response_tokens)

GRPO without its two biases: dividing by each response's own length makes long wrong answers cheap, and dividing
by the group's deviation favours prompts that are nearly always right or wrong. Edge cases as in GRPO.
"""

from torch import Tensor

from rlhf_ray.core.algorithms.groups import group_mean
from rlhf_ray.core.algorithms.spec import Algorithm


def group_centered(rewards: Tensor, groups: Tensor) -> Tensor:
    """reward - group mean: float64 [N]; groups int64 [N]."""
    return rewards - group_mean(rewards, groups)[0]


DR_GRPO = Algorithm(group_advantages=group_centered, mean_over="limit")
