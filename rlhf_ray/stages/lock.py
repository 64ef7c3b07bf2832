"""One process at a time writes to the directory of a run."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from rlhf_ray.errors import UserError

LOCK = ".lock"
_held: set[Path] = set()  # by this process


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold `<directory>/.lock`; the directory is made if need be. Who holds it already (a pipeline, around its stages)
    goes through. The kernel frees it however the process ends, so that no lock is ever stale.

    Raises UserError if another process holds it, naming that process, or if the directory cannot be written.
    """
    key = directory.resolve()
    if key in _held:
        yield
        return
    with _taken(directory) as file:
        _held.add(key)
        try:
            yield
        finally:
            _held.discard(key)
            file.truncate(0)  # the file stays: who removes a lock file can remove another's


def _taken(directory: Path) -> TextIO:
    path = directory / LOCK
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            json.dump({"pid": os.getpid(), "host": socket.gethostname(), "started": time.strftime("%F %T"),
                       "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}, file)
            file.flush()
        except BaseException:
            file.close()
            raise
    except BlockingIOError:
        raise UserError(f"{directory} is in use by {_holder(path)}: wait for it, stop it, or set another output_dir") \
            from None
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; make it writable for you, or set another output_dir") \
            from error
    return file


def _holder(path: Path) -> str:
    try:
        by = json.loads(path.read_text(encoding="utf-8"))
        return f"process {by['pid']} on host {by['host']} since {by['started']} ({by['command']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"  # which has taken the lock and not yet said who it is
