"""Generate and score, streaming: a shard is scored while later responses are still being sampled.

Exactness. The samples of a step are cut into shares, one for each generator that is wanted. A share is a pure function
of its samples and of the weights, on whichever engine (its prefix cache is emptied first), so a share whose generator
died is sampled again, whole, by any other. What the finished shares gave is kept for that.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import ray

from rlhf_ray.actors.generator import Generator
from rlhf_ray.actors.reader import Reader
from rlhf_ray.actors.scorers import Judge, ReferenceModel, RewardModel
from rlhf_ray.cluster.group import IO, TOGETHER_S, Group, Overdue, debtors, wait
from rlhf_ray.cluster.health import LOST
from rlhf_ray.core.types import RolloutInfo, Sample, SampleText, ScoredShard
from rlhf_ray.train.turns import Turns

SAMPLES = 3  # of an iteration, for people to read
_FINEST = 64  # of the batch, a part so small that it is not cut any more: the calls about each shard cost the driver


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
    def shard_tokens(self) -> np.ndarray:
        """Of each shard, prompts and responses: int64 [shards]."""
        return np.array([info.tokens for info in self.infos], dtype=np.int64)

    @property
    def tokens(self) -> int:
        """Of prompts and responses."""
        return int(self.shard_tokens.sum())

    @property
    def version(self) -> int:
        """Of the oldest weights that sampled any of them."""
        return min(info.version for info in self.infos)

    @property
    def response_tokens(self) -> int:
        return sum(info.response_tokens for info in self.infos)


@dataclass(frozen=True)
class _Shard:
    """References to a scored shard and to what the judge says of it; the numbers that the driver may know."""

    scored: ScoredShard
    judged: Any
    info: RolloutInfo


class Forgotten(Exception):
    """Nobody wants these rollouts any more."""


class RolloutWorkers:
    """The generators and the frozen scorers, working side by side."""

    def __init__(self, generators: Group, rewards: Sequence[Group], reference: Group, judge: Group | None,
                 turns: Turns, temperature: float, max_tokens: int):
        self.generators, self.temperature, self.max_tokens = generators, temperature, max_tokens
        self.rewards, self.reference, self.judge, self.turns = rewards, reference, judge, turns
        self._turns = itertools.count()
        self._samples: tuple[int, list[Sample], int] = (0, [], 0)  # weights, samples and shares of what is kept
        self._kept: dict[int, list[_Shard]] = {}  # by share

    def run(
        self, samples: list[Sample], version: int, shares: int,
        heard: Callable[[Any, int], None] = lambda shard, tokens: None, dropped: threading.Event | None = None,
    ) -> Rollouts:
        """Sample everything with weights `version`, in so many shares; scores are on their way when this returns.

        heard: is told of every shard, a reference and its tokens, as soon as it is there. dropped: once it is set,
        this raises Forgotten within a second. However it ends, generators leave off what is not done then.
        Called again with the same arguments, after actors were replaced, it does only what is missing: what is there
        is kept until a call with others, for an update that fails needs it again. Raises one of LOST, when the other
        generators are done, if one died; Overdue if none delivers within the call deadline.
        """
        self.turns.sample()
        if self._samples != (version, samples, shares):
            self.forget()
            self._samples = version, samples, shares
        missing = {i: samples[i::shares] for i in range(shares) if i not in self._kept and samples[i::shares]}
        self._kept = {i: [self._ask(shard) for shard in shards] for i, shards in self._kept.items()}
        for kept in (shard for shards in self._kept.values() for shard in shards):
            heard(kept.scored.rollout, kept.info.tokens)
        found: dict[int, list[_Shard]] = {i: [] for i in missing}
        lost: Exception | None = None
        for share, shard, info in self._shards(missing, version, dropped or threading.Event()):
            if isinstance(info, Exception):
                lost = info
                del found[share]
            else:
                found[share].append(self._ask(_Shard(ScoredShard(shard, (), None), None, info)))
                heard(shard, info.tokens)
        self._kept |= found
        self.turns.learn()
        if lost:
            raise lost
        # Each share's own order is reproducible; which was done first is not, and must not change any sum.
        shards = [shard for share in sorted(self._kept) for shard in self._kept[share]]
        return Rollouts([s.scored for s in shards], [s.info for s in shards],
                        [s.judged for s in shards if s.judged is not None])

    def forget(self) -> None:
        """Keep nothing."""
        self._samples, self._kept = (0, [], 0), {}

    def _ask(self, shard: _Shard) -> _Shard:
        """Have the shard scored by all who have not been asked yet, or are gone since."""
        s, turn = shard.scored, next(self._turns)

        def asked(ref: Any, group: Group, method: Any, *args: Any) -> Any:
            if ref is not None and debtors([ref]) <= group.ids:
                return ref
            return group.submit(turn % len(group), method, args)

        old = s.scores or (None,) * len(self.rewards)
        scored = replace(
            s, scores=tuple(asked(ref, group, RewardModel.scores, s.rollout)
                            for ref, group in zip(old, self.rewards, strict=True)),
            ref_logprobs=asked(s.ref_logprobs, self.reference, ReferenceModel.logprobs, s.rollout, self.temperature))
        judged = asked(shard.judged, self.judge, Judge.mean_score, s.rollout) if self.judge else None
        return _Shard(scored, judged, shard.info)

    def waiting(self, rollouts: Rollouts) -> dict[str, int]:
        """By role, calls on these rollouts that are not answered yet: how long its queue is now."""
        roles = {ref: group.role for s in rollouts.shards
                 for ref, group in ((s.ref_logprobs, self.reference), *zip(s.scores, self.rewards, strict=True))}
        if self.judge:
            roles |= dict.fromkeys(rollouts.judged, self.judge.role)
        _, late = ray.wait(list(roles), num_returns=len(roles), timeout=0, fetch_local=False) if roles else ([], [])
        return {role: sum(roles[ref] == role for ref in late) for role in dict.fromkeys(roles.values())}

    def read(self, rollouts: Rollouts, weights: Sequence[float], batch_size: int) -> list[Any]:
        """References to a few of the responses as text, lists of SampleText: those at places spread over the batch.

        weights: of the reward sources. The first of these has the tokenizer, and nothing to do once all is scored.
        """
        places = np.arange(0, batch_size, -(-batch_size // SAMPLES))
        refs: list[Any] = []
        for shard, info in zip(rollouts.shards, rollouts.infos, strict=True):
            rows = np.flatnonzero(np.isin(info.positions, places)).tolist()
            if rows:
                refs.append(self.rewards[0].submit(len(refs) % len(self.rewards[0]), Reader.samples,
                                                   (shard.rollout, rows, weights, *shard.scores),
                                                   concurrency_group=IO))
        return refs

    def texts(self, reading: Sequence[Any]) -> list[SampleText]:
        """What `read` has asked for, in the order of the batch."""
        found: list[list[SampleText]] = wait(reading, self.rewards[0].timeout_s, "samples")
        return sorted((sample for some in found for sample in some), key=lambda sample: sample.position)

    def costs(self) -> dict[str, dict[str, float]]:
        """Since the last call, by reward source and of the reference: seconds of work of all its actors, retries."""
        groups = [*self.rewards, self.reference]
        answers = iter(wait([ref for group in groups for ref in group.start(RewardModel.stats,
                                                                                     concurrency_group=IO)],
                            self.reference.timeout_s, "stats"))
        each = {group.role: [next(answers) for _ in group.actors] for group in groups}
        return {role: {key: sum(s[key] for s in some) for key in ("seconds", "retries")} for role, some in each.items()}

    def probe(self, samples: list[Sample], version: int) -> list[list[Any]]:
        """References to the shards of each generator, every one of which answers all samples. Nothing is scored."""
        self.turns.sample()
        shards: list[list[Any]] = [[] for _ in self.generators.actors]
        everybody = dict.fromkeys(range(len(self.generators)), samples)
        for generator, shard, info in self._shards(everybody, version, threading.Event()):
            if isinstance(info, Exception):
                raise info
            shards[generator].append(shard)
        self.turns.learn()
        return shards

    def _shards(
        self, shares: dict[int, list[Sample]], version: int, dropped: threading.Event
    ) -> Iterator[tuple[int, Any, RolloutInfo | Exception]]:
        """(share, shard reference, its numbers), from whichever generator has one ready; an error in place of the
        numbers says that the generator died and that nothing more comes of this share."""
        turns = itertools.cycle(range(len(self.generators)))
        least = max(1, sum(map(len, shares.values())) // _FINEST)
        streams: dict[Any, tuple[int, Any]] = {}
        for (share, samples), i in zip(shares.items(), turns, strict=False):
            stream = self.generators.submit(
                i, Generator.rollout, (samples, version, self.temperature, self.max_tokens, least),
                num_returns="streaming")
            streams[stream] = share, self.generators.actors[i]
        timeout_s = self.generators.timeout_s
        deadline = time.monotonic() + timeout_s
        try:
            while streams:
                left = deadline - time.monotonic()
                ready, _ = ray.wait(list(streams), timeout=max(0.0, min(1.0, left)), fetch_local=False)
                if dropped.is_set():
                    raise Forgotten
                if not ready and left > 1:
                    continue
                if not ready:
                    late = {actor._actor_id.hex() for _, actor in streams.values()}
                    raise Overdue(f"rollout: {len(late)} of {len(self.generators)} generators delivered nothing within "
                                  f"{timeout_s:.0f} s", late)
                ready, _ = ray.wait(list(streams), num_returns=len(streams), timeout=TOGETHER_S, fetch_local=False)
                for stream in list[Any](ready):
                    share, _ = streams[stream]
                    shard = next(stream, None)
                    if shard is None:  # that was all
                        del streams[stream]
                        continue
                    numbers = next(stream, shard)  # follow at once; without them, the shard is the generator's error
                    try:
                        info: RolloutInfo = wait([numbers], timeout_s, "rollout: numbers")[0]
                    except LOST as error:
                        del streams[stream]
                        yield share, None, error
                        continue
                    yield share, shard, info
                    deadline = time.monotonic() + timeout_s
        finally:
            for stream in streams:  # who still samples need not
                ray.cancel(stream)
