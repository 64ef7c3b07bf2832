"""Generate and score, streaming: a shard is scored while later responses are still being sampled."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
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

    def __init__(self, generators: Group, reward: Group, reference: Group, judge: Group | None, temperature: float,
                 max_tokens: int):
        self.generators, self.temperature, self.max_tokens = generators, temperature, max_tokens
        self._reward, self._reference = itertools.cycle(reward.actors), itertools.cycle(reference.actors)
        self._judge = itertools.cycle(judge.actors) if judge else None

    def run(self, samples: list[Sample], version: int) -> Rollouts:
        """Sample everything with weights `version`; scores are on their way when this returns.

        Raises TimeoutError if no generator delivers within the call deadline.
        """
        n = len(self.generators)
        shares = [samples[i::n] for i in range(n)]
        result = Rollouts()
        for shard, info in self._shards(shares, version):
            result.infos.append(info)
            result.shards.append(ScoredShard(
                rollout=shard,
                scores=_call(next(self._reward), RewardModel.scores, shard),
                ref_logprobs=_call(next(self._reference), ReferenceModel.logprobs, shard, self.temperature),
            ))
            if self._judge:
                result.judged.append(_call(next(self._judge), Judge.mean_score, shard))
        return result

    def _shards(self, shares: list[list[Sample]], version: int) -> Iterator[tuple[Any, RolloutInfo]]:
        """Shard references and their numbers, from whichever generator has one ready."""
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
                yield shard, info
                deadline = time.monotonic() + self.generators.timeout_s


def _call(actor: Any, method: Any, *args: Any) -> Any:
    return getattr(actor, method.__name__).remote(*args)
