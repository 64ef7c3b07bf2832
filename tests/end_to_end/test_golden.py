"""Golden trajectories: twenty iterations of every algorithm, and everything that must not change them.

tests/golden/NAME.json holds score, KL, losses and gradient norms of each iteration. Variants of one run (two ranks,
small micro-batches, two generators) must follow the same trajectory. That the same seed twice is the same run, bit for
bit, is what test_resume.py and test_recovery.py rest on. A change that moves a trajectory on purpose rewrites the
files, in the same commit, with its reason: `GOLDEN=write pytest tests/end_to_end/test_golden.py`.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from end_to_end.small import ITERATIONS, ppo_run
from rlhf_ray.train.ppo import PPOTrainer

GOLDEN = Path(__file__).parents[1] / "golden"
KEYS = ("score", "kl_per_sequence", "policy_loss", "value_loss", "ptx_loss", "kl_loss", "policy_grad_norm",
        "critic_grad_norm", "entropy", "response_length")
# Other machines multiply matrices in another order; a wrong mask or factor moves these numbers by far more.
TOLERANCE = {"rel": 5e-3, "abs": 2e-3}


def numbers(rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    return [{key: row[key] for key in KEYS if key in row} for row in rows]


def assert_same(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert len(found) == len(expected) == ITERATIONS
    for i, (a, b) in enumerate(zip(found, expected, strict=True), start=1):
        assert a == pytest.approx(b, **TOLERANCE), f"iteration {i}"


@pytest.mark.parametrize(("algorithm", "variants"), [
    ("ppo_ptx", [{"policy_ranks": 2, "critic_ranks": 2, "generator_replicas": 2},
                 {"policy_micro_batch_tokens": 64, "critic_micro_batch_tokens": 64}]),
    ("grpo", []), ("dr_grpo", []), ("rloo", []), ("reinforce_pp", []),
])
def test_trajectory(ray_session, models, reward_model, tmp_path, algorithm, variants):
    file = GOLDEN / f"{algorithm}.json"
    found = numbers(ppo_run(tmp_path / "plain", models[0], reward_model, algorithm))
    if os.environ.get("GOLDEN") == "write":
        file.parent.mkdir(exist_ok=True)
        file.write_text("[\n" + ",\n".join(json.dumps(row) for row in found) + "\n]\n")
    assert_same(found, json.loads(file.read_text()))
    assert found[-1]["score"] != pytest.approx(found[0]["score"], rel=0.05)  # something is learnt
    for i, change in enumerate(variants):
        assert_same(numbers(ppo_run(tmp_path / str(i), models[0], reward_model, algorithm, **change)), found)


def test_one_update_per_batch_needs_no_pass_for_the_old_logprobs(ray_session, models, reward_model, tmp_path,
                                                                monkeypatch):
    """They are those that the update computes anyway: the same run, with that pass and without it."""
    runs = []
    for name in ("without", "with"):
        if name == "with":
            monkeypatch.setattr(PPOTrainer, "on_policy", False)
        runs.append(numbers(ppo_run(tmp_path / name, models[0], reward_model, "grpo", minibatch_size=16)))
    assert_same(*runs)


def test_the_engines_word_for_the_old_logprobs_is_as_good(ray_session, models, reward_model, tmp_path):
    """The KL penalty in the reward asks for them before the update: the engine knows them too."""
    assert_same(*(numbers(ppo_run(tmp_path / who, models[0], reward_model, "rloo", minibatch_size=16,
                                  old_logprobs=who)) for who in ("engine", "learner")))
