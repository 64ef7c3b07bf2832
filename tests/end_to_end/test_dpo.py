"""DPO on real DeepSpeed: an update does not depend on how it was cut up, and the policy learns the rankings."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from end_to_end.small import small_config
from rlhf_ray.actors.supervised import SupervisedLearner
from rlhf_ray.cluster.cast import Cast
from rlhf_ray.config.schema import OptimizerConfig
from rlhf_ray.core.types import RankedDataset
from rlhf_ray.evaluation.schema import validate_report
from rlhf_ray.stages.rm import pair_counts
from rlhf_ray.train.roles import layout_of, learner_ranks
from rlhf_ray.train.supervised import deal

PROMPTS, K = 8, 4
ALL = np.arange(PROMPTS)


def rankings() -> RankedDataset:
    """Eight prompts with four responses each, of uneven length; ties among the ranks, prompt 3 has one response."""
    rng = np.random.default_rng(0)
    groups = np.concatenate([np.full(1 if g == 3 else K, g) for g in ALL]).astype(np.int32)
    prompt_lengths = rng.integers(3, 8, PROMPTS)[groups].astype(np.int32)
    lengths = (prompt_lengths + rng.integers(2, 14, len(groups))).astype(np.int32)
    return RankedDataset(rng.integers(4, 300, int(lengths.sum())).astype(np.int32), lengths,
                         rng.integers(1, 4, len(groups)).astype(np.int32), groups, prompt_lengths)


def trained(path: str, out: Path, ranks: int, micro_batch_tokens: int, steps: int, whole: bool = False) -> tuple:
    """Weights, the report of every step, and the implicit rewards [N], after so many steps of four prompts (or all)."""
    cfg, data = small_config(path), rankings()
    role = cfg.roles.supervised
    role.ranks, role.micro_batch_tokens, role.param_persistence_threshold = ranks, micro_batch_tokens, 500
    optimizer = OptimizerConfig(lr=1e-3, warmup_ratio=0.0, schedule="constant")
    weights = np.bincount(data.groups, weights=data.lengths)
    with Cast(layout_of(cfg, ["supervised"]), cfg.cluster) as cast:
        ref = ray.put(data)
        group = cast.start(
            SupervisedLearner, "supervised",
            [(rank, "dpo", path, ref, cfg.model, role, optimizer, steps, 0, 0.0, False, 60.0, cfg.dpo)
             for rank in learner_ranks(cast, "supervised", ranks)], 1,
        )
        cast.ready()
        group.call_each(SupervisedLearner.remember_reference, deal(ALL, weights, ranks))
        windows = [ALL if whole else ALL[4 * (i % 2) :][:4] for i in range(steps)]
        reports = [group.call_each(SupervisedLearner.train, deal(w, weights, ranks))[0] for w in windows]
        rewards = np.full(len(data.lengths), np.nan)
        for rows, values in group.call_each(SupervisedLearner.scores, deal(ALL, weights, ranks)):
            rewards[rows] = values
        group.call(SupervisedLearner.save, str(out), "float32", {})
    return load_file(out / "model.safetensors"), reports, rewards


@torch.no_grad()
def response_logprobs(path: str) -> np.ndarray:
    """Summed log-probability of each response by transformers alone, a sequence at a time, unpacked: [N]."""
    data, model = rankings(), AutoModelForCausalLM.from_pretrained(path)
    found = []
    for ids, prompt in zip(np.split(data.ids, np.cumsum(data.lengths)[:-1]), data.prompt_lengths, strict=True):
        row = torch.tensor(ids.astype(np.int64))[None]
        logprobs = model(row).logits[0, :-1].log_softmax(-1).gather(-1, row[0, 1:, None])
        found.append(float(logprobs[prompt - 1 :].sum()))
    return np.array(found)


def test_ranks_and_micro_batches_do_not_change_the_update(ray_session, models, tmp_path):
    """One rank with everything in one pass = one rank with a prompt at a time = two ranks; in the first step every
    margin is 0 and the loss log 2 per untied pair, over C(K, 2) and prompts."""
    whole, reports, rewards = trained(models[0], tmp_path / "whole", 1, 4096, 2)
    before = load_file(f"{models[0]}/model.safetensors")
    assert max(np.abs(whole[k] - before[k]).max() for k in whole) > 5e-4  # it moved
    _, untied = pair_counts(rankings(), ALL[:4], rewards)
    assert reports[0]["pairs"] == untied.sum() < 3 * 6  # there are ties
    assert reports[0]["loss"] == pytest.approx(np.log(2) * (untied / 6).sum() / 4, rel=1e-5)
    assert reports[0]["margin_sum"] == pytest.approx(0, abs=1e-4)
    assert abs(reports[1]["margin_sum"]) > 1e-3
    gained = 0.1 * (response_logprobs(str(tmp_path / "whole")) - response_logprobs(models[0]))  # beta is 0.1
    assert rewards == pytest.approx(gained, abs=1e-4)
    assert np.abs(gained).max() > 1e-2
    for name, ranks, tokens in (("single", 1, 16), ("two", 2, 4096)):
        weights, others, found = trained(models[0], tmp_path / name, ranks, tokens, 2)
        for report, other in zip(reports, others, strict=True):
            for key in ("loss", "grad_norm", "pairs"):
                assert other[key] == pytest.approx(report[key], rel=1e-4, abs=1e-6), (name, key)
        assert found == pytest.approx(rewards, abs=1e-3)
        # Adam's first steps turn rounding of a tiny gradient into a move of its own: compare with the step size.
        worst = max(float(np.quantile(np.abs(weights[k] - whole[k]), 0.99)) for k in weights)
        assert worst < 2e-5, (name, worst)


def test_a_few_steps_order_the_training_pairs_by_the_implicit_reward(ray_session, models, tmp_path):
    _, reports, rewards = trained(models[0], tmp_path, 2, 4096, 12, whole=True)
    correct, total = pair_counts(rankings(), ALL, rewards)
    assert correct.sum() / total.sum() > 0.95
    assert reports[-1]["loss"] < 0.8 * reports[0]["loss"]
    assert reports[-1]["margin_sum"] > 0


def test_from_rankings_to_a_report_without_reward_model_or_reinforcement_learning(tmp_path):
    """sft, compare, dpo and eval on the embedded reviews, by the console script."""
    done = subprocess.run(
        [str(Path(sys.executable).parent / "rlhf-ray"), "pipeline", "experiment=null", "cluster=local", "data=reviews",
         "stages=[sft,compare,dpo,eval]", "eval.policy=dpo", "model.path=assets://reviews_base", "model.max_length=112",
         f"output_dir={tmp_path}", "data.max_prompt_tokens=40", "rollout.max_response_tokens=16", "eval.prompts=16",
         "compare.max_response_tokens=16", "sft.max_examples=64", "compare.prompts=24", "dpo.prompts_per_batch=4",
         "eval.loss_blocks=8", "roles.supervised.ranks=2"],
        capture_output=True, text=True, timeout=900, check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    validate_report(report, policy="dpo")
    assert list(report["stages"]) == ["sft", "compare", "dpo", "eval"]
    assert report["rm"] is None and report["rm_score"] is None and report["algorithm"] == "dpo"
    assert report["judge"]["held_out_accuracy"] > 0.7 and report["labeler"]["held_out_accuracy"] > 0.7
    assert report["win_rate"]["dpo_vs_sft"]["n"] == 16 and report["kl_per_sequence"] != 0
    assert {a["role"] for a in report["actors"] if a["stage"] == "eval"} == {"generator", "reference"}
    steps = [json.loads(line) for line in (tmp_path / "dpo/metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 6 and all(s["pairs"] > 0 and s["skipped"] == 0 for s in steps)  # 22 training prompts by 4
    assert steps[0]["margin_sum"] == pytest.approx(0, abs=1e-2)
    assert "DPO preferred over" in (tmp_path / "report.html").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "dpo/model").config.vocab_size > 0
