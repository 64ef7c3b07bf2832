"""One process at a time writes to the directory of a run.

On a disk the kernel sees to it. At a URL nobody can: there the holder says who he is in `.lock`, and every few seconds
in `.beat` that he lives. Whoever finds a lock waits for the next beat; if none comes, its holder is dead, whatever the
clocks say. Two drivers that start in the same second may both begin; the first to see another's lock stops.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TextIO

from rlhf_ray import remote, storage
from rlhf_ray.errors import UserError
from rlhf_ray.metrics.progress import console

LOCK, _BEAT = ".lock", ".beat"
BEAT_S, SILENCE_S = 5.0, 20.0
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
    file, left = _taken(directory)
    with file:
        _held.add(key)
        try:
            with _taken_at_url(directory, url, left) if (url := storage.url_of(directory)) else nullcontext():
                yield
        finally:
            _held.discard(key)
            file.truncate(0)  # the file stays: who removes a lock file can remove another's


def _taken(directory: Path) -> tuple[TextIO, str]:
    """The open file, and what a holder who was killed had left in it."""
    path = directory / LOCK
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.seek(0)
            left = file.read()
            file.truncate(0)
            json.dump({"pid": os.getpid(), "host": socket.gethostname(), "started": time.strftime("%F %T"),
                       "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}, file)
            file.flush()
        except BaseException:
            file.close()
            raise
    except BlockingIOError:
        raise _in_use(storage.shown(directory), path.read_text(encoding="utf-8", errors="replace")) from None
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; make it writable for you, or set another output_dir") \
            from error
    return file, left


def _in_use(where: str, lock: str) -> UserError:
    return UserError(f"{where} is in use by {_holder(lock)}: wait for it, stop it, or set another output_dir")


def _holder(lock: str) -> str:
    try:
        by = json.loads(lock)
        return f"process {by['pid']} on host {by['host']} since {by['started']} ({by['command']})"
    except (ValueError, KeyError, TypeError):
        return "another process"  # which has taken the lock and not yet said who it is


# --- at a URL ---


@contextmanager
def _taken_at_url(directory: Path, url: str, left: str) -> Iterator[None]:
    """Hold the lock there, bring this node's copy up to date, and in the end publish what is still to be published.

    left: by a holder of the same copy, who is dead, or the copy's own lock would not be ours.
    """
    storage.probe(directory)
    storage.renew()
    mine, over = (directory / LOCK).read_bytes(), threading.Event()
    found = remote.read(f"{url}/{LOCK}")
    if found and found.decode() != left:
        _wait_for_silence(url, found.decode())
    remote.write(f"{url}/{LOCK}", mine)
    beating = threading.Thread(target=_beat, args=(url, mine, over), name="lock", daemon=True)
    beating.start()
    try:
        storage.fetch(directory, storage.small)
        yield
        storage.settle()
    except BaseException:
        with suppress(UserError):  # what went wrong first is to be told
            storage.settle()
        raise
    finally:
        over.set()
        beating.join(SILENCE_S)  # a beat that hangs ends with the process
        with suppress(UserError):
            if remote.read(f"{url}/{LOCK}") == mine:
                for name in (LOCK, _BEAT):
                    remote.delete(f"{url}/{name}")


def _wait_for_silence(url: str, lock: str) -> None:
    """Raises UserError if the holder lives."""
    console.print(f"{url} was taken by {_holder(lock)}: waiting {SILENCE_S:.0f} s for a sign of its life", markup=False)
    before, until = remote.read(f"{url}/{_BEAT}"), time.monotonic() + SILENCE_S
    while time.monotonic() < until:
        time.sleep(BEAT_S / 5)
        if remote.read(f"{url}/{_BEAT}") != before:
            raise _in_use(url, lock)


def _beat(url: str, mine: bytes, over: threading.Event) -> None:
    while not over.is_set():
        with suppress(UserError):  # it may work the next time
            if remote.read(f"{url}/{LOCK}") != mine:
                storage.fail(UserError(f"{url} was taken over by another process while this one gave no sign of life: "
                                       "nothing more is written there"))
                return
            remote.write(f"{url}/{_BEAT}", str(time.time()).encode())
        over.wait(BEAT_S)
