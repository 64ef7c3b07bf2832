"""Faults at chosen moments of a real run, and how long each took to be put right."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

from rlhf_ray.cluster.group import wait
from rlhf_ray.cluster.health import HEALTH, Member
from rlhf_ray.config.schema import Config
from rlhf_ray.stages import ppo
from rlhf_ray.train.ppo import PPOTrainer

# `writing` comes after `checkpoint`: the copies of that are on their way to the disk, beside the next iteration.
PHASES = ("rollout", "score", "advantages", "update", "weight_sync", "checkpoint", "writing")
CLOCKED = ("seconds", "tokens_per_second", "role_tokens_per_second", "waiting_calls", "reward_seconds", "memory_gib",
           "restarts", "generators", "weight_versions")


def kill(actor: Any) -> None:
    """End it as the kernel would, now. Asks for its number: where all goes fast, nobody has yet, and 0 would be us."""
    who = actor.describe.options(concurrency_group=HEALTH).remote()  # beside its work
    os.kill(wait([who], 60, "describe")[0]["pid"], signal.SIGKILL)


@dataclass
class Fault:
    """A signal to one actor, `delay` seconds into a phase of an iteration.

    noticed: from there until it counted as gone, seconds. recovered: to the end of the first iteration in which
    somebody else worked in its seat, so that the start of an engine is part of it; 0 if the run was over before.
    """

    step: int
    phase: str
    role: str
    index: int = 0
    delay: float = 0.0
    signal: int = signal.SIGKILL
    at: float = 0.0
    pid: int = 0
    noticed: float = 0.0
    recovered: float = 0.0


class Chaos:
    """Strikes each fault once, when its phase begins."""

    def __init__(self, faults: Sequence[Fault]):
        self.left, self.struck, self.over = list(faults), list[Fault](), False
        self.plain: list[float] = []  # seconds of iterations without a fault

    def enter(self, trainer: PPOTrainer, phase: str) -> None:
        step = trainer.step + (phase not in ("checkpoint", "writing"))  # an iteration is counted when it is whole
        for fault in [f for f in self.left if (f.step, f.phase) == (step, phase)]:
            self.left.remove(fault)
            timer = threading.Timer(fault.delay, self._strike, (trainer, fault))
            timer.daemon = True
            timer.start()

    def advanced(self, trainer: PPOTrainer, seconds: float) -> None:
        """An iteration is done."""
        pids = {(m.role, m.index): m.pid for m in list(trainer.cast.health.members.values())}
        waiting = [f for f in self.struck if not f.recovered]
        for fault in waiting:
            works = trainer.cast.seats(fault.role).get(fault.index, False)  # and does not come up still
            if works and pids.get((fault.role, fault.index), 0) not in (0, fault.pid):
                fault.recovered = time.monotonic() - fault.at
        if not waiting:
            self.plain.append(seconds)

    def _strike(self, trainer: PPOTrainer, fault: Fault) -> None:
        while (member := self._hit(trainer, fault)) is None:
            if self.over:
                return
            time.sleep(0.05)
        self.struck.append(fault)
        while not (member.gone or self.over):
            time.sleep(0.01)
        if member.gone:
            fault.noticed = time.monotonic() - fault.at

    @staticmethod
    def _hit(trainer: PPOTrainer, fault: Fault) -> Member | None:
        """Whoever sits there, struck; None while there is nobody who has said who he is.

        A hang is for who has come up: until then only the deadline of a start counts, which is longer than a run here.
        """
        for member in list(trainer.cast.health.members.values()):
            there = member.pid and (member.started_at or fault.signal != signal.SIGSTOP)
            if (member.role, member.index) == (fault.role, fault.index) and there and not member.gone:
                fault.at, fault.pid = time.monotonic(), member.pid
                with suppress(ProcessLookupError):  # an earlier fault has just ended it
                    os.kill(member.pid, fault.signal)
                    return member
        return None


def seeded(count: int, actors: Sequence[tuple[str, int]], seed: int) -> list[Fault]:
    """One fault for each of the first `count` iterations: every actor in every phase, as far as that goes, then any in
    any; at any moment of it. One in ten is a hang."""
    rng = random.Random(seed)
    places = [(phase, actor) for phase in PHASES for actor in actors]
    rng.shuffle(places)
    places += [(rng.choice(PHASES), rng.choice(actors)) for _ in range(count - len(places))]
    return [Fault(step, phase, *actor, delay=rng.choice((0.0, rng.uniform(0, 0.03 if phase == "writing" else 0.3))),
                  signal=signal.SIGSTOP if rng.random() < 0.1 else signal.SIGKILL)
            for step, (phase, actor) in enumerate(places[:count], start=1)]


def recovery_times(script: Chaos) -> dict[str, dict[str, float]]:
    """Of each role: faults, and the median and the worst time until all was right again, seconds. Those that the run
    did not last for are counted, and have no time."""
    table: dict[str, dict[str, float]] = {}
    for role in sorted({fault.role for fault in script.struck}):
        struck = [fault for fault in script.struck if fault.role == role]
        times = [fault.recovered for fault in struck if fault.recovered]
        table[role] = {"faults": len(struck), "measured": len(times)}
        if times:
            table[role] |= {"median_s": round(median(times), 1), "worst_s": round(max(times), 1)}
    return table


def results(name: str, facts: dict[str, Any]) -> None:
    """Into CHAOS_RESULTS/NAME.json, if that is where they are to go, and onto the console."""
    text = json.dumps({"cpus": os.cpu_count(), **facts}, indent=1)
    print(text)
    if "CHAOS_RESULTS" in os.environ:
        (Path(os.environ["CHAOS_RESULTS"]) / f"{name}.json").write_text(text + "\n")


@contextmanager
def chaos(faults: Sequence[Fault]) -> Iterator[Chaos]:
    """The ppo stage inside meets these faults."""
    script = Chaos(faults)

    class Trainer(PPOTrainer):
        def enter(self, phase: str) -> None:
            super().enter(phase)
            script.enter(self, phase)

        def save(self, metrics: Mapping[str, Any] | None = None) -> None:
            super().save(metrics)
            script.enter(self, "writing")

        def advance(self) -> None:
            started = time.monotonic()
            super().advance()
            script.advanced(self, time.monotonic() - started)

    with patch.object(ppo, "PPOTrainer", Trainer):
        try:
            yield script
        finally:
            script.over = True


def outcome(cfg: Config) -> tuple[bytes, list[dict[str, Any]]]:
    """What a run came to: its final weights, and its metrics without what a clock or a fault changes."""
    directory = Path(cfg.output_dir) / "ppo"
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return ((directory / "model" / "model.safetensors").read_bytes(),
            [{k: v for k, v in row.items() if k not in CLOCKED} for row in rows])
