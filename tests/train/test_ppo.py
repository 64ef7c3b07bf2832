"""Dealing shards to ranks and putting their answers back in order."""

import pytest

from rlhf_ray.train.ppo import _share, _unshare


def test_shards_are_dealt_in_turn() -> None:
    assert _share(["a", "b", "c", "d", "e"], 2) == [["a", "c", "e"], ["b", "d"]]
    assert _share(["a"], 3) == [["a"], [], []]  # every rank is called, with nothing if need be


def test_answers_come_back_in_the_order_of_the_shards() -> None:
    assert _unshare([["A", "C", "E"], ["B", "D"]]) == ["A", "B", "C", "D", "E"]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 9])
def test_one_is_the_inverse_of_the_other(count: int, ranks: int) -> None:
    shards = list(range(count))
    assert _unshare(_share(shards, ranks)) == shards
