"""What the learners say of rollouts before they learn from them: old log-probabilities and values.

Streaming: learners have nothing to do while responses are sampled, so a shard is theirs as soon as it is there. Their
passes are collective, so they are asked in waves: of one shard for each rank as long as they keep up, else of what has
come meanwhile, and in the last of what is left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import ray

from rlhf_ray.actors.learners import CriticLearner
from rlhf_ray.actors.policy import OldLogprobs, PolicyLearner
from rlhf_ray.cluster.group import Group, wait
from rlhf_ray.core.minibatches import balance
from rlhf_ray.errors import UserError
from rlhf_ray.train.rollout import Rollouts

T = TypeVar("T")


class Scoring:
    """Of one step. policy, critic: who is asked; eager: at once, not when all shards are there."""

    def __init__(self, policy: Group | None, critic: Group | None, eager: bool):
        self._policy = _Waves(policy, PolicyLearner.score, eager) if policy else None
        self._critic = _Waves(critic, CriticLearner.values, eager) if critic else None

    def add(self, shard: Any, tokens: int) -> None:
        """A shard is there: a reference to it."""
        for waves in (self._policy, self._critic):
            if waves:
                waves.add(shard, tokens)

    def finish(self, rollouts: Rollouts, timeout_s: float) -> dict[str, float]:
        """Wait for all of it, for the rewards and the reference; the shards then have what was found. Returns mean
        entropy and mismatch, nats per token.

        Everything that a reward source or the reference can raise is raised here, before anything has been updated: a
        learner that found it in place of an array would only say that it is lost.
        """
        shards = [s.rollout for s in rollouts.shards]
        if not shards:
            raise UserError("every response of this iteration is empty: the policy ends before it begins; look at "
                            "data.template and at what sft was trained on")
        asked = [ref for waves in (self._policy, self._critic) if waves for ref in waves.finish()]
        wait(asked + [ref for s in rollouts.shards for ref in (*s.scores, s.ref_logprobs)], timeout_s, "scoring")
        old: list[OldLogprobs] = self._policy.answers(shards) if self._policy else []
        values = self._critic.answers(shards) if self._critic else [None] * len(shards)
        refs = [o.logprobs for o in old] or [None] * len(shards)
        rollouts.shards = [replace(s, old_logprobs=o, values=v)
                           for s, o, v in zip(rollouts.shards, refs, values, strict=True)]
        if not old:
            return {}
        tokens = sum(o.tokens for o in old)
        return {"entropy": sum(o.entropy for o in old) / tokens, "mismatch": sum(o.gap for o in old) / tokens}


class _Waves:
    def __init__(self, group: Group, method: Callable[[Any, Sequence[Any]], list[Any]], eager: bool):
        self._group, self._method, self._eager = group, method, eager
        self._waiting: list[tuple[Any, int]] = []  # shards, their tokens
        self._places: dict[Any, tuple[Any, int]] = {}  # shard -> the call that answers, the place in its answer
        self._calls: list[Any] = []

    def add(self, shard: Any, tokens: int) -> None:
        self._waiting.append((shard, tokens))
        if self._eager and len(self._waiting) >= len(self._group) and not self._behind():
            self._ask()

    def _behind(self) -> bool:
        """Whether the wave before the last is not done: there is work for a while, and fewer calls are cheaper."""
        ranks = len(self._group)
        wave = self._calls[-2 * ranks : -ranks]
        return bool(wave) and bool(ray.wait(wave, num_returns=ranks, timeout=0, fetch_local=False)[1])

    def finish(self) -> list[Any]:
        """References to all answers."""
        if self._waiting:
            self._ask()
        return self._calls

    def answers(self, shards: Sequence[Any]) -> list[Any]:
        """What was answered of these shards, when all has been."""
        answered = dict(zip(self._calls, wait(self._calls, self._group.timeout_s, "scoring"), strict=True))
        return [answered[call][place] for call, place in (self._places[shard] for shard in shards)]

    def _ask(self) -> None:
        shards, tokens = zip(*self._waiting, strict=True)
        dealt = [[shards[i] for i in mine] for mine in balance(np.arange(len(shards)), np.array(tokens),
                                                               len(self._group))]
        calls = self._group.start_each(self._method, [(mine,) for mine in dealt])
        self._waiting = []
        self._calls += calls
        self._places |= {shard: (call, place) for call, mine in zip(calls, dealt, strict=True)
                         for place, shard in enumerate(mine)}


def in_order(dealt: Sequence[np.ndarray], answers: Sequence[Sequence[T]]) -> list[T]:
    """What was answered of each shard. dealt: shard numbers, by rank; answers: of each of them, by rank."""
    by_shard = {int(shard): answer for shards, some in zip(dealt, answers, strict=True)
                for shard, answer in zip(shards, some, strict=True)}
    return [by_shard[shard] for shard in sorted(by_shard)]

