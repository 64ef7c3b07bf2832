"""Text as blocks of one length."""

from typing import Any

import numpy as np
import pytest

from rlhf_ray.data import blocks
from rlhf_ray.data.blocks import block_dataset, some_blocks, token_blocks
from rlhf_ray.errors import UserError


def test_documents_run_on_between_bos_and_eos_and_the_tail_is_dropped(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BATCH", 2)  # documents go on over the border of a batch
    out = token_blocks(["abc", "de", "fghij"], tokenizer, 5)
    assert out.dtype == np.int32
    assert out.shape == (3, 5)
    assert "".join(tokenizer.convert_ids_to_tokens(out.reshape(-1))) == "<s>abc</s><s>de</s><s>fghij"


def test_less_than_one_block(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="1 texts make 5 tokens, less than one block of 6"):
        token_blocks(["abc"], tokenizer, 6)
    with pytest.raises(UserError, match="0 texts make 0 tokens"):
        token_blocks([], tokenizer, 6)


def test_some_blocks_are_from_all_over_and_in_order() -> None:
    """20 of 100: rows as they are, none twice; an ordered corpus (by label, say) gives some of each quarter."""
    every = np.arange(200, dtype=np.int32).reshape(100, 2)
    out = some_blocks(every, 20, seed=0)
    rows = out[:, 0] // 2
    assert out.dtype == np.int32
    assert out.tolist() == every[rows].tolist()
    assert (np.diff(rows) > 0).all()
    assert len(rows) == 20
    assert set(rows // 25) == {0, 1, 2, 3}
    assert some_blocks(every, 20, seed=0).tolist() == out.tolist() != some_blocks(every, 20, seed=1).tolist()


@pytest.mark.parametrize("count", [3, 5])
def test_all_blocks_if_there_are_no_more(count: int) -> None:
    every = np.arange(6).reshape(3, 2)
    assert some_blocks(every, count, seed=0).tolist() == every.tolist()


def test_all_but_the_first_token_of_a_block_is_learnt():
    data = block_dataset(np.arange(6, dtype=np.int32).reshape(2, 3))
    assert data.ids.tolist() == [0, 1, 2, 3, 4, 5]
    assert data.lengths.tolist() == [3, 3]
    assert data.in_loss.tolist() == [False, True, True, False, True, True]
