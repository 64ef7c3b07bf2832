"""Files and directories that are whole or not there, and down to the disk before anything that they replace is gone.

A disk that is full, read-only or broken is one line for the user (UserError); what was there before stays as it was.
What is under way has a name that begins with a dot: `.NAME.tmp`, and what it is about to replace `.NAME.old`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from rlhf_ray.errors import UserError


def sync(path: Path) -> None:
    """Down to the disk: a file's contents, or a directory's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path, what: str = "") -> Iterator[None]:
    """What goes wrong in here is that `path` cannot be written: a UserError. what: comes before its name."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise unwritable(path, error, what) from error


def unwritable(path: Path, error: OSError | SafetensorError, what: str = "") -> UserError:
    there = next(p for p in (path, *path.absolute().parents) if p.is_dir())
    reason = getattr(error, "strerror", None) or error
    return UserError(f"cannot write {what}{path}: {reason}; {shutil.disk_usage(there).free / 2**30:.2f} GiB are free "
                     "there; what was written before is as it was: make room or make it writable, and "
                     "give the same command again")


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all. Raises UserError."""
    fresh = path.with_name(f".{path.name}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            fresh.write_text(text, encoding="utf-8")
            sync(fresh)
            fresh.replace(path)
            sync(path.parent)
        finally:
            fresh.unlink(missing_ok=True)


class Log:
    """A file that grows by whole pieces, and can go back to where it was. Raises UserError."""

    def __init__(self, path: Path):
        self.path = path
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
            sync(path.parent)

    def add(self, piece: bytes) -> None:
        """All of it or nothing. It is with the operating system when this returns: it outlives this process."""
        with writing(self.path):
            before, rest = self._file.tell(), memoryview(piece)
            try:
                while rest:
                    rest = rest[self._file.write(rest) :]
            except OSError:
                with suppress(OSError):
                    self._cut(before)
                raise

    def sync(self) -> int:
        """Down to the disk. Returns the length of the file, bytes."""
        with writing(self.path):
            os.fsync(self._file.fileno())
            return self._file.tell()

    def rewind(self, position: int) -> None:
        """Forget everything after `position`. A file that is shorter than that is not filled up with zeros."""
        with writing(self.path):
            self._cut(min(position, self._file.tell()))

    def close(self) -> None:
        self._file.close()

    def _cut(self, position: int) -> None:
        self._file.truncate(position)
        self._file.seek(position)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A fresh directory to be filled. It takes the place of `path` when the context ends well. Raises UserError.

    Directories do not replace each other in one step: a kill between two renames leaves the old one as `.NAME.old`, and
    `restore`, or the next call, gives it its name again.
    """
    fresh, old = path.with_name(f".{path.name}.tmp"), _old(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        restore(path)
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        try:
            yield fresh
            for file in (*fresh.rglob("*"), fresh):
                sync(file)
            if path.exists():
                path.rename(old)
            fresh.rename(path)
            sync(path.parent)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
            restore(path)


def restore(path: Path) -> None:
    """Clear up what a kill has left of `replacing`: at one of the two names is a whole directory, if there was any."""
    old = _old(path)
    if path.exists() and old.is_symlink():
        old.unlink()
    elif path.exists():
        shutil.rmtree(old, ignore_errors=True)
    elif old.exists():
        old.rename(path)


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")
