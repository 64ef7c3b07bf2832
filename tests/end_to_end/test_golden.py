"""Golden trajectories: twenty iterations of every algorithm, and everything that must not change them.

tests/golden/NAME.json holds score, KL, losses and gradient norms of each iteration. Variants of one run (two ranks,
small micro-batches, two generators) must follow the same trajectory; the same seed twice must be the same run, bit for
bit. A change that moves a trajectory on purpose rewrites the files, in the same commit, with its reason:
`GOLDEN=write pytest tests/end_to_end/test_golden.py`.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from end_to_end.small import TEXTS, WORDS, small_config
from rlhf_ray.config.load import compose
from rlhf_ray.config.schema import Config
from rlhf_ray.stages import ppo

GOLDEN = Path(__file__).parents[1] / "golden"
ITERATIONS = 20
KEYS = ("score", "kl_per_sequence", "policy_loss", "value_loss", "ptx_loss", "kl_loss", "policy_grad_norm",
        "critic_grad_norm", "entropy", "response_length")
# Other machines multiply matrices in another order; a wrong mask or factor moves these numbers by far more.
TOLERANCE = {"rel": 5e-3, "abs": 2e-3}


def trajectory(directory: Path, start: str, reward: str, algorithm: str, **change: int) -> list[dict[str, Any]]:
    """metrics.jsonl of a run of the ppo stage."""
    cfg = config(directory, start, algorithm)
    for key, value in change.items():
        section, name = key.split("_", 1)
        setattr(getattr(cfg.roles, section), name, value)
    for stage, model in (("sft", start), ("rm", reward)):
        (directory / stage).mkdir(parents=True)
        (directory / stage / "model").symlink_to(model)
        (directory / stage / "stage.json").write_text("{}")
    ppo.run(cfg)
    return [json.loads(line) for line in (directory / "ppo/metrics.jsonl").read_text().splitlines()]


def config(directory: Path, start: str, algorithm: str) -> Config:
    chosen = compose(["experiment=null", f"algorithm={algorithm}"])
    cfg = small_config(start)
    cfg.output_dir, cfg.stages, cfg.algorithm, cfg.rollout = str(directory), ["ppo"], chosen.algorithm, chosen.rollout
    directory.mkdir(parents=True, exist_ok=True)
    prompts, texts = directory / "prompts.jsonl", directory / "texts.txt"
    prompts.write_text("".join(json.dumps({"prompt": f"tell of {a} and {b}"}) + "\n" for a in WORDS for b in WORDS[:3]))
    texts.write_text("\n\n".join(TEXTS))
    cfg.data.source, cfg.data.ppo_prompts, cfg.data.texts = "files", str(prompts), str(texts)
    cfg.rollout.batch_size, cfg.rollout.max_response_tokens, cfg.algorithm.minibatch_size = 16, 12, 8
    cfg.algorithm.kl_coef, cfg.algorithm.ptx_blocks, cfg.roles.generator.shard_size = 0.1, 2, 4
    cfg.ppo.iterations = ITERATIONS
    for optimizer in (cfg.ppo.policy_optimizer, cfg.ppo.critic_optimizer):
        optimizer.lr, optimizer.eps, optimizer.schedule = 1e-3, 1e-4, "constant"
    return cfg


def numbers(rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    return [{key: row[key] for key in KEYS if key in row} for row in rows]


def assert_same(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert len(found) == len(expected) == ITERATIONS
    for i, (a, b) in enumerate(zip(found, expected, strict=True), start=1):
        assert a == pytest.approx(b, **TOLERANCE), f"iteration {i}"


@pytest.mark.parametrize(("algorithm", "variants"), [
    ("ppo_ptx", [{"policy_ranks": 2, "critic_ranks": 2},
                 {"policy_micro_batch_tokens": 64, "critic_micro_batch_tokens": 64}, {"generator_replicas": 2}]),
    ("grpo", [{"policy_ranks": 2, "generator_replicas": 2}]),
    ("dr_grpo", []), ("rloo", []), ("reinforce_pp", []),
])
def test_trajectory(ray_session, models, reward_model, tmp_path, algorithm, variants):
    file = GOLDEN / f"{algorithm}.json"
    found = numbers(trajectory(tmp_path / "plain", models[0], reward_model, algorithm))
    if os.environ.get("GOLDEN") == "write":
        file.parent.mkdir(exist_ok=True)
        file.write_text("[\n" + ",\n".join(json.dumps(row) for row in found) + "\n]\n")
    assert_same(found, json.loads(file.read_text()))
    assert found[-1]["score"] != pytest.approx(found[0]["score"], rel=0.05)  # something is learnt
    for i, change in enumerate(variants):
        assert_same(numbers(trajectory(tmp_path / str(i), models[0], reward_model, algorithm, **change)), found)


def test_the_same_seed_twice_is_the_same_run(ray_session, models, reward_model, tmp_path):
    """Every number of every iteration, times aside, to the last bit; the saved weights too."""
    runs = [trajectory(tmp_path / name, models[0], reward_model, "ppo") for name in "ab"]
    for a, b in zip(*runs, strict=True):
        for clocked in ("seconds", "tokens_per_second", "reward_seconds"):
            a.pop(clocked), b.pop(clocked)
        assert a == b
    weights = [(tmp_path / name / "ppo/model/model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]
