"""Plain text as token blocks of one length."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_ray.core.types import TokenDataset
from rlhf_ray.errors import UserError

BATCH = 1024  # documents tokenized at once: a corpus as Python lists takes ten times its size as int32


def some_blocks(blocks: np.ndarray, count: int, seed: int) -> np.ndarray:
    """`count` blocks (or all, if there are fewer) from all over: documents may lie in an order, by label say."""
    return blocks[np.sort(np.random.default_rng(seed).permutation(len(blocks))[:count])]


def token_blocks(texts: Sequence[str], tokenizer: Any, block_length: int) -> np.ndarray:
    """Documents, each as BOS + tokens + EOS, end to end, cut into blocks: int32 [n, block_length].

    The tail that fills no block is dropped. Raises UserError if there is not one whole block.
    """
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    last = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pieces = [np.zeros(0, dtype=np.int32)]
    for start in range(0, len(texts), BATCH):
        batch = tokenizer(list(texts[start : start + BATCH]), add_special_tokens=False, return_attention_mask=False)
        pieces.append(np.array([i for tokens in batch["input_ids"] for i in (*first, *tokens, *last)], dtype=np.int32))
    ids = np.concatenate(pieces)
    count = len(ids) // block_length
    if count == 0:
        raise UserError(f"{len(texts)} texts make {len(ids)} tokens, less than one block of {block_length}: give more "
                        "text (data.texts, data.eval_texts)")
    return ids[: count * block_length].reshape(count, block_length)


def block_dataset(blocks: np.ndarray) -> TokenDataset:
    """Blocks [N, L] as supervised text: every token but the first of its block is learnt."""
    in_loss = np.ones(blocks.shape, dtype=bool)
    in_loss[:, 0] = False
    return TokenDataset(blocks.reshape(-1), np.full(len(blocks), blocks.shape[1], dtype=np.int32), in_loss.reshape(-1))
