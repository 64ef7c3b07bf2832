"""The loop of PPO and its relatives. The driver handles references and numbers; tokens never pass through it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from ray.exceptions import ObjectLostError

from rlhf_ray.actors.generator import sample_seed
from rlhf_ray.actors.learners import CriticLearner
from rlhf_ray.actors.policy import PolicyLearner, Prepared
from rlhf_ray.cluster.group import ActorInfo, Group, wait
from rlhf_ray.cluster.interruption import Interruption
from rlhf_ray.cluster.timeline import span
from rlhf_ray.config.schema import Config
from rlhf_ray.core.kl import adapted_kl_coef
from rlhf_ray.core.minibatches import balance, plan_minibatches
from rlhf_ray.core.shards import of_rank
from rlhf_ray.core.types import Moments, Sample, Shaping, Window
from rlhf_ray.data.prompts import PromptStream
from rlhf_ray.errors import UserError
from rlhf_ray.metrics.progress import console
from rlhf_ray.metrics.recorder import Recorder
from rlhf_ray.train.ahead import Ahead
from rlhf_ray.train.checkpoint import Checkpoint, Checkpoints
from rlhf_ray.train.fleet import Fleet
from rlhf_ray.train.measures import measures
from rlhf_ray.train.mismatch import check_first_sync
from rlhf_ray.train.recovery import Recovery, Saver
from rlhf_ray.train.roles import sync_backend
from rlhf_ray.train.rollout import Rollouts, RolloutWorkers
from rlhf_ray.train.scoring import Scoring, in_order
from rlhf_ray.train.watch import Watch


@dataclass
class Clock:
    """Seconds of each phase of an iteration; `enter` hears of every beginning, and `ray timeline` shows them all."""

    iteration: int
    enter: Callable[[str], None]
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.enter(phase)
        started = time.monotonic()
        with span(f"iteration {self.iteration}: {phase}"):
            yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - started

    def close(self, seconds: float, before: dict[str, float]) -> None:
        """The iteration took so long; what no phase had is `other`. before: what of the checkpoint before it was not
        done beside the work; it is taken over."""
        self.seconds["other"] = max(0.0, seconds - sum(self.seconds.values()))
        self.seconds |= before
        before.clear()


class Again(Exception):
    """The iteration has to be tried again; all is set for it."""


class PPOTrainer:
    """InstructGPT's step 3 (Ouyang et al. 2022, section 3.5), with any algorithm of core/algorithms.

    They differ in how scores become advantages and in whether there is a critic; this loop is the same for all.
    """

    def __init__(self, cfg: Config, workers: RolloutWorkers, policy: Group, critic: Group | None,
                 prompts: PromptStream, ptx: PromptStream | None, recorder: Recorder, watch: Watch, fleet: Fleet,
                 checkpoints: Checkpoints):
        self.cfg, self.workers, self.policy, self.critic = cfg, workers, policy, critic
        self.prompts, self.ptx, self.recorder, self.watch = prompts, ptx, recorder, watch
        self.fleet, self.cast = fleet, fleet.cast
        self.step, self.version = 0, 1
        self.held: dict[str, int] = {}  # by generator, the version of the weights that it said it holds
        self.ahead = Ahead(workers)
        self.begun = self.done = False
        self.actors: list[ActorInfo] = []  # as they came up
        self.saving: dict[str, float] = {}  # seconds
        self.weights = cfg.reward.weights or [1.0] * len(cfg.reward.sources)
        self.kl_coef, self.seen_scores = cfg.algorithm.kl_coef, Moments()
        learners = [policy, *([critic] if critic else [])]
        self.saver = Saver(checkpoints, learners)
        self.recovery = Recovery(self.cast, learners, self.saver, cfg.cluster.attempts, connect=self.connect,
                                 roll_back=self.roll_back)
        self.start = self.boundary = self.state_dict()

    def run(self, checkpoint: Checkpoint | None = None, last: Callable[[], None] = lambda: None) -> None:
        """Train to ppo.iterations, from a checkpoint or from the start, whatever is lost on the way. last: what is
        still to be done with the learners then.

        However it ends, it leaves a checkpoint of the last whole iteration if the learners live.
        """
        with Interruption() as self.interruption:
            try:
                while not self.done:
                    try:
                        self.go_on(checkpoint, last)
                    except Exception as error:
                        self.interruption.allow()
                        if isinstance(error, ObjectLostError):
                            self.workers.forget()  # what is kept may be gone with its node
                        self.ahead.drop()
                        self.load_state_dict(self.boundary)
                        if not isinstance(error, Again):
                            self.recovery.heal(error)
            except BaseException:
                self.saver.last(self.save)
                raise
            finally:
                self.ahead.drop()
                self.workers.forget()

    def go_on(self, checkpoint: Checkpoint | None, last: Callable[[], None]) -> None:
        if not self.begun:
            self.begin(checkpoint)
        self.watch.act(self.step)  # if somebody was lost while it did
        while self.step < self.cfg.ppo.iterations:
            self.advance()
        self.saver.finish()
        last()
        self.done = True

    def begin(self, checkpoint: Checkpoint | None) -> None:
        with console.status("starting the actors of all roles"):
            self.actors = self.cast.ready()
        if checkpoint:
            self.recovery.restore(checkpoint)
            self.roll_back(checkpoint)
        self.connect()  # engines start from a file; from here on they hold what the learners hold
        check_first_sync(self.workers, self.policy, self.prompts.count, self.version, self.cfg.seed,
                         self.cfg.weight_sync.max_mismatch)
        self.begun = True

    def advance(self) -> None:
        """One iteration: a transaction, which ends with a state that driver and learners share."""
        values = self.run_step(self.step + 1)
        self.step += 1
        self.watch.check(self.step, values)
        self.boundary = self.state_dict()
        self.recovery.updating = False
        self.recovery.succeeded(self.step)
        self.interruption.allow()
        if self.step % self.cfg.checkpoint.iterations == 0 or self.step == self.cfg.ppo.iterations:
            with Clock(self.step, self.enter, self.saving)("checkpoint"):
                self.save(values)
        self.watch.act(self.step)

    def run_step(self, step: int) -> dict[str, Any]:
        clock, started = Clock(step, self.enter), time.monotonic()
        with clock("rollout"):
            rollouts, scoring = self.rollout(step)
        waiting = self.workers.waiting(rollouts)
        if ahead := self.looks_ahead(step):
            if self.version < step:
                with clock("weight_sync"):
                    self.push_weights(step)
            self.ahead.begin(self.prompts.state_dict(), self.samples(step + 1), self.version, self.fleet.wanted)
        with clock("score"):
            measured = scoring.finish(rollouts, self.policy.timeout_s)
        reading = self.workers.read(rollouts, self.weights, self.cfg.rollout.batch_size)  # beside the next phase
        with clock("advantages"):
            batch = self.prepare(rollouts)
            samples = self.workers.texts(reading)
        staleness = step - rollouts.version
        self.saver.poll()
        self.interruption.defer()  # until the iteration is whole
        self.recovery.updating = True
        with clock("update"):
            report = self.update(step, rollouts, batch)
        if not ahead:
            with clock("weight_sync"):
                self.push_weights(step + 1)
        judged = wait(rollouts.judged, self.policy.timeout_s, "judge")
        clock.close(time.monotonic() - started, self.saving)
        values = {
            **batch.numbers, **measured, **report, "kl_coef": self.kl_coef, "staleness": staleness,
            "waiting_calls": waiting, "seconds": clock.seconds, "memory_gib": self.cast.health.memory_gib(),
            "restarts": {group.role: self.recovery.restarts[group.role] for group in self.cast.groups},
            **measures(self.workers, rollouts, judged, report, clock.seconds, self.held, self.cfg.algorithm.ppo_epochs),
        }
        self.recorder.log(step, values, samples)
        self.adapt(batch, len(rollouts.lengths))
        return values

    def enter(self, phase: str) -> None:
        """Called when a phase begins."""
        self.cast.phase, self.cast.iteration = phase, self.step + 1

    # -- the phases ------------------------------------------------------------------------------------------------

    def samples(self, step: int) -> list[Sample]:
        """What to sample in this step: `samples_per_prompt` rollouts of each of the next prompts."""
        r, seed = self.cfg.rollout, self.cfg.seed
        prompts = np.repeat(self.prompts.take(r.batch_size // r.samples_per_prompt), r.samples_per_prompt)
        return [Sample(i, int(p), sample_seed(seed, step, i)) for i, p in enumerate(prompts)]

    def looks_ahead(self, step: int) -> bool:
        """Whether the batch after this one is sampled while this one is learnt from."""
        p, checkpoint = self.cfg.ppo, self.cfg.checkpoint
        return p.schedule == "one_step_off" and step < p.iterations and step % checkpoint.iterations != 0

    def rollout(self, step: int) -> tuple[Rollouts, Scoring]:
        """The batch of this step, and what the learners are asked about it: shard by shard while the others are
        sampled, unless they have no device or no time for that."""
        ahead = self.ahead.take()
        scoring = Scoring(None if self.on_policy else self.policy, self.critic,
                          eager=ahead is None and not self.workers.turns.shared)
        if ahead is None:
            if self.workers.turns.stale:  # it is tried again, or the first sync was looked at
                self.sync()
            return self.workers.run(self.samples(step), self.version, self.fleet.wanted, scoring.add), scoring
        for shard, info in zip(ahead.shards, ahead.infos, strict=True):
            scoring.add(shard.rollout, info.tokens)
        return ahead, scoring

    @property
    def on_policy(self) -> bool:
        """Whether the update computes the old log-probabilities itself: they are those of its only pass, and nothing
        asks for them before, or for none but the engine's."""
        a, batch = self.cfg.algorithm, self.cfg.rollout.batch_size
        engines = a.kl_in == "loss" or a.old_logprobs == "engine"
        return a.ppo_epochs == 1 and batch <= a.minibatch_size and engines and a.importance_cap is None

    def prepare(self, rollouts: Rollouts) -> Prepared:
        """Rewards, advantages, returns: references to train batches, and the batch's numbers."""
        r = self.cfg.reward
        shaping = Shaping(r.truncated, r.truncation_penalty, r.overlong_tokens, r.overlong_penalty, r.normalize, r.clip,
                          self.cfg.rollout.max_response_tokens)
        dealt = balance(np.arange(len(rollouts.shards)), rollouts.shard_tokens, len(self.policy))
        results = self.policy.call_each(
            PolicyLearner.prepare, [([rollouts.shards[i] for i in shards], self.weights, shaping, self.kl_coef,
                                     self.seen_scores) for shards in dealt])
        if not results[0].seen.count:
            raise UserError("every response of this iteration was cut at rollout.max_response_tokens="
                            f"{self.cfg.rollout.max_response_tokens}, and reward.truncated=drop leaves nothing to "
                            "learn from: raise the first, or set reward.truncated=penalty")
        return Prepared(in_order(dealt, [x.policy for x in results]),
                        in_order(dealt, [x.critic for x in results]) if self.critic else [], results[0].numbers,
                        results[0].seen)

    def update(self, step: int, rollouts: Rollouts, batch: Prepared) -> dict[str, float]:
        """Policy and critic side by side, on the same minibatches."""
        a, order, critic, policy = self.cfg.algorithm, rollouts.canonical_order, [], []
        sizes = np.array([len(info.lengths) for info in rollouts.infos])

        def parts(shards: list[Any], ranks: int) -> list[tuple[list[Any], list[Window]]]:
            """For each rank the shards that it needs, and its windows on them."""
            rng = np.random.default_rng((self.cfg.seed, step))
            plan = plan_minibatches(rollouts.lengths[order], ranks, a.minibatch_size, a.ppo_epochs, rng)
            mine = [of_rank([order[parts[rank]] for parts in plan], sizes) for rank in range(ranks)]
            return [([shards[i] for i in needed], [Window(w, np.zeros(0, dtype=np.int64)) for w in windows])
                    for needed, windows in mine]

        if self.critic:
            critic = self.critic.start_each(CriticLearner.update, parts(batch.critic, len(self.critic)))
        if not self.critic or step > self.cfg.ppo.critic_warmup_iterations:
            mine = parts(batch.policy, len(self.policy))
            if self.ptx:  # every optimizer step mixes in text blocks of its own
                for k in range(len(mine[0][1])):
                    blocks = self.ptx.take(a.ptx_blocks)
                    for rank, (_, windows) in enumerate(mine):
                        windows[k] = replace(windows[k], ptx=blocks[rank :: len(mine)])
            policy = self.policy.start_each(
                PolicyLearner.update, [(*part, self.kl_coef, self.on_policy) for part in mine])
        wait(critic + policy, self.policy.timeout_s, "update")
        reports: list[dict[str, float]] = [wait(refs[:1], self.policy.timeout_s, "update")[0]
                                           for refs in (critic, policy) if refs]
        return {key: value for report in reports for key, value in report.items()}

    def connect(self) -> None:
        """Lay the wire to all generators, and bring them to the policy's weights."""
        r, c = self.cfg.roles.generator, self.cfg
        self.workers.turns.sync()
        self.policy.call(PolicyLearner.connect, self.workers.generators.actors, r.tensor_parallel_size,
                         sync_backend(c), self.cast.meeting_point("policy"), c.weight_sync.bucket_mib,
                         c.cluster.call_timeout_s)
        self.push()

    def push(self) -> None:
        """Every generator on the wire holds the policy's weights, stamped with their version, or this raises."""
        held: list[int] = self.policy.call(PolicyLearner.push, self.version)[0]
        self.held = dict(zip(self.workers.generators.names, held, strict=True))
        self.workers.turns.stale = False

    def sync(self) -> None:
        """`push`, with whatever shares a device in its place for that."""
        self.workers.turns.sync()
        self.push()

    def push_weights(self, version: int) -> None:
        """Every generator holds the policy's weights, stamped `version`, or this raises. Here they join and leave.

        Raises Again if learners were lost on the way and have gone back.
        """
        self.version = version
        try:
            if self.fleet.gather():
                self.connect()
            else:
                self.sync()
        except Exception as error:
            if self.recovery.heal(error, updated=True):
                raise Again from error

    def adapt(self, batch: Prepared, responses: int) -> None:
        """What one iteration teaches the next, once per iteration: the KL coefficient, the statistics of scores."""
        a = self.cfg.algorithm
        self.seen_scores += batch.seen
        if a.kl_target is not None:
            self.kl_coef = adapted_kl_coef(self.kl_coef, batch.numbers["kl_per_sequence"], a.kl_target, responses,
                                           a.kl_horizon)

    # -- state -----------------------------------------------------------------------------------------------------

    def save(self, metrics: Mapping[str, Any] | None = None) -> None:
        """A checkpoint of the last whole iteration, unless there is one; learners in the middle of one have none."""
        step = self.boundary["step"]
        if step > self.saver.saved and self.recovery.settled:
            numbers = {k: v for k, v in (metrics or {}).items() if isinstance(v, int | float)}
            self.saver.save(step, self.boundary, numbers)

    def state_dict(self) -> dict[str, Any]:
        """What the driver knows besides its configuration: JSON-able."""
        return {"step": self.step, "kl_coef": self.kl_coef, "seen_scores": asdict(self.seen_scores),
                "prompts": self.ahead.prompts or self.prompts.state_dict(),
                "ptx": self.ptx.state_dict() if self.ptx else None,
                "recorded": self.recorder.positions, "watch": self.watch.state_dict(),
                "fleet": self.fleet.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; what was recorded later is recorded again."""
        self.step, self.kl_coef, self.seen_scores = state["step"], state["kl_coef"], Moments(**state["seen_scores"])
        self.version = self.step + 1
        self.prompts.load_state_dict(state["prompts"])
        if self.ptx:
            self.ptx.load_state_dict(state["ptx"])
        self.recorder.rewind(state["recorded"])
        self.watch.load_state_dict(state["watch"])
        self.fleet.load_state_dict(state["fleet"])
        self.boundary = dict(state)

    def roll_back(self, checkpoint: Checkpoint | None) -> None:
        """The learners hold a checkpoint's state, or that of the start: so does the driver."""
        self.load_state_dict(checkpoint.state_like(self.start) if checkpoint else self.start)
        console.print(f"going on after iteration {self.step}")
