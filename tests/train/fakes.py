"""A stage whose actors are not there: what is asked of them is noted, in order."""

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from rlhf_ray.cluster import group
from rlhf_ray.cluster.group import ActorInfo, Group
from rlhf_ray.cluster.health import Member
from rlhf_ray.config.schema import CheckpointConfig
from rlhf_ray.models.shards import SavedFile, shard_name
from rlhf_ray.train import recovery
from rlhf_ray.train.checkpoint import Checkpoint, Checkpoints
from rlhf_ray.train.recovery import Recovery, Saver

Call = Callable[[], Any]


class Actor:
    """Notes every call; what comes back is that call, to be waited for."""

    def __init__(self, name: str, script: "Script"):
        self.name, self.script = name, script

    def __getattr__(self, method: str) -> Any:
        def remote(*args: Any) -> Call:
            self.script.notes.append(" ".join([method, self.name, *(Path(x).name for x in args if isinstance(x, str))]))
            return lambda: self.script.answer(method, self.name, *args)

        return SimpleNamespace(remote=remote, options=lambda **_: SimpleNamespace(remote=remote))


class Script:
    """A policy of two ranks, a critic of one, a reward model. notes: what happened. losses: who is gone at each
    look. errors: what the next calls of that name raise. answers: what calls of that name give. written: whether what
    is written is on the disk. ranks: of each learner, if there are others."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch, attempts: int = 2,
                 ranks: Mapping[str, int] = MappingProxyType({"policy": 2, "critic": 1})):
        self.written = threading.Event()
        self.written.set()
        self.silent: list[str] = []  # ranks that write nothing
        for module in (recovery, group):
            monkeypatch.setattr(module, "wait", self.wait)
        self.notes: list[str] = []
        self.losses: list[list[str]] = []
        self.waiting: list[str] = []  # living learners who do not hear of a loss in their group
        self.errors: dict[str, list[BaseException]] = {}
        self.answers: dict[str, Any] = {}
        letters = iter("abc")
        self.arguments = {role: [(f"rank {i}", next(letters)) for i in range(n)] for role, n in ranks.items()}
        self.learners = [Group(role, [Actor(f"{role}-{i}", self) for i in range(n)], 1.0) for role, n in ranks.items()]
        self.checkpoints = Checkpoints(directory, CheckpointConfig(), {})
        self.saver = Saver(self.checkpoints, self.learners)
        cast: Any = self
        self.recovery = Recovery(cast, self.learners, self.saver, attempts, lambda: self.notes.append("connect"),
                                 self.roll_back)

    def wait(self, calls: Sequence[Call], timeout_s: float, what: str) -> list[Any]:
        assert "writing" not in what or self.written.wait(10)
        return [call() for call in calls]

    def answer(self, what: str, name: str = "", directory: Any = "", *_: Any) -> Any:
        if self.errors.get(what):
            raise self.errors[what].pop(0)
        if what != "write" or name in self.silent:
            return self.answers.get(what, [])
        role, rank = name.split("-")
        file = Path(directory) / shard_name(role, int(rank), len(self.arguments[role]))
        file.touch()
        return [SavedFile(file.name, 0, hashlib.sha256().hexdigest())]

    def roll_back(self, checkpoint: Checkpoint | None) -> None:
        self.notes.append(f"roll back to {checkpoint.step if checkpoint else 'the start'}")

    def saved(self, step: int) -> "Script":
        self.saver.save(step, {"step": step}, {})
        self.saver.finish()
        self.notes.clear()
        return self

    def heal(self, *gone: str, error: Exception | None = None, updated: bool = False) -> bool:
        self.losses.insert(0, list(gone))
        self.notes.clear()
        return self.recovery.heal(error or ActorDiedError(), updated)

    # -- as Cast has it

    def lost(self, error: BaseException) -> list[Member]:
        return self.members(self.losses.pop(0) if self.losses else [], "died")

    def stuck(self, roles: set[str]) -> list[Member]:
        return [member for member in self.members(self.waiting, "hung") if member.role in roles]

    @staticmethod
    def members(names: list[str], gone: str) -> list[Member]:
        return [Member(role, int(i), f"{role}-{i}", None, gone=gone) for role, i in (name.split("-") for name in names)]

    def replace(self, member: Member, set_up: bool = True) -> None:
        self.notes.append(f"replace {member.name}" + ("" if set_up else ", to be set up with its group"))

    def ready(self) -> list[ActorInfo]:
        self.notes.append("ready")
        self.answer("ready")
        return []

    def args(self, group: Group) -> list[tuple[Any, ...]]:
        return self.arguments[group.role]

    def set_up_again(self, group: Group, per_actor: list[tuple[Any, ...]]) -> None:
        self.notes.append(f"set up {group.role}")
        self.arguments[group.role] = per_actor

    def meeting_point(self, role: str) -> tuple[str, int]:
        return "10.0.0.3", 1234
