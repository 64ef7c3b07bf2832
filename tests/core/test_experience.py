import dataclasses
import math

import numpy as np
import pytest
import torch

from rlhf_ray.core.algorithms.registry import ALGORITHMS
from rlhf_ray.core.experience import Assessment, Responses, assess, token_advantages
from rlhf_ray.core.types import Moments, Shaping

PPO, GRPO, DR_GRPO, REINFORCE_PP = (ALGORITHMS[name] for name in ("ppo", "grpo", "dr_grpo", "reinforce_pp"))
BY_NAME = pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
PLAIN, NOTHING = Shaping(), Moments()


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def batch(*scores: list[float], truncated=(0, 0, 0, 0), tokens=(2, 4, 1, 3), kl=(2, 0, 1, 1), positions=(0, 1, 2, 3)):
    return Responses(*(np.array(x, dtype=float) for x in (positions, truncated, tokens, kl, scores)))


def assessed(responses: Responses, algorithm=DR_GRPO, weights=(1.0,), shaping=PLAIN, kl_coef=0.5, group_size=2,
           seen=NOTHING) -> Assessment:
    return assess(responses, algorithm, list(weights), shaping, kl_coef, group_size, seen)


# -- the whole batch -----------------------------------------------------------------------------------------------


def test_a_batch_in_groups_by_hand():
    """Scores 1, 3 | 5, 5; KL 2, 0 | 1, 1 nats over 2, 4 | 1, 3 tokens; coefficient 0.5, centred in groups of two.

    Rewards 0, 3 | 4.5, 4.5: advantages -1.5, 1.5 | 0, 0. The second group's scores are equal: 1 of 2. Score 3.5 on
    average, its deviation sqrt((6.25 + 0.25 + 2.25 + 2.25) / 4). KL 4 / 4 per response, 4 / 10 per token.
    """
    out = assessed(batch([1, 3, 5, 5]))
    torch.testing.assert_close(out.advantages, f64(-1.5, 1.5, 0, 0))
    torch.testing.assert_close(out.shaped, f64(1, 3, 5, 5))
    assert out.kept.tolist() == [True] * 4
    assert out.numbers == {
        "truncated": 0, "response_length": 2.5, "score": 3.5, "score_std": pytest.approx(math.sqrt(2.75)), "reward": 3,
        "kl_per_sequence": 1, "kl_per_token": 0.4, "dropped": 0, "equal_groups": 0.5,
    }
    assert out.seen == Moments(14, 1 + 9 + 25 + 25, 4)


def test_kl_outside_the_reward_changes_the_reward_only():
    """Coefficient 0: the rewards are the scores; KL is reported all the same."""
    inside, outside = assessed(batch([1, 3, 5, 5])), assessed(batch([1, 3, 5, 5]), kl_coef=0.0)
    torch.testing.assert_close(outside.advantages, f64(-1, 1, 0, 0))
    assert outside.numbers == {**inside.numbers, "reward": 3.5}


def test_numbers_of_groups_only_where_there_are_groups():
    assert "equal_groups" not in assessed(batch([1, 1, 1, 1]), PPO, group_size=1).numbers
    assert assessed(batch([1, 1, 2, 1]), PPO).numbers["equal_groups"] == 0.5  # of any algorithm with several responses


def test_token_level_algorithms_have_no_advantages_of_responses():
    assert assessed(batch([1, 3, 5, 5]), PPO).advantages is None


@BY_NAME
def test_the_order_of_rows_does_not_matter(algorithm):
    """To the last bit: whichever rank computed which response, all ranks assess alike."""
    rng = np.random.default_rng(0)
    n = 24
    whole = Responses(rng.permutation(100)[:n].astype(float), rng.integers(0, 2, n).astype(float),
                      rng.integers(1, 9, n).astype(float), rng.normal(size=n), rng.normal(size=(2, n)))
    table = whole.table()
    first, second = (assess(Responses.from_table(table[rng.permutation(n)]), algorithm, [0.3, 0.7],
                           Shaping("drop", normalize=True, clip=1.0), 0.1, 4, Moments(1.0, 5.0, 6.0)) for _ in range(2))
    for f in dataclasses.fields(Assessment):
        a, b = getattr(first, f.name), getattr(second, f.name)
        same = torch.equal if isinstance(a, torch.Tensor) else np.array_equal if f.name == "positions" else \
            lambda x, y: x == y
        assert same(a, b), f.name
    assert first.positions.tolist() == sorted(whole.positions)


def test_a_table_holds_everything():
    whole = batch([1, 3, 5, 5], [0.5, 2, 4, 8], truncated=(0, 1, 0, 1))
    back = Responses.from_table(whole.table())
    for f in dataclasses.fields(Responses):
        assert np.array_equal(getattr(back, f.name), getattr(whole, f.name)), f.name
    assert whole.table()[1].tolist() == [1, 1, 4, 0, 3, 2]


def test_two_sources_by_hand():
    """1 * score + 0.1 * other: 1 + 1, 3 - 1 | 5 + 0, 5 + 0. The log has each source as it came, and the sum."""
    out = assessed(batch([1, 3, 5, 5], [10, -10, 0, 0]), weights=(1.0, 0.1), kl_coef=0.0)
    torch.testing.assert_close(out.shaped, f64(2, 2, 5, 5), rtol=1e-15, atol=0)
    assert {key: out.numbers[key] for key in ("score", "score_1", "score_2", "equal_groups")} == {
        "score": pytest.approx(3.5, rel=1e-15), "score_1": 3.5, "score_2": 0, "equal_groups": 1}
    assert "score_1" not in assessed(batch([1, 3, 5, 5])).numbers


def test_the_score_is_raw_and_the_reward_is_shaped():
    """Clipped at 2, less KL 2, 0, 1, 1 at 0.5: rewards 0, 2, 1.5, 1.5. The score stays 3.5; 3 of 4 were clipped."""
    out = assessed(batch([1, 3, 5, 5]), shaping=Shaping(clip=2.0))
    torch.testing.assert_close(out.shaped, f64(1, 2, 2, 2))
    assert {key: out.numbers[key] for key in ("score", "reward", "score_clip_fraction")} == {
        "score": 3.5, "reward": 1.25, "score_clip_fraction": 0.75}


def test_scores_are_normalised_by_the_run_so_far_this_batch_included():
    """Before: 4 scores of sum 2, squares 60. Now 1, 3, 5, 5. Together mean 16 / 8 = 2, variance 120 / 8 - 4 = 11.

    What is handed on is this batch alone, raw.
    """
    out = assessed(batch([1, 3, 5, 5]), PPO, shaping=Shaping(normalize=True), seen=Moments(2, 60, 4))
    torch.testing.assert_close(out.shaped, f64(-1, 1, 3, 3) / math.sqrt(11))
    assert out.seen == Moments(14, 60, 4)
    assert (out.numbers["score"], out.numbers["reward"]) == (3.5, pytest.approx(1.5 / math.sqrt(11) - 0.5))


# -- truncated responses -------------------------------------------------------------------------------------------


@BY_NAME
@pytest.mark.parametrize("wild", [1e6, math.inf, math.nan])
def test_a_dropped_response_is_left_out_of_every_statistic(algorithm, wild):
    """The batch without it gives the same; only the numbers that count it see it."""
    how = Shaping("drop", normalize=True, clip=1.5)
    given = {"positions": (4, 5, 6, 7), "truncated": (0, 1, 0, 0)}
    with_it = assessed(batch([1, wild, 5, 2], kl=(2, wild, 1, 1), **given), algorithm, shaping=how)
    table = batch([1, 0, 5, 2], **given).table()
    without = assessed(Responses.from_table(table[[0, 2, 3]]), algorithm, shaping=how)
    assert with_it.kept.tolist() == [True, False, True, True]
    counts = {"truncated": 0.25, "response_length": 2.5, "dropped": 1}
    assert with_it.numbers == {**without.numbers, **counts}
    assert with_it.seen == without.seen
    torch.testing.assert_close(with_it.shaped[with_it.kept], without.shaped)
    if with_it.advantages is not None:
        assert with_it.advantages[:2].tolist() == [0, 0]  # itself, and the one that is left of its group
        torch.testing.assert_close(with_it.advantages[[0, 2, 3]], without.advantages)


def test_equal_groups_are_those_of_two_kept_responses():
    """Of three groups of two one has lost a response: of the other two, one is equal. With no group left, no number."""
    six = {"tokens": (1,) * 6, "kl": (0,) * 6, "positions": range(6)}
    out = assessed(batch([1, 1, 2, 2, 3, 4], truncated=(0, 1, 0, 0, 0, 0), **six), shaping=Shaping("drop"))
    assert out.numbers["equal_groups"] == 0.5
    out = assessed(batch([1, 1, 2, 2, 3, 4], truncated=(0, 1) * 3, **six), shaping=Shaping("drop"))
    assert "equal_groups" not in out.numbers
    torch.testing.assert_close(out.advantages, torch.zeros(6, dtype=torch.float64))


@BY_NAME
def test_when_all_are_dropped_nothing_is_left_and_nothing_breaks(algorithm):
    """The driver is told by the empty moments, and says what to do."""
    out = assessed(batch([1, 3, 5, 5], truncated=(1, 1, 1, 1)), algorithm, shaping=Shaping("drop", normalize=True))
    assert not out.kept.any()
    assert out.seen == Moments()
    assert out.numbers == {"truncated": 1, "response_length": 2.5}
    kl, mask = torch.zeros(4, 4), torch.arange(4)[None] < torch.tensor([2, 4, 1, 3])[:, None]
    advantages, _, kept = token_advantages(algorithm, out, np.arange(4), kl, kl, mask, 0.5, 1.0, 0.95)
    assert not kept.any() and not advantages.any()


# -- tokens --------------------------------------------------------------------------------------------------------

# A shard that holds positions 2 and 0, in this order, of 1 and 2 tokens, behind a prompt token each.
MASK = torch.tensor([[False, True, False], [False, True, True]])
KL = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.5, 0.5]])
VALUES = torch.tensor([[9.0, 2.0, 9.0], [9.0, 1.0, 3.0]])


def spread(algorithm, assessment: Assessment, kl_coef=0.5, gamma=1.0, lam=0.5, mask=MASK):
    rows = assessment.rows(np.array([2, 0]))
    return token_advantages(algorithm, assessment, rows, KL, VALUES, mask, kl_coef, gamma, lam)


def test_advantages_of_tokens_by_hand():
    """Response 2: score 5, KL 1: reward 4.5, A = 4.5 - 2, return 4.5.

    Response 0: score 1; rewards -0.75 and 1 - 0.25 = 0.75. delta_1 = 0.75 - 3 = -2.25; delta_0 = -0.75 + 3 - 1 = 1.25,
    A_0 = 1.25 - 0.5 * 2.25 = 0.125. Returns A + V: 1.125, 0.75.
    """
    advantages, returns, kept = spread(PPO, assessed(batch([1, 3, 5, 5]), PPO))
    torch.testing.assert_close(advantages, torch.tensor([[0, 2.5, 0], [0, 0.125, -2.25]]))
    torch.testing.assert_close(returns, torch.tensor([[0, 4.5, 0], [0, 1.125, 0.75]]))
    assert torch.equal(kept, MASK)


def test_returns_of_tokens_without_a_critic_by_hand():
    """gamma 1, no baseline: 4.5; 0.75 - 0.75 = 0 and 0.75."""
    advantages, _, _ = spread(REINFORCE_PP, assessed(batch([1, 3, 5, 5]), REINFORCE_PP))
    torch.testing.assert_close(advantages, torch.tensor([[0, 4.5, 0], [0, 0, 0.75]]))


def test_kl_outside_the_reward_is_not_in_the_token_rewards():
    """kl_coef 0: REINFORCE++ spreads the score alone."""
    advantages, _, _ = spread(REINFORCE_PP, assessed(batch([1, 3, 5, 5]), REINFORCE_PP, kl_coef=0.0), kl_coef=0.0)
    torch.testing.assert_close(advantages, torch.tensor([[0, 5.0, 0], [0, 1.0, 1.0]]))


def test_the_advantage_of_a_response_is_that_of_each_of_its_tokens():
    """KL is in it already, whole. No returns: there is no critic."""
    advantages, returns, kept = spread(DR_GRPO, assessed(batch([1, 3, 6, 5])))
    torch.testing.assert_close(advantages, torch.tensor([[0, 0.5, 0], [0, -1.5, -1.5]]))
    assert not returns.any()
    assert torch.equal(kept, MASK)
    assert advantages.dtype == KL.dtype


@BY_NAME
def test_tokens_of_dropped_responses_are_not_in_the_mask(algorithm):
    assessment = assessed(batch([1, 3, 5, 6], truncated=(0, 0, 1, 0)), algorithm, shaping=Shaping("drop"))
    advantages, _, kept = spread(algorithm, assessment)
    assert kept.tolist() == [[False] * 3, MASK[1].tolist()]
    assert not advantages[0].any()
    assert advantages[1].any()


@BY_NAME
def test_shards_get_what_the_whole_batch_would(algorithm):
    """Advantages of each response alone, in any order, are those of all at once."""
    g = torch.Generator().manual_seed(0)
    kl, values = torch.randn(2, 4, 4, generator=g)
    mask = torch.arange(4)[None] < torch.tensor([2, 4, 1, 3])[:, None]
    kl, values = kl * mask, values * mask
    responses = batch([1, 3, 5, 6], kl=kl.sum(1).tolist())
    assessment = assessed(responses, algorithm)

    def of(rows: list[int]):
        where = assessment.rows(np.array(rows))
        return token_advantages(algorithm, assessment, where, kl[rows], values[rows], mask[rows], 0.5, 0.9, 0.8)

    whole = of([0, 1, 2, 3])
    for row in (3, 0, 2, 1):
        for part, all_ in zip(of([row]), whole, strict=True):
            torch.testing.assert_close(part[0], all_[row], rtol=0, atol=0)


def test_positions_may_have_gaps():
    """Empty responses are dropped before: positions 0, 5, 6, 7 in groups of four are a lone one and three."""
    out = assessed(batch([9, 1, 2, 6], kl=(0,) * 4, positions=(0, 5, 6, 7)), group_size=4)
    torch.testing.assert_close(out.advantages, f64(0, -2, -1, 3))
    assert out.rows(np.array([7, 0, 5])).tolist() == [3, 0, 1]
