"""An output_dir that is a URL, s3://bucket/team/run or whatever else fsspec opens: for clusters without a shared disk.

Everything knows paths only. For such a run they lead into a copy of the URL that each node has on a disk of its own,
and a path says by itself what it is a copy of, wherever it is read:

    <TMPDIR>/rlhf_ray-<uid>/s3%3A%2F%2Fbucket%2Fteam/run/ppo/metrics.jsonl      s3://bucket/team/run/ppo/metrics.jsonl
                                                    /.run.versions/ppo/...      which version of each file the copy has

`fetch` brings the copy up to date before something is read, `publish` the URL after something was written, `withdraw`
deletes there. For any other path they do nothing. What begins with a dot or ends in `.tmp` or `.old` is of its node
alone, but for a checkpoint under way: at the URL, where nothing can be renamed, it has its final name from the start.
What says that all else is whole, a manifest or the record of a stage, is published last and withdrawn first.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import socket
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import xxhash

from rlhf_ray import remote
from rlhf_ray.errors import UserError

CACHE = "RLHF_RAY_CACHE"  # environment: where copies lie, instead of <TMPDIR>/rlhf_ray-<uid>; one path for all nodes
_WHOLE = ("manifest.json", "stage.json")
_OF_ACTORS = {"model", "untrained", "checkpoints", "export"}  # directories whose files are published by themselves
_COPY = re.compile(r"(.*/[a-z][a-z0-9+.-]*%3A%2F[^/]*)/([^/]+)(.*)")
_UNDER_WAY = re.compile(r"/\.(step-\d+)\.tmp(?=/|$)")
_STREAMS = 8  # files of one call under way at a time
_PIECE = 16 * 2**20  # bytes read at once

Wanted = Callable[[str], bool]  # by the name below the directory that is meant


# --- which path is a copy of what ---


def local_root(output_dir: str) -> Path:
    """Where the files of a run are on every node: in output_dir itself, or in the copy of the URL.

    Raises UserError for a URL that cannot be one of a run.
    """
    if "://" not in output_dir:
        return Path(output_dir).absolute()
    base = os.environ.get(CACHE) or Path(tempfile.gettempdir()) / f"rlhf_ray-{os.getuid()}"
    return _place(Path(base).absolute(), output_dir)


@contextmanager
def reading(output_dir: str) -> Iterator[Path]:
    """The files of a run for somebody who only looks: of a URL a copy of his own, made of what is small and gone with
    the context, so that a driver on the same machine is not disturbed."""
    if "://" not in output_dir:
        yield Path(output_dir)
        return
    with tempfile.TemporaryDirectory(prefix="rlhf_ray-") as base:
        root = _place(Path(base), output_dir)
        fetch(root, small)
        yield root


def url_of(path: Path) -> str | None:
    """What a path is a copy of; None if it is none."""
    found = _parts(path)
    return f"{unquote(found[0].name)}/{found[1]}{found[2]}" if found else None


def shown(path: Path) -> str:
    """A path for a person: the URL, if it is a copy."""
    return url_of(path) or str(path)


def run_name(directory: Path) -> str:
    """What a run is called among others, by its output_dir: the name of that, and for one run of a sweep, such as
    `runs/a/seed=1`, the name of the sweep before it: `a/seed=1`."""
    parts = (url_of(directory) or os.path.normpath(directory.absolute())).split("/")
    return "/".join(parts[-2:]) if "=" in parts[-1] else parts[-1]


def of_driver(name: str) -> bool:
    """What the driver writes: all but models and the tensors of checkpoints."""
    return not _OF_ACTORS & set(name.split("/")) or name.endswith(_WHOLE)


def small(name: str) -> bool:
    """What a stage or a watcher reads before anything else."""
    return of_driver(name) and "wandb" not in name.split("/")


def _place(base: Path, url: str) -> Path:
    remote.check_url(url)
    above, _, name = url.rstrip("/").rpartition("/")
    return base / quote(above, safe="") / name  # so that the run's directory has the run's name


def _parts(path: Path) -> tuple[Path, str, str] | None:
    """(the directory of the copy, the run's name, the rest with final names) of a path in a copy."""
    found = _COPY.fullmatch(str(path))
    return (Path(found[1]), found[2], _UNDER_WAY.sub(r"/\1", found[3])) if found else None


# --- from the URL ---


def fetch(path: Path, wanted: Wanted = lambda name: True) -> None:
    """Bring a file or directory of a copy up to date, as far as it is wanted; whatever is not at the URL goes.

    Of several processes of a node one does it while the others wait. Raises UserError if the URL cannot be read.
    """
    url, copy = url_of(path), _parts(path)
    if url is None or copy is None:
        return
    copy[0].mkdir(parents=True, exist_ok=True)
    with (copy[0] / f".{copy[1]}.lock").open("a") as alone, ThreadPoolExecutor(_STREAMS) as pool:
        fcntl.flock(alone, fcntl.LOCK_EX)
        there = remote.listing(url)
        for name in _files(path).keys() - there.keys():
            _drop(path / name, path)
        list(pool.map(lambda name: _download(path / name, there[name]),
                      (name for name in there if wanted(name) and not _of_node(name))))


def sizes(path: Path) -> dict[Path, int]:
    """Bytes of the files right in a directory, or of the file itself; at the URL, if it is a copy."""
    if url := url_of(path):
        return {path / name: info["size"] for name, info in remote.listing(url).items() if "/" not in name}
    return {file: file.stat().st_size for file in (path, *path.glob("*")) if file.is_file()}


def digest(path: Path, size: int) -> str:
    """Of all `size` bytes of a file (XXH3, 128 bits, hex), at the URL if it is a copy; nothing is kept of that.

    Against accidents, not against malice: as fast as it can be read.
    """
    url, found = url_of(path), xxhash.xxh3_128()
    if url is None:
        now = path.stat()
        return _digest(path, now.st_size, now.st_mtime_ns, now.st_ctime_ns)
    for start in range(0, size, _PIECE):
        found.update(remote.read(url, start, min(start + _PIECE, size)) or b"")
    return found.hexdigest()


@lru_cache
def _digest(path: Path, size: int, mtime_ns: int, ctime_ns: int) -> str:
    """Size and times are there so that a file that changed is read again."""
    found = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            found.update(piece)
    return found.hexdigest()


# --- to the URL ---


class _Uploads:
    """One after the other, beside the work of this process. After one has failed no further one is begun: the old
    checkpoint goes only when the new one is there."""

    def __init__(self) -> None:
        self._pool, self._lock = ThreadPoolExecutor(1, "uploads"), threading.Lock()
        self._waiting: set[tuple[Any, ...]] = set()
        self.renew()

    def renew(self) -> None:
        """Forget what failed: it was of another run of this process."""
        self._failure: UserError | None = None
        self._last: Future[None] | None = None

    def add(self, *call: Any) -> None:
        with self._lock:
            if call not in self._waiting:  # else it will find what is there when its turn comes
                self._waiting.add(call)
                self._last = self._pool.submit(self._run, call)

    def _run(self, call: tuple[Any, ...]) -> None:
        with self._lock:
            self._waiting.discard(call)
        if self._failure is None:
            try:
                call[0](*call[1:])
            except UserError as error:
                self._failure = error

    def settle(self) -> None:
        """Wait until all is published and withdrawn. Raises UserError, from then on whenever it is called, if something
        could not be."""
        if self._last:
            self._last.result()
        if self._failure:
            raise self._failure

    def fail(self, error: UserError) -> None:
        """Leave the URL alone from now on; `settle` says why."""
        self._failure = error


_uploads = _Uploads()
settle, fail, renew = _uploads.settle, _uploads.fail, _uploads.renew


def publish(path: Path, wanted: Wanted = lambda name: True, exact: bool = False) -> None:
    """Begin to bring the URL up to date with a file or directory of this node's copy, as far as it is wanted.

    exact: what is not here goes there, too.
    """
    if url := url_of(path):
        _uploads.add(_publish, path, url, wanted, exact)


def withdraw(path: Path) -> None:
    """Begin to delete a file or directory at the URL; the copy is the caller's."""
    if url := url_of(path):
        _uploads.add(_withdraw, path, url)


def probe(path: Path) -> None:
    """Raise UserError unless this node can have a copy of the run that `path` belongs to, and write, read and delete at
    its URL. Nothing of the run is touched."""
    if parts := _parts(path):
        root = parts[0] / parts[1]
        url = url_of(root)
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output_dir={url}: cannot make its copy {root} on {socket.gethostname()}: "
                            f"{error.strerror}; set the environment variable {CACHE} to a directory that every node "
                            "can make") from error
        file, data = f"{url}/.probe-{uuid.uuid4().hex}", b"rlhf_ray"
        remote.write(file, data)
        if remote.read(file) != data:
            raise UserError(f"output_dir={url}: what this node ({socket.gethostname()}) writes there, it cannot read: "
                            "take a file system that shows at once what was written")
        remote.delete(file)


def _publish(path: Path, url: str, wanted: Wanted, exact: bool) -> None:
    states = {name: state for name, file in _files(path).items() if wanted(name) and (state := _state(file))}
    if exact:
        for name in remote.listing(url).keys() - states.keys():
            _withdraw(path / name, f"{url}/{name}")
    changed = [name for name, state in states.items() if _mark(path / name)[1:] != state]
    with ThreadPoolExecutor(_STREAMS) as pool:
        list(pool.map(lambda name: _upload(path / name), (n for n in changed if not (path / n).name.endswith(_WHOLE))))
    for name in changed:
        if (path / name).name.endswith(_WHOLE):
            _upload(path / name)
    for name, info in remote.listing(url).items() if changed else ():
        if name in changed:
            _remember(path / name, [remote.version(info), *states[name]])


def _withdraw(path: Path, url: str) -> None:
    remote.delete(url, first=lambda name: name.endswith(_WHOLE))
    mark = _mark_file(path)
    shutil.rmtree(mark) if mark.is_dir() else mark.unlink(missing_ok=True)


def _upload(file: Path) -> None:
    remote.upload(file, url_of(file) or "")


# --- the files of a copy ---


def _files(path: Path) -> dict[str, Path]:
    """By name, as `remote.listing` has them, without those that are of this node alone."""
    if path.is_file():
        return {"": path}
    found = (Path(directory) / name for directory, _, names in os.walk(path) for name in names)  # they come and go
    return {name: p for p in found if p.is_file() and not p.is_symlink()
            and not _of_node(name := p.relative_to(path).as_posix())}


def _of_node(name: str) -> bool:
    return any(part.startswith(".") or part.endswith((".tmp", ".old")) for part in name.split("/"))


def _drop(file: Path, top: Path) -> None:
    """Delete a file, and the directories below `top` that are empty then."""
    file.unlink(missing_ok=True)
    with suppress(OSError):
        while (file := file.parent) != top and file.is_relative_to(top):
            file.rmdir()


def _download(file: Path, info: remote.Info) -> None:
    """Unless the copy has that version."""
    version = remote.version(info)
    if version is not None and _mark(file) == [version, *_state(file)]:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f".{file.name}.tmp")
    if remote.download(url_of(file) or "", fresh):
        if (then := remote.written(info)) is not None:
            os.utime(fresh, (then, then))  # a watcher says how old things are
        fresh.replace(file)
        _remember(file, [version, *_state(file)])


# A mark says which version of a file the copy has: the version at the URL, then the state of the file here.


def _state(file: Path) -> list[int]:
    try:
        found = file.stat()
    except FileNotFoundError:
        return []
    return [found.st_size, found.st_mtime_ns]


def _mark_file(path: Path) -> Path:
    directory, run, name = _parts(path) or (path, "", "")
    return directory / f".{run}.versions{name}"


def _mark(file: Path) -> list[Any]:
    try:
        mark: list[Any] = json.loads(_mark_file(file).read_text())
    except (OSError, ValueError):
        return []
    return mark


def _remember(file: Path, mark: list[Any]) -> None:
    path = _mark_file(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    fresh.write_text(json.dumps(mark))
    fresh.replace(path)
