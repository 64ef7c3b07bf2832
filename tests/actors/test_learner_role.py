"""A rank writes where the checkpoint will be."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from rlhf_ray import storage
from rlhf_ray.actors.learner_role import LearnerRole
from rlhf_ray.models.shards import SavedFile, Shards

NAME = "policy-00000-of-00001.safetensors"


def write(directory: Path) -> list[SavedFile]:
    rank = LearnerRole()
    rank.copied = [(NAME, {"w|weight": torch.ones(3)}, {"steps_done": 1})]
    with ThreadPoolExecutor(1) as thread:  # which from then on has only the time that nobody else wants
        return thread.submit(rank.write, str(directory)).result()


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
