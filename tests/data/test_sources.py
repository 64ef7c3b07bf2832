"""From configuration to data, and what is found to be missing before anything starts."""

from pathlib import Path

import pytest

from rlhf_ray.config.schema import STAGES, DataConfig
from rlhf_ray.data.sources import check_paths, load_task_data
from rlhf_ray.errors import UserError


def test_a_path_that_a_stage_needs_is_asked_for() -> None:
    with pytest.raises(UserError, match=r"data\.demonstrations is not set, and sft needs it"):
        check_paths(DataConfig(), "sft")
    with pytest.raises(UserError, match=r"data\.ppo_prompts is not set"):
        load_task_data(DataConfig()).ppo_prompts()


def test_a_file_that_is_not_there_is_named_by_the_stage_that_reads_it() -> None:
    cfg = DataConfig(demonstrations="hf://some/data", comparisons="nowhere.jsonl")
    check_paths(cfg, "sft")
    with pytest.raises(UserError, match=r"data\.comparisons=nowhere\.jsonl: no such file"):
        check_paths(cfg, "compare")


@pytest.mark.parametrize("stage", STAGES)
def test_the_embedded_reviews_need_no_paths(stage: str) -> None:
    check_paths(DataConfig(source="reviews"), stage)


def test_the_fingerprint_follows_the_files_and_the_keys(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n')
    cfg = DataConfig(ppo_prompts=str(path))
    before = load_task_data(cfg).fingerprint()
    assert load_task_data(cfg).fingerprint() == before
    assert load_task_data(DataConfig(ppo_prompts=str(path), template="none")).fingerprint() != before
    path.write_text('{"prompt": "ab"}\n')
    assert load_task_data(cfg).fingerprint() != before


def test_there_is_no_labeler_or_judge_for_unknown_data() -> None:
    data = load_task_data(DataConfig())
    assert data.judge() is None
    with pytest.raises(UserError, match=r"set compare\.ranker=file"):
        data.labeler(1.0)
