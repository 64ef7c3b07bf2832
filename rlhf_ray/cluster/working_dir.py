"""What goes along with a job: the files of a directory, as one archive."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from zipfile import ZipFile

from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE, get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

from rlhf_ray.config.schema import STAGES
from rlhf_ray.errors import UserError

# Beside Ray's own: what runs make, secrets, and what tools keep. The rest is up to .gitignore and .rayignore.
SECRET = ".env*"
LEFT_OUT = ("/outputs", "/wandb", SECRET, "*.egg-info", ".*_cache")
MOST_BYTES = DASHBOARD_CLIENT_MAX_SIZE - 2**20  # in one request, with its own bytes and the archive's table
MOST_FILES = 20_000
_QUIET = logging.getLogger(f"{__name__}.quiet")
_QUIET.disabled = True


def collect(
    root: Path, without: Collection[Path], named: Iterable[Path], others: Mapping[str, Path]
) -> dict[str, Path]:
    """Name in the archive -> file: those of `root` that a job of Ray's own would get, without secrets and runs; those
    `named` in any case.

    without: directories of the runs to come. named: files and directories below root. others: directories elsewhere, by
    the name that they get. Raises UserError naming the largest entries if this is more than Ray takes.
    """
    files: dict[str, Path] = {}
    sizes: Counter[str] = Counter()

    def add(path: Path, name: str) -> None:
        if name in files or not path.is_file():
            return
        files[name] = path
        sizes[name.split("/")[0]] += path.stat().st_size
        if sizes.total() > MOST_BYTES or len(files) > MOST_FILES:
            raise _too_large(root, sizes, len(files))

    def below(directory: Path) -> Iterable[Path]:
        if not directory.is_dir():
            return [directory]
        return (path for path in directory.rglob("*")
                if "__pycache__" not in path.parts and not path.match(SECRET))

    excludes = [_get_excludes(root, [*get_runtime_env_default_excludes(), *LEFT_OUT]), without.__contains__,
                lambda path: path != root and _is_run(path)]
    _dir_travel(root, excludes, lambda path: add(path, str(path.relative_to(root))), include_gitignore=True,
                logger=_QUIET)
    for directory in named:
        for path in below(directory):
            add(path, str(path.relative_to(root)))
    for name, directory in others.items():
        for path in below(directory):
            add(path, f"{name}/{path.relative_to(directory)}")
    return files


def _is_run(path: Path) -> bool:
    """Whether a run has begun in this directory, or was copied here."""
    return (path / ".lock").is_file() or any((path / stage / "stage.json").is_file() for stage in STAGES)


def write(files: Mapping[str, Path], archive: Path) -> None:
    """The same files make the same bytes: Ray knows an archive by its hash, and keeps it."""
    with ZipFile(archive, "w", strict_timestamps=False) as out:
        for name in sorted(files):
            out.write(files[name], name)


def _too_large(root: Path, sizes: Counter[str], files: int) -> UserError:
    limit = f"{MOST_BYTES / 2**20:.0f} MiB, the most that Ray takes" if sizes.total() > MOST_BYTES else \
        f"{MOST_FILES:,} files"
    largest = ", ".join(f"{name} ({size / 2**20:.1f} MiB)" for name, size in sizes.most_common(4))
    return UserError(f"{root} is too large to go along with a job: more than {limit}, most of it in {largest}; name "
                     "what the job can do without in .gitignore or .rayignore, and put large files where every node "
                     "has them and give their absolute path")
