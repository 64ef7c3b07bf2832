"""The rollout generator: vLLM in a Ray actor."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import ray
from numpy.random import SeedSequence
from ray.exceptions import TaskCancelledError

from rlhf_ray.cluster.group import wait
from rlhf_ray.cluster.role import Role
from rlhf_ray.config.schema import GeneratorConfig, ModelConfig
from rlhf_ray.core.ragged import offsets
from rlhf_ray.core.repetition import repeated_ngrams
from rlhf_ray.core.shards import shard_sizes
from rlhf_ray.core.types import PromptSet, RolloutBatch, RolloutInfo, Sample
from rlhf_ray.engines.generation import GenerationEngine, Request, Response


def sample_seed(run_seed: int, step: int, position: int) -> int:
    """The seed of one sample: the same for the same place in the run; two samples share one by chance, 1 in 2^31."""
    return int(SeedSequence([run_seed, step, position]).generate_state(1)[0] >> 1)


class Generator(Role):
    """One vLLM engine. Samples with the weights it was last given, and stamps each shard with their version."""

    def setup(
        self, path: str, model: ModelConfig, cfg: GeneratorConfig, prompts: PromptSet, sync_backend: str, seed: int,
        shared: bool = False,
    ) -> None:
        self.cfg, self.prompts, self.starts = cfg, prompts, offsets(prompts.lengths)
        self.engine = GenerationEngine(path, model, cfg, sync_backend, seed, shared)

    def rollout(
        self, samples: Sequence[Sample], version: int, temperature: float, max_tokens: int, least: int = 1
    ) -> Iterator[RolloutBatch | RolloutInfo]:
        """Sample; yields a shard and then what the driver may know of it, again and again, as responses finish.

        least: responses that are worth a shard of their own (see `shard_sizes`).

        Raises RuntimeError if this engine does not hold the weights `version`: a stale engine is never asked.
        """
        if self.engine.version != version:
            raise RuntimeError(f"asked for a rollout of weights {version}, this engine holds {self.engine.version}")
        self.engine.forget_prefixes()  # so that the same samples give the same bits, whatever came before
        responses = self._sample(samples, temperature, max_tokens)
        for size in shard_sizes(len(samples), self.cfg.shard_size, least):
            started = time.monotonic()
            finished = list(itertools.islice(responses, size))
            yield from self._shard(samples, finished, time.monotonic() - started)

    def answer(self, samples: Sequence[Sample], temperature: float, max_tokens: int) -> list[np.ndarray]:
        """Response token ids int32 [n] of every sample, in order."""
        self.engine.forget_prefixes()
        responses = {r.index: r.ids for r in self._sample(samples, temperature, max_tokens)}
        return [responses[i] for i in range(len(samples))]

    def load(self, path: str) -> None:
        """Take the weights of another model of the same shape."""
        self.engine.load(path)

    # -- taking turns on a device: see train/turns.py -----------------------------------------------------------------

    def sleep(self) -> None:
        self.engine.sleep()

    def wake(self) -> None:
        self.engine.wake("weights", "kv_cache")

    def wake_weights(self) -> None:
        self.engine.wake("weights")

    def _sample(self, samples: Sequence[Sample], temperature: float, max_tokens: int) -> Iterator[Response]:
        return self.engine.sample([Request(self._prompt(s.prompt_index), s.seed) for s in samples], temperature,
                                  max_tokens, _unless_cancelled)

    def _prompt(self, i: int) -> list[int]:
        return self.prompts.ids[self.starts[i] : self.starts[i + 1]].tolist()

    def _shard(
        self, samples: Sequence[Sample], responses: list[Response], seconds: float
    ) -> Iterator[RolloutBatch | RolloutInfo]:
        empty = sum(len(r.ids) == 0 for r in responses)
        if empty == len(responses):
            return
        kept = sorted((r for r in responses if len(r.ids)), key=lambda r: samples[r.index].position)
        mine = [samples[r.index] for r in kept]
        prompts = [self._prompt(s.prompt_index) for s in mine]
        lengths = np.array([len(p) + len(r.ids) for p, r in zip(prompts, kept, strict=True)], dtype=np.int32)
        batch = RolloutBatch(
            ids=np.concatenate([np.concatenate([p, r.ids]) for p, r in zip(prompts, kept, strict=True)]).astype(
                np.int32),
            lengths=lengths,
            prompt_lengths=np.array([len(p) for p in prompts], dtype=np.int32),
            sampled_logprobs=np.concatenate(
                [np.concatenate([np.zeros(len(p), np.float32), r.logprobs]) for p, r in zip(prompts, kept, strict=True)]
            ),
            truncated=np.array([r.truncated for r in kept]),
            prompt_index=np.array([s.prompt_index for s in mine], dtype=np.int64),
            positions=np.array([s.position for s in mine], dtype=np.int64),
            seeds=np.array([s.seed for s in mine], dtype=np.int64),
            version=self.engine.version,
        )
        yield batch
        repeated, ngrams = np.sum([repeated_ngrams(r.ids) for r in kept], axis=0)
        yield RolloutInfo(
            positions=batch.positions, lengths=lengths, response_tokens=int(sum(len(r.ids) for r in kept)),
            truncated=int(batch.truncated.sum()), empty=empty, repeated=int(repeated), ngrams=int(ngrams),
            seconds=seconds, version=batch.version,
        )

    # -- weight sync: called by the policy's rank 0 -------------------------------------------------------------

    def init_weight_transfer(self, payload: dict[str, Any]) -> None:
        self.engine.init_weight_transfer(payload)

    def start_weight_update(self) -> None:
        self.engine.start_weight_update()

    def update_weights(self, payload: Any) -> None:
        self.engine.update_weights(payload)

    def finish_weight_update(self, version: int) -> tuple[int, list[int]]:
        """(the version that this engine now holds, a digest of what each of its workers was given)."""
        digests = self.engine.finish_weight_update(version)
        return self.engine.version, digests


def _unless_cancelled() -> None:
    """Whoever asked may have cancelled the call: Ray leaves it to a call that has begun to see that."""
    if ray.get_runtime_context().is_canceled():
        raise TaskCancelledError


class RayEngines:
    """All generators as the weight sender sees them (`engines.weight_sync.Engines`)."""

    def __init__(self, generators: Sequence[Any], workers_each: int, timeout_s: float):
        # Before the deadline of whoever waits for the learners, so that it is the generator that is found to be late.
        self._generators, self._each, self._timeout_s = list(generators), workers_each, 0.9 * timeout_s
        self._until = 0.0
        self.workers = len(self._generators) * workers_each

    def worker_counts(self) -> list[int]:
        return [self._each] * len(self._generators)

    def init(self, payloads: list[dict[str, Any]]) -> None:
        self._begin()
        self._wait([g.init_weight_transfer.remote(p) for g, p in zip(self._generators, payloads, strict=True)])

    def start(self) -> None:
        self._begin()
        self._wait([g.start_weight_update.remote() for g in self._generators])

    def update(self, payload: Any) -> None:
        self._wait([g.update_weights.remote(payload) for g in self._generators])

    def finish(self, version: int, digest: int) -> list[int]:
        held = self._wait([g.finish_weight_update.remote(version) for g in self._generators])
        wrong = [f"generator {i} holds version {v} with digests {d}" for i, (v, d) in enumerate(held)
                 if v != version or d != [digest] * self._each]
        if wrong:
            raise RuntimeError(f"after the sync to version {version}, digest {digest}: {'; '.join(wrong)}. The weights "
                               "did not arrive as they were sent: check the wire between learners and generators")
        return [v for v, _ in held]

    def _begin(self) -> None:
        """Connecting, or a sync, from here on: all its calls together have one deadline."""
        self._until = time.monotonic() + self._timeout_s

    def _wait(self, refs: list[Any]) -> list[Any]:
        return wait(refs, max(0.0, self._until - time.monotonic()),
                    f"weight sync, {self._timeout_s:.0f} s for all of it: a generator")
