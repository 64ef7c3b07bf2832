"""The PPO loop. The driver handles references and numbers; tokens never pass through it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from rlhf_ray.actors.generator import Sample, sample_seed
from rlhf_ray.actors.learners import CriticLearner, PolicyLearner, Window
from rlhf_ray.cluster.group import Group, wait
from rlhf_ray.config.schema import Config
from rlhf_ray.core.minibatches import plan_minibatches
from rlhf_ray.data.prompts import PromptStream
from rlhf_ray.metrics.recorder import Recorder
from rlhf_ray.train.rollout import Rollouts, RolloutWorkers


@dataclass
class Clock:
    """Seconds of each phase of an iteration."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - started


class PPOTrainer:
    """InstructGPT's step 3 (Ouyang et al. 2022, section 3.5): PPO on the reward model's score with a per-token KL
    penalty towards the SFT model, mixed with the pre-training loss."""

    def __init__(self, cfg: Config, workers: RolloutWorkers, policy: Group, critic: Group, prompts: PromptStream,
                 ptx: PromptStream | None, recorder: Recorder):
        self.cfg, self.workers, self.policy, self.critic = cfg, workers, policy, critic
        self.prompts, self.ptx, self.recorder = prompts, ptx, recorder
        self.version = 0

    def run(self) -> None:
        self.push_weights(version=1)  # engines start from a file; from here on they hold what the learners hold
        for step in range(1, self.cfg.ppo.iterations + 1):
            self.run_step(step)

    def run_step(self, step: int) -> None:
        clock, started = Clock(), time.monotonic()
        with clock("rollout"):
            rollouts = self.workers.run(self.samples(step), self.version)
        with clock("score"):
            entropy, mismatch = self.score(rollouts)
        with clock("advantages"):
            batches, numbers = self.prepare(rollouts)
        with clock("update"):
            report = self.update(step, rollouts, batches)
        with clock("weight_sync"):
            self.push_weights(self.version + 1)
        judged = wait(rollouts.judged, self.policy.timeout_s, "judge")
        seconds = time.monotonic() - started
        clock.seconds["other"] = max(0.0, seconds - sum(clock.seconds.values()))
        self.recorder.log(step, {
            **numbers, **report, "entropy": entropy, "mismatch": mismatch, "weight_version": self.version,
            "truncated": sum(i.truncated for i in rollouts.infos) / len(rollouts.lengths),
            "empty": sum(i.empty for i in rollouts.infos),
            **({"judge_score": sum(s for s, _ in judged) / sum(n for _, n in judged)} if judged else {}),
            "tokens_per_second": rollouts.response_tokens / seconds, "seconds": clock.seconds,
        })

    # -- the phases ------------------------------------------------------------------------------------------------

    def samples(self, step: int) -> list[Sample]:
        """What to sample in this step: `samples_per_prompt` rollouts of each of the next prompts."""
        r, seed = self.cfg.rollout, self.cfg.seed
        prompts = np.repeat(self.prompts.take(r.prompts_per_step), r.samples_per_prompt)
        return [Sample(i, int(p), sample_seed(seed, step, i)) for i, p in enumerate(prompts)]

    def score(self, rollouts: Rollouts) -> tuple[float, float]:
        """Old log-probabilities and values, while reward and reference finish. Returns mean entropy and mismatch."""
        shards = [s.rollout for s in rollouts.shards]
        policy = self.policy.start_each(PolicyLearner.score, [(s,) for s in _share(shards, len(self.policy))])
        critic = self.critic.start_each(CriticLearner.values, [(s,) for s in _share(shards, len(self.critic))])
        results = wait(policy + critic, self.policy.timeout_s, "scoring")
        old = _unshare([refs for refs, _ in results[: len(self.policy)]])
        values = _unshare(results[len(self.policy) :])
        rollouts.shards = [replace(s, old_logprobs=o, values=v)
                           for s, o, v in zip(rollouts.shards, old, values, strict=True)]
        tokens, entropy, gap = results[0][1]
        return entropy / tokens, gap / tokens

    def prepare(self, rollouts: Rollouts) -> tuple[list[Any], dict[str, float]]:
        """Rewards, advantages, returns: references to train batches, and the batch's numbers."""
        shares = _share(rollouts.shards, len(self.policy))
        results = self.policy.call_each(PolicyLearner.prepare, [(s, self.cfg.algorithm.kl_coef) for s in shares])
        return _unshare([refs for refs, _ in results]), results[0][1]

    def update(self, step: int, rollouts: Rollouts, batches: list[Any]) -> dict[str, float]:
        """Policy and critic side by side, on the same minibatches."""
        a, order = self.cfg.algorithm, rollouts.canonical_order

        def windows(ranks: int) -> list[list[Window]]:
            rng = np.random.default_rng((self.cfg.seed, step))
            plan = plan_minibatches(rollouts.lengths[order], ranks, a.minibatch_size, a.ppo_epochs, rng)
            return [[Window(order[parts[rank]], np.zeros(0, dtype=np.int64)) for parts in plan]
                    for rank in range(ranks)]

        refs = self.critic.start_each(CriticLearner.update, [(batches, w) for w in windows(len(self.critic))])
        if step > self.cfg.ppo.critic_warmup_iterations:
            mine = windows(len(self.policy))
            if self.ptx:  # every optimizer step mixes in text blocks of its own
                for k in range(len(mine[0])):
                    blocks = self.ptx.take(a.ptx_blocks)
                    for rank, rank_windows in enumerate(mine):
                        rank_windows[k] = replace(rank_windows[k], ptx=blocks[rank :: len(mine)])
            refs += self.policy.start_each(PolicyLearner.update, [(batches, w) for w in mine])
        reports = wait(refs, self.policy.timeout_s, "update")
        return reports[0] | (reports[-1] if len(reports) > len(self.critic) else {})

    def push_weights(self, version: int) -> None:
        """Every generator holds the policy's weights, stamped `version`, or this raises."""
        self.policy.call(PolicyLearner.push, version)
        self.version = version


def _share(items: list[Any], ranks: int) -> list[list[Any]]:
    """Deal shards to ranks in turn (they are of one size, whatever their order)."""
    return [items[rank::ranks] for rank in range(ranks)]


def _unshare(parts: list[list[Any]]) -> list[Any]:
    """The inverse of `_share`."""
    out: list[Any] = [None] * sum(len(p) for p in parts)
    for rank, part in enumerate(parts):
        out[rank :: len(parts)] = part
    return out


