"""Stage `eval`: which policy would people prefer, and what did it cost? Writes report.json and report.html."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from rlhf_ray.actors.scorers import ReferenceModel, RewardModel
from rlhf_ray.cluster.cast import Cast
from rlhf_ray.cluster.group import Group
from rlhf_ray.cluster.runtime import session
from rlhf_ray.config.schema import Config
from rlhf_ray.core.types import PromptSet
from rlhf_ray.data.blocks import block_dataset, some_blocks, token_blocks
from rlhf_ray.data.formats import Prompt
from rlhf_ray.data.prompts import encode_prompts
from rlhf_ray.data.sources import TaskData, load_task_data
from rlhf_ray.data.templates import render_prompt
from rlhf_ray.errors import UserError
from rlhf_ray.evaluation.statistics import accuracy, accuracy_gain, distinct_n, win_rate
from rlhf_ray.metrics.progress import console
from rlhf_ray.models.hub import load_tokenizer
from rlhf_ray.stages.common import Paths, StageRecord, model_fingerprint, stage, stage_record
from rlhf_ray.stages.lock import locked
from rlhf_ray.stages.report import log_report, publish
from rlhf_ray.storage import shown
from rlhf_ray.train import roles
from rlhf_ray.train.answers import ANSWERS, forget_answers, prompt_set, sample_answers

VERIFIER = "the task's verifier, which checks every answer"
CLASSIFIER = "a classifier fitted on the other half of the human labels, which took no part in training"
REWARD_MODEL = "the reward model itself: not independent of training"
RIGHT = 1.0  # a verifier's score of an answer that is right; less is a wrong one, whatever credit it gets


@dataclass(frozen=True)
class Judge:
    """Who scores the answers. scores: texts, in the order of the prompts, to float64 [prompts]; None: the reward
    model's scores stand in. record: what report.json says of it. verifies: a score of RIGHT is a right answer."""

    scores: Callable[[Sequence[str]], np.ndarray] | None
    record: dict[str, Any]
    verifies: bool = False


@dataclass
class Answers:
    """What one model said to all held-out prompts, and what was made of it: everything [prompts]."""

    texts: list[str]
    lengths: np.ndarray
    rm: np.ndarray | None  # None: the run has no reward model
    judge: np.ndarray
    kl: np.ndarray  # log-probability under the model minus under the SFT model, nats per response
    held_out_loss: float


def run(cfg: Config) -> None:
    with locked(Paths(cfg).root):
        with stage(cfg, "eval") as record:
            if cfg.resume == "never":
                forget_answers(Paths(cfg).stage("eval"))
            evaluate(cfg, record)
        forget_answers(Paths(cfg).stage("eval"))
        publish(cfg)
        log_report(cfg)
    console.print(f"report: {shown(Paths(cfg).root / 'report.html')}")


def evaluate(cfg: Config, record: StageRecord) -> None:
    paths, task_data, policy = Paths(cfg), load_task_data(cfg.data), cfg.eval.policy
    for maker in ("sft", policy):
        paths.require(maker)
    models = {"base": paths.start, "sft": str(paths.sft),
              policy: str({"ppo": paths.policy, "dpo": paths.dpo}[policy])}
    tokenizer = load_tokenizer(models["sft"])
    kept, encoded, dropped = encode_prompts(task_data.eval_prompts()[: cfg.eval.prompts], cfg.data, tokenizer)
    prompts = prompt_set(encoded)
    scored = "rm" in cfg.stages and stage_record(cfg, "rm") is not None
    judge = judge_of(task_data, kept, [render_prompt(p, cfg.data.template, tokenizer) for p in kept], scored)
    blocks = token_blocks(task_data.eval_texts(), tokenizer, cfg.model.max_length)
    blocks = some_blocks(blocks, cfg.eval.loss_blocks, cfg.seed)
    layout = roles.layout_of(cfg, [role for role in roles.roles_of(cfg, "eval") if scored or role != "reward"])
    with session(cfg), Cast(layout, cfg.cluster, paths.stage("eval")) as cast:
        generators = roles.generators(cast, cfg, models["sft"], ray.put(prompts), roles.sync_backend(cfg))
        scorers = roles.reference_models(cast, cfg, models["sft"])
        reward = roles.reward_models(cast, cfg, str(paths.reward)) if scored else None
        actors = cast.persist(cast.ready)
        answers = {
            name: examine(cfg, cast, name, models, generators, scorers, reward, prompts, blocks, tokenizer, judge)
            for name in models
        }
    _record(cfg, record, answers, [_shown(p) for p in kept], judge)
    record.add(actors=actors, prompts=len(kept), dropped=dropped, data=task_data.fingerprint())


def judge_of(task_data: TaskData, prompts: Sequence[Prompt], texts: Sequence[str], has_rm: bool) -> Judge:
    """The verifier of a task whose answers can be checked, else a judge of its own, else the reward model.

    texts: the prompts as the models read them. Raises UserError if there is none of the three.
    """
    verify, classifier = task_data.verifier(), task_data.judge()
    if verify is not None:
        def verified(responses: Sequence[str]) -> np.ndarray:
            metadata = [json.loads(p.metadata or "{}") for p in prompts]
            return np.array(verify(list(texts), list(responses), metadata), dtype=np.float64)

        return Judge(verified, {"held_out_accuracy": None, "is": VERIFIER}, verifies=True)
    if classifier is not None:
        return Judge(classifier.log_odds, {**task_data.judge_accuracy(), "is": CLASSIFIER})
    if has_rm:
        return Judge(None, {"held_out_accuracy": None, "is": REWARD_MODEL})
    raise UserError("nobody can judge: these data have neither verifier nor judge, and this run no reward model to "
                    "stand in; run `rlhf-ray rm` first, with rm in stages, or use data whose answers can be judged")


def examine(
    cfg: Config, cast: Cast, name: str, models: dict[str, str], generators: Group, scorers: Group, reward: Group | None,
    prompts: PromptSet, blocks: np.ndarray, tokenizer: Any, judge: Judge,
) -> Answers:
    """Let one model answer all prompts, the same seeds for every model, and measure the answers."""
    e = cfg.eval
    sampled = sample_answers(cast, generators, models[name], prompts, f"eval {name}", 1, e.temperature,
                             cfg.rollout.max_response_tokens, cfg.seed + 1,
                             journal=Paths(cfg).stage("eval") / f"{ANSWERS}-{name}.jsonl",
                             model=f"{model_fingerprint(models[name])} {cfg.model.dtype}")
    responses = [r[0] for r in sampled]
    texts = [t.strip() for t in tokenizer.batch_decode([r.tolist() for r in responses], skip_special_tokens=True)]
    starts = np.cumsum(prompts.lengths) - prompts.lengths
    whole = [np.concatenate([prompts.ids[s : s + n], r])
             for s, n, r in zip(starts, prompts.lengths, responses, strict=True)]
    lengths = np.array([len(w) for w in whole], dtype=np.int32)
    wanted = np.concatenate([np.arange(len(w)) >= n for w, n in zip(whole, prompts.lengths, strict=True)])
    ids, text = np.concatenate(whole), block_dataset(blocks)

    def logprobs(model: str, *asked: Any) -> np.ndarray:
        def call() -> np.ndarray:
            scorers.call(ReferenceModel.load, models[model])
            return scorers.ask(ReferenceModel.logprobs_of, *asked)

        return cast.persist(call)

    under = {model: logprobs(model, ids, lengths, wanted, e.temperature) for model in {"sft", name}}
    nll = logprobs(name, text.ids, text.lengths, text.in_loss, 1.0)
    truncated = np.array([r[-1] != tokenizer.eos_token_id for r in responses])
    rm: np.ndarray | None = None
    if reward:
        rm = cast.persist(lambda: reward.ask(RewardModel.scores_of, ids, lengths, truncated)).astype(np.float64)
    scores = judge.scores(texts) if judge.scores else rm
    assert scores is not None
    ends = np.cumsum(lengths)
    kl = np.add.reduceat(under[name] - under["sft"], ends - lengths).astype(np.float64)
    return Answers(
        texts=texts, lengths=np.array([len(r) for r in responses]), rm=rm, judge=scores, kl=kl,
        held_out_loss=float(-nll.sum() / text.in_loss.sum()),
    )


def _record(
    cfg: Config, record: StageRecord, answers: dict[str, Answers], prompts: list[str], judge: Judge
) -> None:
    e, policy = cfg.eval, cfg.eval.policy

    def each(of: Callable[[Answers], float]) -> dict[str, float]:
        return {name: float(of(a)) for name, a in answers.items()}

    wins = {
        f"{policy}_vs_{other}": win_rate(answers[policy].judge, answers[other].judge, e.tie_margin,
                                         e.bootstrap_samples, cfg.seed).to_dict()
        for other in e.baselines
    }
    rm = {name: float(a.rm.mean()) for name, a in answers.items() if a.rm is not None}
    record.add(
        policy=policy, judge=judge.record, win_rate=wins, judge_score=each(lambda a: a.judge.mean()),
        rm_score=rm or None, distinct_2=each(lambda a: distinct_n(a.texts, 2)),
        held_out_loss=each(lambda a: a.held_out_loss), mean_length=each(lambda a: a.lengths.mean()),
        kl_per_sequence=float(answers[policy].kl.mean()),
        samples=[
            {"prompt": prompts[i], **{name: {"text": a.texts[i], "judge": float(a.judge[i])}
                                      for name, a in answers.items()}}
            for i in range(min(e.table_samples, len(prompts)))
        ],
    )
    if judge.verifies:
        record.add(accuracy=_accuracies(cfg, {name: a.judge >= RIGHT for name, a in answers.items()}))
    for name, w in wins.items():
        console.print(f"{name}: preferred in {w['rate']:.1%} [{w['ci95'][0]:.1%}, {w['ci95'][1]:.1%}] of {w['n']} "
                      f"held-out prompts ({w['wins']} wins, {w['ties']} ties, {w['losses']} losses)")


def _accuracies(cfg: Config, right: dict[str, np.ndarray]) -> dict[str, Any]:
    """Of every model, and how much the policy gained on the SFT model. right: by model, bool [prompts]."""
    policy = cfg.eval.policy
    by_model = {name: accuracy(r).to_dict() for name, r in right.items()}
    gain = accuracy_gain(right[policy], right["sft"], cfg.eval.bootstrap_samples, cfg.seed).to_dict()
    for name, a in by_model.items():
        console.print(f"{name}: {a['rate']:.1%} [{a['ci95'][0]:.1%}, {a['ci95'][1]:.1%}] of {a['n']} held-out prompts "
                      "answered rightly")
    console.print(f"{policy} minus sft: {100 * gain['difference']:+.1f} points [{100 * gain['ci95'][0]:+.1f}, "
                  f"{100 * gain['ci95'][1]:+.1f}] ({gain['gained']} gained, {gain['lost']} lost)")
    return {**by_model, f"{policy}_minus_sft": gain}


def _shown(prompt: Prompt) -> str:
    return "\n".join(m.content for m in prompt.turns) + (f"\n\n{prompt.input}" if prompt.input else "")
