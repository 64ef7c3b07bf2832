"""Models on disk: what is saved is what plain transformers reads, whole or not at all.

Covers lines 24 (the reward bias is stored with the model), 32 (the critic's head is the reward model's) and 39 (one
name of a tied pair), and of 17 that no dropout is on unless it was asked for, of the rules in tests/README.md.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from disks import Disk
from rlhf_ray import storage
from rlhf_ray.config.schema import ModelConfig
from rlhf_ray.errors import UserError
from rlhf_ray.models.hub import (
    SCORE_SHIFT,
    Packer,
    check_same_tokenizer,
    load_causal_lm,
    load_scalar_model,
    load_tokenizer,
    save_model,
    score_shift,
)
from rlhf_ray.models.tiny import train_tokenizer

CFG = ModelConfig(dtype="float32")
IDS = torch.tensor([[1, 5, 9, 200, 7]])


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """But for the order in which products are added up."""
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4)



@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["a small text"], 300)


def llama(tied: bool = True, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        initializer_range=0.3,
    )).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def saved(model: Any, tokenizer: Any, path: Path, dtype: str = "float32", **config: Any) -> str:
    save_model(model, model.named_parameters(), tokenizer, path, dtype, **config)
    return str(path)


# -- saving ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_plain_transformers_reads_the_same_model(tied: bool, tokenizer: Any, tmp_path: Path) -> None:
    model = llama(tied)
    path = saved(model, tokenizer, tmp_path / "model")
    read = AutoModelForCausalLM.from_pretrained(path)
    assert read.dtype == torch.float32
    assert same(logits(read), logits(model))
    assert AutoTokenizer.from_pretrained(path).encode("a small text") == tokenizer.encode("a small text")


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_not_stored_twice(tied: bool, tokenizer: Any, tmp_path: Path) -> None:
    """Also when the weights come with both names, as from an average of all of them."""
    model = llama(tied)
    weights = [*model.named_parameters(remove_duplicate=False)]
    assert "lm_head.weight" in dict(weights)
    save_model(model, weights, tokenizer, tmp_path / "model", "float32")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert ("lm_head.weight" in stored) is not tied
    assert set(stored) | {"lm_head.weight"} == {name for name, _ in weights}
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert (read.lm_head.weight is read.model.embed_tokens.weight) is tied
    assert same(logits(read), logits(model))


def test_the_dtype_of_the_file_and_of_the_loaded_model(tokenizer: Any, tmp_path: Path) -> None:
    path = saved(llama(), tokenizer, tmp_path / "model", "bfloat16")
    assert {t.dtype for t in load_file(tmp_path / "model" / "model.safetensors").values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(path).dtype == torch.bfloat16  # config.json says so
    assert load_causal_lm(path, ModelConfig(dtype="float32")).dtype == torch.float32


def test_saving_writes_what_is_given_and_not_what_the_model_holds(tokenizer: Any, tmp_path: Path) -> None:
    """A ZeRO-3 rank's own parameters are empty shells; a moving average is not the model either."""
    other = llama(seed=1)
    save_model(llama(seed=0), other.named_parameters(), tokenizer, tmp_path / "model", "float32")
    assert same(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model")), logits(other))


def test_a_weight_may_be_gone_once_the_next_one_is_drawn(tokenizer: Any, tmp_path: Path) -> None:
    """Gathered weights are valid until the next is drawn: each must have been copied by then."""
    model, one_buffer = llama(), torch.empty(300 * 32)

    def gathered() -> Iterator[tuple[str, torch.Tensor]]:
        for name, p in model.named_parameters():
            one_buffer.fill_(float("nan"))
            view = one_buffer[: p.numel()].view(p.shape)
            view.copy_(p.detach())
            yield name, view

    save_model(model, gathered(), tokenizer, tmp_path / "model", "float32")
    assert same(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model")), logits(model))


def test_a_new_model_takes_the_place_of_the_old_one(tokenizer: Any, tmp_path: Path) -> None:
    saved(llama(seed=0), tokenizer, tmp_path / "model", **{SCORE_SHIFT: 1.0})
    (tmp_path / "model" / "stray.txt").write_text("of the old model")
    path = saved(llama(seed=1), tokenizer, tmp_path / "model")
    assert same(logits(AutoModelForCausalLM.from_pretrained(path)), logits(llama(seed=1)))
    assert score_shift(path) == 0.0
    assert not (tmp_path / "model" / "stray.txt").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_crash_while_saving_leaves_the_old_model(tokenizer: Any, tmp_path: Path) -> None:
    path = saved(llama(seed=0), tokenizer, tmp_path / "model")

    def breaks() -> Iterator[tuple[str, torch.Tensor]]:
        yield next(llama(seed=1).named_parameters())
        raise RuntimeError("a rank died")

    with pytest.raises(RuntimeError, match="a rank died"):
        save_model(llama(seed=1), breaks(), tokenizer, tmp_path / "model", "float32")
    assert same(logits(load_causal_lm(path, CFG)), logits(llama(seed=0)))
    load_tokenizer(path)


@pytest.mark.parametrize("pages", [1, 31, 34])  # of 4 KiB: too few for weights, for the config, for the tokenizer
def test_a_full_disk_is_one_line_and_leaves_the_old_model(pages: int, tokenizer: Any, small_disk: Disk) -> None:
    path = small_disk.path / "model"
    saved(llama(seed=0), tokenizer, path)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    small_disk.fill(4096 * pages)
    with pytest.raises(UserError, match=f"^cannot write {path}: .*No space left.*; 0.00 GiB are free there; "):
        saved(llama(seed=1), tokenizer, path)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert sorted(p.name for p in small_disk.path.iterdir()) == ["filler", "model"]
    small_disk.empty()
    assert same(logits(load_causal_lm(saved(llama(seed=1), tokenizer, path), CFG)), logits(llama(seed=1)))


def test_a_read_only_disk_is_one_line(tokenizer: Any, small_disk: Disk) -> None:
    small_disk.forbid()
    with pytest.raises(UserError, match=f"^cannot write {small_disk.path}/model: Read-only file system; "):
        saved(llama(), tokenizer, small_disk.path / "model")


# -- reward models -----------------------------------------------------------------------------------------------


def test_a_scalar_head_that_is_not_there_yet_starts_at_zero(tokenizer: Any, tmp_path: Path) -> None:
    model = llama()
    torch.manual_seed(3)
    scalar = load_scalar_model(saved(model, tokenizer, tmp_path / "sft"), CFG)
    assert scalar.score.weight.shape == (1, 32)
    assert not scalar.score.weight.any()
    assert torch.equal(scalar.model.embed_tokens.weight, model.model.embed_tokens.weight)  # the body is the SFT model's
    assert torch.equal(scalar.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight)


def test_a_trained_scalar_head_is_kept(tokenizer: Any, tmp_path: Path) -> None:
    reward = load_scalar_model(saved(llama(), tokenizer, tmp_path / "sft"), CFG)
    with torch.no_grad():
        reward.score.weight.copy_(torch.arange(32.0)[None])
    path = saved(reward, tokenizer, tmp_path / "reward")
    for read in (load_scalar_model(path, CFG), AutoModelForSequenceClassification.from_pretrained(path)):
        assert read.config.num_labels == 1
        assert read.score.weight.tolist() == [list(range(32))]


def test_the_reward_bias_is_stored_with_the_model(tokenizer: Any, tmp_path: Path) -> None:
    reward = load_scalar_model(saved(llama(), tokenizer, tmp_path / "sft"), CFG)
    assert score_shift(saved(reward, tokenizer, tmp_path / "with", **{SCORE_SHIFT: -0.625})) == -0.625
    assert score_shift(saved(reward, tokenizer, tmp_path / "without")) == 0.0
    assert json.loads((tmp_path / "with" / "config.json").read_text())["score_shift"] == -0.625


# -- loading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [
    lambda path: load_causal_lm(path, CFG), lambda path: load_scalar_model(path, CFG), load_tokenizer,
])
def test_a_directory_without_a_model_is_named(load: Any, tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(UserError, match=r"expected a directory with config\.json") as error:
            load(str(path))
        assert f"no model in '{path}'" in str(error.value)


def test_a_model_without_weights_is_the_users_to_mend(tokenizer: Any, tmp_path: Path) -> None:
    path = saved(llama(), tokenizer, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot load a model from") as error:
        load_causal_lm(path, CFG)
    assert path in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_tokenizer_that_cannot_end_a_response_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    path = saved(llama(), tokenizer, tmp_path / "model")
    assert load_tokenizer(path).eos_token == "<|eos|>"
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<|bos|>")
    path = saved(llama(), plain, tmp_path / "endless")
    with pytest.raises(UserError, match="has no eos_token") as error:
        load_tokenizer(path)
    assert path in str(error.value)


def test_dropout_is_what_is_asked_for_and_not_what_the_model_came_with(tokenizer: Any, tmp_path: Path) -> None:
    """Train mode included, since gradients are computed in it. What is saved later keeps the model's own value."""
    came = llama()
    came.config.attention_dropout = 0.9
    path = saved(came, tokenizer, tmp_path / "model")
    for model in (load_causal_lm(path, CFG).train(), load_scalar_model(path, CFG).train()):
        assert torch.equal(model.model(input_ids=IDS)[0], model.model.eval()(input_ids=IDS)[0])
        again = saved(model, tokenizer, tmp_path / "again")
        assert json.loads((Path(again) / "config.json").read_text())["attention_dropout"] == 0.9
    dropping = load_causal_lm(path, CFG, dropout=0.5).train()
    assert not torch.equal(logits(dropping), logits(dropping))
    assert same(logits(dropping.eval()), logits(came))


def test_dropout_that_is_a_number_of_a_module_is_set_too(tmp_path: Path) -> None:
    """OPT has no nn.Dropout: its modules hold `dropout` as a float, under two names in config.json."""
    torch.manual_seed(0)
    OPTForCausalLM(OPTConfig(
        vocab_size=300, hidden_size=32, word_embed_proj_dim=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64,
        max_position_embeddings=64, dropout=0.9, attention_dropout=0.8, init_std=0.3,
    )).save_pretrained(tmp_path)
    model = load_causal_lm(str(tmp_path), CFG).train()
    assert same(logits(model), logits(model.eval()))
    layer = load_causal_lm(str(tmp_path), CFG, dropout=0.25).model.decoder.layers[0]
    assert (layer.dropout, layer.self_attn.dropout) == (0.25, 0.25)


def test_gradient_checkpointing_is_the_configurations_and_changes_no_gradient(tokenizer: Any, tmp_path: Path) -> None:
    path = saved(llama(), tokenizer, tmp_path / "model")
    plain = load_causal_lm(path, CFG).train()
    checkpointed = load_causal_lm(path, ModelConfig(dtype="float32", gradient_checkpointing=True)).train()
    assert (plain.is_gradient_checkpointing, checkpointed.is_gradient_checkpointing) == (False, True)
    for model in (plain, checkpointed):
        model(input_ids=IDS, labels=IDS).loss.backward()
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, msg=name)


def test_of_a_model_at_a_url_comes_what_is_needed(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(storage.CACHE, str(tmp_path / "copies"))
    plain = saved(llama(), tokenizer, tmp_path / "there/run/sft/model")
    path = storage.local_root(f"file://{tmp_path}/there/run") / "sft/model"
    assert load_tokenizer(str(path)).get_vocab() == tokenizer.get_vocab()
    assert not list(path.glob("*.safetensors"))  # a driver may be on a small machine
    assert same(logits(load_causal_lm(str(path), CFG)), logits(load_causal_lm(plain, CFG)))
    shutil.rmtree(plain)
    with pytest.raises(UserError, match="no model in"):
        load_tokenizer(str(path))


def test_two_tokenizers_that_differ_are_refused_by_name(tmp_path: Path) -> None:
    """Roles exchange token ids: another vocabulary, or another end of sequence, would be read as other words."""
    names = {}
    for name, texts in (("policy", ["a b c d"]), ("same", ["a b c d"]), ("other", ["x yx yx yx yx"])):
        names[name] = str(tmp_path / name)
        train_tokenizer(texts, 264).save_pretrained(names[name])
        (tmp_path / name / "config.json").write_text("{}")
    check_same_tokenizer(names["policy"], names["same"])
    with pytest.raises(UserError, match=r"policy.* and .*other.* are not the same \(\d+ tokens differ, .*reward.so"):
        check_same_tokenizer(names["policy"], names["other"])
    end = AutoTokenizer.from_pretrained(names["same"])
    end.eos_token = "<|user|>"
    end.save_pretrained(names["same"])
    with pytest.raises(UserError, match="bos or eos differ"):
        check_same_tokenizer(names["policy"], names["same"])


# -- how sequences become rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("attention", "more", "packer"), [
    ("sdpa", {}, Packer(32, one_row=False, shares_prompts=True)),
    ("sdpa", {"sliding_window": 16}, Packer(32, one_row=False, shares_prompts=False)),
    ("sdpa", {"layer_types": ["full_attention", "full_attention"]}, Packer(32, one_row=False, shares_prompts=True)),
    ("sdpa", {"layer_types": ["full_attention", "linear_attention"]}, Packer(32, one_row=False, shares_prompts=False)),
    ("flash_attention_2", {}, Packer(32, one_row=True, shares_prompts=False)),
])
def test_prompts_are_shared_where_every_layer_takes_a_mask(attention: str, more: Any, packer: Packer) -> None:
    text = SimpleNamespace(**more)
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text))
    assert Packer.of(model, ModelConfig(max_length=32, attn_implementation=attention)) == packer


@pytest.mark.parametrize(("shares", "shapes"), [(True, [(1, 5)]), (False, [(2, 4)])])
def test_a_packer_shares_prompts_only_if_the_model_may(shares: bool, shapes: list[tuple[int, int]]) -> None:
    """7 8 9 | 1 and 7 8 9 | 2 are five tokens in one row, or eight in two."""
    ids, lengths = np.array([7, 8, 9, 1, 7, 8, 9, 2], dtype=np.int32), np.array([4, 4])
    found = Packer(4, False, shares)(ids, lengths, 8, np.array([3, 3]))
    assert [tuple(rows.ids.shape) for rows in found] == shapes
