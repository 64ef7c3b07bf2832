"""Prompts: encoded once, then drawn in an endless shuffled stream that can be resumed."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_ray.config.schema import DataConfig
from rlhf_ray.data.formats import Prompt
from rlhf_ray.data.templates import encode_prompt
from rlhf_ray.errors import UserError


def encode_prompts(
    prompts: Sequence[Prompt], cfg: DataConfig, tokenizer: Any
) -> tuple[list[Prompt], list[list[int]], int]:
    """(the prompts kept, their token ids, how many were dropped for having more than data.max_prompt_tokens).

    Raises UserError if none is left.
    """
    encoded = [encode_prompt(p, cfg.template, tokenizer) for p in prompts]
    kept = [i for i, ids in enumerate(encoded) if len(ids) <= cfg.max_prompt_tokens]
    if not kept:
        raise UserError(f"none of {len(prompts)} prompts has at most data.max_prompt_tokens={cfg.max_prompt_tokens} "
                        "tokens: raise it, or give shorter prompts")
    return [prompts[i] for i in kept], [encoded[i] for i in kept], len(prompts) - len(kept)


class PromptStream:
    """Numbers 0..n-1 without end: each once per epoch, every epoch in an order of its own."""

    def __init__(self, count: int, seed: int):
        if count < 1:
            raise ValueError("a stream needs at least one prompt")
        self.count, self.seed = count, seed
        self.drawn = 0

    def take(self, n: int) -> np.ndarray:
        """The next n numbers, int64 [n]."""
        out = np.empty(n, dtype=np.int64)
        filled = 0
        while filled < n:
            epoch, at = divmod(self.drawn, self.count)
            order = np.random.default_rng((self.seed, epoch)).permutation(self.count)[at : at + n - filled]
            out[filled : filled + len(order)] = order
            filled += len(order)
            self.drawn += len(order)
        return out

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count, "seed": self.seed, "drawn": self.drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Raises ValueError if the state is of another stream."""
        if (state["count"], state["seed"]) != (self.count, self.seed):
            raise ValueError(f"state of a stream of {state['count']} prompts with seed {state['seed']}, this one has "
                             f"{self.count} and {self.seed}")
        self.drawn = state["drawn"]
