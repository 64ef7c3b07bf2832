"""Demonstrations as tokens. Covers lines 2 (one BOS), 3 (EOS is learnt) and 4 (masks from lengths) of the guide on
correctness."""

from typing import Any

import numpy as np
import pytest

from rlhf_ray.config.schema import Config
from rlhf_ray.data.formats import Demonstration, Message, Prompt
from rlhf_ray.errors import UserError
from rlhf_ray.models.tiny import train_tokenizer
from rlhf_ray.stages.sft import encode

BOS, EOS, USER, ASSISTANT = range(4)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer([], 260)  # special tokens and bytes: a letter is a token


def config(max_prompt_tokens: int = 64, max_length: int = 64, template: str = "chat") -> Config:
    cfg = Config()
    cfg.data.template, cfg.data.max_prompt_tokens, cfg.model.max_length = template, max_prompt_tokens, max_length
    return cfg


def demonstration(prompt: str, response: str) -> Demonstration:
    return Demonstration(Prompt((Message("user", prompt),)), response)


def letters(tokenizer: Any, text: str) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(c) for c in text]


def test_only_the_response_and_its_end_are_learnt(tokenizer: Any) -> None:
    data, dropped = encode([demonstration("ab", "cde"), demonstration("f", "g")], config(), tokenizer)
    assert data.ids.tolist() == [
        BOS, USER, *letters(tokenizer, "ab"), ASSISTANT, *letters(tokenizer, "cde"), EOS,
        BOS, USER, *letters(tokenizer, "f"), ASSISTANT, *letters(tokenizer, "g"), EOS,
    ]
    assert data.lengths.tolist() == [9, 6]
    assert data.in_loss.tolist() == [False] * 5 + [True] * 4 + [False] * 4 + [True] * 2
    assert (data.ids.dtype, data.lengths.dtype, data.in_loss.dtype) == (np.int32, np.int32, bool)
    assert dropped == 0


def test_the_mask_is_by_length_where_ids_repeat(tokenizer: Any) -> None:
    """The response is the prompt's text again, and an EOS (which is pad too) stands in an earlier turn."""
    turns = (Message("user", "ab"), Message("assistant", "ab"), Message("user", "ab"))
    data, _ = encode([Demonstration(Prompt(turns), "ab")] * 2, config(), tokenizer)
    assert data.ids[:15].tolist().count(EOS) == 2
    assert data.in_loss[:15].tolist() == [False] * 12 + [True] * 3


def test_a_form_without_chat_gets_one_bos(tokenizer: Any) -> None:
    data, _ = encode([demonstration("ab", "c")] * 2, config(template="none"), tokenizer)
    assert data.ids[:5].tolist() == [BOS, *letters(tokenizer, "abc"), EOS]
    assert data.in_loss[:5].tolist() == [False] * 3 + [True] * 2


def test_too_long_ones_are_dropped_and_counted(tokenizer: Any) -> None:
    """A prompt of n letters is n + 3 tokens, a response one more than its letters."""
    fits = demonstration("abc", "de")  # 6 + 3 = 9
    many = [fits, demonstration("abcd", "d"), fits, demonstration("abc", "def")]
    data, dropped = encode(many, config(max_prompt_tokens=6, max_length=9), tokenizer)
    assert data.lengths.tolist() == [9, 9]
    assert dropped == 2
    assert encode(many, config(7, 9), tokenizer)[1] == 1
    assert encode(many, config(7, 10), tokenizer)[1] == 0


@pytest.mark.parametrize(("texts", "fit"), [(("abcd", "abcd"), 0), (("a", "abcd"), 1)])
def test_none_left_or_too_few_to_hold_one_out(texts: tuple[str, ...], fit: int, tokenizer: Any) -> None:
    with pytest.raises(UserError) as error:
        encode([demonstration("a", t) for t in texts], config(max_length=8), tokenizer)
    assert f"{fit} of 2 demonstrations fit" in str(error.value)
    assert "model.max_length=8" in str(error.value)
    assert "data.max_prompt_tokens=64" in str(error.value)
