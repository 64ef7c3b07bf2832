"""Files that another process writes: one that grows is read as it grows, the others may come and go."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, BinaryIO


class Tail:
    """The rows of `path` that were whole at the last `read`, with those of their entries that are named in `keys`.

    Only what was appended is read. A file that was cut or written anew, as by a run that went back to a checkpoint, is
    read again from the start. A last line without its end is left for the next time; one that is no JSON is left out.
    Only the newest `last` rows are kept (None: all).
    """

    def __init__(self, path: Path, keys: Collection[str], last: int | None = None):
        self.path, self.keys, self.last = path, frozenset(keys), last
        self.rows: list[dict[str, Any]] = []
        self._position, self._last = 0, b""  # end of what was read, in bytes; the last line before it

    def size(self) -> int:
        """Of the file now, bytes; 0 where there is none."""
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0

    def read(self) -> list[dict[str, Any]]:
        """All rows, oldest first; none where there is no file."""
        try:
            with self.path.open("rb") as file:
                if not self._goes_on(file):
                    self._forget()
                file.seek(self._position)
                appended = file.read()
        except FileNotFoundError:
            self._forget()
            return self.rows
        whole = appended[: appended.rfind(b"\n") + 1]
        for line in whole.splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                self.rows.append({key: value for key, value in row.items() if key in self.keys})
        if self.last is not None:
            del self.rows[: -self.last]
        if whole:
            self._position += len(whole)
            self._last = whole[whole[:-1].rfind(b"\n") + 1 :]
        return self.rows

    def _goes_on(self, file: BinaryIO) -> bool:
        """Whether the line that was read last is still where it was: the length alone would miss a file that was cut
        and has grown beyond it since."""
        file.seek(self._position - len(self._last))
        return file.read(len(self._last)) == self._last

    def _forget(self) -> None:
        self.rows, self._position, self._last = [], 0, b""


def time_of(path: Path) -> float | None:
    """When it was last written, unix seconds; None where it is not."""
    try:
        return path.stat().st_mtime
    except (FileNotFoundError, NotADirectoryError):
        return None


def text_of(path: Path) -> str:
    """All of it; empty where it is not."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return ""


def object_of(path: Path) -> dict[str, Any] | None:
    """The JSON object in it; None where there is none."""
    try:
        value = json.loads(text_of(path))
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
