"""What every learner can do besides learning: be copied, written down, brought back, and join a new group."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from rlhf_ray import storage
from rlhf_ray.cluster.role import Role
from rlhf_ray.engines.learner import Learner
from rlhf_ray.models.shards import SavedFile, Shards, shard_name, write_tensors


class LearnerRole(Role):
    """Base of all learners; one instance is one ZeRO-3 rank. `setup` may be called again, when ranks were lost: the
    process then leaves its group, loads the first weights again and joins the new group."""

    role: ClassVar[str]
    learner: Learner
    copied: tuple[str, list[tuple[str, dict[str, Tensor], dict[str, Any]]]] = "", []
    """The snapshot that is still to be written: in which directory, and its files (name, tensors, header)."""

    def leave(self) -> None:
        """Let go of an earlier life."""
        if "learner" in self.__dict__:
            self.__dict__.pop("learner").close()

    def snapshot(self, directory: str) -> None:
        """Copy the state to host memory, for `write` into that directory; training may go on at once."""
        self.copied = "", []  # one copy at a time
        tensors, header = self.learner.state()
        name = shard_name(self.role, self.learner.rank, self.learner.world_size)
        self.copied = directory, [(name, tensors, header), *self.more()]

    def more(self) -> list[tuple[str, dict[str, Tensor], dict[str, Any]]]:
        """Further files of this rank: (name, tensors, header)."""
        return []

    def write(self, directory: str) -> list[SavedFile]:
        """Write the snapshot; runs beside whatever else the learner does (concurrency group `io`)."""
        # This thread only: it runs where a core would be idle, for an engine waits as a whole for each of its threads.
        with suppress(OSError):  # some containers do not allow it
            os.sched_setscheduler(threading.get_native_id(), os.SCHED_IDLE, os.sched_param(0))
        if self.copied[0] != directory:  # nobody waits for this one any more
            raise RuntimeError(f"there is no copy for {directory}, but for {self.copied[0] or 'none'}")
        (_, copied), self.copied = self.copied, ("", [])  # the next one may be made while this one is written
        path = Path(directory)
        kept_elsewhere, files = storage.url_of(path) is not None, []
        if kept_elsewhere:  # where the driver is on another node, nobody makes or removes directories here
            path.mkdir(parents=True, exist_ok=True)
            for before in set(path.parent.glob(".step-*.tmp")) - {path}:
                with suppress(OSError):  # the driver is here, and was faster
                    before.rmdir()
        for name, tensors, header in copied:
            files.append(write_tensors(path / name, tensors, header))
            storage.publish(path / name)
            if kept_elsewhere:
                storage.settle()
                (path / name).unlink()
        return files

    def offload(self, everything: bool) -> None:
        """Leave the device to another: see Learner.offload."""
        self.learner.offload(everything)

    def reload(self) -> None:
        self.learner.reload()

    def restore(self, directory: str) -> None:
        """Take over what was written there, by as many ranks or by others."""
        path = Path(directory)
        storage.fetch(path.parent, lambda name: name.startswith(f"{path.name}/"))
        with Shards(path, self.role) as shards:
            self.learner.load(shards)
