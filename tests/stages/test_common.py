"""Where stages look for what the stages before them made."""

from pathlib import Path

import pytest

from rlhf_ray.config.schema import Config
from rlhf_ray.errors import UserError
from rlhf_ray.stages.common import Paths, stage_record, write_json


def test_a_stage_that_has_not_ended_well_is_asked_for(tmp_path: Path) -> None:
    """Its directory and its model alone do not do: the record is written last."""
    cfg = Config(output_dir=str(tmp_path))
    paths = Paths(cfg)
    paths.sft.mkdir(parents=True)
    with pytest.raises(UserError, match="no finished sft: run `rlhf-ray sft` first") as error:
        paths.require("sft")
    assert str(tmp_path / "sft") in str(error.value)
    assert stage_record(cfg, "sft") is None
    write_json(tmp_path / "sft" / "stage.json", {"seconds": 1})
    paths.require("sft")
    assert stage_record(cfg, "sft") == {"seconds": 1}
    with pytest.raises(UserError, match="no finished compare"):
        paths.require("compare")
