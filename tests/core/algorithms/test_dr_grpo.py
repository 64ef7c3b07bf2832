import torch

from rlhf_ray.core.algorithms.dr_grpo import DR_GRPO, group_centered


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_by_hand():
    """Group 0: 1, 3: mean 2. Group 1, of three, interleaved: 0, 0, 3: mean 1. Not divided by any deviation."""
    out = group_centered(f64(1, 0, 3, 0, 3), torch.tensor([0, 1, 0, 1, 1]))
    torch.testing.assert_close(out, f64(-1, -1, 1, -1, 2), rtol=0, atol=0)


def test_scores_ten_times_as_large_have_ten_times_the_advantage():
    """Unlike in GRPO, where a prompt that is nearly always right or wrong counts as much as any other."""
    rewards, groups = f64(0, 0, 0, 1), torch.zeros(4, dtype=torch.int64)
    torch.testing.assert_close(group_centered(10 * rewards, groups), 10 * group_centered(rewards, groups))


def test_the_spec_is_the_papers():
    """A token weighs the same whatever the length of its response."""
    assert (DR_GRPO.ratio, DR_GRPO.mean_over, DR_GRPO.critic, DR_GRPO.whiten) == ("token", "limit", False, "never")
    assert DR_GRPO.advantages is None
