import time
from collections.abc import Sequence

import numpy as np
import pytest

from rlhf_ray.core.repetition import repeated_ngrams


def counted(ids: Sequence[int], n: int) -> tuple[int, int]:
    """The same, one n-gram at a time."""
    seen: set[tuple[int, ...]] = set()
    repeated = 0
    for i in range(len(ids) - n + 1):
        ngram = tuple(ids[i : i + n])
        repeated += ngram in seen
        seen.add(ngram)
    return repeated, max(0, len(ids) - n + 1)


# ids, n, (repeated, all)
BY_HAND = [
    ("nothing twice", [1, 2, 3, 4, 5], 3, (0, 3)),
    ("one token five times: 777, 777, 777", [7, 7, 7, 7, 7], 3, (2, 3)),
    ("123 231 312 123 231", [1, 2, 3, 1, 2, 3, 1], 3, (2, 5)),
    ("the same tokens in another order are another 3-gram", [1, 2, 3, 3, 2, 1], 3, (0, 4)),
    ("12 21 12 21", [1, 2, 1, 2, 1], 2, (2, 4)),
    ("single tokens", [4, 4, 9, 4], 1, (2, 4)),
    ("exactly one 3-gram", [1, 2, 3], 3, (0, 1)),
    ("shorter than one", [1, 1], 3, (0, 0)),
    ("empty", [], 3, (0, 0)),
]


@pytest.mark.parametrize(("ids", "n", "expected"), [case[1:] for case in BY_HAND], ids=[case[0] for case in BY_HAND])
def test_by_hand(ids, n, expected):
    assert repeated_ngrams(np.array(ids, dtype=np.int32), n) == counted(ids, n) == expected


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_equals_counting_one_by_one(n):
    rng = np.random.default_rng(n)
    for vocabulary in (2, 4, 2**31 - 1):
        for size in (n, 17, 200):
            ids = rng.integers(vocabulary, size=size, dtype=np.int32)
            assert repeated_ngrams(ids, n) == counted(ids.tolist(), n)


def test_what_comes_back_are_plain_integers_and_the_ids_are_not_written_to():
    ids = np.array([1, 2, 3, 1, 2, 3], dtype=np.int32)
    ids.flags.writeable = False  # as Ray hands them out
    assert [type(x) for x in repeated_ngrams(ids)] == [int, int]


def test_a_batch_takes_milliseconds():
    """128 responses of 48 tokens take about 8 ms; the bound is far above it, for a busy machine."""
    ids = np.random.default_rng(0).integers(30_000, size=(128, 48), dtype=np.int32)
    started = time.process_time()
    assert sum(repeated_ngrams(row)[1] for row in ids) == 128 * 46
    assert time.process_time() - started < 0.5
