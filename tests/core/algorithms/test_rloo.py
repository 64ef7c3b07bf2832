import torch

from rlhf_ray.core.algorithms.rloo import RLOO, leave_one_out
from rlhf_ray.core.losses import Clip, policy_loss


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_by_hand():
    """Group 0: 1, 2, 6: baselines (2 + 6) / 2, (1 + 6) / 2, (1 + 2) / 2. Group 1: 5, 3: the other one."""
    out = leave_one_out(f64(1, 5, 2, 6, 3), torch.tensor([0, 1, 0, 0, 1]))
    torch.testing.assert_close(out, f64(1 - 4, 5 - 3, 2 - 3.5, 6 - 1.5, 3 - 5))


def test_it_equals_the_loop_over_the_others():
    g = torch.Generator().manual_seed(0)
    rewards = torch.randn(9, generator=g, dtype=torch.float64)
    groups = torch.tensor([0, 0, 0, 0, 2, 2, 2, 3, 3])
    expected = [rewards[i] - torch.stack([rewards[j] for j in range(9) if groups[j] == groups[i] and j != i]).mean()
                for i in range(9)]
    torch.testing.assert_close(leave_one_out(rewards, groups), torch.stack(expected))


def test_the_first_step_is_reinforce_with_that_baseline():
    """Before any update the ratio is 1: the gradient by each log-probability is -A / number of responses."""
    lengths, advantages = torch.tensor([3, 1]), leave_one_out(f64(1, 4), torch.tensor([0, 0]))
    responses = torch.arange(2).repeat_interleave(lengths)
    logprobs = torch.randn(4, dtype=torch.float64, requires_grad=True)
    out = policy_loss(logprobs, logprobs.detach(), advantages[responses], (1 / lengths.double())[responses],
                      Clip(0.2, 0.2), 2.0, responses)
    out.loss.backward()
    torch.testing.assert_close(logprobs.grad, f64(3, 3, 3, -3) / 2)


def test_the_spec_is_the_papers():
    """The whole response is one action."""
    assert (RLOO.ratio, RLOO.mean_over, RLOO.critic, RLOO.whiten) == ("response", "responses", False, "never")
    assert RLOO.advantages is None
