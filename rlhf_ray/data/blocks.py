"""Plain text as token blocks of one length."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_ray.errors import UserError


def token_blocks(texts: Sequence[str], tokenizer: Any, block_length: int) -> np.ndarray:
    """Documents, each as BOS + tokens + EOS, end to end, cut into blocks: int32 [n, block_length].

    The tail that fills no block is dropped. Raises UserError if there is not one whole block.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids: list[int] = []
    for tokens in tokenizer(list(texts), add_special_tokens=False)["input_ids"]:
        ids += [*bos, *tokens, tokenizer.eos_token_id]
    count = len(ids) // block_length
    if count == 0:
        raise UserError(f"{len(texts)} texts make {len(ids)} tokens, less than one block of {block_length}: give more "
                        "text (data.texts, data.eval_texts)")
    return np.array(ids[: count * block_length], dtype=np.int32).reshape(count, block_length)
