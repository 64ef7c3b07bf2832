import math
from itertools import combinations, pairwise

import pytest
import torch

from rlhf_ray.core.losses import explained_variance, lm_loss, policy_loss, ranking_loss, value_loss
from rlhf_ray.core.masked import moments

NAN = math.nan


def test_policy_loss_by_hand():
    """clip_ratio 0.2, denominator 10; ratios 1.5, 1.5, 0.5, 0.5, 1.1 and one masked token.

    A = +1: min(1.5, 1.2) = 1.2, clipped    A = -1: min(-1.5, -1.2) = -1.5
    A = +2: min(1.0, 1.6) = 1.0             A = -2: min(-1.0, -1.6) = -1.6, clipped
    A = +1: 1.1                             sum 0.2, loss -0.02
    Gradient of -ratio * A / 10 by log-probability, where not clipped: 0, 0.15, -0.1, 0, -0.11.
    """
    ratios = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1, NAN])
    logprobs = (ratios.log() - 3).requires_grad_()
    mask = torch.tensor([True] * 5 + [False])
    out = policy_loss(
        logprobs, torch.full((6,), -3.0), torch.tensor([1.0, -1.0, 2.0, -2.0, 1.0, NAN]), mask, 0.2, 10.0
    )
    out.loss.backward()
    assert out.loss.item() == pytest.approx(-0.02, abs=1e-6)
    torch.testing.assert_close(logprobs.grad, torch.tensor([0.0, 0.15, -0.1, 0.0, -0.11, 0.0]))
    assert out.clip_count.item() == 2
    assert out.kl_k1_sum.item() == pytest.approx(-math.log(1.5 * 1.5 * 0.5 * 0.5 * 1.1), abs=1e-6)
    assert out.clamped_count.item() == 0


def test_policy_loss_clamps_and_counts_wild_ratios():
    """A masked wild ratio does not count. Without the clamp, exp(500) * -1 would be -inf."""
    logprobs, mask = torch.tensor([500.0, 0.0, 500.0]), torch.tensor([True, True, False])
    out = policy_loss(logprobs, torch.zeros(3), torch.tensor([-1.0, 1.0, 1.0]), mask, 0.2, 1.0)
    assert out.loss.isfinite() and out.clamped_count.item() == 1


def test_value_loss_by_hand():
    """value_clip 0.5, old values 0, denominator 4.

    V = 2, R = 3: errors 1 and (0.5 - 3)^2 = 6.25, clipped: no gradient
    V = 2, R = 0: errors 4 and 0.25: 4, gradient (V - R) / 4 = 0.5
    V = 0.25, R = 1: both 0.5625, gradient -0.75 / 4        loss = 0.5 * 10.8125 / 4
    """
    values = torch.tensor([2.0, 2.0, 0.25, NAN], requires_grad=True)
    returns, mask = torch.tensor([3.0, 0.0, 1.0, NAN]), torch.tensor([True, True, True, False])
    out = value_loss(values, torch.zeros(4), returns, mask, 0.5, 4.0)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(0.5 * 10.8125 / 4)
    torch.testing.assert_close(values.grad, torch.tensor([0.0, 0.5, -0.1875, 0.0]))
    assert out.clip_count.item() == 1
    assert out.squared_error_sum.item() == pytest.approx(1 + 4 + 0.5625)


def test_explained_variance_by_hand():
    """Returns 1, 2, 3 have variance 2/3. Perfect: 1. Their mean as prediction: squared errors 2: 0. Off by 1
    everywhere: squared errors 3: 1 - 1 / (2/3) = -0.5."""
    m = moments(torch.tensor([1.0, 2.0, 3.0]), torch.ones(3, dtype=torch.bool))
    assert [explained_variance(m, e) for e in (0.0, 2.0, 3.0)] == pytest.approx([1.0, 0.0, -0.5])
    flat = moments(torch.ones(3), torch.ones(3, dtype=torch.bool))
    assert math.isnan(explained_variance(flat, 1.0))


def test_lm_loss_by_hand():
    """-(-1 - 3) / 8 = 0.5; the masked NaN gives neither loss nor gradient."""
    logprobs = torch.tensor([-1.0, NAN, -3.0], requires_grad=True)
    loss = lm_loss(logprobs, torch.tensor([True, False, True]), 8.0)
    loss.backward()
    assert loss.item() == 0.5
    torch.testing.assert_close(logprobs.grad, torch.tensor([-0.125, 0.0, -0.125]))


def token_losses(x: torch.Tensor, part: slice, denominator: float) -> tuple[dict[str, torch.Tensor], ...]:
    """The three per-token losses, by field, on some of the tokens of one window; x [5, T], x[0] is trained."""
    new, old, weights, targets, masked = x[:, part]
    mask = masked > -0.5
    return (
        vars(policy_loss(new, old, weights, mask, 0.2, denominator)),
        vars(value_loss(new, old, targets, mask, 0.2, denominator)),
        {"loss": lm_loss(new, mask, denominator)},
    )


@pytest.mark.parametrize("cuts", [[0, 12, 24], [0, 1, 24], [0, 5, 5, 11, 24], list(range(25))])
def test_any_split_in_micro_batches_is_the_same_update(cuts):
    """Losses, gradients and diagnostics of the parts add up to those of the whole, empty parts too."""
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    denominator = float((x[4] > -0.5).sum())
    whole = token_losses(x, slice(None), denominator)
    parts = [token_losses(x, slice(a, b), denominator) for a, b in pairwise(cuts)]
    for i, expected in enumerate(whole):
        for name, value in expected.items():
            torch.testing.assert_close(sum(part[i][name] for part in parts), value)
        gradient = torch.autograd.grad(expected["loss"], x)[0]
        torch.testing.assert_close(torch.autograd.grad(sum(p[i]["loss"] for p in parts), x)[0], gradient)
        assert gradient[0].any()


def test_diagnostics_carry_no_graph():
    x = torch.randn(5, 8, requires_grad=True)
    ranking = ranking_loss(x[0], torch.arange(8), torch.zeros(8, dtype=torch.int64))
    for out in (*token_losses(x, slice(None), 8.0), vars(ranking)):
        assert [name for name, value in out.items() if value.requires_grad] == ["loss"]


@pytest.mark.parametrize("denominator", [0.0, -1.0, NAN])
def test_an_empty_window_is_an_error(denominator):
    with pytest.raises(ValueError, match="nothing to train on"):
        lm_loss(torch.zeros(2), torch.ones(2, dtype=torch.bool), denominator)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def test_ranking_loss_by_hand():
    """Interleaved on purpose. Prompt 5: K = 3, ranks 1 < 2 = 2: pairs (a, b) and (a, c).

    The tie (b, c) is left out, the divisor stays C(3, 2) = 3. Prompt 9: K = 2, C(2, 2) = 1: one pair, in the
    wrong order. Prompt 7: K = 1, no pair.
    a - b = 2 (correct), a - c = 0 (half), y - x = 1 for the worse y: wrong. Correct 1.5 of 3.
    """
    #                       a    x    b     c    y    lone
    rewards = torch.tensor([1.0, 0.0, -1.0, 1.0, 1.0, 4.0])
    ranks, groups = torch.tensor([1, 1, 2, 2, 3, 1]), torch.tensor([5, 9, 5, 5, 9, 7])
    out = ranking_loss(rewards, ranks, groups)
    expected = -(log_sigmoid(2) + log_sigmoid(0)) / 3 - log_sigmoid(-1)
    assert out.loss.item() == pytest.approx(expected)
    assert (out.correct.item(), out.pairs.item()) == (1.5, 3)


def test_ranking_loss_equals_the_loop_over_pairs():
    """Against the formula read aloud; and prompts in separate calls add up to the same."""
    g = torch.Generator().manual_seed(0)
    rewards, ranks = torch.randn(20, generator=g), torch.randint(1, 5, (20,), generator=g)
    groups = torch.tensor([0] * 4 + [1] * 9 + [2] * 7)
    expected = 0.0
    for group in range(3):
        members = (groups == group).nonzero().flatten().tolist()
        pairs = [sorted(p, key=lambda i: ranks[i]) for p in combinations(members, 2)]
        terms = [log_sigmoid((rewards[i] - rewards[j]).item()) for i, j in pairs if ranks[i] < ranks[j]]
        expected -= sum(terms) / len(pairs)
    assert ranking_loss(rewards, ranks, groups).loss.item() == pytest.approx(expected, rel=1e-5)
    chosen = [groups == i for i in range(3)]
    parts = [ranking_loss(rewards[m], ranks[m], groups[m]).loss.item() for m in chosen]
    assert sum(parts) == pytest.approx(expected, rel=1e-5)


def test_ranking_loss_of_ties_only_is_zero_with_a_graph():
    rewards = torch.tensor([1.0, 2.0], requires_grad=True)
    out = ranking_loss(rewards, torch.tensor([1, 1]), torch.tensor([0, 0]))
    out.loss.backward()
    assert (out.loss.item(), out.correct.item(), out.pairs.item()) == (0, 0, 0)
    torch.testing.assert_close(rewards.grad, torch.zeros(2))
