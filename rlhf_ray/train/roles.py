"""From configuration to running roles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray

from rlhf_ray.actors.generator import Generator
from rlhf_ray.actors.learners import CriticLearner
from rlhf_ray.actors.policy import PolicyLearner, Sampling
from rlhf_ray.actors.rewards import RewardFunction, RewardService
from rlhf_ray.actors.scorers import Judge, ReferenceModel, RewardModel
from rlhf_ray.cluster.cast import Cast
from rlhf_ray.cluster.group import Group
from rlhf_ray.cluster.runtime import address_of
from rlhf_ray.config.reward_sources import SERVICE
from rlhf_ray.config.schema import Config
from rlhf_ray.core.layout import check_sync_backend, default_sync_backend
from rlhf_ray.core.types import PromptTexts
from rlhf_ray.engines.learner import Rank
from rlhf_ray.errors import UserError
from rlhf_ray.train.stage_roles import MODEL as MODEL
from rlhf_ray.train.stage_roles import layout_of as layout_of
from rlhf_ray.train.stage_roles import reward_role as reward_role
from rlhf_ray.train.stage_roles import roles_of as roles_of


def sync_backend(cfg: Config) -> str:
    """The wire of the weight sync: what was asked for if the layout allows it, else the layout's own."""
    gpus = cfg.roles.policy.gpus > 0 and cfg.roles.generator.gpus > 0
    colocated = cfg.cluster.placement == "colocated"
    if cfg.weight_sync.backend == "auto":
        return default_sync_backend(gpus, colocated, address_of(cfg.cluster) == "local")
    try:
        check_sync_backend(cfg.weight_sync.backend, gpus, colocated)
    except ValueError as error:
        raise UserError(f"weight_sync.backend={cfg.weight_sync.backend}: {error}") from error
    return cfg.weight_sync.backend


def learner_ranks(cast: Cast, role: str, world_size: int) -> list[Rank]:
    """Who is who in a learner group, and where it meets."""
    address, port = cast.meeting_point(role)
    return [Rank(rank, world_size, address, port) for rank in range(world_size)]


def generators(cast: Cast, cfg: Config, path: str, prompts: Any, backend: str, elastic: bool = False) -> Group:
    """elastic: they may come and go, unless each shares the device of a policy rank."""
    g = cfg.roles.generator
    return cast.start(Generator, "generator",
                      [(path, cfg.model, g, prompts, backend, cfg.seed, elastic and shares_devices(cfg))] * g.replicas,
                      g.threads, elastic and cfg.cluster.placement != "colocated")


def shares_devices(cfg: Config) -> bool:
    """Whether generators and learners take turns on GPUs."""
    return cfg.cluster.placement == "colocated" and cfg.roles.generator.gpus > 0


def sharing(cfg: Config, policy: Group, critic: Group | None) -> list[Group]:
    """The learners that take turns with generators: the policy, and a critic that has a share of a GPU."""
    if not shares_devices(cfg):
        return []
    return [policy, critic] if critic and 0 < cfg.roles.critic.gpus < 1 else [policy]


def reward_models(cast: Cast, cfg: Config, path: str) -> Group:
    r = cfg.roles.reward
    return cast.start(RewardModel, "reward", [(path, cfg.model, r)] * r.replicas, r.threads)


def reference_models(cast: Cast, cfg: Config, path: str) -> Group:
    r = cfg.roles.reference
    return cast.start(ReferenceModel, "reference", [(path, cfg.model, r)] * r.replicas, r.threads)


def judge(cast: Cast, tokenizer_path: str, classifier: Any) -> Group:
    return cast.start(Judge, "judge", [(tokenizer_path, ray.put(classifier))], 1)


def reward_sources(cast: Cast, cfg: Config, model_path: str, tokenizer_path: str, prompts: PromptTexts) -> list[Group]:
    """One group of actors for each entry of reward.sources."""
    r, texts, groups = cfg.roles.reward, ray.put(prompts), []
    for i, source in enumerate(cfg.reward.sources):
        role, args = reward_role(cfg, i), (source, tokenizer_path, texts, cfg.reward)
        if source == MODEL:
            groups.append(cast.start(RewardModel, role, [(model_path, cfg.model, r)] * r.replicas, r.threads))
        elif source.startswith(SERVICE):
            groups.append(cast.start(RewardService, role, [args] * r.replicas, 1))
        else:
            groups.append(cast.start(RewardFunction, role, [(*args, str(Path.cwd()))] * r.replicas, 1))
    return groups


def policy_learners(cast: Cast, cfg: Config, path: str, steps: int, ptx: Any) -> Group:
    p, r, timeout = cfg.roles.policy, cfg.rollout, cfg.cluster.call_timeout_s
    sampling = Sampling(r.temperature, r.samples_per_prompt, r.max_response_tokens)
    return cast.start(
        PolicyLearner, "policy",
        [(rank, path, cfg.model, p, cfg.ppo.policy_optimizer, cfg.algorithm, sampling, steps, ptx, cfg.seed, timeout,
          sync_backend(cfg) == "shm")
         for rank in learner_ranks(cast, "policy", p.ranks)],
        p.threads,
    )


def critic_learners(cast: Cast, cfg: Config, path: str, steps: int) -> Group:
    c, timeout = cfg.roles.critic, cfg.cluster.call_timeout_s
    return cast.start(
        CriticLearner, "critic",
        [(rank, path, cfg.model, c, cfg.ppo.critic_optimizer, cfg.algorithm, steps, cfg.seed, timeout)
         for rank in learner_ranks(cast, "critic", c.ranks)],
        c.threads,
    )
