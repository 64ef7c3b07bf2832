"""Stage `ppo`: the policy against the reward model (InstructGPT, step 3)."""

import math
from dataclasses import asdict

import ray

from rlhf_ray.actors.learners import PolicyLearner
from rlhf_ray.cluster.group import Cast
from rlhf_ray.cluster.runtime import session
from rlhf_ray.config.schema import Config
from rlhf_ray.data.blocks import token_blocks
from rlhf_ray.data.prompts import PromptStream, encode_prompts
from rlhf_ray.data.sources import load_task_data
from rlhf_ray.metrics.progress import console
from rlhf_ray.metrics.recorder import Recorder
from rlhf_ray.models.hub import load_tokenizer
from rlhf_ray.stages.common import Paths, stage
from rlhf_ray.stages.pretrain import block_dataset
from rlhf_ray.train import roles
from rlhf_ray.train.answers import prompt_set
from rlhf_ray.train.ppo import PPOTrainer
from rlhf_ray.train.rollout import RolloutWorkers


def optimizer_steps(cfg: Config, iterations: int) -> int:
    """Optimizer steps of a learner over so many iterations."""
    rollouts = cfg.rollout.prompts_per_step * cfg.rollout.samples_per_prompt
    return iterations * cfg.algorithm.ppo_epochs * math.ceil(rollouts / cfg.algorithm.minibatch_size)


def run(cfg: Config) -> None:
    with stage(cfg, "ppo") as record:
        paths, task_data = Paths(cfg), load_task_data(cfg.data)
        for maker in ("sft", "rm"):
            paths.require(maker)
        sft, reward = str(paths.sft), str(paths.reward)
        tokenizer = load_tokenizer(sft)
        _, prompts, dropped = encode_prompts(task_data.ppo_prompts(), cfg.data, tokenizer)
        backend, watched = roles.sync_backend(cfg), task_data.judge() is not None
        layout = roles.layout_of(
            cfg, ["policy", "critic", "generator", "reward", "reference"] + (["judge"] if watched else []))
        with session(cfg), Cast(layout, cfg.cluster) as cast:
            ptx = stream = None
            if cfg.algorithm.ptx_coef:
                blocks = token_blocks(task_data.texts(), tokenizer, cfg.model.max_length)
                ptx, stream = ray.put(block_dataset(blocks)), PromptStream(len(blocks), cfg.seed + 1)
            p = cfg.ppo
            generators = roles.generators(cast, cfg, sft, ray.put(prompt_set(prompts)), backend)
            policy = roles.policy_learners(
                cast, cfg, sft, optimizer_steps(cfg, p.iterations - p.critic_warmup_iterations), ptx)
            critic = roles.critic_learners(cast, cfg, reward, optimizer_steps(cfg, p.iterations))
            workers = RolloutWorkers(
                generators, roles.reward_models(cast, cfg, reward), roles.reference_models(cast, cfg, sft),
                roles.judge(cast, sft, task_data.judge()) if watched else None,
                cfg.rollout.temperature, cfg.rollout.max_response_tokens,
            )
            with console.status("starting generator, reward, reference, policy and critic actors"):
                actors = cast.ready()
                policy.call(PolicyLearner.connect, generators.actors, cfg.roles.generator.tensor_parallel_size, backend,
                            cast.meeting_point("policy"), cfg.weight_sync.bucket_mib, cfg.cluster.call_timeout_s)
            (paths.stage("ppo") / "metrics.jsonl").unlink(missing_ok=True)  # of an earlier run of this stage
            log = cfg.logging
            with Recorder(paths.stage("ppo"), log.wandb, log.wandb_project, asdict(cfg)) as recorder:
                order = PromptStream(len(prompts), cfg.seed)
                PPOTrainer(cfg, workers, policy, critic, order, stream, recorder).run()
            policy.call(PolicyLearner.save, str(paths.policy))
            record.add(prompts=len(prompts), dropped=dropped, iterations=p.iterations, weight_sync=backend,
                       actors=actors, data=task_data.fingerprint())
