"""manifest.json of a checkpoint: of which run, the driver's state, size and checksum of every file, its own too."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rlhf_ray import disk, storage
from rlhf_ray.errors import UserError
from rlhf_ray.models.shards import SavedFile

FORMAT = 3  # another one for every change to what a checkpoint holds, its fingerprints included
MANIFEST = "manifest.json"
_READERS = 4  # threads that hash files; more do not read a disk faster


class NotWhole(Exception):
    """A checkpoint that cannot be used: which file of it, and why."""


def write_manifest(directory: Path, manifest: Mapping[str, Any]) -> None:
    """The last file of a checkpoint. When this returns, all of the directory is on the disk."""
    (directory / MANIFEST).write_text(json.dumps({**manifest, "sha256": _digest(manifest)}, indent=2) + "\n")
    for path in (*directory.iterdir(), directory):
        disk.sync(path)


def read_manifest(directory: Path) -> dict[str, Any]:
    """As it was given to `write_manifest`. Raises NotWhole."""
    path = directory / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        if manifest["format"] != FORMAT:
            raise NotWhole(f"{path} is of format {manifest['format']}, this version of rlhf_ray reads {FORMAT}")
        if manifest.pop("sha256") != _digest(manifest):
            raise NotWhole(f"{path}: checksum differs")
    except FileNotFoundError:
        raise NotWhole(f"{path} is missing") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NotWhole(f"{path} is unreadable: {type(error).__name__}: {error}") from error
    return manifest


def verify(directory: Path) -> dict[str, Any]:
    """The manifest, once every file that it names is there with its size and sha256. Raises NotWhole."""
    manifest = read_manifest(directory)
    with ThreadPoolExecutor(_READERS) as pool:
        for problem in pool.map(lambda file: _problem(directory, SavedFile(**file)), manifest["files"]):
            if problem:
                raise NotWhole(problem)
    return manifest


def check_written(directory: Path, files: Sequence[SavedFile]) -> None:
    """Raise UserError unless exactly these files are there, as large as they were for whoever wrote them."""
    found = {path.name: size for path, size in storage.sizes(directory).items()}
    announced = {file.name: file.bytes for file in files}
    for name in sorted(found.keys() | announced.keys()):
        if name not in found:
            wrong = "was written and is not there"
        elif name not in announced:
            wrong = "is there, and no actor of this run says that it wrote it"
        elif found[name] != announced[name]:
            wrong = f"was written with {announced[name]} bytes and has {found[name]}"
        else:
            continue
        raise UserError(f"{storage.shown(directory / name)} {wrong}: output_dir must be a path that leads every node "
                        "to the same place, and nothing else may write there")


def _problem(directory: Path, file: SavedFile) -> str:
    """What is wrong with a file of a checkpoint, or nothing."""
    path = directory / file.name
    try:
        if (size := path.stat().st_size) != file.bytes:
            return f"{path} has {size} bytes instead of {file.bytes}"
        with path.open("rb") as opened:
            same = hashlib.file_digest(opened, "sha256").hexdigest() == file.sha256
        return "" if same else f"{path}: checksum differs"
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} is unreadable: {error.strerror}"


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
