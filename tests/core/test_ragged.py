"""Ragged batches and packed rows. Covers line 4 of the rules in tests/README.md: masks come from lengths."""

import numpy as np
import pytest
import torch

from rlhf_ray.core.ragged import (
    PackedRows,
    families,
    family_limits,
    first_true,
    offsets,
    one_token_rows,
    pack,
    pad,
    plan_rows,
    take,
    unpad,
)
from rlhf_ray.core.types import RankedDataset, RolloutBatch

FLAT = np.array([10, 11, 12, 20, 30, 31], dtype=np.int32)  # three sequences end to end
LENGTHS = np.array([3, 1, 2], dtype=np.int32)


def test_offsets_are_starts_and_one_end() -> None:
    assert offsets(LENGTHS).tolist() == [0, 3, 4, 6]
    assert offsets(np.array([], dtype=np.int32)).tolist() == [0]


def test_offsets_do_not_overflow_the_type_of_the_lengths() -> None:
    assert offsets(np.array([2**31 - 1, 2**31 - 1], dtype=np.int32)).tolist() == [0, 2**31 - 1, 2**32 - 2]


def test_take_gives_whole_sequences_in_the_order_asked_for() -> None:
    assert take(FLAT, LENGTHS, [2, 0]).tolist() == [30, 31, 10, 11, 12]
    assert take(FLAT, LENGTHS, np.array([1, 1])).tolist() == [20, 20]
    nothing = take(FLAT, LENGTHS, [])
    assert len(nothing) == 0
    assert nothing.dtype == FLAT.dtype


def test_pad_puts_zeros_behind_and_unpad_takes_them_away() -> None:
    values, mask = pad(FLAT, LENGTHS)
    assert values.tolist() == [[10, 11, 12], [20, 0, 0], [30, 31, 0]]
    assert mask.tolist() == [[True, True, True], [True, False, False], [True, True, False]]
    assert unpad(values, mask).tolist() == FLAT.tolist()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.bool_])
def test_padding_round_trip_keeps_values_and_type(dtype: type) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 9, size=20)  # some sequences are empty
    flat = rng.integers(0, 5, size=lengths.sum()).astype(dtype)  # zeros are values here, not padding
    flat.flags.writeable = lengths.flags.writeable = False  # as arrays from Ray's object store are
    back = unpad(*pad(flat, lengths))
    assert back.dtype == dtype
    assert back.tolist() == flat.tolist()


def test_padding_nothing() -> None:
    values, mask = pad(np.zeros(0, np.float32), np.zeros(0, np.int32))
    assert values.shape == mask.shape == (0, 0)


# -- packing -----------------------------------------------------------------------------------------------------


def test_rows_are_about_equally_full() -> None:
    """By hand, 21 tokens want three rows of 8: 7, 5 and 4 open them, 3 goes to the row of 4, 2 to that of 5."""
    assert plan_rows(np.array([3, 7, 2, 5, 4]), 8) == [[1], [3, 2], [4, 0]]


def test_one_more_row_where_the_least_number_does_not_do() -> None:
    """Two rows of 8 would hold 15 tokens, but not three sequences of 5."""
    assert plan_rows(np.array([5, 5, 5]), 8) == [[0], [1], [2]]


def test_a_row_may_be_full_to_the_last_place() -> None:
    assert plan_rows(np.array([4, 4, 4, 4]), 8) == [[0, 2], [1, 3]]
    assert plan_rows(np.array([], dtype=np.int64), 8) == []


def test_a_sequence_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="sequence 1 has 9 tokens; a row holds 8"):
        plan_rows(np.array([3, 9]), 8)


def test_neighbours_are_about_equally_full() -> None:
    """Passes take rows in order, and are as wide as their fullest."""
    assert plan_rows(np.array([3, 8, 3, 7, 4]), 8) == [[1], [3], [0, 2], [4]]


def test_pack_by_hand() -> None:
    """Rows of 4 hold [sequence 0] and [sequences 2, 1]: two micro-batches of one row, or one of two."""
    first, second = pack(FLAT, LENGTHS, row_length=4, tokens_per_batch=4)
    assert first.ids.tolist() == [[10, 11, 12]]  # only as wide as its fullest row
    assert second.ids.tolist() == [[30, 31, 20]]
    assert second.positions.tolist() == [[0, 1, 0]]
    assert second.index.tolist() == [[4, 5, 3]]
    (both,) = pack(FLAT, LENGTHS, row_length=4, tokens_per_batch=8)
    assert both.ids.tolist() == [[10, 11, 12], [30, 31, 20]]
    assert both.filled.all()


def test_a_long_sequence_pads_as_few_rows_as_can_be() -> None:
    """Three rows in passes of two: the long one is alone, and the others as wide as they are."""
    (long, others) = pack(np.ones(17, dtype=np.int32), np.array([5, 7, 5]), 7, 14)
    assert (long.ids.shape, others.ids.shape) == ((1, 7), (2, 5))
    assert long.filled.all() and others.filled.all()


def test_empty_places_by_hand() -> None:
    """Rows of 3: one holds sequence 0, the other sequence 1 and two empty places."""
    (both,) = pack(FLAT[:4], LENGTHS[:2], row_length=3, tokens_per_batch=6)
    assert both.ids.tolist() == [[10, 11, 12], [20, 0, 0]]
    assert both.positions.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert both.index.tolist() == [[0, 1, 2], [3, -1, -1]]
    assert both.filled.tolist() == [[True] * 3, [True, False, False]]


def test_one_row_by_hand() -> None:
    """The two rows of the test above end to end; the empty places stay where they were."""
    (flat,) = pack(FLAT[:4], LENGTHS[:2], row_length=3, tokens_per_batch=6, one_row=True)
    assert flat.ids.tolist() == [[10, 11, 12, 20, 0, 0]]
    assert flat.positions.tolist() == [[0, 1, 2, 0, 0, 0]]
    assert flat.index.tolist() == [[0, 1, 2, 3, -1, -1]]
    assert flat.pick(FLAT, fill=-1).tolist() == [[10, 11, 12, 20, -1, -1]]


def test_one_row_changes_the_shape_only() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 17, size=60)
    ids = rng.integers(1, 1000, size=lengths.sum())
    usual, flat = (pack(ids, lengths, 16, 64, one_row=one_row) for one_row in (False, True))
    assert max(len(b.ids) for b in usual) == 4
    for a, b in zip(usual, flat, strict=True):
        assert b.ids.shape == (1, a.ids.numel())
        for name in ("ids", "positions", "index"):
            assert torch.equal(getattr(b, name).flatten(), getattr(a, name).flatten())


@pytest.mark.parametrize(("row_length", "tokens"), [(16, 16), (16, 50), (64, 200), (64, 10), (5, 40)])
def test_every_token_once_and_no_micro_batch_too_large(row_length: int, tokens: int) -> None:
    rng = np.random.default_rng(row_length + tokens)
    lengths = rng.integers(1, 17, size=60).astype(np.int32)
    ids = rng.integers(1, 1000, size=lengths.sum()).astype(np.int32)
    starts = offsets(lengths)
    batches = pack(ids, lengths, row_length, tokens)
    index = np.concatenate([b.index[b.filled].numpy() for b in batches])
    assert sorted(index) == list(range(len(ids)))
    for b in batches:
        rows, width = b.ids.shape
        assert width <= max(row_length, 16)
        assert rows * width <= tokens or rows == 1
        assert b.ids[b.filled].tolist() == ids[b.index[b.filled]].tolist()
        assert not b.ids[~b.filled].any()
        assert not b.positions[~b.filled].any()
        # a token's position is its distance from the start of its own sequence
        places = b.index[b.filled].numpy()
        sequence = np.searchsorted(starts, places, side="right") - 1
        assert b.positions[b.filled].tolist() == (places - starts[sequence]).tolist()
        # and sequences stay in one piece
        after = b.positions[:, 1:] > 0
        assert torch.equal(b.index[:, 1:][after], b.index[:, :-1][after] + 1)


def test_packing_computes_little_padding() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 33, size=300)
    batches = pack(np.ones(lengths.sum(), np.int32), lengths, 128, 512)
    assert sum(b.ids.numel() for b in batches) < 1.05 * lengths.sum()


def test_a_sequence_longer_than_row_length_gets_a_row_of_its_size() -> None:
    batches = pack(FLAT, LENGTHS, row_length=2, tokens_per_batch=2)
    assert [b.ids.tolist() for b in batches] == [[[10, 11, 12]], [[30, 31, 20]]]


def test_nothing_to_pack() -> None:
    assert pack(FLAT[:0], LENGTHS[:0], 4, 8) == []


def test_pick_brings_a_per_token_array_into_the_rectangle() -> None:
    (rows,) = pack(FLAT[:4], LENGTHS[:2], row_length=3, tokens_per_batch=6)
    weights = np.array([4.0, 1.0, 2.0, 3.0], dtype=np.float32)
    assert rows.pick(weights).tolist() == [[4, 1, 2], [3, 0, 0]]
    assert rows.pick(weights, fill=-1).tolist() == [[4, 1, 2], [3, -1, -1]]
    wanted = rows.pick(FLAT[:4] > 11)
    assert wanted.dtype == torch.bool
    assert wanted.tolist() == [[False, False, True], [True, False, False]]


@pytest.mark.filterwarnings("error")
def test_pick_on_a_device_brings_what_is_in_host_memory_there() -> None:
    rows = pack(FLAT, np.array([3, 1]), 4, 8)[0].to(torch.device("meta"))
    assert rows.pick(FLAT).device.type == "meta"


def test_pick_from_a_read_only_array() -> None:
    """What Ray hands out cannot be written: no warning, and nothing that writes to it by accident."""
    (rows,) = pack(FLAT, LENGTHS, row_length=4, tokens_per_batch=8)
    frozen = np.arange(6.0)
    frozen.flags.writeable = False
    picked = rows.pick(frozen)
    picked += 1
    assert frozen.tolist() == [0, 1, 2, 3, 4, 5]


def test_the_smallest_rectangle_is_all_empty() -> None:
    rows = one_token_rows()
    assert not rows.filled.any()
    assert rows.ids.shape == rows.positions.shape


# -- masks -------------------------------------------------------------------------------------------------------


def test_responses_are_told_by_lengths_whatever_the_ids() -> None:
    """0 is pad, EOS and a word here: in the prompt, inside the response and at its end. One response has one token."""
    ids = np.array([5, 0, 0, 7, 0, 0, 0, 0], dtype=np.int32)
    lengths, prompts = np.array([5, 3], dtype=np.int32), np.array([2, 2], dtype=np.int32)
    batch = RolloutBatch(
        ids=ids, lengths=lengths, prompt_lengths=prompts, sampled_logprobs=np.zeros(8, np.float32),
        truncated=np.array([False, False]), prompt_index=np.array([0, 1]), positions=np.array([0, 1]),
        seeds=np.array([1, 2]), version=1,
    )
    ranked = RankedDataset(ids, lengths, np.array([1, 2]), np.array([0, 0]), prompts)
    assert ranked.in_response.tolist() == batch.in_response.tolist()
    assert batch.in_response.tolist() == [
        False, False, True, True, True,
        False, False, True,
    ]


# -- responses that share their prompt ---------------------------------------------------------------------------------

TREE = np.array([7, 8, 1, 2, 7, 8, 3, 9, 4, 7, 8, 5], dtype=np.int32)  # 7 8 | 1 2, 7 8 | 3, 9 | 4, 7 8 | 5
TREE_LENGTHS, TREE_PROMPTS = np.array([4, 3, 2, 3]), np.array([2, 2, 1, 2])


def test_families_have_one_prompt_and_are_no_longer_than_the_limit() -> None:
    """2 + 2 + 1 + 1 tokens, the prompt once; with 5 the last one begins another family."""
    assert families(TREE, TREE_LENGTHS, TREE_PROMPTS, np.full(4, 6)) == [[0, 1, 3], [2]]
    assert families(TREE, TREE_LENGTHS, TREE_PROMPTS, np.full(4, 5)) == [[0, 1], [2], [3]]
    assert families(TREE, TREE_LENGTHS, TREE_PROMPTS, np.full(4, 1)) == [[0], [1], [2], [3]]


def test_who_has_no_prompt_or_no_response_is_alone() -> None:
    assert families(TREE, TREE_LENGTHS, np.zeros(4, dtype=np.int64), np.full(4, 99)) == [[0], [1], [2], [3]]
    twice, two = np.array([1, 2, 1, 2], dtype=np.int32), np.array([2, 2])
    assert families(twice, two, two, np.full(2, 99)) == [[0], [1]]


def test_a_shared_prompt_by_hand() -> None:
    """7 8 1 2 3 5 | 9 4 in one row: what comes before 3 and 5 is the prompt's end, and each sees it and itself."""
    (rows,) = pack(TREE, TREE_LENGTHS, 8, 8, prompts=TREE_PROMPTS)
    assert rows.ids.tolist() == [[7, 8, 1, 2, 3, 5, 9, 4]]
    assert rows.positions.tolist() == [[0, 1, 2, 3, 2, 2, 0, 1]]
    assert rows.index.tolist() == [[0, 1, 2, 3, 6, 11, 7, 8]]
    states = torch.tensor([[[10.0], [11.0], [12.0], [13.0], [14.0], [15.0], [16.0], [17.0]]])
    assert rows.before(states)[0, [1, 2, 3, 4, 5, 7], 0].tolist() == [10, 11, 12, 11, 11, 16]  # not of first tokens
    sees = {0: [0], 1: [0, 1], 2: [0, 1, 2], 3: [0, 1, 2, 3], 4: [0, 1, 4], 5: [0, 1, 5], 6: [6], 7: [6, 7]}
    visible = rows.visible()
    assert visible is not None and visible.shape == (1, 1, 8, 8)
    assert {i: visible[0, 0, i].nonzero().flatten().tolist() for i in range(8)} == sees


def test_empty_places_see_themselves_alone() -> None:
    rows = pack(TREE, TREE_LENGTHS, 6, 12, prompts=TREE_PROMPTS)[0]
    assert rows.ids.tolist() == [[7, 8, 1, 2, 3, 5], [9, 4, 0, 0, 0, 0]]
    visible = rows.visible()
    assert visible is not None
    assert [visible[1, 0, i].nonzero().flatten().tolist() for i in range(2, 6)] == [[2], [3], [4], [5]]


def test_without_a_shared_prompt_positions_say_it_all() -> None:
    """As if prompts had not been named."""
    prompts = TREE_PROMPTS.copy()
    prompts[:2] = 4, 3  # these two have no response
    (rows,), (plain,) = (pack(TREE, TREE_LENGTHS, 12, 12, prompts=p) for p in (prompts, None))
    assert rows.links is None and rows.visible() is None
    assert (rows.ids.tolist(), rows.positions.tolist()) == (plain.ids.tolist(), plain.positions.tolist())
    states = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    two = PackedRows(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3))
    assert two.before(states).tolist() == [[0, 1, 2], [0, 4, 5]]


def test_a_family_may_be_longer_than_a_row() -> None:
    """As far as that gains, if a micro-batch has as many: 2 + 32 x 3 = 98 tokens for 32 responses of 40, 26 for the
    others; else as many as fit."""
    ids = np.array([7, 8, 1, 2, 3] * 40, dtype=np.int32)
    lengths, prompts = np.full(40, 5), np.full(40, 2)
    assert family_limits(prompts).tolist() == [98] * 40
    assert [rows.filled.sum() for rows in pack(ids, lengths, 5, 100, prompts=prompts)] == [98, 26]
    assert [tuple(rows.ids.shape) for rows in pack(ids, lengths, 5, 32, prompts=prompts)] == [(1, 32)] * 4


@pytest.mark.parametrize("prompt", [1, 32, 500])
def test_a_family_ends_where_attention_costs_what_the_prompt_does(prompt: int) -> None:
    """Two halves compute the prompt twice, the whole attends to 2s instead of s tokens; 2,500 cost a token."""
    (limit,) = family_limits(np.array([prompt]))
    half = (limit + prompt) / 2
    assert 2 * half * half / 2_500 == pytest.approx(prompt, rel=0.05)


@pytest.mark.parametrize("seed", range(5))
def test_every_response_token_once_and_every_token_knows_its_past(seed: int) -> None:
    """Following `before` from a token to the first gives the sequence up to it; `visible` is the same set."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, 5, size=n).tolist() for n in (1, 3, 3, 6)]
    sequences = [prompts[k] + rng.integers(0, 9, size=rng.integers(0, 7)).tolist() for k in rng.integers(0, 4, size=20)]
    lengths = np.array([len(s) for s in sequences])
    known = np.array([next(len(p) for p in prompts if s[: len(p)] == p) for s in sequences])
    flat = np.concatenate(sequences).astype(np.int32)
    owner = np.repeat(np.arange(20), lengths)
    seen: list[int] = []
    for rows in pack(flat, lengths, 12, 40, prompts=known):
        visible = rows.visible()
        for r, place in rows.filled.nonzero().tolist():
            at = int(rows.index[r, place])
            past = flat[offsets(lengths)[owner[at]] : at + 1].tolist()
            walk = [place]
            while rows.positions[r, walk[-1]]:
                walk.append(walk[-1] - 1 if rows.links is None else int(rows.links[0, r, walk[-1]]))
            assert rows.ids[r, walk[::-1]].tolist() == past
            if visible is not None:
                assert visible[r, 0, place].nonzero().flatten().tolist() == walk[::-1]
            seen.append(at)
    in_response = np.arange(len(flat)) - offsets(lengths)[owner] >= known[owner]
    assert sorted(set(seen)) == sorted(seen) and set(np.flatnonzero(in_response)) <= set(seen)


def test_first_true_by_hand() -> None:
    """0 0 1 | 1 | 0 0, which has none."""
    assert first_true(np.array([0, 0, 1, 1, 0, 0], dtype=bool), np.array([3, 1, 2])).tolist() == [2, 0, 0]
    assert first_true(np.zeros(0, dtype=bool), np.zeros(0, dtype=np.int64)).tolist() == []
