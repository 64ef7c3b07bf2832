"""Every recipe in conf/ composes, and validates once its ??? are given."""

import re
from functools import reduce
from typing import Any

import pytest

from rlhf_ray.config.checks import validate
from rlhf_ray.config.load import compose, conf_dir, groups
from rlhf_ray.config.schema import Config
from rlhf_ray.stages.doctor import wanted_gpus

RECIPES = groups()["experiment"]
PATHS = [f"data.{name}={name}.jsonl" for name in
         ("demonstrations", "comparisons", "ppo_prompts", "eval_prompts", "texts", "eval_texts")]
GIVEN = {"quickstart": [], "reasoning": [], "reviews_base": [], "hf_8gpu": PATHS,
         "instructgpt": ["model.path=Org/Name", *PATHS]}

# Ouyang et al. 2022, appendix C (1.3B and 6B).
PUBLISHED = {
    "model.max_length": 2048, "data.max_prompt_tokens": 1024, "rollout.max_response_tokens": 1024,
    "sft.epochs": 16, "sft.batch_size": 32, "sft.dropout": 0.2, "sft.optimizer.lr": 9.65e-6,
    "sft.optimizer.schedule": "cosine", "sft.optimizer.min_lr_ratio": 0.1, "sft.optimizer.warmup_ratio": 0.0,
    "rm.epochs": 1, "rm.prompts_per_batch": 64, "rm.optimizer.lr": 9e-6, "rm.optimizer.schedule": "cosine",
    "rm.optimizer.min_lr_ratio": 0.1,
    "rollout.batch_size": 512, "rollout.samples_per_prompt": 1, "rollout.temperature": 1.0,
    "algorithm.minibatch_size": 64, "algorithm.ppo_epochs": 1, "algorithm.clip_ratio": 0.2, "algorithm.kl_coef": 0.02,
    "algorithm.gamma": 1.0, "algorithm.ptx": True, "algorithm.ptx_coef": 27.8, "algorithm.ema_decay": 0.992,
    "ppo.policy_optimizer.schedule": "constant", "ppo.critic_optimizer.schedule": "constant",
    "ppo.critic_optimizer.lr": 9e-6,
    **{f"{section}.{beta}": value for section in ("sft.optimizer", "rm.optimizer", "ppo.policy_optimizer",
       "ppo.critic_optimizer") for beta, value in (("beta1", 0.9), ("beta2", 0.95))},
}


def get(cfg: Config, key: str) -> Any:
    return reduce(getattr, key.split("."), cfg)


def test_there_are_recipes() -> None:
    assert set(GIVEN) == set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_validates(recipe: str) -> None:
    cfg = compose([f"experiment={recipe}", *GIVEN[recipe]])
    validate(cfg, "pipeline")
    for stage in (*cfg.stages, "doctor"):
        validate(cfg, stage)


def test_the_default_is_the_quickstart() -> None:
    assert compose([]) == compose(["experiment=quickstart"])
    cfg = compose([])
    assert cfg.roles.policy.ranks == cfg.roles.supervised.ranks == 2
    assert wanted_gpus(cfg.roles) == 0
    assert "pretrain" not in cfg.stages


def test_the_base_of_the_quickstart_is_made_from_scratch_on_the_cpu() -> None:
    """By the stage pretrain alone, on the split that the quickstart holds its reviews out by."""
    cfg, user = compose(["experiment=reviews_base"]), compose([])
    assert cfg.stages == ["pretrain"]
    assert cfg.pretrain.init == "scratch"
    assert wanted_gpus(cfg.roles) == 0
    assert (cfg.data.source, cfg.data.split_seed) == (user.data.source, user.data.split_seed)
    assert cfg.model.max_length >= user.model.max_length


@pytest.mark.parametrize(("recipe", "gpus"), [("hf_8gpu", 8), ("instructgpt", 16)])
def test_gpus(recipe: str, gpus: int) -> None:
    roles = compose([f"experiment={recipe}"]).roles
    assert wanted_gpus(roles) == gpus
    assert roles.supervised.ranks * roles.supervised.gpus == gpus
    roles.supervised.ranks = 1
    assert wanted_gpus(roles) == gpus  # PPO alone fills the node too


@pytest.mark.parametrize("key", PUBLISHED)
def test_instructgpt_is_as_published(key: str) -> None:
    assert get(compose(["experiment=instructgpt"]), key) == PUBLISHED[key]


def test_instructgpt_derived_values() -> None:
    cfg = compose(["experiment=instructgpt"])
    assert cfg.ppo.iterations * cfg.rollout.batch_size == 256_000  # episodes
    assert cfg.algorithm.ptx_blocks == 8 * cfg.algorithm.minibatch_size  # 8 pre-training examples per episode
    assert cfg.ppo.policy_optimizer.warmup_ratio * cfg.ppo.iterations == 10


def test_instructgpt_names_the_source_of_each_value() -> None:
    """Each line of a hyper-parameter section says where its value is from, or that it is our choice."""
    text = (conf_dir() / "experiment" / "instructgpt.yaml").read_text(encoding="utf-8")
    for section in ("sft", "compare", "rm", "rollout", "algorithm", "ppo"):
        body = re.search(rf"^{section}:.*\n((?:  .*\n|\n)+)", text, re.MULTILINE)
        assert body is not None
        for line in body[1].splitlines():
            if line.strip() and not line.rstrip().endswith(":"):
                assert re.search(r"# .*(\bC\b|C\.\d|section \d|not published)", line), line
