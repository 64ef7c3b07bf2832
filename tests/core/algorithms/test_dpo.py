import math
from itertools import combinations

import pytest
import torch

from rlhf_ray.core.algorithms.dpo import dpo_loss, implicit_rewards
from rlhf_ray.core.losses import ranking_loss


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def test_one_pair_by_hand():
    """Preferred: -10 from -12, dispreferred: -20 from -19; beta 0.5. h = 1 and -0.5, margin 1.5.

    Loss -log sigmoid(1.5); its gradient by the preferred log-probability is -beta * sigmoid(-1.5), by the other the
    opposite (Rafailov et al. 2023, the gradient below eq. 7).
    """
    logps = torch.tensor([-10.0, -20.0], requires_grad=True)
    out = dpo_loss(logps, torch.tensor([-12.0, -19.0]), torch.tensor([1, 2]), torch.tensor([0, 0]), 0.5)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(math.log1p(math.exp(-1.5)))
    pull = 0.5 / (1 + math.exp(1.5))
    torch.testing.assert_close(logps.grad, torch.tensor([-pull, pull]))
    assert (out.correct.item(), out.pairs.item(), out.margin_sum.item()) == (1, 1, 1.5)


def test_k_wise_ranks_ties_and_a_lone_response_by_hand():
    """Interleaved on purpose; beta 1, reference 0. Prompt 5: K = 3, ranks 1 < 2 = 2: pairs (a, b) and (a, c).

    The tie (b, c) is left out, the divisor stays C(3, 2) = 3. Prompt 9: one pair, the wrong way round. Prompt 7: K = 1.
    a - b = 2 (correct), a - c = 0 (half), x - y = -1 (wrong): 1.5 of 3, margins sum to 1.
    """
    #                      a    x    b     c    y    lone
    logps = torch.tensor([1.0, 0.0, -1.0, 1.0, 1.0, 4.0])
    ranks, groups = torch.tensor([1, 1, 2, 2, 3, 1]), torch.tensor([5, 9, 5, 5, 9, 7])
    out = dpo_loss(logps, torch.zeros(6), ranks, groups, 1.0)
    assert out.loss.item() == pytest.approx(-(log_sigmoid(2) + log_sigmoid(0)) / 3 - log_sigmoid(-1))
    assert (out.correct.item(), out.pairs.item(), out.margin_sum.item()) == (1.5, 3, 1)


def test_before_the_first_step_the_loss_is_log_two_per_prompt_without_ties():
    """pi = pi_ref: every margin is 0, and label smoothing makes no difference there."""
    logps, ranks = torch.randn(8, dtype=torch.float64), torch.tensor([1, 2, 3, 4, 2, 1, 4, 3])
    for smoothing in (0.0, 0.3):
        out = dpo_loss(logps, logps, ranks, torch.tensor([0] * 4 + [1] * 4), 0.1, smoothing)
        assert out.loss.item() == pytest.approx(2 * math.log(2))
        assert (out.correct.item(), out.pairs.item(), out.margin_sum.item()) == (6, 12, 0)


def test_label_smoothing_by_hand_and_where_it_stops():
    """e = 0.25, margin 2: -0.75 log sigmoid(2) - 0.25 log sigmoid(-2). At margin log(0.75 / 0.25) the gradient is 0."""
    one = dpo_loss(torch.tensor([2.0, 0.0]), torch.zeros(2), torch.tensor([1, 2]), torch.zeros(2), 1.0, 0.25)
    assert one.loss.item() == pytest.approx(-0.75 * log_sigmoid(2) - 0.25 * log_sigmoid(-2))
    logps = torch.tensor([math.log(3), 0.0], dtype=torch.float64, requires_grad=True)
    dpo_loss(logps, torch.zeros(2), torch.tensor([1, 2]), torch.zeros(2), 1.0, 0.25).loss.backward()
    torch.testing.assert_close(logps.grad, torch.zeros(2, dtype=torch.float64))


def test_it_is_the_ranking_loss_of_the_implicit_rewards_and_prompts_add_up():
    g = torch.Generator().manual_seed(0)
    logps, reference = torch.randn(20, generator=g) * 9 - 50, torch.randn(20, generator=g) * 9 - 50
    ranks, groups = torch.randint(1, 5, (20,), generator=g), torch.tensor([0] * 4 + [1] * 9 + [2] * 7)
    whole = dpo_loss(logps, reference, ranks, groups, 0.1)
    ranking = ranking_loss(implicit_rewards(logps, reference, 0.1), ranks, groups)
    assert (whole.loss, whole.correct, whole.pairs) == (ranking.loss, ranking.correct, ranking.pairs)
    parts = [dpo_loss(logps[m], reference[m], ranks[m], groups[m], 0.1) for m in (groups == i for i in range(3))]
    for name, value in vars(whole).items():
        assert sum(getattr(p, name).item() for p in parts) == pytest.approx(value.item(), rel=1e-5), name


def test_it_equals_the_loop_over_pairs():
    g = torch.Generator().manual_seed(1)
    logps, reference = (torch.randn(7, generator=g, dtype=torch.float64) for _ in range(2))
    ranks, beta, e = [3, 1, 2, 2, 4, 1, 3], 0.7, 0.1
    h, expected = (beta * (logps - reference)).tolist(), 0.0
    for i, j in combinations(range(7), 2):
        if ranks[i] != ranks[j]:
            margin = h[i] - h[j] if ranks[i] < ranks[j] else h[j] - h[i]
            expected -= ((1 - e) * log_sigmoid(margin) + e * log_sigmoid(-margin)) / 21
    out = dpo_loss(logps, reference, torch.tensor(ranks), torch.zeros(7), beta, e)
    assert out.loss.item() == pytest.approx(expected, rel=1e-12)


def test_no_pair_is_zero_with_a_graph():
    for ranks, groups in (([1, 1], [0, 0]), ([1, 2], [0, 1])):
        logps = torch.tensor([-3.0, -4.0], requires_grad=True)
        out = dpo_loss(logps, torch.zeros(2), torch.tensor(ranks), torch.tensor(groups), 0.1)
        out.loss.backward()
        assert [value.item() for value in vars(out).values()] == [0, 0, 0, 0]
        torch.testing.assert_close(logps.grad, torch.zeros(2))


def test_wild_margins_stay_finite_and_bfloat16_is_widened():
    """-log sigmoid(-10,000) is 10,000, not infinity; 300 - 299 is 1 only if subtracted as float32 or wider."""
    logps = torch.tensor([-1e5, 0.0], requires_grad=True)
    out = dpo_loss(logps, torch.zeros(2), torch.tensor([1, 2]), torch.zeros(2), 0.1, 0.01)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(9900)
    assert logps.grad.isfinite().all()
    rewards = implicit_rewards(torch.tensor([-300.0], dtype=torch.bfloat16), torch.tensor([-299.0]), 1.0)
    assert rewards.dtype == torch.float32
    assert rewards.item() == -1
    assert implicit_rewards(torch.zeros(1, dtype=torch.float64), torch.zeros(1), 1.0).dtype == torch.float64


def test_diagnostics_and_the_reference_carry_no_graph():
    x = torch.randn(2, 6, requires_grad=True)
    out = dpo_loss(x[0], x[1], torch.arange(6), torch.zeros(6), 0.1)
    assert [name for name, value in vars(out).items() if value.requires_grad] == ["loss"]
    out.loss.backward()
    assert x.grad[0].all() and not x.grad[1].any()


@pytest.mark.parametrize(("beta", "smoothing"), [(0.0, 0.0), (-1.0, 0.0), (math.nan, 0.0), (0.1, 0.5), (0.1, -0.1)])
def test_senseless_options_are_refused(beta, smoothing):
    with pytest.raises(ValueError, match="DPO needs"):
        dpo_loss(torch.zeros(2), torch.zeros(2), torch.tensor([1, 2]), torch.zeros(2), beta, smoothing)
