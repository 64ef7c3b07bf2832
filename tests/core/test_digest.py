from functools import reduce
from itertools import combinations, permutations

import pytest
import torch

from rlhf_ray.core import digest as module
from rlhf_ray.core.digest import add_digests, tensor_digest

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.int64]


@pytest.fixture(params=["processor", "accelerator"], autouse=True)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an accelerator would compute is computed here too."""
    if request.param == "accelerator":
        monkeypatch.setattr(module, "_on_processor", module._on_accelerator)


def weights(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 20).to(dtype)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return tensor_digest("w", a) == tensor_digest("w", b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_counts(dtype):
    """Of 6 elements each bit is flipped alone: no two digests are equal."""
    w = weights(2, 3, dtype=dtype)
    flipped = []
    for place in range(w.nbytes):
        for bit in range(8):
            copy = w.clone()
            copy.view(-1).view(torch.uint8)[place] ^= 1 << bit
            flipped.append(tensor_digest("w", copy))
    assert len({tensor_digest("w", w), *flipped}) == 8 * w.nbytes + 1
    assert all(0 <= d < 1 << 64 for d in flipped)


def test_zeros_of_either_sign_are_not_the_same_bits():
    assert not same(torch.tensor([0.0]), torch.tensor([-0.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_swapped_elements_are_noticed(dtype):
    w = weights(40, dtype=dtype)
    assert len(set(w.tolist())) == 40
    for i, j in combinations(range(40), 2):
        order = list(range(40))
        order[i], order[j] = j, i
        assert not same(w, w[order]), (i, j)


@pytest.mark.parametrize("w", [weights(4, 4), torch.eye(4), torch.arange(16.0).reshape(4, 4)],
                         ids=["random", "identity", "counting"])
def test_moved_rows_and_columns_are_noticed(w):
    """Of the identity too, where swapping rows moves as many ones forwards as backwards."""
    for rows in ([1, 0, 2, 3], [1, 0, 3, 2], [3, 1, 2, 0], [3, 2, 1, 0], [1, 2, 3, 0]):
        assert not same(w, w[rows]), rows
        assert not same(w, w[:, rows]), rows
    assert same(w, w.T) == torch.equal(w, w.T)


def test_dtype_shape_and_name_count():
    """Though the bits are the same."""
    w = weights(2, 6)
    others = [w.view(torch.int32), w.reshape(6, 2), w.reshape(12), w.reshape(1, 2, 6), w.view(torch.bfloat16)]
    assert len({tensor_digest("w", x) for x in (w, *others)} | {tensor_digest("v", w)}) == len(others) + 2


def test_layout_and_graph_do_not_count():
    w = weights(4, 6)
    assert same(w, w.T.contiguous().T)
    assert same(w[:, ::2], w[:, ::2].clone())
    assert same(w, torch.nn.Parameter(w.clone()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_a_large_tensor_is_more_than_its_parts(monkeypatch, dtype):
    """It is walked through a few words at a time: two that change places are noticed wherever they are, and so is every
    element of the last word, which it fills only in part."""
    monkeypatch.setattr(module, "_WORDS", 2)
    w = torch.arange(1, 46).to(dtype)
    per_word = 4 // w.element_size()
    words = [w[i : i + per_word] for i in range(0, 5 * per_word, per_word)]
    orders = [torch.cat([words[i] for i in order]) for order in permutations(range(len(words)))]
    assert len({tensor_digest("w", x) for x in orders}) == len(orders) > 1
    for place in range(40, 45):
        changed = w.clone()
        changed[place] += 1
        assert not same(w, changed)


def test_a_view_that_begins_in_the_middle_of_a_word_is_what_it_shows():
    w = weights(41, dtype=torch.int8)
    for start in range(8):
        assert same(w[start:], w[start:].clone())


def test_tensors_in_any_order_have_the_same_sum():
    """Engines load weights in an order of their own. Two that got each other's contents are noticed."""
    tensors = {"a": weights(5), "b": weights(2, 3), "c": weights(5) + 1}
    digests = [tensor_digest(name, t) for name, t in tensors.items()]
    total = reduce(add_digests, digests)
    assert reduce(add_digests, reversed(digests)) == total
    assert 0 <= total < 1 << 64
    exchanged = {"a": tensors["c"], "b": tensors["b"], "c": tensors["a"]}
    assert reduce(add_digests, (tensor_digest(name, t) for name, t in exchanged.items())) != total
    assert reduce(add_digests, digests[:2]) != total


def test_nothing_and_a_scalar_have_digests():
    assert not same(torch.zeros(0), torch.zeros(0, 3))
    assert not same(torch.tensor(1.0), torch.tensor(2.0))


@pytest.mark.parametrize("words", [1, 1 << 16, (1 << 16) + 5, 65 << 16, (65 << 16) + 5])
def test_the_last_word_counts_however_many_there_are(words):
    """An accelerator takes parts of 65,536 words side by side, 64 at a time."""
    w = torch.arange(words, dtype=torch.int32)
    changed = w.clone()
    changed[-1] += 1
    assert not same(w, changed)
    if words > 1:
        changed[-1], changed[0] = w[0], w[-1]
        assert not same(w, changed)
