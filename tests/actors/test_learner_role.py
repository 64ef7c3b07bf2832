"""A rank writes where the checkpoint will be."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlhf_ray import storage
from rlhf_ray.actors.learner_role import LearnerRole
from rlhf_ray.models.shards import SavedFile, Shards

NAME = "policy-00000-of-00001.safetensors"


class Rank(LearnerRole):
    """Of a group of one, with a weight of `value`."""

    role = "policy"

    def __init__(self, value: float = 1.0):
        self.learner = SimpleNamespace(  # type: ignore[assignment]
            rank=0, world_size=1, state=lambda: ({"w|weight": torch.full((3,), value)}, {"steps_done": 1}))


def write(directory: Path) -> list[SavedFile]:
    rank = Rank()
    rank.snapshot(str(directory))
    with ThreadPoolExecutor(1) as thread:  # which from then on has only the time that nobody else wants
        return thread.submit(rank.write, str(directory)).result()


def test_a_snapshot_is_written_where_it_was_meant_for_and_nowhere_else(tmp_path: Path) -> None:
    """The writing of the first was given up while it lasted; it neither takes the second's copy nor loses it."""
    rank, (first, second) = Rank(), (tmp_path / "first", tmp_path / "second")
    second.mkdir()
    rank.snapshot(str(first))
    rank.snapshot(str(second))
    with ThreadPoolExecutor(1) as thread:
        with pytest.raises(RuntimeError, match=r"no copy for .*first"):
            thread.submit(rank.write, str(first)).result()
        assert [file.name for file in thread.submit(rank.write, str(second)).result()] == [NAME]


def test_a_copy_made_while_another_is_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the upload of a checkpoint that was given up takes long."""
    rank, directories = Rank(), [tmp_path / "first", tmp_path / "second"]
    for directory in directories:
        directory.mkdir()
    uploads = iter([lambda: rank.snapshot(str(directories[1])), lambda: None])
    monkeypatch.setattr(storage, "publish", lambda path: next(uploads)())
    rank.snapshot(str(directories[0]))
    with ThreadPoolExecutor(1) as thread:
        assert all(thread.submit(rank.write, str(directory)).result() for directory in directories)


def test_where_no_thread_may_be_idle_it_is_written_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some containers forbid the system call."""
    def refused(*_: object) -> None:
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr("os.sched_setscheduler", refused)
    assert write(tmp_path)


def test_on_a_disk_into_the_directory_that_the_driver_has_made(tmp_path: Path) -> None:
    (file,) = write(tmp_path)
    assert (file.name, file.bytes) == (NAME, (tmp_path / NAME).stat().st_size)


def test_at_a_url_and_nothing_stays_on_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There under the final name, for nothing can be renamed; here it would be one checkpoint after the other."""
    monkeypatch.setenv(storage.CACHE, str(tmp_path / "copies"))
    checkpoints = storage.local_root(f"file://{tmp_path}/there/run") / "ppo/checkpoints"
    for step in (1, 2):
        (file,) = write(checkpoints / f".step-0000000{step}.tmp")
        directory = tmp_path / f"there/run/ppo/checkpoints/step-0000000{step}"
        assert file.bytes == (directory / NAME).stat().st_size
        with Shards(directory, "policy") as shards:
            assert shards.whole("w", "weight", (3,)).tolist() == [1.0] * 3
    assert list(checkpoints.rglob("*")) == [checkpoints / ".step-00000002.tmp"]
