import numpy as np
import pytest

from rlhf_ray.core.minibatches import plan_minibatches

LENGTHS = np.random.default_rng(0).integers(1, 200, size=50)


def members(steps) -> list[list[int]]:
    return [sorted(np.concatenate(step).tolist()) for step in steps]


def test_membership_does_not_depend_on_the_number_of_ranks():
    plans = [plan_minibatches(LENGTHS, ranks, 8, 3, np.random.default_rng(7)) for ranks in (1, 2, 5, 16)]
    assert all(len(step) == ranks for plan, ranks in zip(plans, (1, 2, 5, 16), strict=True) for step in plan)
    assert all(members(plan) == members(plans[0]) for plan in plans)


def test_every_epoch_covers_every_rollout_once_in_a_new_order():
    """50 rollouts by 8: six steps of 8 and one of the last 2, twice."""
    steps = plan_minibatches(LENGTHS, 3, 8, 2, np.random.default_rng(7))
    assert [len(m) for m in members(steps)] == [8] * 6 + [2] + [8] * 6 + [2]
    for epoch in (steps[:7], steps[7:]):
        assert sorted(i for m in members(epoch) for i in m) == list(range(50))
    assert members(steps[:7]) != members(steps[7:])


def test_the_seed_decides_the_order():
    plans = [members(plan_minibatches(LENGTHS, 2, 8, 1, np.random.default_rng(seed))) for seed in (1, 1, 2)]
    assert plans[0] == plans[1] != plans[2]


def test_balance_by_hand():
    """Lengths 7, 5, 4, 3, 3 on two ranks: 7 | 5, then 4 to the 5, 3 to the 7, 3 to the 9: loads 10 and 12.

    By number of rollouts, or in the shuffled order, other loads come out.
    """
    lengths = np.array([3, 7, 4, 5, 3])
    for seed in range(5):
        (step,) = plan_minibatches(lengths, 2, 5, 1, np.random.default_rng(seed))
        assert [lengths[part].tolist() for part in step] == [[7, 3], [5, 4, 3]] or [
            lengths[part].tolist() for part in step
        ] == [[7, 3, 3], [5, 4]]


def test_ranks_carry_about_the_same_number_of_tokens():
    for step in plan_minibatches(LENGTHS, 4, 50, 1, np.random.default_rng(0)):
        loads = [LENGTHS[part].sum() for part in step]
        assert max(loads) - min(loads) < 20


def test_fewer_rollouts_than_ranks_leave_some_empty():
    (step,) = plan_minibatches(np.array([3, 4]), 4, 8, 1, np.random.default_rng(0))
    assert sorted(len(part) for part in step) == [0, 0, 1, 1]
    assert all(part.dtype == np.int64 for part in step)


@pytest.mark.parametrize("bad", [(0, 8, 1), (1, 0, 1), (1, 8, 0)])
def test_bad_arguments(bad):
    with pytest.raises(ValueError, match="below 1"):
        plan_minibatches(LENGTHS, *bad, np.random.default_rng(0))
