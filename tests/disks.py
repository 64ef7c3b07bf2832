"""A disk of a test's own, which may be filled or made read-only."""

import shutil
import subprocess
from pathlib import Path


class Disk:
    """A real file system, mounted at `path`."""

    def __init__(self, path: Path):
        self.path, self._filler = path, path / "filler"

    def fill(self, free: int = 0) -> None:
        """Until so many bytes are free."""
        self._filler.touch()
        self._filler.write_bytes(bytes(self._filler.stat().st_size + shutil.disk_usage(self.path).free - free))

    def empty(self) -> None:
        self._filler.unlink()

    def forbid(self) -> None:
        """Nobody may write any more."""
        subprocess.run(["mount", "-o", "remount,ro", self.path], check=True)
