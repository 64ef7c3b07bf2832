"""Stage `eval`: which policy would people prefer, and what did it cost? Writes report.json and report.html."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from rlhf_ray.actors.generator import Generator
from rlhf_ray.actors.scorers import ReferenceModel, RewardModel
from rlhf_ray.cluster.group import Cast, Group
from rlhf_ray.cluster.runtime import session
from rlhf_ray.config.schema import Config
from rlhf_ray.core.types import PromptSet
from rlhf_ray.data.blocks import some_blocks, token_blocks
from rlhf_ray.data.prompts import encode_prompts
from rlhf_ray.data.sources import TaskData, load_task_data
from rlhf_ray.evaluation.statistics import distinct_n, win_rate
from rlhf_ray.metrics.progress import console
from rlhf_ray.models.hub import load_tokenizer
from rlhf_ray.stages.common import Paths, StageRecord, stage
from rlhf_ray.stages.pretrain import block_dataset
from rlhf_ray.stages.report import publish
from rlhf_ray.train import roles
from rlhf_ray.train.answers import prompt_set, sample_answers

NAMES = ("base", "sft", "ppo")


@dataclass
class Answers:
    """What one model said to all held-out prompts, and what was made of it: everything [prompts]."""

    texts: list[str]
    lengths: np.ndarray
    rm: np.ndarray
    judge: np.ndarray
    kl: np.ndarray  # log-probability under the model minus under the SFT model, nats per response
    held_out_loss: float


def run(cfg: Config) -> None:
    with stage(cfg, "eval") as record:
        evaluate(cfg, record)
    publish(cfg)
    console.print(f"report: {Paths(cfg).root / 'report.html'}")


def evaluate(cfg: Config, record: StageRecord) -> None:
    paths, task_data = Paths(cfg), load_task_data(cfg.data)
    models = {"base": paths.start, "sft": str(paths.sft), "ppo": str(paths.policy)}
    for maker in ("sft", "rm", "ppo"):
        paths.require(maker)
    tokenizer = load_tokenizer(models["sft"])
    kept, encoded, dropped = encode_prompts(task_data.eval_prompts()[: cfg.eval.prompts], cfg.data, tokenizer)
    prompts = prompt_set(encoded)
    blocks = token_blocks(task_data.eval_texts(), tokenizer, cfg.model.max_length)
    blocks = some_blocks(blocks, cfg.eval.loss_blocks, cfg.seed)
    judge = task_data.judge()
    layout = roles.layout_of(cfg, ["generator", "reference", "reward"])
    with session(cfg), Cast(layout, cfg.cluster) as cast:
        generators = roles.generators(cast, cfg, models["sft"], ray.put(prompts), roles.sync_backend(cfg))
        scorers = roles.reference_models(cast, cfg, models["sft"])
        reward = roles.reward_models(cast, cfg, str(paths.reward))
        actors = cast.ready()
        score = judge.log_odds if judge else None
        answers = {
            name: _examine(cfg, name, models, generators, scorers, reward, prompts, blocks, tokenizer, score)
            for name in NAMES
        }
    _record(cfg, record, answers, [_shown(p) for p in kept], task_data)
    record.add(actors=actors, prompts=len(kept), dropped=dropped, data=task_data.fingerprint())


def _examine(
    cfg: Config, name: str, models: dict[str, str], generators: Group, scorers: Group, reward: Group,
    prompts: PromptSet, blocks: np.ndarray, tokenizer: Any, judge: Callable[[Sequence[str]], np.ndarray] | None,
) -> Answers:
    """Let one model answer all prompts, the same seeds for every model, and measure the answers."""
    e = cfg.eval
    generators.call(Generator.load, models[name])
    sampled = sample_answers(generators, prompts, f"eval {name}", 1, e.temperature, cfg.rollout.max_response_tokens,
                             cfg.seed + 1)
    responses = [r[0] for r in sampled]
    texts = [t.strip() for t in tokenizer.batch_decode([r.tolist() for r in responses], skip_special_tokens=True)]
    starts = np.cumsum(prompts.lengths) - prompts.lengths
    whole = [np.concatenate([prompts.ids[s : s + n], r])
             for s, n, r in zip(starts, prompts.lengths, responses, strict=True)]
    lengths = np.array([len(w) for w in whole], dtype=np.int32)
    wanted = np.concatenate([np.arange(len(w)) >= n for w, n in zip(whole, prompts.lengths, strict=True)])
    ids, text = np.concatenate(whole), block_dataset(blocks)
    under = {}
    for model in {"sft", name}:
        scorers.call(ReferenceModel.load, models[model])
        under[model] = scorers.ask(ReferenceModel.logprobs_of, ids, lengths, wanted, e.temperature)
    scorers.call(ReferenceModel.load, models[name])
    nll = scorers.ask(ReferenceModel.logprobs_of, text.ids, text.lengths, text.in_loss, 1.0)
    truncated = np.array([r[-1] != tokenizer.eos_token_id for r in responses])
    rm = reward.ask(RewardModel.scores_of, ids, lengths, truncated)
    ends = np.cumsum(lengths)
    kl = np.add.reduceat(under[name] - under["sft"], ends - lengths).astype(np.float64)
    return Answers(
        texts=texts, lengths=np.array([len(r) for r in responses]), rm=rm,
        judge=judge(texts) if judge else rm.astype(np.float64), kl=kl,
        held_out_loss=float(-nll.sum() / text.in_loss.sum()),
    )


def _record(
    cfg: Config, record: StageRecord, answers: dict[str, Answers], prompts: list[str], task_data: TaskData
) -> None:
    e = cfg.eval

    def each(of: Callable[[Answers], float]) -> dict[str, float]:
        return {name: float(of(a)) for name, a in answers.items()}

    wins = {
        f"ppo_vs_{other}": win_rate(answers["ppo"].judge, answers[other].judge, e.tie_margin, e.bootstrap_samples,
                                    cfg.seed).to_dict()
        for other in e.baselines
    }
    record.add(
        judge={**task_data.judge_accuracy(), "is": "a classifier fitted on the other half of the human labels"
               if task_data.judge() else "the reward model itself: not independent of training"},
        win_rate=wins, judge_score=each(lambda a: a.judge.mean()), rm_score=each(lambda a: a.rm.mean()),
        distinct_2=each(lambda a: distinct_n(a.texts, 2)), held_out_loss=each(lambda a: a.held_out_loss),
        mean_length=each(lambda a: a.lengths.mean()), kl_per_sequence=float(answers["ppo"].kl.mean()),
        samples=[
            {"prompt": prompts[i], **{name: {"text": a.texts[i], "judge": float(a.judge[i])}
                                      for name, a in answers.items()}}
            for i in range(min(e.table_samples, len(prompts)))
        ],
    )
    for name, w in wins.items():
        console.print(f"{name}: preferred in {w['rate']:.1%} [{w['ci95'][0]:.1%}, {w['ci95'][1]:.1%}] of {w['n']} "
                      f"held-out prompts ({w['wins']} wins, {w['ties']} ties, {w['losses']} losses)")


def _shown(prompt: Any) -> str:
    return "\n".join(m.content for m in prompt.turns) + (f"\n\n{prompt.input}" if prompt.input else "")
