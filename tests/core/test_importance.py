import math

import pytest
import torch

from rlhf_ray.core.importance import effective_sample_size, importance_weights
from rlhf_ray.core.losses import Clip, policy_loss

NAN = math.nan
OLD = torch.tensor([0.5, 0.5, 0.8, NAN]).log()
SAMPLED = torch.tensor([1.0, 0.5, 0.2, 0.1]).log()
MASK = torch.tensor([True, True, True, False])


def test_by_hand():
    """Ratios 0.5, 1, 4, cap 2: weights 0.5, 1, 2; the fourth token is masked.

    Sums 3.5 and 0.25 + 1 + 4; one of three at the cap; the largest ratio, 4, is that before it.
    """
    weights, sums = importance_weights(OLD, SAMPLED, MASK, 2.0)
    torch.testing.assert_close(weights, torch.tensor([0.5, 1.0, 2.0, 0.0]))
    assert (sums.count, sums.capped) == (3, 1)
    assert (sums.weights, sums.squares, sums.largest) == pytest.approx((3.5, 5.25, 4.0), rel=1e-6)


def test_only_what_is_above_the_cap_counts_as_capped():
    """Engine and trainer agree, ratio 1; a cap of 1 cuts nothing off."""
    _, sums = importance_weights(torch.zeros(3), torch.zeros(3), torch.ones(3, dtype=torch.bool), 1.0)
    assert (sums.capped, sums.largest) == (0, 1)


def test_weights_are_constants_of_the_loss():
    """No gradient through them: that of the loss is weight * ratio * A, here at ratio 1."""
    old, sampled = OLD.clone().requires_grad_(), SAMPLED.clone().requires_grad_()
    weights, _ = importance_weights(old, sampled, MASK, 2.0)
    assert not weights.requires_grad
    logprobs = OLD.clone().requires_grad_()
    policy_loss(logprobs, OLD, torch.ones(4), weights, Clip(0.2, 0.2), 1.0).loss.backward()
    torch.testing.assert_close(logprobs.grad, -torch.tensor([0.5, 1.0, 2.0, 0.0]))


def test_effective_sample_size_by_hand():
    """3.5^2 / (3 * 5.25); 1 when all weights are equal; 1 / n when one has it all; NaN without tokens."""
    assert effective_sample_size(3.5, 5.25, 3) == pytest.approx(12.25 / 15.75)
    assert effective_sample_size(5 * 0.7, 5 * 0.49, 5) == pytest.approx(1)
    assert effective_sample_size(9, 81, 5) == pytest.approx(1 / 5)
    assert math.isnan(effective_sample_size(0, 0, 0))


def test_sums_of_shards_add_up_to_those_of_the_batch():
    g = torch.Generator().manual_seed(0)
    old, sampled, chance = torch.randn(3, 6, 9, generator=g)
    mask = chance < 0.5
    weights, whole = importance_weights(old, sampled, mask, 1.5)
    parts = [importance_weights(old[rows], sampled[rows], mask[rows], 1.5) for rows in (slice(0, 2), slice(2, 6))]
    torch.testing.assert_close(torch.cat([w for w, _ in parts]), weights)
    for name in ("weights", "squares", "count", "capped"):
        assert sum(getattr(s, name) for _, s in parts) == pytest.approx(getattr(whole, name)), name
    assert max(s.largest for _, s in parts) == whole.largest
    assert whole.count == mask.sum()
    assert whole.capped == (mask & ((old - sampled).exp() > 1.5)).sum()


def test_tokens_that_the_engine_thought_impossible_stay_finite():
    weights, sums = importance_weights(torch.zeros(2), torch.tensor([-math.inf, -500.0]), torch.ones(2).bool(), 5.0)
    assert weights.tolist() == [5, 5]
    assert math.isfinite(sums.largest)


def test_no_tokens_are_sums_of_zero():
    weights, sums = importance_weights(OLD, SAMPLED, torch.zeros(4, dtype=torch.bool), 2.0)
    assert not weights.any()
    assert vars(sums) == {"weights": 0, "squares": 0, "count": 0, "capped": 0, "largest": 0}
