"""A sign of life from every actor: who is gone, who hangs, how much memory each takes.

A thread of the driver asks actors every few seconds, on a thread of theirs that nothing else uses: all of them, or of
many those who have not been asked for longest. An actor that dies is noted with what Ray says of it. One that stays
silent beyond the deadline is killed: so a hang becomes a death, and whoever waits for that actor hears of it from Ray
at once.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import (
    ActorUnavailableError,
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)

from rlhf_ray.metrics.progress import console

HEALTH = "health"  # the concurrency group of `Role.pulse`
# What a call raises when the actor, its node or an argument is gone, rather than for a reason of its own.
LOST = (RayActorError, NodeDiedError, OutOfMemoryError, ObjectLostError)
_HISTORY = 5000  # pulses kept for the post-mortem, per actor
_IN_A_ROUND = 32  # actors that are asked at once: what the signs of life cost the driver must not grow with the cluster


@dataclass(frozen=True)
class Pulse:
    """What an actor says of itself: resident memory in bytes, open file descriptors, kills for lack of memory that the
    kernel of its node has counted since boot."""

    rss: int
    fds: int
    oom_kills: int


@dataclass
class Member:
    """An actor under watch."""

    role: str
    index: int
    name: str
    actor: Any
    node: str = ""  # address
    node_id: str = ""  # Ray's
    pid: int = 0
    logs: tuple[str, ...] = ()  # files of its standard output and error, on its node
    started_at: float = 0.0  # before, it may be silent: imports can take long, and `start` has a deadline of its own
    pulses: deque[tuple[float, Pulse]] = field(default_factory=lambda: deque(maxlen=_HISTORY))  # (unix time, pulse)
    asked: Any = None  # the answer that has not come yet; the first question is who it is
    asked_at: float = 0.0  # since when it owes an answer; 0: it owes none
    turn: int = 0  # how many questions had been asked, of whomever, when it was asked last
    # How: `died` (its process or node ended); `hung` (silent), `overdue` (a late answer) or `failed` (it came in the
    # place of another and its setup raised), all three killed.
    gone: str = ""
    words: str = ""  # what Ray says


class Health:
    """Watches actors from `start` to `stop`. interval_s: between two rounds; deadline_s: of an answer."""

    def __init__(self, interval_s: float, deadline_s: float):
        self._interval_s, self._deadline_s = interval_s, deadline_s
        self.members: dict[str, Member] = {}
        self._turns = itertools.count(1)
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="health", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def watch(self, member: Member) -> None:
        with self._lock:
            self.members[member.name] = member

    def started(self, names: Iterable[str]) -> None:
        """These have come up."""
        with self._lock:
            for name in names:
                if not self.members[name].started_at:
                    self.members[name].started_at = time.monotonic()

    def forget(self, name: str) -> None:
        """Somebody else takes its place, or it is no longer needed."""
        with self._lock:
            self.members.pop(name, None)

    def kill(self, name: str, how: str, words: str) -> None:
        """End an actor that does not end itself, stopped processes too."""
        with self._lock:
            member = self.members.get(name)
            if member is None or member.gone:
                return
            member.gone, member.words = how, words
        ray.kill(member.actor)

    def memory_gib(self) -> dict[str, float]:
        """Resident memory of every actor at its last sign of life."""
        with self._lock:
            return {f"{m.role}-{m.index}": m.pulses[-1][1].rss / 2**30 for m in self.members.values() if m.pulses}

    def look(self) -> list[Member]:
        """Ask everybody now; returns those who are gone."""
        with self._lock:
            for member in self._askable():
                self._ask(member)
            self._listen(0.3)
            return [m for m in self.members.values() if m.gone]

    def _run(self) -> None:
        looked = time.monotonic()
        while not self._stop.wait(self._interval_s):
            slept = time.monotonic() - looked > self._deadline_s / 2
            looked = time.monotonic()
            try:
                self._look_after(slept)
            except Exception as error:  # whatever it is, hangs must still be noticed
                console.print(f"health: {error!r}", markup=False)

    def _look_after(self, slept: bool) -> None:
        """One round: ask all, and end those who are silent for too long. slept: it was this process that did."""
        with self._lock:
            if slept:
                for member in self.members.values():
                    member.asked_at = time.monotonic()
            for member in self._askable()[:_IN_A_ROUND]:
                self._ask(member)
            self._listen(0.05)
            late = [m for m in self.members.values()
                    if m.started_at and m.asked_at
                    and time.monotonic() - max(m.asked_at, m.started_at) > self._deadline_s]
        for member in late:
            self.kill(member.name, "hung", f"no sign of life for {self._deadline_s:.0f} s")

    def _askable(self) -> list[Member]:
        """All who live and owe no answer; first who has not been asked for longest."""
        return sorted((m for m in self.members.values() if m.asked is None and not m.gone), key=lambda m: m.turn)

    def _ask(self, member: Member) -> None:
        question = member.actor.pulse if member.pid else member.actor.describe
        member.asked = question.options(concurrency_group=HEALTH).remote()
        member.asked_at = member.asked_at or time.monotonic()
        member.turn = next(self._turns)

    def _listen(self, timeout_s: float) -> None:
        asked = {m.asked: m for m in self.members.values() if m.asked is not None}
        if not asked:
            return
        ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=timeout_s)
        for ref in ready:
            member, asked[ref].asked = asked[ref], None
            try:
                answer = ray.get(ref, timeout=1)
                member.asked_at = 0.0
                if isinstance(answer, Pulse):
                    member.pulses.append((time.time(), answer))
                else:
                    member.node, member.node_id, member.pid, member.logs = (
                        answer[key] for key in ("node", "node_id", "pid", "logs"))
            except (GetTimeoutError, ActorUnavailableError):  # it is asked again, and its time runs on
                continue
            except RayTaskError:  # it cannot say how it is, and so it lives
                member.asked_at = 0.0
            except RayError as error:
                if not member.gone:
                    member.gone, member.words = "died", str(error)
