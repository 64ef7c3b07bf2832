import math
from itertools import combinations, pairwise

import pytest
import torch

from rlhf_ray.core.algorithms.registry import ALGORITHMS
from rlhf_ray.core.losses import (
    Clip,
    entropy_loss,
    explained_variance,
    kl_loss,
    lm_loss,
    policy_loss,
    ranking_loss,
    value_loss,
)
from rlhf_ray.core.masked import moments

NAN = math.nan
CLIP = Clip(0.2, 0.2)


def test_policy_loss_by_hand():
    """Clip 0.2 both ways, denominator 10; ratios 1.5, 1.5, 0.5, 0.5, 1.1 and one masked token.

    A = +1: min(1.5, 1.2) = 1.2, clipped    A = -1: min(-1.5, -1.2) = -1.5
    A = +2: min(1.0, 1.6) = 1.0             A = -2: min(-1.0, -1.6) = -1.6, clipped
    A = +1: 1.1                             sum 0.2, loss -0.02
    Gradient of -ratio * A / 10 by log-probability, where not clipped: 0, 0.15, -0.1, 0, -0.11.
    """
    ratios = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1, NAN])
    logprobs = (ratios.log() - 3).requires_grad_()
    advantages, weights = torch.tensor([1.0, -1.0, 2.0, -2.0, 1.0, NAN]), torch.tensor([1.0] * 5 + [0.0])
    out = policy_loss(logprobs, torch.full((6,), -3.0), advantages, weights, CLIP, 10.0)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(-0.02, abs=1e-6)
    torch.testing.assert_close(logprobs.grad, torch.tensor([0.0, 0.15, -0.1, 0.0, -0.11, 0.0]))
    assert out.clip_count.item() == 2
    assert out.kl_k1_sum.item() == pytest.approx(-math.log(1.5 * 1.5 * 0.5 * 0.5 * 1.1), abs=1e-6)
    assert out.clamped_count.item() == 0


def test_policy_loss_clamps_and_counts_wild_ratios():
    """A masked wild ratio does not count. Without the clamp, exp(500) * -1 would be -inf."""
    logprobs, weights = torch.tensor([500.0, 0.0, 500.0]), torch.tensor([1.0, 1.0, 0.0])
    out = policy_loss(logprobs, torch.zeros(3), torch.tensor([-1.0, 1.0, 1.0]), weights, CLIP, 1.0)
    assert out.loss.isfinite() and out.clamped_count.item() == 1


def policy(ratios, advantages, weights, clip, denominator, responses=None):
    """policy_loss of ratios to old log-probabilities of -3, and its gradient by log-probability."""
    logprobs = (torch.tensor(ratios).log() - 3).requires_grad_()
    out = policy_loss(logprobs, torch.full_like(logprobs, -3.0), torch.tensor(advantages), torch.tensor(weights), clip,
                      denominator, None if responses is None else torch.tensor(responses))
    out.loss.backward()
    return out, logprobs.grad


def test_the_clip_may_be_wider_upwards():
    """Low 0.2, high 0.5 (DAPO's clip-higher); ratios 1.4, 1.6, 0.7, 0.9.

    A = +1: 1.4 is inside, 1.6 counts 1.5, clipped. A = -1: 0.7 counts -0.8, clipped; 0.9 is inside: -0.9.
    Sum 1.4 + 1.5 - 0.8 - 0.9 = 1.2.
    """
    out, grad = policy([1.4, 1.6, 0.7, 0.9], [1.0, 1.0, -1.0, -1.0], [1.0] * 4, Clip(0.2, 0.5), 1.0)
    assert out.loss.item() == pytest.approx(-1.2, abs=1e-6)
    torch.testing.assert_close(grad, torch.tensor([-1.4, 0.0, 0.0, 0.9]))
    assert out.clip_count.item() == 2


def test_dual_clip_bounds_what_a_negative_advantage_can_do():
    """Clip 0.2, dual 3 (Ye et al. 2020, eq. 5): with A < 0, max(min(r A, clip(r) A), 3 A).

    A = -2: r = 5 gives max(-10, -6) = -6, cut off; r = 2.5 gives -5, gradient -r A = 5; r = 0.5 gives
    max(-1.6, -6) = -1.6, cut off by the ordinary clip. A = +1, r = 5: 1.2 as ever. Sum -11.4.
    """
    ratios, advantages, weights = [5.0, 2.5, 0.5, 5.0], [-2.0, -2.0, -2.0, 1.0], [1.0] * 4
    out, grad = policy(ratios, advantages, weights, Clip(0.2, 0.2, 3.0), 1.0)
    assert out.loss.item() == pytest.approx(11.4, abs=1e-5)
    torch.testing.assert_close(grad, torch.tensor([0.0, 5.0, 0.0, 0.0]))
    assert out.clip_count.item() == 3
    without, grad = policy(ratios, advantages, weights, CLIP, 1.0)
    assert without.loss.item() == pytest.approx(10 + 5 + 1.6 - 1.2, abs=1e-5)
    torch.testing.assert_close(grad, torch.tensor([10.0, 5.0, 0.0, 0.0]))


def test_the_ratio_of_a_response_is_the_product_over_its_tokens():
    """Two responses, interleaved; each token weighs 1 / length, denominator 2; one token does not count.

    Response 0: 0.5 * 1.8 = 0.9, A = 2: 1.8 for each of two tokens, of weight 1/2: 1.8.
    Response 1: 2 * 0.5 * 1.5 = 1.5, A = 1: clipped to 1.2, three tokens of weight 1/3: 1.2. Its fourth has weight 0.
    Loss -(1.8 + 1.2) / 2 = -1.5. Every token of response 0 has the gradient of the whole: -0.9 * 2 / 2.
    """
    out, grad = policy([0.5, 2.0, 0.5, 1.8, 1.5, NAN], [2.0, 1.0, 1.0, 2.0, 1.0, NAN],
                       [1 / 2, 1 / 3, 1 / 3, 1 / 2, 1 / 3, 0.0], CLIP, 2.0, [0, 1, 1, 0, 1, 1])
    assert out.loss.item() == pytest.approx(-1.5, abs=1e-6)
    torch.testing.assert_close(grad, torch.tensor([-0.9, 0.0, 0.0, -0.9, 0.0, 0.0]))
    assert (out.clip_count.item(), out.clamped_count.item()) == (3, 0)
    assert out.kl_k1_sum.item() == pytest.approx(-math.log(0.9 * 1.5), abs=1e-6)


def test_a_long_response_is_clamped_as_a_whole():
    """30 tokens of log-ratio 1 make 30, beyond 20: each is counted, and none has a gradient; alone, none would be."""
    for responses, clamped in ((torch.zeros(30, dtype=torch.int64), 30), (None, 0)):
        logprobs = torch.ones(30, requires_grad=True)
        out = policy_loss(logprobs, torch.zeros(30), -torch.ones(30), torch.ones(30), CLIP, 1.0, responses)
        out.loss.backward()
        assert out.clamped_count.item() == clamped
        assert logprobs.grad.any() == (clamped == 0)


@pytest.mark.parametrize(
    ("mean_over", "weights", "denominator", "expected"),
    [
        ("tokens", [1, 1, 1, 1], 4, 9 / 4),
        ("responses", [1, 1 / 3, 1 / 3, 1 / 3], 2, (6 + 1) / 2),
        ("limit", [1, 1, 1, 1], 2 * 8, 9 / 16),
    ],
)
def test_the_three_means_by_hand(mean_over, weights, denominator, expected):
    """A response of one token, A = 6, and one of three, A = 1 each; ratio 1; responses may be 8 tokens long.

    All tokens: 9 / 4. First each response by its own length: (6 + 1) / 2. By what they may be: 9 / (2 * 8).
    """
    assert mean_over in {a.mean_over for a in ALGORITHMS.values()}
    out, grad = policy([1.0] * 4, [6.0, 1.0, 1.0, 1.0], [float(w) for w in weights], CLIP, denominator)
    assert out.loss.item() == pytest.approx(-expected)
    torch.testing.assert_close(grad, -torch.tensor([6.0, 1.0, 1.0, 1.0]) * torch.tensor(weights) / denominator)


def test_importance_weights_scale_loss_and_gradient():
    """Weights 0.5 and 2 on tokens of ratio 1.1 and A = 1: -(0.55 + 2.2) / 2; the counts count tokens, not weights."""
    out, grad = policy([1.1, 1.1, 1.5], [1.0, 1.0, 1.0], [0.5, 2.0, 4.0], CLIP, 2.0)
    assert out.loss.item() == pytest.approx(-(0.55 + 2.2 + 4.8) / 2, abs=1e-6)
    torch.testing.assert_close(grad, torch.tensor([-0.275, -1.1, 0.0]))
    assert out.clip_count.item() == 1
    assert out.kl_k1_sum.item() == pytest.approx(-math.log(1.1 * 1.1 * 1.5), abs=1e-6)


# log r = log(ref / policy) = log 2, 0, log(1/2); weights 1, 1, 3; denominator 5
@pytest.mark.parametrize(
    ("estimator", "values", "gradients"),
    [
        ("k2", [math.log(2) ** 2 / 2, 0, math.log(2) ** 2 / 2], [-math.log(2), 0, math.log(2)]),  # d/dp: -log r
        ("k3", [2 - 1 - math.log(2), 0, 0.5 - 1 + math.log(2)], [1 - 2, 0, 1 - 0.5]),  # d/dp: 1 - r
    ],
)
def test_kl_loss_by_hand(estimator, values, gradients):
    """And a fourth token of weight 0, NaN."""
    logprobs = torch.tensor([-2.0, -1.0, -3.0, NAN], requires_grad=True)
    reference = torch.tensor([-2 + math.log(2), -1.0, -3 - math.log(2), NAN])
    weights = torch.tensor([1.0, 1.0, 3.0, 0.0])
    loss, clamped = kl_loss(logprobs, reference, weights, estimator, 5.0)
    loss.backward()
    assert loss.item() == pytest.approx((values[0] + values[1] + 3 * values[2]) / 5, abs=1e-6)
    torch.testing.assert_close(logprobs.grad, torch.tensor([*gradients, 0.0]) * weights / 5)
    assert (clamped.item(), clamped.requires_grad) == (0, False)


def test_k3_in_the_loss_is_clamped_and_counted():
    """log r = 25: e^20 - 1 - 25, whose gradient is that of -log r alone; a masked wild token does not count."""
    logprobs = torch.tensor([-25.0, -500.0], requires_grad=True)
    loss, clamped = kl_loss(logprobs, torch.zeros(2), torch.tensor([1.0, 0.0]), "k3", 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(math.exp(20) - 26, rel=1e-6)
    assert clamped.item() == 1
    torch.testing.assert_close(logprobs.grad, torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize("estimator", ["k1", "k4"])
def test_unsound_estimators_are_refused_in_the_loss(estimator):
    with pytest.raises(ValueError, match=f"{estimator} is not sound in a loss: k2 or k3"):
        kl_loss(torch.zeros(1), torch.zeros(1), torch.ones(1), estimator, 1.0)


def test_entropy_loss_by_hand():
    """-(1 * 2 + 0.5 * 4) / 8 = -0.5, gradient -w / 8; the NaN of weight 0 has no effect."""
    entropies = torch.tensor([2.0, 4.0, NAN], requires_grad=True)
    loss = entropy_loss(entropies, torch.tensor([1.0, 0.5, 0.0]), 8.0)
    loss.backward()
    assert loss.item() == -0.5
    torch.testing.assert_close(entropies.grad, torch.tensor([-0.125, -0.0625, 0.0]))


KEPT, WEIGHTS = torch.tensor([True, False]), torch.tensor([1.0, 0.0])
ONE_RESPONSE = torch.zeros(2, dtype=torch.int64)
OF_TWO_TOKENS = {  # x is trained, y is every other argument
    "policy": lambda x, y: policy_loss(x, y, y, WEIGHTS, CLIP, 1.0).loss,
    "policy with dual clip": lambda x, y: policy_loss(x, y, -y, WEIGHTS, Clip(0.2, 0.2, 2.0), 1.0).loss,
    "policy per response": lambda x, y: policy_loss(x, y, y, WEIGHTS, CLIP, 1.0, ONE_RESPONSE).loss,
    "k2": lambda x, y: kl_loss(x, y, WEIGHTS, "k2", 1.0)[0],
    "k3": lambda x, y: kl_loss(x, y, WEIGHTS, "k3", 1.0)[0],
    "entropy": lambda x, y: entropy_loss(x, WEIGHTS, 1.0),
    "value": lambda x, y: value_loss(x, y, y, KEPT, 0.2, 1.0).loss,
    "lm": lambda x, y: lm_loss(x, KEPT, 1.0),
}


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("loss", OF_TWO_TOKENS.values(), ids=OF_TWO_TOKENS)
def test_what_is_masked_has_no_effect_and_no_gradient_whatever_is_there(loss, bad):
    """In every argument of the second token, whose weight is 0 or whose mask is False."""
    x, clean = torch.tensor([0.4, bad], requires_grad=True), torch.tensor([0.4, 0.0], requires_grad=True)
    out, expected = loss(x, torch.tensor([0.5, bad])), loss(clean, torch.tensor([0.5, 0.0]))
    out.backward()
    expected.backward()
    assert out.item() == expected.item()
    assert torch.equal(x.grad, clean.grad)
    assert x.grad[0] != 0 and x.grad[1] == 0


def test_a_token_that_is_not_a_number_breaks_the_loss():
    """So that the step is seen to be broken, and left out by all ranks together."""
    for logprobs, advantages in ((NAN, 1.0), (0.0, NAN)):
        out = policy_loss(torch.tensor([logprobs, 0.0]), torch.zeros(2), torch.tensor([advantages, 1.0]),
                          torch.ones(2), CLIP, 1.0)
        assert out.loss.isnan()


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


def test_rounding_is_not_a_clipped_value():
    """old + (V - old) differs from V in the last bit; with a range of 100 nothing is clipped."""
    g = torch.Generator().manual_seed(0)
    values, old, returns = torch.randn(3, 1000, generator=g)
    assert ((old + (values - old)) != values).any()
    assert value_loss(values, old, returns, torch.ones(1000, dtype=torch.bool), 100.0, 1.0).clip_count.item() == 0


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
    """The per-token losses, by field, on some of the tokens of one window; x [5, T], x[0] is trained."""
    new, old, advantages, targets, masked = x[:, part]
    mask = masked > -0.5
    weights = torch.where(mask, masked.detach() + 0.6, 0)  # what mean and importance correction make of them
    return (
        vars(policy_loss(new, old, advantages, weights, CLIP, denominator)),
        vars(policy_loss(new, old, advantages, weights, Clip(0.1, 0.3, 1.5), denominator)),
        vars(value_loss(new, old, targets, mask, 0.2, denominator)),
        {"loss": lm_loss(new, mask, denominator)},
        dict(zip(("loss", "clamped"), kl_loss(new, old, weights, "k2", denominator), strict=True)),
        dict(zip(("loss", "clamped"), kl_loss(new, old, weights, "k3", denominator), strict=True)),
        {"loss": entropy_loss(new, weights, denominator)},
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


@pytest.mark.parametrize("cuts", [[0, 9, 24], [0, 2, 2, 9, 24]])
def test_any_split_by_responses_is_the_same_update_for_their_ratio(cuts):
    """Responses of 2, 7 and 15 tokens, whole in a micro-batch, numbered anew in each; one part has no tokens."""
    g = torch.Generator().manual_seed(0)
    x = (0.1 * torch.randn(2, 24, generator=g, dtype=torch.float64)).requires_grad_()
    lengths = torch.tensor([2, 7, 15])
    responses, weights = torch.arange(3).repeat_interleave(lengths), (1 / lengths.double()).repeat_interleave(lengths)
    advantages = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64).repeat_interleave(lengths)

    def loss(a: int, b: int) -> dict[str, torch.Tensor]:
        numbers = responses[a:b] - (responses[a] if a < b else 0)
        return vars(policy_loss(x[0, a:b], x[1, a:b], advantages[a:b], weights[a:b], CLIP, 3.0, numbers))

    whole, parts = loss(0, 24), [loss(a, b) for a, b in pairwise(cuts)]
    for name, value in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts), value)
    gradient = torch.autograd.grad(whole["loss"], x)[0]
    torch.testing.assert_close(torch.autograd.grad(sum(p["loss"] for p in parts), x)[0], gradient)
    assert gradient[0].any()


def test_diagnostics_carry_no_graph():
    x = torch.randn(5, 8, requires_grad=True)
    ranking = ranking_loss(x[0], torch.arange(8), torch.zeros(8, dtype=torch.int64))
    for out in (*token_losses(x, slice(None), 8.0), vars(ranking)):
        assert [name for name, value in out.items() if value.requires_grad] == ["loss"]


def test_no_tokens_are_a_loss_of_zero_with_a_graph():
    """What a rank computes for a micro-batch in which every response is left out."""
    x = torch.zeros(5, 0, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    ratio = vars(policy_loss(x[0], x[1], x[2], x[3].detach(), CLIP, 3.0, none))
    for out in (*token_losses(x, slice(None), 3.0), ratio):
        assert out["loss"].item() == 0
        out["loss"].backward()


@pytest.mark.parametrize("denominator", [0.0, -1.0, NAN])
def test_an_empty_window_is_an_error(denominator):
    x, w, mask = torch.zeros(2), torch.ones(2), torch.ones(2, dtype=torch.bool)
    for loss in (
        lambda: lm_loss(x, mask, denominator), lambda: value_loss(x, x, x, mask, 0.2, denominator),
        lambda: policy_loss(x, x, x, w, CLIP, denominator), lambda: entropy_loss(x, w, denominator),
        lambda: kl_loss(x, x, w, "k2", denominator), lambda: kl_loss(x, x, w, "k3", denominator),
    ):
        with pytest.raises(ValueError, match="nothing to train on"):
            loss()


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
