"""Generate and score, streaming: a shard is scored while later responses are still being sampled."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray

from rlhf_ray.actors.generator import Sample
from rlhf_ray.actors.learners import ScoredShard
from rlhf_ray.actors.scorers import Judge, ReferenceModel, RewardModel
from rlhf_ray.cluster.group import Group
from rlhf_ray.core.types import RolloutInfo


@dataclass
class Rollouts:
    """All shards of a step: references, and the numbers that the driver may know."""

    shards: list[ScoredShard] = field(default_factory=list)
    infos: list[RolloutInfo] = field(default_factory=list)
    judged: list[Any] = field(default_factory=list)  # references to (sum of judge scores, responses)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every rollout, shard after shard: int32 [N]."""
        return np.concatenate([info.lengths for info in self.infos])

    @property
    def canonical_order(self) -> np.ndarray:
        """Rollout numbers ordered by their place in the batch: the same whoever finished first. int64 [N]."""
        return np.argsort(np.concatenate([info.positions for info in self.infos]))

    @property
    def response_tokens(self) -> int:
        return sum(info.response_tokens for info in self.infos)


class RolloutWorkers:
    """The generators and the frozen scorers, working side by side."""

    def __init__(self, generators: Group, rewards: Sequence[Group], reference: Group, judge: Group | None,
                 temperature: float, max_tokens: int):
        self.generators, self.temperature, self.max_tokens = generators, temperature, max_tokens
        self.rewards, self._next_reward = rewards, [itertools.cycle(group.actors) for group in rewards]
        self._reference = itertools.cycle(reference.actors)
        self._judge = itertools.cycle(judge.actors) if judge else None

    def run(self, samples: list[Sample], version: int) -> Rollouts:
        """Sample everything with weights `version`; scores are on their way when this returns.

        Raises TimeoutError if no generator delivers within the call deadline.
        """
        n = len(self.generators)
        shares = [samples[i::n] for i in range(n)]
        found = []
        for generator, shard, info in self._shards(shares, version):
            scored = ScoredShard(
                rollout=shard,
                scores=tuple(_call(next(group), RewardModel.scores, shard) for group in self._next_reward),
                ref_logprobs=_call(next(self._reference), ReferenceModel.logprobs, shard, self.temperature),
            )
            judged = _call(next(self._judge), Judge.mean_score, shard) if self._judge else None
            found.append((generator, scored, info, judged))
        # Each generator's own order is reproducible; who of them was first is not, and must not change any sum.
        found.sort(key=lambda x: x[0])
        return Rollouts([x[1] for x in found], [x[2] for x in found], [x[3] for x in found if x[3] is not None])

    def reward_costs(self) -> dict[str, Any]:
        """Since the last call: seconds that each reward source worked, and how many calls had to be tried again."""
        costs = {group.role: group.call(RewardModel.stats) for group in self.rewards}
        return {"reward_seconds": {role: sum(c["seconds"] for c in each) for role, each in costs.items()},
                "reward_retries": sum(c["retries"] for each in costs.values() for c in each)}

    def probe(self, samples: list[Sample], version: int) -> list[list[Any]]:
        """References to the shards of each generator, every one of which answers all samples. Nothing is scored."""
        shards: list[list[Any]] = [[] for _ in self.generators.actors]
        for generator, shard, _ in self._shards([samples] * len(self.generators), version):
            shards[generator].append(shard)
        return shards

    def _shards(self, shares: list[list[Sample]], version: int) -> Iterator[tuple[int, Any, RolloutInfo]]:
        """(generator, shard reference, its numbers), from whichever generator has one ready."""
        streams: dict[Any, int] = {
            actor.rollout.options(num_returns="streaming").remote(share, version, self.temperature, self.max_tokens): i
            for i, (actor, share) in enumerate(zip(self.generators.actors, shares, strict=True)) if share
        }
        deadline = time.monotonic() + self.generators.timeout_s
        while streams:
            ready, _ = ray.wait(list(streams), timeout=max(0.0, deadline - time.monotonic()), fetch_local=False)
            if not ready:
                raise TimeoutError(f"generators {sorted(streams.values())} delivered nothing in time")
            for stream in list[Any](ready):
                try:
                    shard = next(stream)
                except StopIteration:
                    del streams[stream]
                    continue
                try:
                    info: RolloutInfo = ray.get(next(stream))
                except StopIteration:  # the generator failed: the one reference left holds its error
                    ray.get(shard)
                    raise
                yield streams[stream], shard, info
                deadline = time.monotonic() + self.generators.timeout_s


def _call(actor: Any, method: Any, *args: Any) -> Any:
    return getattr(actor, method.__name__).remote(*args)
