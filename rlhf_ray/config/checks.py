"""What cannot work in a composed `Config`: values out of range, contradictions between keys, a model that is not there.

Everything that is wrong ends in a `UserError` whose lines each name a key and say what to do. Imports nothing heavy:
`rlhf-ray --help` pays for it.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_ray.config.load import LIMITS, asset_dir, did_you_mean, leaves, limits
from rlhf_ray.config.reward_sources import check_source
from rlhf_ray.config.schema import MISSING, STAGES, Config, LearnerConfig
from rlhf_ray.errors import UserError

# Where each KL estimator is sound. Why: rlhf_ray/core/kl.py, whose table this is; to import it would import torch, so a
# test keeps the two equal.
SOUND = {"reward": ("k1",), "loss": ("k2", "k3")}
BF16_MISMATCH = 0.01
ASSET_SPLIT_SEED = 0  # the split of the reviews that assets://reviews_base was trained on

# Which data.* keys a stage reads when data.source=files, beyond those that depend on other options.
STAGE_DATA = {
    "pretrain": ["texts", "eval_texts"],
    "sft": ["demonstrations"],
    "compare": [],
    "rm": ["demonstrations"],  # the scores are shifted so that demonstrations have mean 0
    "ppo": ["ppo_prompts"],
    "dpo": [],
    "eval": ["eval_prompts", "eval_texts"],
}
# Which roles a stage starts.
STAGE_ROLES = {
    "pretrain": ["supervised"],
    "sft": ["supervised"],
    "compare": ["generator"],
    "rm": ["supervised"],
    "ppo": ["generator", "reward", "reference", "policy", "critic"],
    "dpo": ["supervised"],
    "eval": ["generator", "reward", "reference"],
}


def stages_of(cfg: Config, stage: str) -> list[str]:
    """What a command runs: the configured stages for `pipeline`, itself if it is a stage, else (`doctor`) nothing."""
    return cfg.stages if stage == "pipeline" else [stage] if stage in STAGES else []


def validate(cfg: Config, stage: str) -> None:
    """Refuse what cannot work, before anything starts.

    Checks the limits of every field, then the contradictions that matter to `stage`. Touches no file and no cluster.
    Raises UserError with one line for each problem.
    """
    problems = list(_out_of_range(cfg))
    if not problems:  # the checks below compute with values that are in range
        runs = stages_of(cfg, stage)
        problems = [
            problem
            for check in (_pipeline, _missing, _lengths, _batches, _algorithm, _rewards, _alarms, _export,
                          _devices, _weight_sync)
            for problem in check(cfg, runs)
        ]
    if problems:
        raise UserError("\n".join(problems))


def _needs_model(cfg: Config, runs: list[str]) -> bool:
    """Whether a run starts from model.path: not when the recipe has a pretrain stage that starts from scratch."""
    scratch = cfg.pretrain.init == "scratch" and ("pretrain" in cfg.stages or runs == ["pretrain"])
    return bool(runs) and not scratch


def check_model(cfg: Config, stage: str) -> None:
    """Refuse a local model.path that holds no model, unless `stage` makes it; hub names are left to transformers."""
    if not _needs_model(cfg, stages_of(cfg, stage)):
        return
    path = Path(cfg.model.path)
    local = cfg.model.path.startswith((".", "/", "~")) or cfg.model.path.count("/") > 1 or path.exists()
    if local and not (path / "config.json").is_file():
        raise UserError(f"model.path={cfg.model.path}: no model there (no config.json); give a Hugging Face directory "
                        "or hub name, or make one with `rlhf-ray pretrain`")
    if not local:
        return
    context = json.loads((path / "config.json").read_text()).get("max_position_embeddings")
    if context is not None and cfg.model.max_length > context:
        raise UserError(f"model.max_length={cfg.model.max_length} is more than the {context} positions that "
                        f"{cfg.model.path} was built for: lower it")


def _out_of_range(cfg: Config) -> Iterator[str]:
    for key, f, value in leaves(cfg):
        meaning = f.metadata["help"]
        if value == MISSING:
            if key != "model.path":  # which pretrain from scratch does without
                yield f"{key} is not set: give {key}=VALUE ({meaning})"
            continue
        for entry in value if isinstance(value, list) else [value]:
            if "choices" in f.metadata and entry not in f.metadata["choices"]:
                allowed = ", ".join(f.metadata["choices"])
                yield f"{key}={entry}: must be one of {allowed}{did_you_mean(str(entry), f.metadata['choices'])}"
        if isinstance(value, (int, float)):
            # `not (value >= limit)` and not `value < limit`: NaN fails too.
            inside = all(op(value, f.metadata[name]) for name, (op, _) in LIMITS.items() if name in f.metadata)
            if not inside:
                yield f"{key}={value}: must be {limits(f.metadata)} ({meaning})"
            elif not math.isfinite(value):
                yield f"{key}={value}: must be a finite number ({meaning})"


def _pipeline(cfg: Config, runs: list[str]) -> Iterator[str]:
    order = [STAGES.index(stage) for stage in cfg.stages]
    if not order:
        yield f"stages=[]: nothing to run; name some of {', '.join(STAGES)}"
    elif order != sorted(set(order)):
        right = ",".join(STAGES[i] for i in sorted(set(order)))
        yield f"stages=[{','.join(cfg.stages)}]: each stage once and in order; write stages=[{right}]"
    if "compare" in runs and len(runs) > 1 and cfg.compare.ranker == "people":
        yield ("compare.ranker=people ends before anybody has ranked: run `rlhf-ray compare` alone, have its "
               "to_rank.jsonl ranked, then go on with compare.ranker=file data.comparisons=RANKED")
    if "ppo" in runs and cfg.ppo.critic_warmup_iterations >= cfg.ppo.iterations:
        yield (f"ppo.critic_warmup_iterations={cfg.ppo.critic_warmup_iterations} leaves the policy nothing of "
               f"ppo.iterations={cfg.ppo.iterations}: lower the first or raise the second")
    p = cfg.pretrain
    if "pretrain" in runs and p.init == "scratch" and p.hidden_size % p.num_heads:
        yield (f"pretrain.hidden_size={p.hidden_size} is not a multiple of pretrain.num_heads={p.num_heads}: "
               "change one of them")
    elif "pretrain" in runs and p.init == "scratch" and p.hidden_size // p.num_heads % 2:
        yield (f"pretrain.hidden_size={p.hidden_size} / pretrain.num_heads={p.num_heads} is odd, but rotary embeddings "
               "need an even head size: change one of them")


def _missing(cfg: Config, runs: list[str]) -> Iterator[str]:
    if _needs_model(cfg, runs):
        if cfg.model.path == MISSING:
            yield "model.path is not set: give a Hugging Face directory or hub name, or put pretrain into stages"
    elif runs not in ([], ["pretrain"]) and cfg.model.path != MISSING:
        yield (f"model.path={cfg.model.path} would not be used, because stages has pretrain with pretrain.init="
               f"scratch: leave pretrain out, stages=[{','.join(s for s in cfg.stages if s != 'pretrain')}], or set "
               "pretrain.init=model")
    if cfg.data.source == "reviews":
        if cfg.data.split_seed != ASSET_SPLIT_SEED and cfg.model.path == asset_dir("reviews_base") and \
                _needs_model(cfg, runs):
            yield (f"data.split_seed={cfg.data.split_seed} would hold out reviews that the base model has read: it was "
                   f"trained on the split of data.split_seed={ASSET_SPLIT_SEED}; make a base of your own with pretrain")
        if "compare" in runs and cfg.compare.ranker == "file" and not cfg.data.comparisons:
            yield _no_data("comparisons", "compare.ranker=file", "or set compare.ranker=simulated")
        return
    if cfg.data.source == "reasoning":
        if ranked := [stage for stage in runs if stage in ("compare", "rm", "dpo")]:
            yield (f"stages {', '.join(ranked)} rank responses, but the answers of data.source=reasoning are verified: "
                   "set stages=[sft,ppo,eval] (experiment=reasoning does)")
        return
    if cfg.compare.ranker == "simulated" and "compare" in runs:
        yield ("compare.ranker=simulated needs the sentiment labels of data.source=reviews, but data.source=files: "
               "set compare.ranker=file and data.comparisons=PATH")
    elif "compare" in runs and cfg.compare.ranker == "file" and not cfg.data.comparisons:
        yield _no_data("comparisons", "compare.ranker=file", "with your rankings")
    elif "compare" in runs and cfg.compare.ranker == "people" and not cfg.data.compare_prompts:
        yield _no_data("compare_prompts", "compare.ranker=people", "with prompts to answer")
    if "ppo" in runs and cfg.algorithm.ptx and not cfg.data.texts:
        yield _no_data("texts", "algorithm.ptx=true", "or set algorithm.ptx=false")
    needs: dict[str, list[str]] = {}
    for stage in runs:
        for name in STAGE_DATA[stage]:
            needs.setdefault(name, []).append(stage)
    for name, stages in needs.items():
        if not getattr(cfg.data, name):
            yield _no_data(name, f"{' and '.join(stages)} with data.source=files", "or set data=reviews")


def _no_data(name: str, who: str, otherwise: str) -> str:
    return f"data.{name} is not set, but needed by {who}: give data.{name}=PATH or hf://NAME, {otherwise}"


def _lengths(cfg: Config, runs: list[str]) -> Iterator[str]:
    for section, users in (("compare", {"compare"}), ("rollout", {"ppo", "eval"})):
        response = getattr(cfg, section).max_response_tokens
        if users & set(runs) and cfg.data.max_prompt_tokens + response > cfg.model.max_length:
            yield (f"data.max_prompt_tokens={cfg.data.max_prompt_tokens} + {section}.max_response_tokens={response} "
                   f"is longer than model.max_length={cfg.model.max_length}: shorten one or raise model.max_length")


def _batches(cfg: Config, runs: list[str]) -> Iterator[str]:
    """A batch must not be larger than what there is, nor smaller than the ranks that share it."""
    roles, a, r = cfg.roles, cfg.algorithm, cfg.rollout
    shared = [
        ("pretrain", "pretrain.batch_blocks", cfg.pretrain.batch_blocks, "supervised"),
        ("sft", "sft.batch_size", cfg.sft.batch_size, "supervised"),
        ("rm", "rm.prompts_per_batch", cfg.rm.prompts_per_batch, "supervised"),
        ("ppo", "algorithm.minibatch_size", a.minibatch_size, "policy"),
        ("ppo", "algorithm.minibatch_size", a.minibatch_size, "critic"),
        ("dpo", "dpo.prompts_per_batch", cfg.dpo.prompts_per_batch, "supervised"),
    ]
    if a.ptx:
        shared.append(("ppo", "algorithm.ptx_blocks", a.ptx_blocks, "policy"))
    for stage, key, size, role in shared:
        ranks = getattr(roles, role).ranks
        if stage in runs and size < ranks:
            yield f"{key}={size} is less than roles.{role}.ranks={ranks}: every rank needs at least one; raise {key}"
    if "ppo" not in runs:
        return
    if a.minibatch_size > r.batch_size:
        yield (f"algorithm.minibatch_size={a.minibatch_size} is more than rollout.batch_size={r.batch_size}: lower the "
               "first")
    if r.batch_size % r.samples_per_prompt:
        yield (f"rollout.batch_size={r.batch_size} is not a multiple of rollout.samples_per_prompt="
               f"{r.samples_per_prompt}: every prompt gets as many responses; change one of them")


GROUP_ALGORITHMS = ("grpo", "dr_grpo", "rloo")


def _algorithm(cfg: Config, runs: list[str]) -> Iterator[str]:
    if "ppo" not in runs:
        return
    a, k = cfg.algorithm, cfg.rollout.samples_per_prompt
    if a.name in GROUP_ALGORITHMS and k < 2:
        yield (f"algorithm.name={a.name} compares the responses of one prompt, but rollout.samples_per_prompt={k}: set "
               f"it to 2 or more (algorithm={a.name} sets 4)")
    if a.kl_estimator not in SOUND[a.kl_in]:
        yield (f"algorithm.kl_estimator={a.kl_estimator} with algorithm.kl_in={a.kl_in} has a gradient that is not "
               f"that of a KL penalty: use {' or '.join(SOUND[a.kl_in])} there")
    if a.kl_target is not None and a.kl_coef == 0:
        yield (f"algorithm.kl_target={a.kl_target:g} adapts algorithm.kl_coef by factors, and 0 stays 0: give a "
               "positive algorithm.kl_coef to start from")
    if a.old_logprobs == "engine":
        if a.ppo_epochs > 1 or a.minibatch_size < cfg.rollout.batch_size:
            yield ("algorithm.old_logprobs=engine is for one optimizer step per batch: set algorithm.ppo_epochs=1 and "
                   f"algorithm.minibatch_size={cfg.rollout.batch_size} (rollout.batch_size), or old_logprobs=learner")
        if a.importance_cap is not None:
            yield ("algorithm.old_logprobs=engine leaves nothing to compare with the engine's for "
                   f"algorithm.importance_cap={a.importance_cap:g}: set it to null, or old_logprobs=learner")
    if cfg.ppo.schedule == "one_step_off":
        if a.importance_cap is None:
            yield ("ppo.schedule=one_step_off learns from responses of older weights, for which "
                   "algorithm.importance_cap=null corrects nothing: set it (schedule=one_step_off sets 2)")
        if cfg.checkpoint.iterations == 1:
            yield ("ppo.schedule=one_step_off samples nothing ahead of an iteration with a checkpoint, and "
                   "checkpoint.iterations=1 saves every one: raise it (schedule=one_step_off sets 10)")
        if cfg.cluster.placement == "colocated":
            yield ("ppo.schedule=one_step_off samples while it learns, but cluster.placement=colocated has both take "
                   "turns: set schedule=synchronous, or cluster.placement=separate")
    if cfg.ppo.critic_warmup_iterations and a.name != "ppo":
        yield (f"ppo.critic_warmup_iterations={cfg.ppo.critic_warmup_iterations} but algorithm.name={a.name} has no "
               "critic: set it to 0")


def _rewards(cfg: Config, runs: list[str]) -> Iterator[str]:
    r = cfg.reward
    if "ppo" not in runs:
        return
    if not r.sources:
        yield "reward.sources=[]: nothing to learn from; name `model`, MODULE:FUNCTION or a URL"
    if r.weights and len(r.weights) != len(r.sources):
        yield (f"reward.weights has {len(r.weights)} entries for the {len(r.sources)} of reward.sources: give one for "
               "each, or none")
    for source in r.sources:
        if r.sources.count(source) > 1:
            yield f"reward.sources names {source} twice: name each source once, and give it a weight"
            break
        try:
            check_source(source)
        except UserError as error:
            yield str(error)
    if "model" in r.sources and "rm" not in runs and cfg.data.source == "reasoning":
        yield ("reward.sources has `model`, but data.source=reasoning has no rankings to train one on: set "
               "reward.sources=[rlhf_ray.data.reasoning:verify] (experiment=reasoning does)")
    slowest = (r.retries + 1) * r.timeout_s + 8.0 * r.retries  # a pause before each retry
    if any(source != "model" for source in r.sources) and slowest > cfg.cluster.call_timeout_s:
        yield (f"reward.timeout_s={r.timeout_s:g} and reward.retries={r.retries} may take {slowest:g} s, longer than "
               f"cluster.call_timeout_s={cfg.cluster.call_timeout_s:g}: lower one of the first, or raise the last")
    if r.overlong_tokens > cfg.rollout.max_response_tokens:
        yield (f"reward.overlong_tokens={r.overlong_tokens} is more than rollout.max_response_tokens="
               f"{cfg.rollout.max_response_tokens}: lower it")


def _alarms(cfg: Config, runs: list[str]) -> Iterator[str]:
    for name in ("length", "memory"):
        if (threshold := getattr(cfg.alarms, name).threshold) <= 1:
            yield f"alarms.{name}.threshold={threshold:g} is a factor: it must be more than 1"


def _export(cfg: Config, runs: list[str]) -> Iterator[str]:
    if cfg.export.checkpoint is not None and cfg.export.source != "ppo":
        yield (f"export.checkpoint={cfg.export.checkpoint} is a step of ppo, but export.source={cfg.export.source}: "
               "set export.checkpoint=null, or export.source=ppo")


def _devices(cfg: Config, runs: list[str]) -> Iterator[str]:
    on_cpu = [role for stage in runs for role in STAGE_ROLES[stage] if getattr(cfg.roles, role).gpus == 0]
    torch_on_cpu = [role for role in dict.fromkeys(on_cpu) if role != "generator"]  # vLLM picks its own kernel
    if cfg.model.attn_implementation == "flash_attention_2" and torch_on_cpu:
        keys = ", ".join(f"roles.{role}.gpus=0" for role in torch_on_cpu)
        yield f"model.attn_implementation=flash_attention_2 needs GPUs, but {keys}: give them GPUs or set it to sdpa"
    on_gpu = [role for stage in runs for role in STAGE_ROLES[stage] if getattr(cfg.roles, role).gpus]
    if cfg.cluster.placement == "cpu" and on_gpu:
        keys = ", ".join(f"roles.{role}.gpus={getattr(cfg.roles, role).gpus:g}" for role in dict.fromkeys(on_gpu))
        yield f"cluster.placement=cpu leaves GPUs alone, but {keys}: set them to 0, or cluster.placement=separate"
    for role in ("reward", "reference"):
        gpus = getattr(cfg.roles, role).gpus
        if role in on_gpu and gpus > 1 and gpus != int(gpus):
            yield f"roles.{role}.gpus={gpus:g} is neither a share of one GPU nor several: set it to {int(gpus)}"
    generator = cfg.roles.generator
    if "generator" in on_gpu and generator.tensor_parallel_size > 1 and generator.gpus != 1:
        yield (f"roles.generator.tensor_parallel_size={generator.tensor_parallel_size} wants whole devices, but "
               f"roles.generator.gpus={generator.gpus:g}: set it to 1")
    if "generator" in on_cpu and generator.tensor_parallel_size > 1:
        yield (f"roles.generator.tensor_parallel_size={generator.tensor_parallel_size} needs GPUs, but "
               "roles.generator.gpus=0: set it to 1 and raise roles.generator.replicas instead")


def _weight_sync(cfg: Config, runs: list[str]) -> Iterator[str]:
    if "ppo" not in runs:
        return
    generator, policy, backend = cfg.roles.generator, cfg.roles.policy, cfg.weight_sync.backend
    colocated = cfg.cluster.placement == "colocated"
    if cfg.model.dtype == "bfloat16" and cfg.weight_sync.max_mismatch < BF16_MISMATCH:
        yield (f"weight_sync.max_mismatch={cfg.weight_sync.max_mismatch:g} is for float32, but model.dtype=bfloat16 "
               "rounds log-probabilities by 0.01 to 0.03: set it to 0.05")
    if colocated:
        yield from _colocated(generator, policy)
    if backend in ("nccl", "ipc"):
        for name, role in (("generator", generator), ("policy", policy)):
            if role.gpus == 0:
                yield f"weight_sync.backend={backend} needs GPUs, but roles.{name}.gpus=0: use gloo or auto"
    if backend == "ipc" and not colocated:
        yield (f"weight_sync.backend=ipc needs shared GPUs, but cluster.placement={cfg.cluster.placement}: set "
               "cluster.placement=colocated, or weight_sync.backend=auto")
    if backend == "nccl" and colocated:
        yield ("weight_sync.backend=nccl cannot connect two processes on one GPU, but cluster.placement=colocated: "
               "use ipc or auto")


def _colocated(generator: Any, policy: LearnerConfig) -> Iterator[str]:
    if generator.tensor_parallel_size != 1:
        yield (f"cluster.placement=colocated puts one engine on one device, but roles.generator.tensor_parallel_size="
               f"{generator.tensor_parallel_size}: set it to 1, or cluster.placement=separate")
    if generator.replicas != policy.ranks:
        yield (f"cluster.placement=colocated pairs generators with policy ranks, but roles.generator.replicas="
               f"{generator.replicas} and roles.policy.ranks={policy.ranks}: make them equal")
    if generator.gpus and generator.gpu_memory_utilization > generator.gpus:
        yield (f"roles.generator.gpu_memory_utilization={generator.gpu_memory_utilization:g} is more than its share of "
               f"the GPU, roles.generator.gpus={generator.gpus:g}: lower the first")
    if generator.gpus + policy.gpus > 1:
        yield (f"cluster.placement=colocated shares a GPU, but roles.generator.gpus={generator.gpus:g} + "
               f"roles.policy.gpus={policy.gpus:g} is more than 1: use shares such as 0.5 and 0.5")
