import math

import pytest
import torch

from rlhf_ray.core.rewards import apply_truncation, token_rewards


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


def test_truncated_responses_get_the_penalty_instead_of_their_score():
    scores, truncated = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([False, True, False])
    torch.testing.assert_close(apply_truncation(scores, truncated, -1.0), torch.tensor([1.0, -1.0, 3.0]))
    torch.testing.assert_close(apply_truncation(scores, truncated, 0.0), torch.tensor([1.0, 0.0, 3.0]))
    torch.testing.assert_close(apply_truncation(scores, truncated, None), scores)
