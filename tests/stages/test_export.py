"""What is exported is what was trained, bit for bit, loads with plain transformers, and says what it is."""

import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from disks import Disk
from rlhf_ray import storage
from rlhf_ray.actors.policy import EMA
from rlhf_ray.config.load import to_yaml
from rlhf_ray.config.schema import Config, ModelConfig
from rlhf_ray.core.ragged import pack
from rlhf_ray.data.formats import Message, Prompt
from rlhf_ray.data.templates import encode_prompt
from rlhf_ray.errors import UserError
from rlhf_ray.models.hub import SCORE_SHIFT, load_causal_lm, load_scalar_model, load_tokenizer, save_model
from rlhf_ray.models.modules import ScalarModel
from rlhf_ray.models.shards import WEIGHT, shard_name, write_tensors
from rlhf_ray.models.tiny import train_tokenizer
from rlhf_ray.stages.export import run
from rlhf_ray.stages.report import build
from rlhf_ray.train.checkpoint import Checkpoints
from rlhf_ray.train.identity import identity_of

TEXTS = ["the film is good, the film is long", "slow and dull", "what a surprising comedy"] * 20
CFG = ModelConfig(dtype="float32")


def llama(tied: bool, seed: int) -> LlamaForCausalLM:
    """Odd sizes: parameters that two ranks cannot halve are padded."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=301, hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=15,
        max_position_embeddings=64, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=1, pad_token_id=1))


def put(directory: Path, model: Any, dtype: str = "float32", **config: Any) -> Any:
    save_model(model, model.named_parameters(), train_tokenizer(TEXTS, 301), directory, dtype, **config)
    return model


def finish(cfg: Config, stage: str, **record: Any) -> None:
    directory = Path(cfg.output_dir) / stage
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(to_yaml(cfg))
    (directory / "stage.json").write_text(json.dumps({"data": "d" * 64, "seconds": 1.5, "peak_rss_gib": 1.0} | record))


def a_run(path: Path, source: str = "ppo", tied: bool = True, dtype: str = "float32") -> Config:
    """A run with a finished sft, in a directory whose name must not get into a card."""
    cfg = Config(output_dir=str(path / "secret_place" / "run"), stages=["sft", "compare", "rm", "ppo", "dpo", "eval"])
    cfg.export.source, cfg.model.path, cfg.model.dtype = source, str(path / "secret_place" / "my_base"), dtype
    cfg.data.demonstrations = str(path / "secret_place" / "demos.jsonl")
    put(Path(cfg.output_dir) / "sft" / "model", llama(tied, 0), dtype)
    finish(cfg, "sft", val_loss=2.5)
    return cfg


def checkpoint(cfg: Config, step: int, model: Any, ranks: int, ema: Any = None) -> Path:
    """As the actors and the driver write it."""
    identity = identity_of("ppo", cfg, "e" * 64, {"sft": "f" * 64}, {})
    kept = Checkpoints(Path(cfg.output_dir) / "ppo" / "checkpoints", cfg.checkpoint, identity)
    directory, files = kept.begin(step), []
    for rank in range(ranks):
        parts = {}
        for name, p in model.named_parameters():
            size = math.ceil(p.numel() / ranks)
            whole = torch.nn.functional.pad(p.detach().flatten(), (0, ranks * size - p.numel()))
            parts[f"{name}|{WEIGHT}"] = whole[rank * size : (rank + 1) * size].clone()
        files.append(write_tensors(directory / shard_name("policy", rank, ranks), parts, {}))
    if ema is not None:
        files.append(write_tensors(directory / EMA, {n: p.detach() for n, p in ema.named_parameters()}, {"version": 1}))
    return kept.commit(step, files, {}, {"score": 0.25, "kl_per_sequence": 3.5}).directory


def exported(cfg: Config) -> Any:
    """The model as a stranger loads it."""
    run(cfg)
    model, info = AutoModelForCausalLM.from_pretrained(Path(cfg.output_dir) / "export", output_loading_info=True)
    assert not any(info.values()), info
    return model


def same(a: Any, b: Any) -> bool:
    ours, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def card(cfg: Config) -> tuple[dict[str, Any], str]:
    """(front matter, text)"""
    text = (Path(cfg.output_dir) / "export" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert "secret_place" not in text
    return yaml.safe_load(front), body


# -- weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_comes_out_bit_for_bit(tied: bool, ranks: int, tmp_path: Path) -> None:
    cfg, policy = a_run(tmp_path, tied=tied), llama(tied, 1)
    checkpoint(cfg, 12, policy, ranks)
    cfg.model.path = "another"  # what this call says of the run does not matter: the run itself says it
    model = exported(cfg)
    assert same(model, policy)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    front, text = card(cfg)
    assert front["base_model"] == "my_base"
    assert "checkpoint of step 12" in text and "not evaluated" in text and "e" * 64 in text
    assert "| score, last iteration | 0.25 |" in text


def test_a_run_at_a_url_is_exported_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice, for the second replaces the first; and to a directory here."""
    monkeypatch.setenv(storage.CACHE, str(tmp_path / "copies"))
    cfg, policies = a_run(tmp_path), {step: llama(True, step) for step in (3, 11)}
    for step, policy in policies.items():
        checkpoint(cfg, step, policy, 2)
    there = Path(cfg.output_dir)
    cfg.output_dir = f"file://{there}"
    for step, policy in policies.items():
        cfg.export.checkpoint = step
        run(cfg)
        assert same(AutoModelForCausalLM.from_pretrained(there / "export"), policy)
    cfg.export.path = str(tmp_path / "here")
    run(cfg)
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "here"), policies[11])
    assert not (tmp_path / "copies").exists()
    cfg.export.path = None
    (there / "export/README.md").unlink()
    with pytest.raises(UserError, match=f"^export.path=file://{there}/export is there and is no export of rlhf-ray"):
        run(cfg)


def test_averaged_weights_are_exported_where_there_are_any(tmp_path: Path) -> None:
    cfg, average = a_run(tmp_path), llama(True, 2)
    checkpoint(cfg, 1, llama(True, 1), 1, ema=average)
    assert same(exported(cfg), average)


def test_it_is_the_newest_checkpoint_or_the_one_asked_for_or_the_finished_model(tmp_path: Path) -> None:
    cfg, policies = a_run(tmp_path), {step: llama(True, step) for step in (3, 11, 99)}
    for step in (3, 11):
        checkpoint(cfg, step, policies[step], 1)
    assert same(exported(cfg), policies[11])
    cfg.export.checkpoint = 3
    assert same(exported(cfg), policies[3])  # in the place of the export before
    put(Path(cfg.output_dir) / "ppo" / "model", policies[99])
    finish(cfg, "ppo", iterations=20)
    assert same(exported(cfg), policies[3])
    cfg.export.checkpoint = None
    assert same(exported(cfg), policies[99])
    assert sorted(p.name for p in Path(cfg.output_dir).iterdir()) == ["export", "ppo", "sft"]  # no litter


@pytest.mark.parametrize(("trained", "asked", "found"), [
    ("float32", "saved", torch.float32), ("bfloat16", "saved", torch.bfloat16), ("float32", "bfloat16", torch.bfloat16),
    ("bfloat16", "float32", torch.float32),
])
def test_dtypes(trained: str, asked: str, found: torch.dtype, tmp_path: Path) -> None:
    cfg, policy = a_run(tmp_path, dtype=trained), llama(True, 1)
    checkpoint(cfg, 1, policy, 2)
    cfg.export.dtype = asked
    model = exported(cfg)
    assert model.dtype == found
    assert same(model, policy.to(found))
    assert f"| weights | {str(found).removeprefix('torch.')} |" in card(cfg)[1]


def test_a_reward_model_scores_with_plain_transformers_as_it_does_here(tmp_path: Path) -> None:
    """The end of a response is the padding token too, and counts."""
    cfg = a_run(tmp_path, "rm")
    scalar = load_scalar_model(str(Path(cfg.output_dir) / "sft" / "model"), CFG)
    torch.nn.init.normal_(scalar.score.weight)
    put(Path(cfg.output_dir) / "rm" / "model", scalar, **{SCORE_SHIFT: 0.75})
    finish(cfg, "rm", val_accuracy=0.7, ci95=[0.6, 0.8], score_shift=0.75)
    run(cfg)
    model = AutoModelForSequenceClassification.from_pretrained(Path(cfg.output_dir) / "export")
    assert model.config.architectures == ["LlamaForSequenceClassification"]
    assert model.config.score_shift == 0.75
    ids = torch.tensor([[0, 5, 6, 7, 1]])
    (rows,) = pack(ids[0].numpy(), np.array([5]), 5, 5)
    with torch.no_grad():
        score = float(model(ids).logits[0, 0]) - model.config.score_shift
        assert score == pytest.approx(float(ScalarModel(scalar, 0.75)(rows)[0, -1]), abs=1e-6)
    assert isinstance(executed(cfg)["score"], float)
    front, text = card(cfg)
    assert front["pipeline_tag"] == "text-classification" and "reward-model" in front["tags"]
    assert "score_shift" in text and "simulated labeler" in text and "0.7" in text


# -- the card ----------------------------------------------------------------------------------------------------


def executed(cfg: Config) -> dict[str, Any]:
    """The names that the card's first Python snippet defines."""
    body = card(cfg)[1]
    snippet = re.findall(r"```python\n(.*?)```", body, re.DOTALL)[0]
    names: dict[str, Any] = {}
    exec(snippet.replace('path = "."', f"path = {str(Path(cfg.output_dir) / 'export')!r}"), names)
    return names


@pytest.mark.parametrize("template", ["chat", "alpaca", "none"])
def test_its_snippet_runs_and_begins_as_the_prompts_in_training_did(template: str, tmp_path: Path) -> None:
    cfg = a_run(tmp_path, "sft")
    cfg.data.template, cfg.rollout.max_response_tokens = template, 3
    finish(cfg, "sft")
    run(cfg)
    names = executed(cfg)
    tokenizer = load_tokenizer(str(Path(cfg.output_dir) / "export"))
    asked = encode_prompt(Prompt((Message("user", "..."),)), template, tokenizer)
    assert names["ids"] == asked
    assert len(asked) < names["output"].shape[1] <= len(asked) + 3


def test_it_tells_what_was_measured_of_this_very_model(tmp_path: Path) -> None:
    cfg = a_run(tmp_path)
    put(Path(cfg.output_dir) / "ppo" / "model", llama(True, 1))
    cfg.stages = ["sft", "ppo", "eval"]
    finish(cfg, "ppo", iterations=20)
    win = {"wins": 328, "ties": 18, "losses": 54, "rate": 0.8425, "ci95": [0.8036, 0.8762], "n": 400}
    models = {"base": 1.0, "sft": 2.0, "ppo": 3.0}
    finish(cfg, "eval", policy="ppo", judge={"held_out_accuracy": 0.75, "is": "a classifier"},
           win_rate={"ppo_vs_sft": win}, kl_per_sequence=3.51, judge_score=models, rm_score=None, distinct_2=models,
           held_out_loss=models, mean_length=models)
    (Path(cfg.output_dir) / "report.json").write_text(json.dumps(build(cfg)))
    run(cfg)
    text = card(cfg)[1]
    assert ("| ppo preferred over sft | 84.2% [80.4%, 87.6%], n = 400 (328 wins, 18 ties, 54 losses) |") in text
    assert "judged by a classifier, right on 75.0%" in text and "| 3.51 |" in text
    assert "| judge_score | 1 | 2 | 3 |" in text
    finish(cfg, "ppo", iterations=20, seconds=2.5)  # trained again, and not evaluated since
    run(cfg)
    text = card(cfg)[1]
    assert "84.2%" not in text and "not evaluated on held-out prompts" in text


def test_it_says_what_hub_and_readers_need_and_nothing_of_the_machine(tmp_path: Path) -> None:
    cfg = a_run(tmp_path)
    cfg.algorithm.name, cfg.reward.sources = "grpo", ["rewards:brevity", "https://internal.example:9000/score?key=k"]
    checkpoint(cfg, 2, llama(True, 1), 1)
    run(cfg)
    front, text = card(cfg)
    assert front == {"base_model": "my_base", "library_name": "transformers", "pipeline_tag": "text-generation",
                     "tags": ["rlhf_ray", "rlhf", "ppo", "grpo"]}
    assert "internal" not in text and "rewards:brevity" in text and "demos.jsonl" in text
    assert "No evaluation of safety" in text and "from vllm import LLM" in text
    config = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0])
    assert config["algorithm"] == asdict(cfg.algorithm)
    assert "labeler" not in text  # no rankings had a part in it


def test_the_base_of_the_hub_keeps_its_name_and_one_made_here_has_none(tmp_path: Path) -> None:
    cfg = a_run(tmp_path, "sft")
    cfg.model.path = "Qwen/Qwen2.5-1.5B"
    finish(cfg, "sft")
    run(cfg)
    assert card(cfg)[0]["base_model"] == "Qwen/Qwen2.5-1.5B"
    cfg.stages = ["pretrain", "sft"]
    finish(cfg, "sft")
    run(cfg)
    front, text = card(cfg)
    assert "base_model" not in front and "trained from scratch" in text


# -- what is refused, and what a failure leaves ------------------------------------------------------------------


def refused(cfg: Config) -> str:
    with pytest.raises(UserError) as error:
        run(cfg)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def test_what_is_no_export_of_ours_is_not_overwritten(tmp_path: Path) -> None:
    cfg = a_run(tmp_path, "sft")
    mine = tmp_path / "mine"
    cfg.export.path = str(mine)
    mine.mkdir()
    run(cfg)  # an empty directory may be filled
    assert (mine / "model.safetensors").stat().st_mode & 0o777 == (mine / "config.json").stat().st_mode & 0o777
    run(cfg)
    for text in ("# a card of somebody's", "---\ntags:\n- rlhf\n---\n- rlhf_ray\n", ""):
        (mine / "README.md").write_text(text)
        before = sorted((p.name, p.stat().st_mtime_ns) for p in mine.iterdir())
        assert f"export.path={mine} is there and is no export" in refused(cfg)
        assert sorted((p.name, p.stat().st_mtime_ns) for p in mine.iterdir()) == before
    cfg.export.path = str(Path(cfg.output_dir) / "sft" / "model")
    assert "nothing is overwritten" in refused(cfg)
    cfg.export.path = str(mine / "README.md")
    assert "nothing is overwritten" in refused(cfg)


def test_a_link_to_an_export_is_followed(tmp_path: Path) -> None:
    cfg = a_run(tmp_path, "sft")
    run(cfg)
    link = tmp_path / "link"
    link.symlink_to(Path(cfg.output_dir) / "export")
    cfg.export.path = str(link)
    run(cfg)
    assert link.is_symlink() and (link / "README.md").is_file()


def test_a_full_disk_leaves_the_export_before(tmp_path: Path, small_disk: Disk) -> None:
    cfg = a_run(tmp_path, "sft")
    cfg.export.path = str(small_disk.path / "mine")
    run(cfg)

    small_disk.fill(4096)
    assert refused(cfg).startswith(f"cannot write {cfg.export.path}: ")
    assert sorted(p.name for p in small_disk.path.iterdir()) == ["filler", "mine"]
    load_causal_lm(str(cfg.export.path), CFG)


def test_an_export_that_was_killed_between_two_renames_is_there_again(tmp_path: Path) -> None:
    """Even if the next one fails."""
    cfg = a_run(tmp_path, "sft")
    run(cfg)
    export = Path(cfg.output_dir) / "export"
    export.rename(export.with_name(".export.old"))
    (Path(cfg.output_dir) / "sft/model/config.json").write_text("{}")
    refused(cfg)
    load_causal_lm(str(export), CFG)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    cfg = a_run(tmp_path)
    assert "has no finished ppo: run `rlhf-ray ppo` first" in refused(cfg)
    cfg.export.checkpoint = 7
    assert "export.checkpoint=7: no such checkpoint" in refused(cfg)
    checkpoint(cfg, 3, llama(True, 1), 1)
    assert "there are 3" in refused(cfg)
    cfg.export.source, cfg.export.checkpoint = "dpo", None
    assert "has no finished dpo" in refused(cfg)
    assert not (Path(cfg.output_dir) / "export").exists()


def test_records_of_another_version_are_no_traceback(tmp_path: Path) -> None:
    cfg = a_run(tmp_path, "sft")
    (Path(cfg.output_dir) / "sft" / "config.yaml").write_text("seed: 0\n")
    assert "sft was written by another version of rlhf-ray: it lacks 'stages'" in refused(cfg)


def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path) -> None:
    cfg = a_run(tmp_path)
    checkpoint(cfg, 3, llama(True, 1), 1)
    file = checkpoint(cfg, 4, llama(True, 1), 2) / shard_name("policy", 1, 2)
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    says = refused(cfg)
    assert "step 4 is not whole" in says and "choose another with export.checkpoint (there are: 3)" in says
    cfg.export.checkpoint = 3
    run(cfg)


@pytest.mark.parametrize("ema", [True, False])
def test_a_checkpoint_of_another_model_is_refused(ema: bool, tmp_path: Path) -> None:
    cfg, other = a_run(tmp_path), llama(False, 1)
    checkpoint(cfg, 3, LlamaForCausalLM(other.config), 1, ema=other if ema else None)
    put(Path(cfg.output_dir) / "sft" / "model", LlamaForCausalLM(LlamaConfig(
        **{**llama(True, 0).config.to_diff_dict(), "hidden_size": 16, "head_dim": 8})))
    assert "model" in refused(cfg)
    assert not (Path(cfg.output_dir) / "export").exists()


def test_an_export_tokenizes_as_the_run_did(tmp_path: Path) -> None:
    cfg = a_run(tmp_path, "sft")
    run(cfg)
    tokenizer = AutoTokenizer.from_pretrained(Path(cfg.output_dir) / "export")
    ours = load_tokenizer(str(Path(cfg.output_dir) / "sft" / "model"))
    assert (tokenizer.get_vocab(), tokenizer.chat_template) == (ours.get_vocab(), ours.chat_template)
