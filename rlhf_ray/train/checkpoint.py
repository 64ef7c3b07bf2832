"""Checkpoints of a stage: one directory each, whole or not there.

    <stage directory>/checkpoints/step-00000012/policy-00000-of-00001.safetensors   what the actors wrote
                                                manifest.json                       all else: see manifest.py

A checkpoint is born in `.step-00000012.tmp`; the manifest is its last file, and a rename makes it visible. So whenever
the run is killed, what is there under a final name is whole. Everything is JSON or safetensors: nothing is unpickled.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from rlhf_ray import disk, storage
from rlhf_ray.config.schema import CheckpointConfig
from rlhf_ray.errors import UserError
from rlhf_ray.metrics.progress import console
from rlhf_ray.models.shards import SavedFile
from rlhf_ray.train.manifest import (
    FORMAT,
    MANIFEST,
    NotWhole,
    check_written,
    read_manifest,
    verify,
    write_manifest,
)


@dataclass(frozen=True)
class Checkpoint:
    step: int
    directory: Path
    manifest: dict[str, Any]

    @property
    def state(self) -> dict[str, Any]:
        """The driver's own state, as `commit` was given it."""
        return self.manifest["state"]

    def state_like(self, start: Mapping[str, Any]) -> dict[str, Any]:
        """`state`, for a run that begins with the state `start`. A mapping that is empty there has keys that are data.

        Raises UserError if the two have other keys: whoever wrote the checkpoint was not this version.
        """
        found, known = keys(self.state, start), keys(start, start)
        wrong = [f"{what} {', '.join(sorted(some))}" for what, some in
                 (("it lacks", known - found), ("this version does not know its", found - known)) if some]
        if wrong:
            raise UserError(f"{storage.shown(self.directory)} is of another version of rlhf_ray: {'; '.join(wrong)}; "
                            "go on with the version that wrote it, or start over with resume=never")
        return self.state

    @property
    def identity(self) -> dict[str, Any]:
        """Of the run that saved it: see identity.py."""
        return self.manifest["identity"]


def keys(state: Mapping[str, Any], start: Mapping[str, Any]) -> set[str]:
    """Dotted names of all that is in a state, as deep as in that of the start."""
    found = set(state)
    for name, value in state.items():
        if isinstance(value, Mapping) and (then := start.get(name)):
            found |= {f"{name}.{inner}" for inner in keys(value, then)}
    return found


class Checkpoints:
    """The checkpoints of one stage in `directory`. `identity` goes into every manifest."""

    def __init__(self, directory: Path, cfg: CheckpointConfig, identity: dict[str, Any]):
        self.directory, self._cfg, self._identity = directory, cfg, identity
        self._damaged: set[int] = set()  # steps that `newest` had to pass over

    def begin(self, step: int) -> Path:
        """A fresh directory in which the actors write their files. Raises UserError if that is impossible."""
        with self._writing(step):
            self.directory.mkdir(parents=True, exist_ok=True)
            self._tidy()
            if (fresh := self._unfinished(step)).exists():
                shutil.rmtree(fresh)  # what kept _tidy from it is said here
            fresh.mkdir()
        storage.withdraw(self._path(step))
        storage.settle()
        return fresh

    def commit(
        self, step: int, files: Sequence[SavedFile], state: dict[str, Any], metrics: Mapping[str, Any]
    ) -> Checkpoint:
        """Make what was begun a checkpoint, then delete those that need not be kept.

        state: JSON values, keys are strings; numbers come back exactly, infinities and NaN too. metrics: those that are
        numbers are recorded; a stage that checkpoint.best_metric is not about gives none. Raises UserError if the disk
        is full or read-only, if files are not there as announced, or if best_metric is not among the metrics.
        """
        numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, Real)}
        best = self._cfg.best_metric
        if numbers and best is not None and best not in numbers:
            raise UserError(f"checkpoint.best_metric={best}: no such metric; there are {', '.join(sorted(numbers))}")
        manifest = {"format": FORMAT, "step": step, "identity": self._identity, "state": state, "metrics": numbers,
                    "files": [asdict(file) for file in files]}
        born, final = self._unfinished(step), self._path(step)
        with self._writing(step):
            check_written(born, files)
            write_manifest(born, manifest)
            if final.exists():  # it was found damaged, or is saved for the second time
                final.rename(self._replaced(step))
            born.rename(final)
            disk.sync(self.directory)
        self._damaged.discard(step)
        storage.publish(self.directory.parent, storage.of_driver)  # metrics and all, and then the manifest
        try:
            self._tidy()
            kept = self._kept(step)
            for old in self._steps():
                if old not in kept:
                    self._delete(old)
        except OSError as error:
            console.print(f"cannot delete old checkpoints in {self.directory}: {error}; delete them yourself",
                          markup=False)
        return Checkpoint(step, final, manifest)

    def abandon(self, step: int) -> None:
        """Drop what was begun, if anything."""
        shutil.rmtree(self._unfinished(step), ignore_errors=True)
        storage.withdraw(self._path(step))

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint, every file verified by size and sha256; None if there are no checkpoints.

        One that is not whole gets a line on the console, and the one before is tried. Raises UserError if none is.
        """
        storage.settle()
        with self._writing():
            self._tidy()
        storage.fetch(self.directory, lambda name: name.endswith(MANIFEST))
        problems = []
        for step in reversed(self._steps()):
            storage.fetch(self._path(step))
            try:
                return Checkpoint(step, self._path(step), verify(self._path(step)))
            except NotWhole as problem:
                problems.append(str(problem))
                self._damaged.add(step)
                console.print(f"the checkpoint of step {step} is not whole: {problem}", markup=False)
        if problems:
            raise UserError(f"no checkpoint in {storage.shown(self.directory)} is whole: {problems[0]}; put right what "
                            "is wrong, or start over with resume=never")
        return None

    def clear(self) -> None:
        """Delete all checkpoints. Raises UserError if that is impossible."""
        with self._writing():
            self._tidy()
            for step in self._steps():
                self._delete(step)
        storage.withdraw(self.directory)
        storage.settle()

    # -- names: what is no checkpoint begins with a dot ------------------------------------------------------------

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"

    def _unfinished(self, step: int) -> Path:
        return self.directory / f".step-{step:08d}.tmp"

    def _replaced(self, step: int) -> Path:
        return self.directory / f".step-{step:08d}.old"

    def _steps(self) -> list[int]:
        """Of everything under a final name, rising."""
        names = (path.name.removeprefix("step-") for path in self.directory.glob("step-*"))
        return sorted(int(name) for name in names if name.isdecimal())

    # -- keeping ---------------------------------------------------------------------------------------------------

    def _kept(self, newest: int) -> set[int]:
        """Which steps stay. Those after `newest` go, the run had gone back to before them; so do damaged ones."""
        steps = [step for step in self._steps() if step <= newest and step not in self._damaged]
        best = max(steps, key=lambda step: (self._score(step), step))
        return {best, *steps[-self._cfg.keep_last :]}

    def _score(self, step: int) -> float:
        """checkpoint.best_metric of a checkpoint; -inf where there is none."""
        try:
            value = read_manifest(self._path(step))["metrics"].get(self._cfg.best_metric, -math.inf)
        except NotWhole:
            return -math.inf
        return -math.inf if math.isnan(value) else value

    def _delete(self, step: int) -> None:
        """Out of sight first, so that a kill in between leaves no half of a checkpoint under a final name."""
        self._path(step).rename(self._unfinished(step))
        self.abandon(step)

    def _tidy(self) -> None:
        """Remove what a kill left behind, as far as it can be removed; a checkpoint that was about to be replaced comes
        back."""
        for path in self.directory.glob(".step-*.tmp"):
            shutil.rmtree(path, ignore_errors=True)
        for path in self.directory.glob(".step-*.old"):
            final = self.directory / path.name[1:].removesuffix(".old")
            if final.exists():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.rename(final)

    @contextmanager
    def _writing(self, step: int | None = None) -> Iterator[None]:
        """An OSError becomes a UserError; what was begun is dropped, to make room."""
        try:
            yield
        except OSError as error:
            told = disk.unwritable(self.directory, error, "" if step is None else f"the checkpoint of step {step} in ")
            with suppress(OSError):
                self._tidy()
            raise told from error
