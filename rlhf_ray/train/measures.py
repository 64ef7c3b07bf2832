"""What an iteration says of those who worked in it: how fast, how long their queues, whose weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_ray.train.rollout import Rollouts, RolloutWorkers


def measures(
    workers: RolloutWorkers, rollouts: Rollouts, judged: Sequence[tuple[float, int]], learnt: Mapping[str, float],
    seconds: Mapping[str, float], held: Mapping[str, int], epochs: int,
) -> dict[str, Any]:
    """Entries of metrics.jsonl. judged: (sum of scores, responses) of each shard, if there is a judge; learnt: what the
    learners report; seconds: of each phase; held: by generator, the version of the weights that it said it holds."""
    costs = workers.costs()
    return {
        "generators": len(workers.generators), "weight_version": min(held.values()), "weight_versions": dict(held),
        "empty": sum(i.empty for i in rollouts.infos),
        "repeated_ngrams": sum(i.repeated for i in rollouts.infos) / max(1, sum(i.ngrams for i in rollouts.infos)),
        "reward_seconds": {group.role: costs[group.role]["seconds"] for group in workers.rewards},
        "reward_retries": sum(cost["retries"] for cost in costs.values()),
        **({"judge_score": sum(s for s, _ in judged) / sum(n for _, n in judged)} if judged else {}),
        "tokens_per_second": rollouts.response_tokens / sum(seconds.values()),
        "role_tokens_per_second": _speeds(workers, rollouts, learnt, seconds["update"], epochs, costs),
    }


def _speeds(
    workers: RolloutWorkers, rollouts: Rollouts, learnt: Mapping[str, float], update_s: float, epochs: int,
    costs: Mapping[str, Mapping[str, float]],
) -> dict[str, float]:
    """Tokens per second of each role while it works, all its actors together.

    Of generators the sampled ones; of all others prompts and responses, and of learners in every epoch.
    """
    groups = [workers.generators, *workers.rewards, workers.reference]
    work = {role: (rollouts.tokens, cost["seconds"]) for role, cost in costs.items()}
    work["generator"] = rollouts.response_tokens, sum(info.seconds for info in rollouts.infos)
    speeds = {g.role: len(g) * tokens / seconds for g in groups for tokens, seconds in [work[g.role]] if seconds}
    learners = [role for role in ("policy", "critic") if f"{role}_grad_norm" in learnt]
    return speeds | dict.fromkeys(learners, epochs * rollouts.tokens / update_s)
