"""A reward function in a real Ray actor: found in the driver's directory; its errors are one line at the console."""

import json
from pathlib import Path

import numpy as np
import pytest
import ray

from end_to_end.small import ppo_run, small_config
from rlhf_ray import cli
from rlhf_ray.actors.rewards import RewardFunction
from rlhf_ray.cluster.cast import Cast
from rlhf_ray.config.load import asset_dir
from rlhf_ray.config.schema import RewardConfig
from rlhf_ray.core.layout import RoleRequest, plan_layout
from rlhf_ray.core.types import PromptTexts, RolloutBatch
from rlhf_ray.errors import UserError

CODE = """
class Unloadable(Exception):
    def __init__(self, a, b):  # cannot be unpickled anywhere
        super().__init__(f"no {a}\\nbut {b}")
def score(prompts, responses, metadata):
    if metadata[0]:
        return [metadata[0]["score"], len(prompts[0])]
    raise Unloadable(1, 2)
"""
PROMPTS = PromptTexts(("Zero", "One"), ("", '{"score": 0.5}'))


def rollout(prompt: int) -> RolloutBatch:
    """Two rollouts of one prompt, with a response of one token each."""
    two = np.full(2, 2)
    return RolloutBatch(
        ids=np.array([0, 300, 0, 301], dtype=np.int32), lengths=two.astype(np.int32),
        prompt_lengths=np.ones(2, dtype=np.int32), sampled_logprobs=np.zeros(4, dtype=np.float32),
        truncated=two == 0, prompt_index=np.full(2, prompt), positions=np.arange(2), seeds=two, version=1,
    )


def test_a_function_of_the_drivers_directory_scores_and_its_error_is_one_line(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rewards.py").write_text(CODE)
    cfg, reward = small_config(), RewardConfig(retries=0)
    layout = plan_layout({"reward": RoleRequest(1, 1.0, 0.0)}, "separate")

    def setup(source: str) -> tuple[object, ...]:
        return source, asset_dir("reviews_base"), ray.put(PROMPTS), reward, str(tmp_path)

    def printed(command: object) -> str:
        """What stderr shows when a stage ends as `command` does."""
        monkeypatch.setattr(cli, "_command", command)
        assert cli.main([]) == 2
        return capsys.readouterr().err

    with Cast(layout, cfg.cluster) as cast:
        group = cast.start(RewardFunction, "reward", [setup("rewards:score")], 1)
        cast.ready()
        assert group.ask(RewardFunction.scores, rollout(1)).tolist() == [0.5, 3.0]
        assert printed(lambda _: group.ask(RewardFunction.scores, rollout(0))) == (
            "rlhf-ray: error: reward.sources=rewards:score: raised Unloadable: no 1 but 2 (rewards.py:8); mend the "
            "function\n")
        stats = group.ask(RewardFunction.stats)
        assert (stats["calls"], stats["retries"]) == (2, 0)
    with Cast(layout, cfg.cluster) as cast:
        cast.start(RewardFunction, "reward", [setup("rewards:scor")], 1)
        assert printed(lambda _: cast.ready()) == (
            f"rlhf-ray: error: reward.sources=rewards:scor: no function scor in {tmp_path}/rewards.py: it is not "
            "there; did you mean score?\n")


FAILS_LATER = """
calls = 0

def score(prompts, responses, metadata):
    global calls
    calls += 1
    if calls > 6:  # an iteration is six shards
        {fault}
    return [float(len(r)) for r in responses]
"""


@pytest.mark.parametrize(("fault", "says"), [
    ("raise KeyError('gold')", r"reward.sources=broken:score: raised KeyError: 'gold'"),
])
def test_a_source_that_fails_stops_the_run_with_no_iteration_half_applied(
    ray_session, models, reward_model, tmp_path, monkeypatch, fault, says,
):
    """In iteration 2 the function breaks: one line is recorded, and nothing is saved as if the run had ended well."""
    (tmp_path / "broken.py").write_text(FAILS_LATER.format(fault=fault))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=says):
        ppo_run(tmp_path / "run", models[0], reward_model, "rloo", ["broken:score"])
    directory = tmp_path / "run/ppo"
    assert [json.loads(line)["iteration"] for line in (directory / "metrics.jsonl").read_text().splitlines()] == [1]
    assert not (directory / "model").exists() and not (directory / "stage.json").exists()


def test_a_weighted_sum_of_a_model_and_a_function_is_what_is_learnt_from(
    ray_session, models, reward_model, tmp_path, monkeypatch,
):
    """score = 1 * model + 1 * letters, each logged and timed."""
    (tmp_path / "letters.py").write_text("def count(p, r, m):\n    return [len(x) / 10 for x in r]\n")
    monkeypatch.chdir(tmp_path)
    rows = ppo_run(tmp_path / "run", models[0], reward_model, "rloo", ["model", "letters:count"])
    for row in rows:
        assert row["score"] == pytest.approx(row["score_1"] + row["score_2"])
        assert set(row["reward_seconds"]) == {"reward", "reward_2"} and row["reward_retries"] == 0
    assert rows[0]["score_2"] > 0
