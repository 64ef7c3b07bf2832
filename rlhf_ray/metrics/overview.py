"""How a run is doing, from its files alone: it may be running here, on another host, or not any more."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

import psutil

from rlhf_ray.config.schema import STAGES
from rlhf_ray.metrics.files import Tail, object_of, text_of, time_of
from rlhf_ray.metrics.recorder import METRICS, SAMPLES
from rlhf_ray.metrics.sparkline import number

SUPERVISED = ("loss", "accuracy")
POLICY = ("score", "judge_score", "kl_per_sequence", "entropy", "response_length", "mismatch")
SHOWN = 3  # alarms, and samples, of the newest
RECENT = 10  # iterations whose times say how long the next ones take
_SKEW_S = 60.0  # by how much the clocks of a host and of a file server may differ

Series = list[float | None]  # None: absent or not finite


@dataclass(frozen=True)
class Holder:
    """The process that said in `.lock` that the run's directory is its own and has not taken that back.

    alive: None where it cannot be known, on another host.
    """

    pid: int
    host: str
    since: str
    command: str
    alive: bool | None


@dataclass(frozen=True)
class Saved:
    """The newest checkpoint. age_s: seconds since it was written."""

    step: int
    age_s: float


@dataclass(frozen=True)
class Actor:
    """Resident memory, GiB, and its growth over its least in the warm-up (0.05: 5% more); None before its end."""

    name: str
    gib: float
    growth: float | None


@dataclass(frozen=True)
class Ring:
    """A line of alarms.jsonl."""

    name: str
    iteration: int
    action: str
    message: str


@dataclass(frozen=True)
class Sample:
    """A line of samples.jsonl: a response, its score, its length in tokens."""

    iteration: int
    prompt: str
    response: str
    score: float | None
    tokens: int


@dataclass(frozen=True)
class Stage:
    """state: done; running; failed (a post-mortem says why); killed (it could not even say so); stopped (interrupted,
    or an error of one line); waiting. seconds: it took, or has been running for. step: how many are done. age_s:
    seconds since metrics.jsonl last grew. post_mortems: oldest first. why: the newest one's summary."""

    name: str
    state: str
    seconds: float | None = None
    step: int = 0
    series: Mapping[str, Series] = field(default_factory=dict)
    age_s: float | None = None
    saved: Saved | None = None
    post_mortems: Sequence[Path] = ()
    why: str = ""


@dataclass(frozen=True)
class Policy:
    """What only ppo has. step_s: median seconds of the last iterations; eta_s: seconds that are left at that pace, None
    unless it is running. phases: mean seconds of each over the last iterations. rang: how many alarms; alarms, samples:
    the newest, oldest first. paused: why, None if it is not."""

    total: int | None
    step_s: float | None
    eta_s: float | None
    phases: Mapping[str, float]
    memory: Sequence[Actor]
    restarts: int | None
    rang: int
    alarms: Sequence[Ring]
    samples: Sequence[Sample]
    paused: str | None


@dataclass(frozen=True)
class Overview:
    """heard: how it came here, if not from files that are being read now."""

    directory: Path
    holder: Holder | None
    stages: Sequence[Stage]
    policy: Policy | None  # None before ppo has begun
    heard: str = ""


class RunFiles:
    """Reads a run's directory again and again."""

    def __init__(self, directory: Path):
        self.directory = directory
        of_ppo = ("iteration", *POLICY, "seconds", "memory_gib", "restarts")
        self._metrics = {name: Tail(directory / name / METRICS, of_ppo if name == "ppo" else ("step", *SUPERVISED))
                         for name in STAGES}
        self._alarms = Tail(directory / "ppo/alarms.jsonl", Ring.__annotations__)
        self._samples = Tail(directory / "ppo" / SAMPLES, Sample.__annotations__, SHOWN)
        self._configs: dict[Path, tuple[float, dict[str, Any]]] = {}  # with the time of the file, unix seconds

    def exist(self) -> bool:
        """Whether a run has ever begun here."""
        return any((self.directory / name).is_file()
                   for name in (".lock", *(f"{s}/{file}" for s in STAGES for file in ("config.yaml", "stage.json"))))

    def sizes(self) -> list[int]:
        """Of the files that grow, bytes."""
        return [tail.size() for tail in (*self._metrics.values(), self._alarms, self._samples)]

    def read(self, now: float) -> Overview:
        """now: unix seconds."""
        holder = read_holder(self.directory)
        configs = [self._config(self.directory / name / "config.yaml") for name in STAGES]
        planned = {name for config in configs for name in config.get("stages") or []}
        stages = [self._stage(name, holder, now) for name in STAGES
                  if name in planned or (self.directory / name).is_dir()]
        ppo = next((stage for stage in stages if stage.name == "ppo" and stage.state != "waiting"), None)
        return Overview(self.directory, holder, stages, self._policy(ppo) if ppo else None)

    def _stage(self, name: str, holder: Holder | None, now: float) -> Stage:
        directory, rows = self.directory / name, self._metrics[name].read()
        begun, taken, grew = (time_of(path) for path in (directory / "config.yaml", self.directory / ".lock",
                                                        directory / METRICS))
        post_mortems = sorted(directory.glob("post_mortem-*"))
        record = object_of(directory / "stage.json")
        if record is not None:
            state = "done"
        elif begun is None:
            state = "waiting"
        elif post_mortems and (time_of(post_mortems[-1] / "summary.txt") or time_of(post_mortems[-1]) or 0.0) >= begun:
            state = "failed"
        elif holder and taken is not None and begun >= taken - 1.0:  # whoever takes the lock writes it later
            state = "killed" if holder.alive is False else "running"
        else:
            state = "stopped"
        seconds = record.get("seconds") if record else now - begun if begun and state == "running" else None
        return Stage(
            name, state, seconds, int(rows[-1].get("iteration", rows[-1].get("step", 0))) if rows else 0,
            {key: [number(row.get(key)) for row in rows] for key in (POLICY if name == "ppo" else SUPERVISED)},
            max(0.0, now - grew) if grew is not None else None, newest_checkpoint(directory / "checkpoints", now),
            post_mortems, " ".join(text_of(post_mortems[-1] / "summary.txt").split()) if post_mortems else "",
        )

    def _policy(self, stage: Stage) -> Policy:
        directory, rows = self.directory / "ppo", self._metrics["ppo"].rows
        config = self._config(directory / "config.yaml")
        total = (config.get("ppo") or {}).get("iterations")
        warm = (config.get("alarms") or {}).get("warmup_iterations", 0)
        times = [row.get("seconds") or {} for row in rows[-RECENT:]]
        step_s, eta_s = pace([sum(t.values()) for t in times if t], (total or 0) - stage.step)
        flag, alarms = directory / "PAUSED", self._alarms.read()
        samples = [row for row in self._samples.read() if set(row) == set(Sample.__annotations__)]
        return Policy(
            total, step_s, eta_s if stage.state == "running" and total else None,
            {name: fmean(t.get(name, 0.0) for t in times) for name in dict.fromkeys(n for t in times for n in t)},
            memory_of([row.get("memory_gib") or {} for row in rows], warm), restarts_of(rows[-1]) if rows else None,
            len(alarms), [Ring(**{key: row.get(key, "") for key in Ring.__annotations__}) for row in alarms[-SHOWN:]],
            [Sample(**row) for row in samples if row["iteration"] == samples[-1]["iteration"]],
            ": ".join(text_of(flag).strip().splitlines()) if flag.exists() else None,
        )

    def _config(self, path: Path) -> dict[str, Any]:
        """A stage's configuration; empty where there is none, or where it is being written."""
        import yaml

        written = time_of(path)
        if written is None:
            return {}
        if self._configs.get(path, (None, {}))[0] != written:
            try:
                tree = yaml.safe_load(text_of(path))
            except yaml.YAMLError:
                tree = None
            if not isinstance(tree, dict):
                return {}
            self._configs[path] = written, tree
        return self._configs[path][1]


# --- parts of it ---


def read_holder(directory: Path) -> Holder | None:
    """Who holds the directory of a run, without touching the lock: to try it would get in the way of a run's start."""
    by = object_of(directory / ".lock")
    if by is None:
        return None
    pid, host = int(by.get("pid", 0)), str(by.get("host", ""))
    alive = _alive(pid, time_of(directory / ".lock") or 0.0) if host == socket.gethostname() else None
    return Holder(pid, host, str(by.get("started", "")), str(by.get("command", "")), alive)


def _alive(pid: int, taken: float) -> bool:
    """Whether a process of this host is there, and is not a younger one of the same number. taken: unix seconds."""
    try:
        process = psutil.Process(pid)
        return process.create_time() <= taken + _SKEW_S and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def newest_checkpoint(directory: Path, now: float) -> Saved | None:
    """now: unix seconds. Those under a final name are whole; one may be deleted while this looks."""
    steps = {int(path.name.removeprefix("step-")): path for path in directory.glob("step-*")
             if path.name.removeprefix("step-").isdecimal()}
    for step in sorted(steps, reverse=True):
        if (written := time_of(steps[step] / "manifest.json")) is not None:
            return Saved(step, max(0.0, now - written))
    return None


def memory_of(rows: Sequence[Mapping[str, float]], warm: int) -> list[Actor]:
    """rows: GiB by actor, one for each iteration, of which the first `warm` are the warm-up."""
    least = {name: min(row[name] for row in rows[:warm] if name in row) for row in rows[:warm] for name in row}
    past = len(rows) > warm
    return [Actor(name, gib, gib / least[name] - 1 if past and least.get(name) else None)
            for name, gib in (rows[-1] if rows else {}).items()]


def restarts_of(row: Mapping[str, Any]) -> int | None:
    """Of all roles; older runs have one number."""
    found = row.get("restarts")
    return sum(found.values()) if isinstance(found, dict) else found


def pace(seconds: Sequence[float], left: int) -> tuple[float | None, float | None]:
    """(median of the last iterations' seconds, seconds that `left` more will take); None without iterations."""
    step_s = median(seconds) if seconds else None
    return step_s, None if step_s is None else step_s * max(0, left)
