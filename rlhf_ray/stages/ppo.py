"""Stage `ppo`: the policy against rewards (InstructGPT, step 3), by PPO or any algorithm of core/algorithms."""

import math
from dataclasses import asdict

import ray

from rlhf_ray import storage
from rlhf_ray.actors.policy import PolicyLearner
from rlhf_ray.cluster.cast import Cast
from rlhf_ray.cluster.group import Group
from rlhf_ray.cluster.runtime import session
from rlhf_ray.config.schema import Config
from rlhf_ray.core.schedule import lr_scale
from rlhf_ray.core.types import PromptTexts
from rlhf_ray.data.blocks import block_dataset, token_blocks
from rlhf_ray.data.prompts import PromptStream, encode_prompts
from rlhf_ray.data.sources import load_task_data
from rlhf_ray.data.templates import render_prompt
from rlhf_ray.metrics.progress import console
from rlhf_ray.metrics.recorder import METRICS, SAMPLES, Recorder
from rlhf_ray.models.hub import check_same_tokenizer, load_tokenizer
from rlhf_ray.stages.common import Paths, resumed, stage
from rlhf_ray.train import roles
from rlhf_ray.train.answers import prompt_set
from rlhf_ray.train.fleet import WANTED, Fleet
from rlhf_ray.train.ppo import PPOTrainer
from rlhf_ray.train.rollout import RolloutWorkers
from rlhf_ray.train.turns import Turns
from rlhf_ray.train.watch import Watch


def optimizer_steps(cfg: Config, iterations: int) -> int:
    """Optimizer steps of a learner over so many iterations."""
    return iterations * cfg.algorithm.ppo_epochs * math.ceil(cfg.rollout.batch_size / cfg.algorithm.minibatch_size)


def other_rates(cfg: Config, was: int, done: int) -> str | None:
    """What to say of learning rates when a run goes on after iteration `done` with another ppo.iterations than `was`;
    None if they stay as they were."""
    p, total = cfg.ppo, cfg.ppo.iterations
    learners = [("critic", p.critic_optimizer, 0)] if cfg.algorithm.name == "ppo" else []
    learners.append(("policy", p.policy_optimizer, p.critic_warmup_iterations if learners else 0))
    changes = []
    for name, o, warmup in learners:
        first = optimizer_steps(cfg, max(0, done - warmup))
        before, now = (lr_scale(first, max(1, optimizer_steps(cfg, n - warmup)), o.warmup_ratio, o.schedule,
                                o.min_lr_ratio) for n in (was, total))
        if before != now:
            changes.append(f"{name} {now:.0%} of the peak instead of {before:.0%}")
    if done >= total or not changes:
        return None
    return (f"ppo.iterations was {was} in the checkpoint, is {total} now, and the learning rates go on as in a run of "
            f"{total}: in iteration {done + 1} {', '.join(changes)}")


def run(cfg: Config) -> None:
    with stage(cfg, "ppo") as record:
        paths, task_data, p = Paths(cfg), load_task_data(cfg.data), cfg.ppo
        paths.require("sft")
        sft, reward = str(paths.sft), str(paths.reward)
        tokenizer = load_tokenizer(sft)
        if roles.MODEL in cfg.reward.sources:
            paths.require("rm")
            check_same_tokenizer(sft, reward)
        kept, prompts, dropped = encode_prompts(task_data.ppo_prompts(), cfg.data, tokenizer)
        texts = PromptTexts(tuple(render_prompt(x, cfg.data.template, tokenizer) for x in kept),
                            tuple(x.metadata for x in kept))
        backend, names = roles.sync_backend(cfg), roles.roles_of(cfg, "ppo")
        has_critic, watched = "critic" in names, "judge" in names
        layout = roles.layout_of(cfg, names)
        models = {"sft": paths.sft, **({"rm": paths.reward} if roles.MODEL in cfg.reward.sources else {})}
        checkpoints, checkpoint = resumed(cfg, record, models, p.iterations)
        if checkpoint:
            was = checkpoint.identity["config"]["ppo"]["iterations"]
            if line := other_rates(cfg, was, checkpoint.step):
                console.print(line, markup=False)
        directory, log = paths.stage("ppo"), cfg.logging
        for old in ("PAUSED", *(() if checkpoint else (METRICS, SAMPLES, "alarms.jsonl", WANTED))):
            (directory / old).unlink(missing_ok=True)
            storage.withdraw(directory / old)
        with session(cfg), Cast(layout, cfg.cluster, directory) as cast:
            ptx = stream = None
            if cfg.algorithm.ptx:
                blocks = token_blocks(task_data.texts(), tokenizer, cfg.model.max_length)
                ptx, stream = ray.put(block_dataset(blocks)), PromptStream(len(blocks), cfg.seed + 1)
            generators = roles.generators(cast, cfg, sft, ray.put(prompt_set(prompts)), backend, elastic=True)
            warmup = p.critic_warmup_iterations if has_critic else 0
            policy = roles.policy_learners(cast, cfg, sft, optimizer_steps(cfg, p.iterations - warmup), ptx)
            critic: Group | None = None
            if has_critic:
                start = reward if roles.MODEL in cfg.reward.sources else sft
                critic = roles.critic_learners(cast, cfg, start, optimizer_steps(cfg, p.iterations))
            workers = RolloutWorkers(
                generators, roles.reward_sources(cast, cfg, reward, sft, texts),
                roles.reference_models(cast, cfg, sft), roles.judge(cast, sft, task_data.judge()) if watched else None,
                Turns(generators, roles.sharing(cfg, policy, critic)),
                cfg.rollout.temperature, cfg.rollout.max_response_tokens,
            )

            def save() -> None:
                policy.call(PolicyLearner.save, str(paths.policy))

            done = checkpoint.step if checkpoint else 0
            with Recorder(directory, log.wandb, log.wandb_project, asdict(cfg), done) as recorder:
                watch = Watch(cfg.alarms, directory, save)
                fleet = Fleet(cast, cfg.roles.generator.replicas, directory)
                trainer = PPOTrainer(cfg, workers, policy, critic, PromptStream(len(prompts), cfg.seed), stream,
                                     recorder, watch, fleet, checkpoints)
                trainer.run(checkpoint, save)
                if log.wandb_model:
                    recorder.log_model(paths.policy)
            record.add(prompts=len(prompts), dropped=dropped, iterations=p.iterations, weight_sync=backend,
                       algorithm=cfg.algorithm.name, actors=trainer.actors, data=task_data.fingerprint(),
                       restarts=dict(trainer.recovery.restarts))
