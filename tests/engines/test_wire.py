"""How weights are cut into buckets: sender and receiver do it by the same rule, from the same list.

Covers line 38 (in buckets, never the whole model) of the rules in tests/README.md.
"""

import pytest
import torch
from vllm.distributed.weight_transfer.base import ParamMeta

from rlhf_ray.engines.wire import buckets


def meta(*parameters: tuple[str, int] | tuple[str, int, torch.dtype]) -> list[ParamMeta]:
    """Parameters of so many elements, float32 (4 bytes each) if nothing else is said."""
    return [ParamMeta(p[0], p[2] if len(p) > 2 else torch.float32, (p[1],)) for p in parameters]


def names(parameters: list[ParamMeta], limit: int) -> list[list[str]]:
    return [[m.name for m in bucket] for bucket in buckets(parameters, limit)]


def test_a_bucket_is_filled_to_the_last_byte() -> None:
    """4 + 6 elements are 40 bytes, and so they fit; one byte less and they do not."""
    parameters = meta(("a", 4), ("b", 6), ("c", 1))
    assert names(parameters, 40) == [["a", "b"], ["c"]]
    assert names(parameters, 39) == [["a"], ["b", "c"]]
    assert names(parameters, 44) == [["a", "b", "c"]]


def test_one_that_is_larger_than_the_limit_travels_alone() -> None:
    parameters = meta(("a", 1), ("large", 100), ("b", 1), ("c", 1))
    assert names(parameters, 8) == [["a"], ["large"], ["b", "c"]]
    assert names(meta(("large", 100)), 8) == [["large"]]


def test_a_bucket_has_one_dtype() -> None:
    half = torch.bfloat16
    parameters = meta(("a", 1), ("b", 1, half), ("c", 1, half), ("d", 1), ("e", 1))
    assert names(parameters, 1000) == [["a"], ["b", "c"], ["d", "e"]]


def test_sizes_are_in_bytes_of_the_dtype() -> None:
    """Five elements: 20 bytes in float32, 10 in bfloat16."""
    assert names(meta(("a", 5), ("b", 5)), 20) == [["a"], ["b"]]
    assert names(meta(("a", 5, torch.bfloat16), ("b", 5, torch.bfloat16)), 20) == [["a", "b"]]


def test_shapes_count_with_all_their_dimensions() -> None:
    """2 x 3 x 4 = 24 elements, 96 bytes; a scalar is one element."""
    parameters = [ParamMeta("a", torch.float32, (2, 3, 4)), ParamMeta("b", torch.float32, ())]
    assert names(parameters, 100) == [["a", "b"]]
    assert names(parameters, 99) == [["a"], ["b"]]


def test_nothing_to_send() -> None:
    assert names([], 8) == []


@pytest.mark.parametrize("limit", [1, 17, 64, 500, 10**9])
def test_every_parameter_once_in_order(limit: int) -> None:
    sizes = torch.randint(1, 40, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    parameters = meta(*[(f"p{i}", n, torch.bfloat16 if i % 7 == 0 else torch.float32) for i, n in enumerate(sizes)])
    found = list(buckets(parameters, limit))
    assert [m for bucket in found for m in bucket] == parameters
    for bucket in found:
        assert len({m.dtype for m in bucket}) == 1
        assert len(bucket) == 1 or sum(m.shape[0] * m.dtype.itemsize for m in bucket) <= limit
