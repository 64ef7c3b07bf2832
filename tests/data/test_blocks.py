"""Text as blocks of one length."""

from typing import Any

import numpy as np
import pytest

from rlhf_ray.data import blocks
from rlhf_ray.data.blocks import token_blocks
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
