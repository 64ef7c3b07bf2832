"""Which roles a stage starts, and what they ask of a cluster.

Imports nothing heavy: a job is checked before it is sent.
"""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_ray.cluster.runtime import JUDGE_CPUS
from rlhf_ray.config.schema import Config
from rlhf_ray.core.layout import Layout, RoleRequest, plan_layout
from rlhf_ray.errors import UserError

MODEL = "model"  # the entry of reward.sources that is the reward model


def roles_of(cfg: Config, stage: str) -> list[str]:
    """The roles that a stage starts together, in the order in which they are placed."""
    if stage == "compare":
        return [] if cfg.compare.ranker == "file" else ["generator"]
    if stage == "eval":
        return ["generator", "reference", *(["reward"] if "rm" in cfg.stages else [])]
    if stage == "ppo":
        critic = ["critic"] if cfg.algorithm.name == "ppo" else []
        sources = [reward_role(cfg, i) for i in range(len(cfg.reward.sources))]
        judge = ["judge"] if cfg.data.source == "reviews" else []
        return ["policy", *critic, "generator", *sources, "reference", *judge]
    return ["supervised"]


def reward_role(cfg: Config, i: int) -> str:
    """The name of the role of the i-th entry of reward.sources: `reward` for the model, else reward_1, reward_2, ..."""
    return "reward" if cfg.reward.sources[i] == MODEL else f"reward_{i + 1}"


def layout_of(cfg: Config, roles: Sequence[str]) -> Layout:
    """The placement of the named roles. Raises UserError when the numbers contradict each other."""
    r = cfg.roles
    requests = {
        "policy": RoleRequest(r.policy.ranks, r.policy.cpus, r.policy.gpus),
        "critic": RoleRequest(r.critic.ranks, r.critic.cpus, r.critic.gpus),
        "generator": RoleRequest(r.generator.replicas, r.generator.cpus,
                                 r.generator.gpus * r.generator.tensor_parallel_size),
        **{reward_role(cfg, i): RoleRequest(r.reward.replicas, r.reward.cpus) for i in range(len(cfg.reward.sources))},
        "reward": RoleRequest(r.reward.replicas, r.reward.cpus, r.reward.gpus),
        "reference": RoleRequest(r.reference.replicas, r.reference.cpus, r.reference.gpus),
        "judge": RoleRequest(1, JUDGE_CPUS),
        "supervised": RoleRequest(r.supervised.ranks, r.supervised.cpus, r.supervised.gpus),
    }
    try:
        return plan_layout({role: requests[role] for role in roles}, cfg.cluster.placement)
    except ValueError as error:
        raise UserError(f"roles and cluster.placement={cfg.cluster.placement} do not go together: {error}") from error
