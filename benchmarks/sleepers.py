"""The real loop, group handling and object store around actors whose engines only sleep: what is left is orchestration.

Every actor answers as the role does whose name it bears, with arrays of the right sizes and types, and takes as long as
`Pace` says. Nothing here imports torch, so that over a hundred of them fit into the memory of a small machine.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray

from rlhf_ray.cluster.role import Role
from rlhf_ray.core.shards import shard_sizes
from rlhf_ray.core.types import CriticBatch, PolicyBatch, RolloutBatch, RolloutInfo, SampleText


@dataclass(frozen=True)
class Pace:
    """Seconds: of the longest response, of a forward pass over one rollout, of an update, of a sync. tokens: of every
    response; the time that a response takes is spread as lognormal, sigma 0.8, cut at `generation_s`."""

    generation_s: float = 0.0
    forward_s: float = 0.0
    update_s: float = 0.0
    sync_s: float = 0.0
    tokens: int = 64


@dataclass(frozen=True)
class Scored:
    """As rlhf_ray.actors.policy.OldLogprobs, which imports torch."""

    logprobs: Any
    tokens: int
    entropy: float
    gap: float


@dataclass(frozen=True)
class Ready:
    """As rlhf_ray.actors.policy.Prepared. seen: three numbers, that of all scores among them."""

    policy: list[Any]
    critic: list[Any]
    numbers: dict[str, float]
    seen: Any


@dataclass(frozen=True)
class Written:
    """As rlhf_ray.models.shards.SavedFile, which imports torch. sha256: of nothing."""

    name: str
    bytes: int = 0
    sha256: str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


class SleepingGenerator(Role):
    def setup(self, pace: Pace, shard_size: int) -> None:
        self.pace, self.shard_size = pace, shard_size

    def rollout(
        self, samples: Sequence[Any], version: int, temperature: float, max_tokens: int, least: int
    ) -> Iterator[RolloutBatch | RolloutInfo]:
        rng = np.random.default_rng([s.seed for s in samples])
        ends = np.sort(np.minimum(rng.lognormal(-1.5, 0.8, len(samples)), 1.0)) * self.pace.generation_s
        ends[-1] = self.pace.generation_s  # every generator has one of the longest
        started = time.monotonic()
        first, tokens = 0, self.pace.tokens
        for n in shard_sizes(len(samples), self.shard_size, least):
            some = samples[first : first + n]
            first += n
            time.sleep(max(0.0, started + ends[first - 1] - time.monotonic()))
            lengths = np.full(n, tokens, dtype=np.int32)
            positions = np.array([s.position for s in some])
            yield RolloutBatch(
                ids=np.ones(n * tokens, dtype=np.int32), lengths=lengths, prompt_lengths=lengths // 2,
                sampled_logprobs=np.zeros(n * tokens, dtype=np.float32), truncated=np.zeros(n, dtype=bool),
                prompt_index=np.zeros(n, dtype=np.int64), positions=positions, seeds=np.zeros(n, dtype=np.int64),
                version=version)
            yield RolloutInfo(positions, lengths, n * tokens // 2, 0, 0, 0, n * tokens, time.monotonic() - started,
                              version)


class SleepingScorer(Role):
    """Reward model and reference in one."""

    def setup(self, pace: Pace) -> None:
        self.pace = pace

    def scores(self, rollout: RolloutBatch) -> np.ndarray:
        time.sleep(self.pace.forward_s * len(rollout.lengths))
        return np.zeros(len(rollout.lengths), dtype=np.float32)

    def logprobs(self, rollout: RolloutBatch, temperature: float) -> np.ndarray:
        time.sleep(self.pace.forward_s * len(rollout.lengths))
        return np.zeros(len(rollout.ids), dtype=np.float32)

    def samples(self, rollout: RolloutBatch, rows: Sequence[int], *_: Any) -> list[SampleText]:
        return [SampleText(int(rollout.positions[row]), "", "", 1, False, 0.0) for row in rows]

    def stats(self) -> dict[str, float]:
        return {"retries": 0.0, "seconds": 0.001}


class SleepingLearner(Role):
    """Policy, or critic, without collectives: ranks do not wait for each other."""

    def setup(self, pace: Pace, role: str, file: str) -> None:
        """file: of a checkpoint, that this rank writes."""
        self.pace, self.role, self.file = pace, role, file

    def score(self, shards: Sequence[Any]) -> list[Scored]:
        rollouts: list[RolloutBatch] = ray.get(list(shards))
        time.sleep(self.pace.forward_s * sum(len(r.lengths) for r in rollouts))
        return [Scored(ray.put(np.zeros(len(r.ids), dtype=np.float32)), len(r.ids), 0.0, 0.0) for r in rollouts]

    def values(self, shards: Sequence[Any]) -> list[Any]:
        return [s.logprobs for s in self.score(shards)]

    def prepare(self, shards: Sequence[Any], weights: Any, shaping: Any, kl_coef: float, seen: Any) -> Ready:
        policy, critic = [], []
        found = iter(ray.get([ref for s in shards
                              for ref in (s.rollout, s.ref_logprobs, s.old_logprobs, s.values, *s.scores)]))
        for shard in shards:
            rollout, ref, old, values, *_ = itertools.islice(found, 4 + len(shard.scores))
            policy.append(ray.put(PolicyBatch(rollout.ids, rollout.lengths, rollout.in_response, old, ref, ref, ref)))
            critic.append(ray.put(CriticBatch(rollout.ids, rollout.lengths, rollout.in_response, values, ref)))
        numbers = {"score": 0.0, "kl_per_sequence": 0.0, "response_length": float(self.pace.tokens)}
        return Ready(policy, critic, numbers, type(seen)(0.0, 0.0, 1.0))

    def update(self, batches: Sequence[Any], *_: Any) -> dict[str, float]:
        ray.get(list(batches))
        time.sleep(self.pace.update_s)
        return {f"{self.role}_grad_norm": 1.0}

    def connect(self, generators: Sequence[Any], *_: Any) -> None:
        self.generators = len(generators)

    def push(self, version: int) -> list[int]:
        time.sleep(self.pace.sync_s)
        return [version] * self.generators

    def snapshot(self, directory: str) -> None:
        pass

    def write(self, directory: str) -> list[Any]:
        (Path(directory) / self.file).touch()
        return [Written(self.file)]


@contextmanager
def trainer(pace: Pace, directory: Path, *overrides: str) -> Iterator[Any]:
    """A PPOTrainer of the configuration that the overrides make, with a critic, whose actors sleep."""
    from rlhf_ray.cluster.cast import Cast
    from rlhf_ray.cluster.runtime import session
    from rlhf_ray.config.load import compose
    from rlhf_ray.data.prompts import PromptStream
    from rlhf_ray.metrics.recorder import Recorder
    from rlhf_ray.models.shards import shard_name
    from rlhf_ray.train import roles
    from rlhf_ray.train.checkpoint import Checkpoints
    from rlhf_ray.train.fleet import Fleet
    from rlhf_ray.train.ppo import PPOTrainer
    from rlhf_ray.train.rollout import RolloutWorkers
    from rlhf_ray.train.turns import Turns
    from rlhf_ray.train.watch import Watch

    cfg = compose(["experiment=null", "data=files", f"output_dir={directory}", "logging.wandb=disabled",
                   "checkpoint.iterations=1000000", *overrides])
    r, kinds = cfg.roles, ("generator", "reward", "reference", "policy", "critic")
    with session(cfg), Cast(roles.layout_of(cfg, list(kinds)), cfg.cluster, directory) as cast:
        generators = cast.start(SleepingGenerator, "generator", [(pace, r.generator.shard_size)] * r.generator.replicas,
                                1)
        policy, critic = (
            cast.start(SleepingLearner, role, [(pace, role, shard_name(role, i, ranks)) for i in range(ranks)], 1)
            for role, ranks in (("policy", r.policy.ranks), ("critic", r.critic.ranks)))
        reward = cast.start(SleepingScorer, "reward", [(pace,)] * r.reward.replicas, 1)
        reference = cast.start(SleepingScorer, "reference", [(pace,)] * r.reference.replicas, 1)
        workers = RolloutWorkers(generators, [reward], reference, None, Turns(generators, []), 1.0,
                                 cfg.rollout.max_response_tokens)
        cast.ready()
        with Recorder(directory, "disabled", "", asdict(cfg)) as recorder:
            yield PPOTrainer(cfg, workers, policy, critic, PromptStream(10_000, 0), None, recorder,
                             Watch(cfg.alarms, directory, lambda: None), Fleet(cast, r.generator.replicas, directory),
                             Checkpoints(directory, cfg.checkpoint, {}))


def timed(trainer: Any, warm_up: int = 2) -> dict[str, list[float]]:
    """Train, and give of every iteration behind the first `warm_up`: its seconds, and the driver's own processor
    seconds (all threads)."""
    wall, cpu = [], []
    advance = trainer.advance

    def advancing() -> None:
        started, worked = time.monotonic(), time.process_time()
        advance()
        wall.append(time.monotonic() - started)
        cpu.append(time.process_time() - worked)

    trainer.advance = advancing
    trainer.run()
    return {"iteration_s": wall[warm_up:], "driver_cpu_s": cpu[warm_up:]}
