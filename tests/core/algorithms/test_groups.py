import math

import pytest
import torch

from rlhf_ray.core.algorithms.groups import equal_groups, group_mean
from rlhf_ray.core.algorithms.registry import ALGORITHMS

F64 = torch.float64


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


def test_means_and_sizes_by_hand():
    """Interleaved and uneven; group 1 has nobody left. 0: (1, 3, 8) -> 4, of 3; 2: (5, -5) -> 0, of 2; 3: 7, alone."""
    mean, count = group_mean(f64(1, 5, 3, 7, -5, 8), torch.tensor([0, 2, 0, 3, 2, 0]))
    torch.testing.assert_close(mean, f64(4, 0, 4, 7, 0, 4), rtol=0, atol=0)
    torch.testing.assert_close(count, f64(3, 2, 3, 1, 2, 3), rtol=0, atol=0)


def test_equal_groups_counts_groups_of_two_or_more():
    """0: equal; 1: nobody; 2: not; 3: alone, which is neither; 4: equal zeros, one of them negative."""
    x, groups = f64(0.1, 5, 0.1, 7, -5, 0.1, 0.0, -0.0), torch.tensor([0, 2, 0, 3, 2, 0, 4, 4])
    assert equal_groups(x, groups).tolist() == [True, False, True]


def test_only_lone_responses_are_no_groups():
    assert equal_groups(f64(1, 2), torch.tensor([0, 5])).tolist() == []


def test_nobody_is_no_group():
    none = torch.zeros(0, dtype=torch.int64)
    assert [x.tolist() for x in group_mean(f64(), none)] == [[], []]
    assert equal_groups(f64(), none).tolist() == []


GROUP_ALGORITHMS = {name: a.group_advantages for name, a in ALGORITHMS.items() if a.group_advantages}


@pytest.mark.parametrize("advantages", GROUP_ALGORITHMS.values(), ids=GROUP_ALGORITHMS)
class TestEveryGroupAlgorithm:
    def test_equal_scores_have_zero_advantage(self, advantages):
        """0.1 + 0.1 + 0.1 is not 0.3: zero up to rounding, but never NaN; a neighbouring group is not affected."""
        out = advantages(f64(0.1, 1, 0.1, 2, 0.1), torch.tensor([0, 1, 0, 1, 0]))
        torch.testing.assert_close(out[[0, 2, 4]], f64(0, 0, 0), rtol=0, atol=1e-11)
        assert out[1] < 0 < out[3]

    def test_a_lone_response_has_zero_advantage(self, advantages):
        assert advantages(f64(1e6, 3, 1, -7), torch.tensor([0, 2, 2, 9])).tolist()[::3] == [0, 0]

    def test_nobody_left_is_nothing(self, advantages):
        assert advantages(f64(), torch.zeros(0, dtype=torch.int64)).shape == (0,)

    def test_advantages_of_a_group_add_up_to_zero(self, advantages):
        """Of uneven groups too, as they are after responses were left out; and a shift of all scores changes none."""
        g = torch.Generator().manual_seed(0)
        groups = torch.tensor([0] * 4 + [1] * 3 + [2] * 2 + [5])[torch.randperm(10, generator=g)]
        rewards = torch.randn(10, generator=g, dtype=F64)
        out = advantages(rewards, groups)
        assert out.dtype == F64
        torch.testing.assert_close(torch.zeros(6, dtype=F64).index_add(0, groups, out), torch.zeros(6, dtype=F64))
        torch.testing.assert_close(advantages(rewards + 7, groups), out)

    def test_the_order_of_responses_does_not_matter(self, advantages):
        """Nor does whether a group has neighbours."""
        g = torch.Generator().manual_seed(1)
        rewards, groups = torch.randn(12, generator=g, dtype=F64), torch.arange(12) // 4
        order = torch.randperm(12, generator=g)
        torch.testing.assert_close(advantages(rewards[order], groups[order]), advantages(rewards, groups)[order])
        alone = advantages(rewards[4:8], groups[4:8])
        torch.testing.assert_close(alone, advantages(rewards, groups)[4:8])

    def test_nan_stays_in_its_group(self, advantages):
        out = advantages(f64(1, math.nan, 1, 3), torch.tensor([0, 0, 1, 1]))
        assert out.isnan().tolist() == [True, True, False, False]
