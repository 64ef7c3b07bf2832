"""Files at a URL, by fsspec: listed, read, written and deleted. Whatever goes wrong is one line (UserError).

Packages and credentials are those of fsspec's file systems, which look for them in the environment of each machine.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rlhf_ray.errors import UserError

Info = Mapping[str, Any]  # what the file system says of a file
# What file systems call that by which a file is seen to be another, size apart.
_SIGNS = ("mtime", "LastModified", "last_modified", "updated", "modified", "created", "ETag", "etag", "md5Hash",
          "content_md5")


def check_url(output_dir: str) -> None:
    """Raise UserError for a URL that carries a secret, which would be in every log, or that names no directory."""
    url = urlsplit(output_dir)
    if ":" in url.netloc.rpartition("@")[0] or url.query:
        raise UserError(f"output_dir={url.scheme}://... carries a password or other parameters, which would be in logs "
                        "and in config.yaml: leave them out, and give credentials by the environment or the files that "
                        f"the package for {url.scheme}:// reads")
    if not re.fullmatch(r"[a-z][a-z0-9+.-]*://.*[^/].*", output_dir) or len(output_dir) > 200:
        raise UserError(f"output_dir={output_dir}: expected PROTOCOL://PLACE/NAME, of at most 200 characters")


def listing(url: str) -> dict[str, Info]:
    """Every file below a directory by its name there; of a file itself, by the name ""; none where there is none."""
    with _at(url, "list") as (fs, root):
        fs.invalidate_cache()
        found: dict[str, Info] = {}
        if fs.async_impl:  # an object store lists all at once
            with suppress(FileNotFoundError):
                found = fs.find(root, detail=True)
                found = {name: info or fs.info(name) for name, info in found.items()}
        else:
            found = {info["name"]: info for info in _walk(fs, root)}
        return {name[len(root) + 1 :]: info for name, info in found.items() if f"{name}/".startswith(f"{root}/")}


def version(info: Info) -> str | None:
    """Another one for another content; None where a file system tells nothing but the size."""
    signs = [f"{key}={info[key]}" for key in _SIGNS if info.get(key) is not None]
    return " ".join([str(info["size"]), *signs]) if signs else None


def written(info: Info) -> float | None:
    """When, unix seconds; None where that is not said."""
    for value in (info.get(key) for key in _SIGNS):
        if isinstance(value, datetime | float):
            return value.timestamp() if isinstance(value, datetime) else value
    return None


def read(url: str, start: int | None = None, end: int | None = None) -> bytes | None:
    """The bytes from `start` to `end` of a file, which must have some there; by default all. None without a file."""
    with _at(url, "read") as (fs, name), suppress(FileNotFoundError):
        return bytes(fs.cat_file(name, start=start, end=end))
    return None


def download(url: str, file: Path) -> bool:
    """Whether the file was there."""
    with _at(url, "read") as (fs, name), suppress(FileNotFoundError):
        fs.get_file(name, str(file))
        return True
    return False


def write(url: str, data: bytes) -> None:
    with _at(url, "write") as (fs, name):
        _put(fs, name, lambda to: fs.pipe_file(to, data))


def upload(file: Path, url: str) -> None:
    with _at(url, "write") as (fs, name):
        try:
            _put(fs, name, lambda to: fs.put_file(str(file), to))
        except FileNotFoundError:
            if file.exists():  # else it has gone meanwhile
                raise


def delete(url: str, first: Callable[[str], bool] = lambda name: False) -> None:
    """A file or directory, if there is one; before all else the files whose names are `first`."""
    there = listing(url)
    with _at(url, "delete") as (fs, root):
        for name in there:
            if first(name):
                fs.rm_file(f"{root}/{name}")
        with suppress(FileNotFoundError):  # that was all
            if there:
                fs.rm(root, recursive=True)


@contextmanager
def _at(url: str, what: str) -> Iterator[tuple[Any, str]]:
    """The file system of a URL, and the name there."""
    try:
        from fsspec.core import url_to_fs

        fs, name = url_to_fs(url)
        yield fs, name.rstrip("/")
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        todo = ("install it on every node" if isinstance(error, ImportError) else
                "look at the address, and at the rights and credentials of this node")
        raise UserError(f"output_dir: cannot {what} {url} from {socket.gethostname()}: {type(error).__name__}: "
                        f"{reason}; {todo}, or set another output_dir") from error


def _put(fs: Any, name: str, send: Callable[[str], Any]) -> None:
    """An object appears whole, and so does a file of this machine; those of other file systems grow."""
    from fsspec.implementations.local import LocalFileSystem

    if not fs.async_impl:  # object stores have no directories, and some take this for the wish to have a new bucket
        fs.makedirs(name.rpartition("/")[0], exist_ok=True)
    if isinstance(fs, LocalFileSystem):
        beside = Path(name).with_name(f".{Path(name).name}.tmp")
        send(str(beside))
        beside.replace(name)
    else:
        send(name)


def _walk(fs: Any, directory: str) -> Iterator[Info]:
    """As fsspec's own, which takes a directory that cannot be read for an empty one."""
    try:
        entries = fs.ls(directory, detail=True)
    except FileNotFoundError:
        return
    for info in entries:
        if info["type"] == "file":
            yield info
        elif info["type"] == "directory" and info["name"].rstrip("/") != directory:
            yield from _walk(fs, info["name"].rstrip("/"))
