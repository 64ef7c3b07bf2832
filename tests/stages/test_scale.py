"""A wish for generators reaches only a ppo stage that is under way, and only one where they can come and go."""

import json
import os
import socket
from pathlib import Path

import pytest

from rlhf_ray.config.schema import Config
from rlhf_ray.errors import UserError
from rlhf_ray.stages import scale


@pytest.fixture
def cfg(tmp_path: Path) -> Config:
    """This process runs ppo there."""
    cfg = Config(output_dir=str(tmp_path))
    cfg.scale.generators = 3
    (tmp_path / "ppo").mkdir()
    (tmp_path / "ppo/config.yaml").write_text("cluster: {placement: separate}\n")
    (tmp_path / ".lock").write_text(json.dumps(
        {"pid": os.getpid(), "host": socket.gethostname(), "started": "now", "command": "rlhf-ray ppo"}))
    return cfg


def test_the_wish_is_written_where_the_driver_looks(cfg: Config, tmp_path: Path) -> None:
    scale.run(cfg)
    assert (tmp_path / "ppo/generators").read_text() == "3\n"


def test_a_number_is_asked_for(cfg: Config) -> None:
    cfg.scale.generators = None
    with pytest.raises(UserError, match=r"scale\.generators=N"):
        scale.run(cfg)


@pytest.mark.parametrize("gone", ["ppo/config.yaml", ".lock"])
def test_a_run_must_be_under_way(cfg: Config, tmp_path: Path, gone: str) -> None:
    (tmp_path / gone).unlink()
    with pytest.raises(UserError, match=r"no ppo stage is under way .* set roles\.generator\.replicas=3"):
        scale.run(cfg)


def test_colocated_generators_stay_as_many_as_there_are(cfg: Config, tmp_path: Path) -> None:
    (tmp_path / "ppo/config.yaml").write_text("cluster: {placement: colocated}\n")
    with pytest.raises(UserError, match=r"cluster\.placement=colocated"):
        scale.run(cfg)
