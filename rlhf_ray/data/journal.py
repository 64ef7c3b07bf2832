"""Finished parts of long sampling, on disk as soon as they are there: no response is generated twice.

JSON lines. The first is a header that says what was asked; each of the others is one part: the number of its first
sample, and the token ids of its responses. A line counts once its newline is on the disk.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from rlhf_ray import disk


class Journal:
    """Parts in the file `path`, those of an earlier, interrupted call included; a context manager.

    header: plain JSON values. A file with another header is started anew, and a line that a kill tore is cut off.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]):
        self.parts: dict[int, list[np.ndarray]] = {}  # by first sample: token ids int32 [n] of each response
        wanted, whole = _line(header), 0
        for i, line in enumerate(_lines(path)):
            if i == 0 and line != wanted:
                break
            if i:
                try:
                    self.parts |= _part(line)
                except (ValueError, TypeError, KeyError, OverflowError):
                    break
            whole += len(line)
        self.path, self._log = path, disk.Log(path)
        self._log.rewind(whole)
        if not whole:
            self._log.add(wanted)

    def add(self, first: int, responses: Sequence[np.ndarray]) -> None:
        """Keep a finished part: responses int32 [n] of the samples from number `first` on. On disk when this returns.

        Raises UserError if the disk is full or read-only.
        """
        self._log.add(_line({"first": first, "ids": [r.tolist() for r in responses]}))
        self._log.sync()
        self.parts[first] = list(responses)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._log.close()


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True).encode() + b"\n"


def _lines(path: Path) -> list[bytes]:
    """The lines that were written to their end."""
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")] \
        if path.exists() else []


def _part(line: bytes) -> dict[int, list[np.ndarray]]:
    part = json.loads(line)
    return {int(part["first"]): [np.array(ids, dtype=np.int32) for ids in part["ids"]]}
