"""How a prompt becomes text and ids. Covers line 2 of the rules in tests/README.md: one BOS, never two."""

from typing import Any

import pytest

from rlhf_ray.data.formats import Message, Prompt
from rlhf_ray.data.templates import encode_prompt, encode_response, render_prompt
from rlhf_ray.errors import UserError

ASK = Prompt((Message("user", "Ask {x}"),))  # braces: user text is no format string
WITH_INPUT = Prompt(ASK.turns, "this")
TALK = Prompt((Message("system", "Be brief"), Message("user", "Ask")))


def test_alpacas_published_forms(tokenizer: Any) -> None:
    assert render_prompt(ASK, "alpaca", tokenizer) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAsk {x}\n\n### Response:"
    )
    assert render_prompt(WITH_INPUT, "alpaca", tokenizer) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAsk {x}\n\n### Input:\nthis\n\n### Response:"
    )


def test_alpaca_has_room_for_one_turn(tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"data\.template=alpaca takes one turn, got 2: set data\.template=chat"):
        render_prompt(TALK, "alpaca", tokenizer)


def test_chat_and_plain(tokenizer: Any) -> None:
    assert render_prompt(TALK, "chat", tokenizer) == "<s><system>Be brief<user>Ask<assistant>"
    assert render_prompt(WITH_INPUT, "chat", tokenizer) == "<s><user>Ask {x}\n\nthis<assistant>"
    assert render_prompt(TALK, "none", tokenizer) == "Ask"


def test_a_tokenizer_without_chat_template_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"no chat template: set data\.template"):
        render_prompt(ASK, "chat", tokenizer)


def test_a_chat_template_that_refuses_the_turns_is_the_users_to_mend(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(UserError, match=r"refuses the roles \['system', 'user'\]: no system role"):
        render_prompt(TALK, "chat", tokenizer)


@pytest.mark.parametrize(("template", "content"), [
    ("chat", "Ask"), ("alpaca", "Ask"), ("none", "Ask"), ("none", "<s>Ask"),  # the last one brings its own
])
def test_one_bos(template: str, content: str, tokenizer: Any) -> None:
    ids = encode_prompt(Prompt((Message("user", content),)), template, tokenizer)
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id not in ids


def test_a_tokenizer_without_bos_gets_none(tokenizer: Any) -> None:
    tokenizer.bos_token = None
    assert tokenizer.decode(encode_prompt(ASK, "none", tokenizer)) == "Ask {x}"


def test_a_response_ends_with_eos_and_has_no_bos(tokenizer: Any) -> None:
    ids = encode_response("Answer", tokenizer)
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[:-1]) == "Answer"
