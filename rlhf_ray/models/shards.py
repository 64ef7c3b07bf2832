"""What a ZeRO-3 rank keeps, in safetensors: flat parts of every parameter and of its optimizer state.

DeepSpeed cuts each parameter, flattened and padded with zeros, into equal parts, one per rank. A file holds those of
one rank under `NAME|KIND` (KIND: `weight`, float32, and the optimizer's own, `exp_avg` and `exp_avg_sq`). The parts of
all files, end to end, are the parameter, whatever the number of ranks: a checkpoint of two ranks loads on three.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import math
import mmap
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rlhf_ray import disk
from rlhf_ray.errors import UserError

WEIGHT = "weight"
_CHUNK = 4 * 2**20  # bytes written at once
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.uint8: "U8"}  # names of the format


@dataclass(frozen=True)
class SavedFile:
    """A file of a checkpoint: its name there, its size in bytes, its sha256 (hex)."""

    name: str
    bytes: int
    sha256: str


def shard_name(role: str, rank: int, world_size: int) -> str:
    return f"{role}-{rank:05d}-of-{world_size:05d}.safetensors"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> SavedFile:
    """Write tensors and a header (JSON), down to the disk. Raises UserError if the disk is full or read-only.

    The library's own writer copies every tensor and holds the interpreter's lock throughout: whoever trains beside it
    would wait, and the file would have to be read again for its checksum.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))  # so that all are aligned
    entries: dict[str, Any] = {"__metadata__": {"header": json.dumps(header)}}
    end = 0
    for name, tensor in ordered:
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape),
                         "data_offsets": [end, end := end + tensor.nbytes]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with (disk.writing(path), open(path, "wb", buffering=0, opener=_past_the_cache) as file,
          mmap.mmap(-1, _CHUNK) as buffer):
        filled = 0
        for piece in (struct.pack("<Q", len(text)) + text, *(_bytes(tensor) for _, tensor in ordered)):
            digest.update(piece)
            rest = memoryview(piece)
            while rest:
                part, rest = rest[: _CHUNK - filled], rest[_CHUNK - filled :]
                buffer[filled : filled + len(part)] = part
                filled += len(part)
                if filled == _CHUNK:
                    _write_all(file, buffer, filled)
                    filled = 0
        _write_all(file, buffer, math.ceil(filled / mmap.PAGESIZE) * mmap.PAGESIZE)
        os.truncate(file.fileno(), 8 + len(text) + end)
        os.fsync(file.fileno())
        return SavedFile(path.name, 8 + len(text) + end, digest.hexdigest())


def _bytes(tensor: Tensor) -> Any:
    """Its memory, if it is in one piece."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _past_the_cache(path: str, flags: int) -> int:
    """An opener. Nobody reads a checkpoint soon, and to find fresh pages for it takes more processor time than all the
    rest of writing. Whoever writes must hand over whole pages."""
    try:
        return os.open(path, flags | os.O_DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)  # a file system that cannot


def _write_all(file: io.FileIO, buffer: mmap.mmap, size: int) -> None:
    with memoryview(buffer)[:size] as data:
        done = 0
        while done < size:
            try:
                done += file.write(data[done:])
            except OSError as error:
                flags = fcntl.fcntl(file, fcntl.F_GETFL)
                if error.errno != errno.EINVAL or not flags & os.O_DIRECT:
                    raise
                fcntl.fcntl(file, fcntl.F_SETFL, flags & ~os.O_DIRECT)  # it cannot, after all


class Shards:
    """The files of all ranks of one role in a checkpoint directory; a context manager. Nothing is read until asked."""

    def __init__(self, directory: Path, role: str):
        self._paths = sorted(directory.glob(f"{role}-*-of-*.safetensors"))
        if not self._paths:
            raise UserError(f"{directory} holds nothing of the role {role}: it is a checkpoint of another algorithm, "
                            "or files were deleted")
        self._files: list[Any] = []

    def __enter__(self) -> Self:
        self._files = [safe_open(path, framework="pt") for path in self._paths]
        self.header: dict[str, Any] = json.loads(self._files[0].metadata()["header"])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.clear()

    def names(self, kind: str = WEIGHT) -> list[str]:
        """The parameters of which there is such a part."""
        return [key.removesuffix(f"|{kind}") for key in self._files[0].keys() if key.endswith(f"|{kind}")]  # noqa: SIM118

    def part(self, name: str, kind: str, numel: int, rank: int, world_size: int) -> Tensor:
        """What rank `rank` of `world_size` holds of a parameter of `numel` elements: flat, padded with zeros.

        Raises UserError if the parameter is missing or of another size.
        """
        size = math.ceil(numel / world_size)
        first, last = rank * size, min((rank + 1) * size, numel)
        found = torch.cat([piece for piece in self._pieces(name, kind, numel, first, last)] or [torch.zeros(0)])
        return torch.nn.functional.pad(found, (0, size - len(found)))

    def whole(self, name: str, kind: str, shape: Sequence[int]) -> Tensor:
        """The whole parameter, in its shape."""
        return self.part(name, kind, math.prod(shape), 0, 1).reshape(tuple(shape))

    def own(self, key: str, rank: int, world_size: int) -> Tensor | None:
        """What this very rank saved under a name of its own; None if there were another number of ranks."""
        if len(self._files) != world_size or key not in self._files[rank].keys():  # noqa: SIM118
            return None
        tensor: Tensor = self._files[rank].get_tensor(key)
        return tensor

    def _pieces(self, name: str, kind: str, numel: int, first: int, last: int) -> Iterator[Tensor]:
        saved = math.ceil(numel / len(self._files))  # elements of each file, the padding of the last included
        for i, file in enumerate(self._files):
            try:
                piece = file.get_slice(f"{name}|{kind}")
            except SafetensorError:
                raise UserError(f"{self._paths[i]} has no {kind} of {name}: it is a checkpoint of another model") \
                    from None
            if piece.get_shape() != [saved]:
                raise UserError(f"{self._paths[i]}: {kind} of {name} has {piece.get_shape()[0]} elements, {saved} were "
                                "expected: it is a checkpoint of another model")
            a, b = max(first - i * saved, 0), min(last - i * saved, saved)
            if a < b:
                yield piece[a:b]
