"""The stream of prompts, and which prompts are too long for it. Covers line 7 of the rules in tests/README.md."""

from typing import Any

import numpy as np
import pytest

from rlhf_ray.config.schema import DataConfig
from rlhf_ray.data.formats import Message, Prompt
from rlhf_ray.data.prompts import PromptStream, encode_prompts
from rlhf_ray.errors import UserError


def test_every_prompt_once_per_epoch_and_every_epoch_in_another_order() -> None:
    stream = PromptStream(50, seed=3)
    first, second = stream.take(50), stream.take(50)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first.dtype == np.int64
    assert (first != second).any()


def test_the_order_does_not_depend_on_how_much_is_taken_at_once() -> None:
    whole, bits = PromptStream(7, seed=1).take(60), PromptStream(7, seed=1)
    assert np.concatenate([bits.take(n) for n in (1, 0, 20, 7, 32)]).tolist() == whole.tolist()


def test_seeds_differ() -> None:
    assert (PromptStream(50, seed=0).take(50) != PromptStream(50, seed=1).take(50)).any()


def test_it_goes_on_where_it_was() -> None:
    stream, resumed = PromptStream(9, seed=2), PromptStream(9, seed=2)
    stream.take(13)
    resumed.load_state_dict(stream.state_dict())
    assert resumed.take(20).tolist() == stream.take(20).tolist()


def test_the_state_of_another_stream_is_refused() -> None:
    with pytest.raises(ValueError, match="state of a stream of 9 prompts with seed 2"):
        PromptStream(8, seed=2).load_state_dict(PromptStream(9, seed=2).state_dict())


def prompts(*contents: str) -> list[Prompt]:
    return [Prompt((Message("user", c),)) for c in contents]


def test_long_prompts_are_dropped_and_counted(tokenizer: Any) -> None:
    cfg = DataConfig(template="none", max_prompt_tokens=4)  # a BOS and three bytes
    asked = prompts("abc", "abcd", "ab")
    kept, encoded, dropped = encode_prompts(asked, cfg, tokenizer)
    assert kept == [asked[0], asked[2]]
    assert [len(e) for e in encoded] == [4, 3]
    assert dropped == 1


def test_nothing_left(tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"none of 1 prompts has at most data\.max_prompt_tokens=3 tokens"):
        encode_prompts(prompts("abc"), DataConfig(template="none", max_prompt_tokens=3), tokenizer)
