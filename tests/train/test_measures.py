"""What an iteration says of those who worked in it. Actors are numbers here."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from rlhf_ray.cluster.group import Group
from rlhf_ray.core.types import RolloutInfo
from rlhf_ray.train.measures import measures
from rlhf_ray.train.rollout import Rollouts


def info(prompts: int, responses: int, seconds: float) -> RolloutInfo:
    """A shard of two rollouts, of so many tokens together."""
    lengths = np.array([prompts, responses], dtype=np.int32)
    return RolloutInfo(np.array([0, 1]), lengths, responses, 0, 1, 3, 12, seconds, 4)


def test_by_hand() -> None:
    """Two generators, two actors of a reward model, a reference; 60 response tokens, 100 with their prompts, in 20 s.

    Tokens per second: 60 / 20 of the run; sampled 2 x 60 / (2 + 4); read 2 x 100 / 5 and 100 / 10; learnt in two epochs
    2 x 100 / 8. Versions are what each generator said, whatever others did.
    """
    costs = {"reward": {"seconds": 5.0, "retries": 2.0}, "reference": {"seconds": 10.0, "retries": 0.0}}
    workers: Any = SimpleNamespace(
        generators=Group("generator", [1, 2], 9.0), rewards=[Group("reward", [1, 2], 9.0)],
        reference=Group("reference", [1], 9.0), costs=lambda: costs)
    rollouts = Rollouts(infos=[info(30, 40, 2.0), info(10, 20, 4.0)])
    assert measures(workers, rollouts, [(3.0, 2), (1.0, 2)], {"policy_grad_norm": 1.0},
                    {"rollout": 12.0, "update": 8.0}, {"generator-0": 6, "generator-1": 5}, 2) == {
        "generators": 2, "weight_version": 5, "weight_versions": {"generator-0": 6, "generator-1": 5},
        "empty": 2, "repeated_ngrams": 6 / 24, "reward_seconds": {"reward": 5.0}, "reward_retries": 2.0,
        "judge_score": 1.0, "tokens_per_second": 3.0,
        "role_tokens_per_second": {"generator": 20.0, "reward": 40.0, "reference": 10.0, "policy": 25.0}}
