"""What the driver of ppo knows besides its configuration, and writes into every checkpoint."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rlhf_ray.cluster.group import Group
from rlhf_ray.config.schema import CheckpointConfig, Config
from rlhf_ray.data.prompts import PromptStream
from rlhf_ray.metrics.recorder import Recorder
from rlhf_ray.train.checkpoint import Checkpoints, keys
from rlhf_ray.train.fleet import Fleet
from rlhf_ray.train.identity import identity_of
from rlhf_ray.train.manifest import FORMAT
from rlhf_ray.train.ppo import PPOTrainer
from rlhf_ray.train.supervised import START
from rlhf_ray.train.watch import Watch

# What a checkpoint of this format holds. Whoever changes it gives FORMAT another number, for other versions say by that
# number that they do not read it.
HELD = {3: {
    "ppo": {
        "step", "kl_coef", "seen_scores", "seen_scores.total", "seen_scores.squares", "seen_scores.count",
        "prompts", "prompts.count", "prompts.seed", "prompts.drawn", "ptx", "ptx.count", "ptx.seed", "ptx.drawn",
        "recorded", "recorded.metrics.jsonl", "recorded.samples.jsonl",
        "watch", "watch.position", "watch.monitor", "watch.monitor.first", "watch.monitor.last", "watch.monitor.rang",
        "fleet", "fleet.wanted"},
    "supervised": {"step", "last", "metrics"},
    "identity": {"stage", "config", "data", "models", "rewards", "versions"},
}}


def trainer(directory: Path, recorder: Recorder) -> PPOTrainer:
    """Its actors are not there: nothing is asked of them."""
    cfg = Config()
    nobody: Any = SimpleNamespace()
    policy, critic = (Group(role, [], 1.0) for role in ("policy", "critic"))
    return PPOTrainer(
        cfg, nobody, policy, critic, PromptStream(3, 0), PromptStream(2, 1), recorder,
        Watch(cfg.alarms, directory, lambda: None), Fleet(nobody, 2, directory),
        Checkpoints(directory / "checkpoints", CheckpointConfig(), {}))


def test_other_keys_are_a_format_of_their_own(tmp_path: Path) -> None:
    with Recorder(tmp_path, "disabled", "project", {}) as recorder:
        start = trainer(tmp_path, recorder).start
    assert HELD[FORMAT] == {"ppo": keys(start, start), "supervised": keys(START, START),
                            "identity": set(identity_of("ppo", Config(), "", {}, {}))}


def test_what_was_written_down_is_what_it_goes_on_from(tmp_path: Path) -> None:
    with Recorder(tmp_path, "disabled", "project", {}) as recorder:
        one, other = trainer(tmp_path, recorder), trainer(tmp_path, recorder)
        recorder.log(1, {"score": 0.5})
        one.step, one.kl_coef = 7, 0.1 + 0.2
        one.prompts.take(4)
        state = json.loads(json.dumps(one.state_dict()))
        recorder.log(2, {"score": 0.25})
        other.load_state_dict(state)
        assert other.state_dict() == one.boundary | state == other.boundary
        assert (other.step, other.version, other.kl_coef, other.prompts.drawn) == (7, 8, 0.1 + 0.2, 4)
        assert recorder.positions == state["recorded"]
