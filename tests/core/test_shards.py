import numpy as np
import pytest

from rlhf_ray.core.minibatches import plan_minibatches
from rlhf_ray.core.shards import of_rank, shard_sizes


@pytest.mark.parametrize(("responses", "largest", "sizes"), [
    (128, 32, [32, 32, 32, 16, 8, 8]), (64, 64, [32, 16, 16]), (6, 4, [4, 1, 1]), (5, 2, [2, 2, 1]), (3, 1, [1, 1, 1]),
    (3, 8, [2, 1]), (7, 8, [4, 2, 1]), (0, 8, []),
])
def test_the_last_shard_of_an_engine_is_cut_into_smaller_ones(responses, largest, sizes):
    assert shard_sizes(responses, largest) == sizes


@pytest.mark.parametrize(("least", "sizes"), [(1, [8, 4, 2, 2]), (2, [8, 4, 2, 2]), (3, [8, 4, 4]), (5, [8, 8])])
def test_no_piece_is_smaller_than_it_is_worth(least, sizes):
    assert shard_sizes(16, 8, least) == sizes


def test_a_rank_reads_only_the_shards_of_its_rollouts():
    """Shards of 3, 2, 4 and 1 rollouts. Of 0 to 9 the rank has 8 and 1, then 2 and 9: none of the second shard."""
    shards, steps = of_rank([np.array([8, 1]), np.array([], dtype=np.int64), np.array([2, 9])], np.array([3, 2, 4, 1]))
    assert shards.tolist() == [0, 2, 3]
    assert [s.tolist() for s in steps] == [[6, 1], [], [2, 7]]


def test_what_a_rank_reads_holds_the_same_rollouts():
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 6, size=15)
    batch = np.split(np.arange(sizes.sum()), np.cumsum(sizes)[:-1])
    plan = plan_minibatches(rng.integers(1, 99, size=sizes.sum()), 8, 10, 2, rng)
    for rank in range(8):
        mine = [parts[rank] for parts in plan]
        shards, steps = of_rank(mine, sizes)
        read = np.concatenate([batch[i] for i in shards])
        assert all(read[s].tolist() == m.tolist() for s, m in zip(steps, mine, strict=True))


def test_a_rank_without_rollouts_reads_one_shard():
    shards, (step,) = of_rank([np.array([], dtype=np.int64)], np.array([3, 2]))
    assert shards.tolist() == [0] and not len(step)
