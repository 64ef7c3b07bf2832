"""Faults at chosen moments of a real run, and how long each took to be put right."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

from rlhf_ray.cluster.health import Member
from rlhf_ray.config.schema import Config
from rlhf_ray.stages import ppo
from rlhf_ray.train.ppo import PPOTrainer

PHASES = ("rollout", "score", "advantages", "update", "weight_sync", "checkpoint")
CLOCKED = ("seconds", "tokens_per_second", "role_tokens_per_second", "waiting_calls", "reward_seconds", "memory_gib",
           "restarts", "generators", "weight_versions")


@dataclass
class Fault:
    """A signal to one actor, `delay` seconds into a phase of an iteration. recovered: from there to the end of the
    iteration in which somebody else had taken its place, seconds."""

    step: int
    phase: str
    role: str
    index: int = 0
    delay: float = 0.0
    signal: int = signal.SIGKILL
    at: float = 0.0
    pid: int = 0
    recovered: float = 0.0


class Chaos:
    """Strikes each fault once, when its phase begins."""

    def __init__(self, faults: Sequence[Fault]):
        self.left, self.struck = list(faults), list[Fault]()
        self.plain: list[float] = []  # seconds of iterations without a fault

    def enter(self, trainer: PPOTrainer, phase: str) -> None:
        for fault in [f for f in self.left if (f.step, f.phase) == (trainer.cast.iteration, phase)]:
            self.left.remove(fault)
            threading.Timer(fault.delay, self._strike, (trainer, fault)).start()

    def advanced(self, trainer: PPOTrainer, seconds: float) -> None:
        """An iteration is done."""
        pids = {(m.role, m.index): m.pid for m in trainer.cast.health.members.values()}
        waiting = [f for f in self.struck if not f.recovered]
        for fault in waiting:
            if pids[fault.role, fault.index] != fault.pid:  # somebody else is there now
                fault.recovered = time.monotonic() - fault.at
        if not waiting:
            self.plain.append(seconds)

    def _strike(self, trainer: PPOTrainer, fault: Fault) -> None:
        member: Member = next(m for m in trainer.cast.health.members.values()
                              if (m.role, m.index) == (fault.role, fault.index))
        while not member.pid:  # it has just been replaced and has not yet said who it is
            time.sleep(0.05)
        fault.at, fault.pid = time.monotonic(), member.pid
        self.struck.append(fault)
        os.kill(member.pid, fault.signal)


def seeded(count: int, actors: Sequence[tuple[str, int]], seed: int) -> list[Fault]:
    """One fault for each of the first `count` iterations: any actor, any phase, at any moment of it."""
    rng = random.Random(seed)
    return [Fault(step, rng.choice(PHASES), *rng.choice(actors), delay=rng.choice((0.0, rng.uniform(0, 0.3))),
                  signal=signal.SIGSTOP if rng.random() < 0.05 else signal.SIGKILL) for step in range(1, count + 1)]


def recovery_times(script: Chaos) -> dict[str, dict[str, float]]:
    """Of each role: faults, and the median and the worst time until all was right again, seconds."""
    times: dict[str, list[float]] = {}
    for fault in script.struck:
        if fault.recovered:
            times.setdefault(fault.role, []).append(fault.recovered)
    return {role: {"faults": len(t), "median_s": round(median(t), 1), "worst_s": round(max(t), 1)}
            for role, t in sorted(times.items())}


@contextmanager
def chaos(faults: Sequence[Fault]) -> Iterator[Chaos]:
    """The ppo stage inside meets these faults."""
    script = Chaos(faults)

    class Trainer(PPOTrainer):
        def enter(self, phase: str) -> None:
            super().enter(phase)
            script.enter(self, phase)

        def advance(self) -> None:
            started = time.monotonic()
            super().advance()
            script.advanced(self, time.monotonic() - started)

    with patch.object(ppo, "PPOTrainer", Trainer):
        yield script


def outcome(cfg: Config) -> tuple[bytes, list[dict[str, Any]]]:
    """What a run came to: its final weights, and its metrics without what a clock or a fault changes."""
    directory = Path(cfg.output_dir) / "ppo"
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return ((directory / "model" / "model.safetensors").read_bytes(),
            [{k: v for k, v in row.items() if k not in CLOCKED} for row in rows])
