import math

import pytest
import torch

from rlhf_ray.core.masked import moments
from rlhf_ray.core.rewards import combine, shape_scores, token_rewards
from rlhf_ray.core.types import Moments, Shaping

F64 = torch.float64


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


# -- token rewards -------------------------------------------------------------------------------------------------


def test_score_lands_on_the_last_response_token():
    """kl_coef 0.1. Row 0: two tokens, score 3 on the second. Row 1: all three. Row 2: garbage in a gap."""
    kl = torch.tensor([[1.0, 2.0, math.nan], [-1.0, 0.0, 4.0], [5.0, math.inf, 6.0]])
    mask = torch.tensor([[True, True, False], [True, True, True], [True, False, True]])
    expected = torch.tensor([[-0.1, 2.8, 0.0], [0.1, 0.0, -2.4], [-0.5, 0.0, 0.4]])
    torch.testing.assert_close(token_rewards(torch.tensor([3.0, -2.0, 1.0]), kl, mask, 0.1), expected)


def test_rewards_of_a_response_add_up_to_score_minus_penalty():
    kl = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(7)[None] < torch.tensor([1, 7, 3, 2, 6])[:, None]
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    torch.testing.assert_close(token_rewards(scores, kl, mask, 0.3).sum(1), scores - 0.3 * (kl * mask).sum(1))


def test_a_response_without_tokens_is_an_error():
    mask = torch.tensor([[True, True], [False, False]])
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        token_rewards(torch.ones(2), torch.zeros(2, 2), mask, 0.1)


def test_an_empty_batch_is_none():
    empty = torch.zeros(0, 0)
    assert token_rewards(torch.zeros(0), empty, empty.bool(), 0.1).shape == (0, 0)


# -- sources -------------------------------------------------------------------------------------------------------


def test_sources_are_combined_by_their_weights_in_float64():
    """1 * 2 + 0.5 * -4 = 0 and 1 * 3 + 0.5 * 1 = 3.5. In float32, 2^24 + 1 would be 2^24."""
    scores = torch.tensor([[2.0, 3.0], [-4.0, 1.0]])
    torch.testing.assert_close(combine(scores, torch.tensor([1.0, 0.5])), f64(0, 3.5), rtol=0, atol=0)
    assert combine(torch.tensor([[2.0**24], [1.0]]), torch.ones(2)).item() == 2**24 + 1


def test_equal_scores_have_equal_sums_wherever_they_stand():
    """A group of equal scores is told by ==."""
    g = torch.Generator().manual_seed(0)
    for n in range(1, 40):
        column, weights = torch.randn(3, 1, generator=g), torch.rand(3, generator=g)
        assert combine(column.expand(3, n).contiguous(), weights).unique().numel() == 1


# -- shaping -------------------------------------------------------------------------------------------------------

NOTHING = Moments()
SCORES, TRUNCATED = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([False, True, False])


def shaped(how: Shaping, scores=SCORES, truncated=TRUNCATED, lengths=(5, 5, 5), seen=NOTHING):
    return shape_scores(scores, truncated, torch.tensor(lengths), seen, how)


def test_truncated_responses_keep_their_score_get_the_penalty_instead_or_are_left_out():
    """The penalty takes the score's place, it is not added to it."""
    for how, expected, kept in [
        (Shaping(), [1, 2, 3], [True, True, True]),
        (Shaping("penalty", -1.0), [1, -1, 3], [True, True, True]),
        (Shaping("penalty", 0.0), [1, 0, 3], [True, True, True]),
        (Shaping("drop"), [1, 2, 3], [True, False, True]),
    ]:
        out = shaped(how)
        torch.testing.assert_close(out.scores, f64(*expected))
        assert out.kept.tolist() == kept
        assert out.clip_fraction == 0


def test_normalised_by_the_moments_of_the_run_then_clipped():
    """Seen: 0 and 4, mean 2, deviation 2. Scores 6, 3, -2 become 2, 0.5, -2, clipped at 1.5: two of three."""
    seen, scores = moments(torch.tensor([0.0, 4.0]), torch.ones(2, dtype=torch.bool)), torch.tensor([6.0, 3.0, -2.0])
    none = torch.zeros(3, dtype=torch.bool)
    torch.testing.assert_close(shaped(Shaping(normalize=True), scores, none, seen=seen).scores, f64(2, 0.5, -2))
    out = shaped(Shaping(normalize=True, clip=1.5), scores, none, seen=seen)
    torch.testing.assert_close(out.scores, f64(1.5, 0.5, -1.5))
    assert out.clip_fraction == pytest.approx(2 / 3)


def test_equal_scores_normalise_to_zero():
    """Variance 0: the 1e-8 under the root keeps it from being 0 / 0."""
    scores = torch.full((3,), 0.1)
    seen = moments(scores, torch.ones(3, dtype=torch.bool))
    torch.testing.assert_close(shaped(Shaping(normalize=True), scores, seen=seen).scores, f64(0, 0, 0))


def test_the_clip_fraction_is_of_the_kept_scores():
    """Clip 1.5: 2 and 3 are clipped; with the truncated 2 left out, 1 of 2 remains. Exactly at the limit is not."""
    assert shaped(Shaping(clip=1.5)).clip_fraction == pytest.approx(2 / 3)
    assert shaped(Shaping("drop", clip=1.5)).clip_fraction == 0.5
    assert shaped(Shaping(clip=3.0)).clip_fraction == 0


def test_clipping_touches_neither_the_truncation_penalty_nor_kl():
    """Clip 1: scores 1, -5 (the penalty), 1. Then KL 10 at coefficient 0.5 is taken off whole: 1 - 5, -5 - 5, 1 - 5."""
    out = shaped(Shaping("penalty", -5.0, clip=1.0))
    torch.testing.assert_close(out.scores, f64(1, -5, 1))
    rewards = token_rewards(out.scores, torch.full((3, 1), 10.0, dtype=F64), torch.ones(3, 1, dtype=torch.bool), 0.5)
    torch.testing.assert_close(rewards[:, 0], f64(-4, -10, -4))


@pytest.mark.parametrize("dtype", [torch.int64, F64])
def test_overlong_penalty_by_hand(dtype):
    """max_tokens 10, of which the last 4 cost up to 2: lengths 1, 6, 7, 9, 10 lose 0, 0, 0.5, 1.5, 2 (DAPO, eq. 13)."""
    how = Shaping(overlong_tokens=4, overlong_penalty=2.0, max_tokens=10)
    lengths = torch.tensor([1, 6, 7, 9, 10], dtype=dtype)
    out = shape_scores(torch.ones(5), torch.zeros(5, dtype=torch.bool), lengths, Moments(), how)
    torch.testing.assert_close(out.scores, f64(1, 1, 0.5, -0.5, -1))
    assert out.kept.all()


def test_overlong_penalty_comes_on_top_of_clipping_and_truncation():
    """Clip 1, truncated costs -2, all 10 of 10 tokens long: 1 - 1, -2 - 1, 1 - 1."""
    how = Shaping("penalty", -2.0, overlong_tokens=5, overlong_penalty=1.0, clip=1.0, max_tokens=10)
    torch.testing.assert_close(shaped(how, lengths=(10, 10, 10)).scores, f64(0, -3, 0))
