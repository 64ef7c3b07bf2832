"""The small tokenizer and the small Llama. Covers rule 2 of tests/README.md: the template writes one BOS."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from rlhf_ray.config.schema import ModelConfig, PretrainConfig
from rlhf_ray.models.hub import load_causal_lm, load_tokenizer
from rlhf_ray.models.tiny import ASSISTANT, BOS, EOS, USER, new_llama, save_untrained, train_tokenizer

TEXTS = ["the film is good, the film is long", "the actors are good", "a story told with warmth", "slow and dull",
         "what a surprising, funny and moving comedy", "nobody needs another sequel"] * 20
CFG = PretrainConfig(vocab_size=320, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=64, block_length=16)
USER_TURN = {"role": "user", "content": "the film"}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 320)


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# -- tokenizer ---------------------------------------------------------------------------------------------------


def test_special_tokens_are_single_ids(tokenizer: Any) -> None:
    assert [ids(tokenizer, t) for t in (BOS, EOS, USER, ASSISTANT)] == [[0], [1], [2], [3]]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 1)
    assert ids(tokenizer, f"a{USER}b") == [*ids(tokenizer, "a"), 2, *ids(tokenizer, "b")]


def test_special_tokens_are_not_in_the_text_of_a_response(tokenizer: Any) -> None:
    assert tokenizer.decode(ids(tokenizer, f"{BOS}good{EOS}"), skip_special_tokens=True) == "good"
    assert tokenizer.decode(ids(tokenizer, f"{USER}a{ASSISTANT}b"), skip_special_tokens=True) == "ab"


def test_the_vocabulary_has_the_size_asked_for_and_knows_common_words(tokenizer: Any) -> None:
    assert len(tokenizer) == 320
    assert len(ids(tokenizer, " film")) == 1  # 4 special tokens and 256 bytes leave room for 60 merges


@pytest.mark.parametrize("text", [
    "the film", " leading, trailing  and   inner spaces ", "tab\t and\nnew\r\nlines\n\n", "don't . stop !", "naïve",
    "日本語 и русский", "👩‍👩‍👧 \U0001f600", "e\u0301 is not \u00e9", "\x00\x7f\u200b\ufeff", "\U0010ffff",
    "".join(chr(c) for c in range(0x20, 0x500)),
])
def test_any_text_comes_back_as_it_was(text: str, tokenizer: Any) -> None:
    """Bytes are the fallback: nothing is unknown, and nothing is tidied up."""
    assert tokenizer.decode(ids(tokenizer, text)) == text


def test_the_tokenizer_adds_nothing_of_its_own(tokenizer: Any) -> None:
    assert tokenizer("good")["input_ids"] == ids(tokenizer, "good")


def test_the_chat_template_by_hand(tokenizer: Any) -> None:
    def render(*messages: dict[str, str], answer: bool) -> str:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer)

    reply = {"role": "assistant", "content": " is good"}
    assert render(USER_TURN, answer=True) == "<|bos|><|user|>the film<|assistant|>"
    assert render(USER_TURN, answer=False) == "<|bos|><|user|>the film"
    assert render(USER_TURN, reply, answer=False) == "<|bos|><|user|>the film<|assistant|> is good<|eos|>"
    assert render(USER_TURN, reply, USER_TURN, answer=True) == (
        "<|bos|><|user|>the film<|assistant|> is good<|eos|><|user|>the film<|assistant|>")


def test_a_prompt_and_its_answer_are_the_beginning_and_end_of_the_conversation(tokenizer: Any) -> None:
    """What the policy reads in a rollout is what it read in training, token by token."""
    prompt = ids(tokenizer, tokenizer.apply_chat_template([USER_TURN], tokenize=False, add_generation_prompt=True))
    whole = ids(tokenizer, tokenizer.apply_chat_template(
        [USER_TURN, {"role": "assistant", "content": " is good"}], tokenize=False))
    assert prompt[0] == 0
    assert prompt[-1] == 3
    assert whole == [*prompt, *ids(tokenizer, " is good"), 1]
    assert whole.count(0) == 1


def test_training_it_again_gives_the_same_tokenizer(tokenizer: Any) -> None:
    assert train_tokenizer(TEXTS, 320).get_vocab() == tokenizer.get_vocab()


# -- model -------------------------------------------------------------------------------------------------------


def test_the_head_shares_the_embeddings(tokenizer: Any) -> None:
    model = new_llama(CFG, 64, tokenizer, seed=0)
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


def test_the_shape_by_hand(tokenizer: Any) -> None:
    """Embeddings 320 x 32; a layer: four 32 x 32, three 32 x 64, two norms of 32; two layers and a last norm."""
    model = new_llama(CFG, 64, tokenizer, seed=0)
    assert sum(p.numel() for p in model.parameters()) == 320 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (0, 1, 1)


@pytest.mark.parametrize(("max_length", "positions"), [(8, 16), (64, 64)])
def test_it_holds_the_longest_of_context_and_training_block(max_length: int, positions: int, tokenizer: Any) -> None:
    assert new_llama(CFG, max_length, tokenizer, seed=0).config.max_position_embeddings == positions


def test_the_seed_decides_the_weights(tokenizer: Any) -> None:
    first, again, other = (new_llama(CFG, 64, tokenizer, seed).model.embed_tokens.weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_an_untrained_model_knows_nothing(tokenizer: Any) -> None:
    """Its loss is that of a guess among all tokens, ln 320, within a few percent."""
    model = new_llama(CFG, 64, tokenizer, seed=0).eval()
    text = torch.tensor([ids(tokenizer, TEXTS[0])])
    with torch.no_grad():
        loss = float(model(input_ids=text, labels=text).loss)
    assert loss == pytest.approx(5.768, rel=0.05)


def test_model_and_tokenizer_go_to_disk_together(tokenizer: Any, tmp_path: Path) -> None:
    save_untrained(CFG, 64, TEXTS, tmp_path / "model", seed=5)
    read = load_tokenizer(str(tmp_path / "model"))
    model = load_causal_lm(str(tmp_path / "model"), ModelConfig(dtype="float32"))
    assert model.config.vocab_size == len(read) == 320
    assert read.get_vocab() == tokenizer.get_vocab()
    assert read.chat_template == tokenizer.chat_template
    assert torch.equal(model.model.embed_tokens.weight, new_llama(CFG, 64, tokenizer, 5).model.embed_tokens.weight)
    assert model.lm_head.weight is model.model.embed_tokens.weight
