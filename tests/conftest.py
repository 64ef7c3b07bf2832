"""What tests of several rooms need."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from disks import Disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Disk]:
    """Of 512 KiB."""
    path = tmp_path / "disk"
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", path], capture_output=True, text=True,
                          check=False)
    if done.returncode:
        pytest.skip(f"mount is not permitted: {done.stderr.strip()}")
    yield Disk(path)
    subprocess.run(["umount", path], check=True)
