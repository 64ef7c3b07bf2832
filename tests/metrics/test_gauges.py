"""The table of gauges knows every key of metrics.jsonl, and what reaches Ray."""

import ast
import json
import math
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.util import metrics

from rlhf_ray.metrics import gauges as module
from rlhf_ray.metrics.gauges import REPEAT_S, RUN, STAGE, SUPERVISED, TABLE, UNITS, Gauges, series, unknown
from rlhf_ray.metrics.recorder import Listeners, Recorder

ROOT = Path(__file__).parents[2]
ROLES = ("policy", "critic", "generator", "reward", "judge", "trainer", "actor", "supervised")
# Where the keys of an iteration are written down.
MAKERS = {
    "train/ppo.py": ["run_step"], "train/scoring.py": ["finish"], "train/measures.py": ["measures"],
    "core/experience.py": ["assess"],
    "actors/policy.py": ["prepare", "update"], "actors/learners.py": ["update"],
}
SUPERVISED_MAKERS = {"actors/supervised.py": ["train", "_summed"], "train/supervised.py": ["learn"]}
NOT_OF_AN_ITERATION = {"iteration", "running"}  # the recorder adds them
IN_WORDS = {"policy_fault", "critic_fault"}  # of steps that were dropped, which are counted

VALUES = {
    "iteration": 3, "score": np.float32(0.5), "score_2": 0.25, "judge_score": None, "entropy": math.nan,
    "value_loss": math.inf, "seconds": {"rollout": 1.5, "update": None}, "reward_seconds": {"reward_2": 0.5},
    "memory_gib": {"policy-0": 1.0, "reward_2-11": 2.0}, "restarts": {"reward_2": 0}, "not in the table": 1.0,
}


def written_keys(of: dict[str, list[str]]) -> set[str]:
    """String keys of the dicts that these build; a number put into a key is #."""
    nodes = []
    for file, names in of.items():
        tree = ast.parse((ROOT / "rlhf_ray" / file).read_text(encoding="utf-8"))
        makers = [f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) and f.name in names]
        assert {f.name for f in makers} == set(names)
        for node in (node for f in makers for node in ast.walk(f)):
            if isinstance(node, ast.Dict):
                nodes += node.keys
            elif isinstance(node, ast.DictComp):
                nodes.append(node.key)
            elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store) \
                    and isinstance(node.value, ast.Name):
                nodes.append(node.slice)
    keys = {str(node.value) for node in nodes if isinstance(node, ast.Constant)}
    return keys | {"".join(part.value if isinstance(part, ast.Constant) else "#" for part in node.values)
                   for node in nodes if isinstance(node, ast.JoinedStr)}


def test_the_table_knows_every_key_and_no_other() -> None:
    assert written_keys(MAKERS) - IN_WORDS | NOT_OF_AN_ITERATION == set(TABLE)
    assert set(SUPERVISED) <= written_keys(SUPERVISED_MAKERS) | {"running"}


@pytest.mark.parametrize("file", sorted((ROOT / "tests/golden").glob("*.json")), ids=lambda file: file.stem)
def test_golden_runs_have_no_unknown_key(file: Path) -> None:
    rows = json.loads(file.read_text())
    assert rows and not set().union(*(unknown(row) for row in rows))


def test_names_are_role_what_unit_and_those_of_one_number_only() -> None:
    for measure in (*TABLE.values(), *SUPERVISED.values()):
        assert re.fullmatch(rf"rlhf_({'|'.join(ROLES)})_[a-z_]+", measure.name)
        assert measure.unit in UNITS and measure.name != f"rlhf_{measure.unit}"
        assert not measure.name.endswith(("_total", "_count", "_sum", "_bucket"))  # Prometheus keeps these for others
        assert measure.help.endswith(".") and RUN not in measure.labels
    names = [measure.name for table in (TABLE, SUPERVISED) for measure in table.values()]
    assert len(set(names)) == len(names)
    assert all(measure.labels == (STAGE,) for measure in SUPERVISED.values())


def test_nested_numbers_become_labelled_series_and_what_is_no_number_is_skipped() -> None:
    assert [(m.name, labels, number) for m, labels, number in series(VALUES)] == [
        ("rlhf_trainer_iteration_number", {}, 3.0),
        ("rlhf_reward_score_points", {}, 0.5),
        ("rlhf_reward_source_score_points", {"source": "2"}, 0.25),
        ("rlhf_trainer_phase_seconds", {"phase": "rollout"}, 1.5),
        ("rlhf_reward_working_seconds", {"role": "reward_2"}, 0.5),
        ("rlhf_actor_memory_gib", {"role": "policy", "rank": "0"}, 1.0),
        ("rlhf_actor_memory_gib", {"role": "reward_2", "rank": "11"}, 2.0),
        ("rlhf_trainer_restarted_actors", {"role": "reward_2"}, 0.0),
    ]
    assert unknown(VALUES) == {"not in the table"}


class FakeGauge:
    """Ray's Gauge as far as it is used: refuses what Ray refuses, and remembers the last number of each series."""

    made: dict[str, "FakeGauge"]

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        assert name not in self.made
        self.made[name] = self
        self.tag_keys, self.numbers = tag_keys, dict[tuple[str, ...], float]()

    def set(self, value: Any, tags: dict[str, str]) -> None:
        assert type(value) is float and tuple(tags) == self.tag_keys and all(type(tag) is str for tag in tags.values())
        self.numbers[tuple(tags.values())] = value


@pytest.fixture
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeGauge]:
    FakeGauge.made = {}
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(metrics, "Gauge", FakeGauge)
    return FakeGauge.made


def test_each_gauge_is_made_once_and_keeps_what_is_not_measured(fake_ray: dict[str, FakeGauge]) -> None:
    gauges = Gauges("mine", "ppo")
    gauges.set(VALUES)
    gauges.set({"iteration": 4, "score": None, "seconds": {"update": 2}})
    gauges.close()
    assert fake_ray["rlhf_trainer_iteration_number"].numbers == {("mine",): 4.0}
    assert fake_ray["rlhf_reward_score_points"].numbers == {("mine",): 0.5}
    assert fake_ray["rlhf_trainer_phase_seconds"].numbers == {("mine", "rollout"): 1.5, ("mine", "update"): 2.0}
    assert fake_ray["rlhf_actor_memory_gib"].numbers == {("mine", "policy", "0"): 1.0, ("mine", "reward_2", "11"): 2.0}
    assert len(fake_ray) == 7


def test_every_number_is_said_again_until_the_end(fake_ray: dict[str, FakeGauge],
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """But not of an actor that is gone. In half of the time after which Ray sends what was said, at most."""
    assert ray._config.metrics_report_interval_ms() / 1000 > 2 * REPEAT_S
    monkeypatch.setattr(module, "REPEAT_S", 0.01)
    gauges = Gauges("mine", "ppo")
    gauges.set({"iteration": 3, "memory_gib": {"policy-0": 1.0, "generator-1": 2.0}})
    gauges.set({"score": 0.5, "memory_gib": {"policy-0": 1.5}})
    for gauge in fake_ray.values():
        gauge.numbers.clear()
    end = time.monotonic() + 10
    while not all(gauge.numbers for gauge in fake_ray.values()):
        assert time.monotonic() < end
        time.sleep(0.01)
    gauges.close()
    assert {name: gauge.numbers for name, gauge in fake_ray.items()} == {
        "rlhf_trainer_iteration_number": {("mine",): 3.0}, "rlhf_reward_score_points": {("mine",): 0.5},
        "rlhf_actor_memory_gib": {("mine", "policy", "0"): 1.5}}
    assert not gauges._repeating.is_alive()


def test_nothing_happens_without_ray(fake_ray: dict[str, FakeGauge], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    gauges = Gauges("mine", "ppo")
    gauges.set(VALUES)
    gauges.close()
    assert not fake_ray


@pytest.mark.parametrize("done", [0, 12])
def test_a_run_is_seen_before_its_first_iteration_and_says_when_it_ends(
    done: int, fake_ray: dict[str, FakeGauge], tmp_path: Path
) -> None:
    """From the start, or gone on with after iteration 12."""
    with Recorder(tmp_path / "mine" / "ppo", "disabled", "project", {}, done) as recorder:
        assert {name: gauge.numbers for name, gauge in fake_ray.items()} == {
            "rlhf_trainer_running_stages": {("mine",): 1.0}, "rlhf_trainer_iteration_number": {("mine",): float(done)}}
        recorder.log(done + 1, {"score": 0.5})
    assert fake_ray["rlhf_trainer_iteration_number"].numbers == {("mine",): done + 1.0}
    assert fake_ray["rlhf_trainer_running_stages"].numbers == {("mine",): 0.0}


@pytest.mark.parametrize(("stage", "values", "more"), [
    ("sft", {"correct": 0.0, "pairs": 0.0}, {}),
    ("rm", {"accuracy": 0.75}, {"rlhf_supervised_accuracy_ratio": 0.75}),
])
def test_a_supervised_stage_is_a_label(stage: str, values: dict[str, float], more: dict[str, float],
                                       fake_ray: dict[str, FakeGauge], tmp_path: Path) -> None:
    """Of what a step reports; its `seconds`, since the start, are no phases of an iteration."""
    heard = Listeners(tmp_path / "a/seed=1" / stage, "step", "disabled", "project", {}, 7, 10)
    heard.log(8, {"loss": 2.5, "lr": 1e-4, "seconds": 9.0, "tokens_per_second": 40.0, **values})
    assert {name: gauge.numbers for name, gauge in fake_ray.items()} == {
        name: {("a/seed=1", stage): number} for name, number in {
            "rlhf_supervised_running_stages": 1.0, "rlhf_supervised_step_number": 8.0,
            "rlhf_supervised_loss_nats": 2.5, "rlhf_supervised_learning_rate": 1e-4,
            "rlhf_supervised_tokens_per_second": 40.0, **more}.items()}
    heard.close()
    assert fake_ray["rlhf_supervised_running_stages"].numbers == {("a/seed=1", stage): 0.0}
