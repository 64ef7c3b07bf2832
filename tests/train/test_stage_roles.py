"""Which roles a stage starts: a job's resources are checked before it is sent, so both must agree."""

import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_ray.config.load import compose
from rlhf_ray.core.algorithms.registry import ALGORITHMS
from rlhf_ray.data.sources import ReviewData, load_task_data
from rlhf_ray.train.stage_roles import layout_of, roles_of


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_critic_is_there_where_the_algorithm_has_one(name: str) -> None:
    assert ("critic" in roles_of(compose([f"algorithm={name}"]), "ppo")) == ALGORITHMS[name].critic


@pytest.mark.parametrize("source", ["reviews", "reasoning", "files"])
def test_the_judge_is_there_where_the_data_have_one(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReviewData, "_classifiers", ("labeler", "judge"))  # which take a while to fit
    cfg = compose([f"data.source={source}"])
    assert ("judge" in roles_of(cfg, "ppo")) == (load_task_data(cfg.data).judge() is not None)


def test_roles_of_every_stage() -> None:
    cfg = compose(["reward.sources=[model,'a:b','http://c']"])
    assert roles_of(cfg, "ppo") == ["policy", "critic", "generator", "reward", "reward_2", "reward_3", "reference",
                                    "judge"]
    assert all(roles_of(cfg, stage) == ["supervised"] for stage in ("pretrain", "sft", "rm", "dpo"))
    assert roles_of(cfg, "compare") == ["generator"]
    assert roles_of(compose(["compare.ranker=file"]), "compare") == []
    assert roles_of(cfg, "eval") == ["generator", "reference", "reward"]
    assert roles_of(compose(["stages=[sft,ppo,eval]"]), "eval") == ["generator", "reference"]
    for stage in ("sft", "compare", "ppo", "eval"):
        assert layout_of(cfg, roles_of(cfg, stage)).bundles


def test_nothing_heavy_is_imported() -> None:
    code = ("import sys, rlhf_ray.stages.submit; heavy = {'torch', 'vllm', 'transformers', 'deepspeed', 'sklearn'}; "
            "assert not heavy & set(sys.modules), heavy & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)
