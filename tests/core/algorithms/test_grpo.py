import math

import torch

from rlhf_ray.core.algorithms.grpo import GRPO, group_normalized


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_by_hand():
    """Group 0: 1, 3: mean 2, deviation sqrt((1 + 1) / 1) = sqrt 2: -+1 / (sqrt 2 + 1e-4).

    Group 1: 0, 0, 3: mean 1, deviation sqrt((1 + 1 + 4) / 2) = sqrt 3: -1, -1, 2 over (sqrt 3 + 1e-4).
    """
    two, three = math.sqrt(2) + 1e-4, math.sqrt(3) + 1e-4
    out = group_normalized(f64(1, 0, 3, 0, 3), torch.tensor([0, 1, 0, 1, 1]))
    torch.testing.assert_close(out, f64(-1 / two, -1 / three, 1 / two, -1 / three, 2 / three), rtol=1e-14, atol=0)


def test_scores_that_differ_by_little_are_not_blown_up():
    """0 and 1e-4: mean 5e-5, deviation 1e-4 / sqrt 2. The 1e-4 in the divisor leaves 5e-5 / 1.7071e-4 = 0.2929."""
    out = group_normalized(f64(0, 1e-4), torch.tensor([0, 0]))
    torch.testing.assert_close(out, f64(-1, 1) * (0.5 / (1 / math.sqrt(2) + 1)))


def test_the_spec_is_the_papers():
    """Ratio and clip per token, each response by its own length, no critic; normalised in groups, not again."""
    assert (GRPO.ratio, GRPO.mean_over, GRPO.critic, GRPO.whiten) == ("token", "responses", False, "never")
    assert GRPO.advantages is None
