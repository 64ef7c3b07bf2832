"""schedule=one_step_off on the real stack: what is sampled by which weights, and what a fault changes of it."""

from pathlib import Path
from typing import Any

from chaos.harness import Fault, chaos, outcome
from end_to_end.small import earlier_stages, ppo_config
from rlhf_ray.config.schema import Config
from rlhf_ray.stages import ppo


def config(directory: Path, start: str, reward: str) -> Config:
    cfg = ppo_config(directory, start, "ppo")
    cfg.ppo.schedule, cfg.algorithm.importance_cap = "one_step_off", 2.0
    cfg.ppo.iterations, cfg.checkpoint.iterations = 8, 4
    cfg.cluster.heartbeat_s, cfg.cluster.heartbeat_timeout_s = 0.5, 6.0
    earlier_stages(directory, start, reward)
    return cfg


def column(rows: list[dict[str, Any]], key: str) -> list[Any]:
    return [row[key] for row in rows]


def test_batches_are_one_step_old_and_a_learner_may_die(ray_session, models, reward_model, tmp_path):
    """Behind a checkpoint nothing is on its way, so that the run which goes back to it is the same, to the last bit:
    no prompt twice, none left out. One that loses a generator goes on with newer samples."""
    runs = [config(tmp_path / name, models[0], reward_model) for name in ("plain", "learner", "generator")]
    ppo.run(runs[0])
    weights, rows = outcome(runs[0])
    assert column(rows, "staleness") == [0, 1, 1, 1, 0, 1, 1, 1]
    assert all(row["mismatch"] > 1e-4 for row in rows if row["staleness"])  # those of older weights
    assert all(row["mismatch"] < 1e-5 for row in rows if not row["staleness"])
    assert all(0.5 < row["importance_ess"] <= 1 for row in rows)
    with chaos([Fault(7, "update", "policy", delay=0.02)]) as script:
        ppo.run(runs[1])
    assert script.struck and outcome(runs[1]) == (weights, rows)
    with chaos([Fault(3, "score", "generator")]) as script:
        ppo.run(runs[2])
    again = outcome(runs[2])[1]
    assert script.struck and column(again, "iteration") == list(range(1, 9))
    assert column(again, "staleness") == [0, 1, 1, 0, 0, 1, 1, 1]
    assert again[:3] == rows[:3] and again[3]["score"] != rows[3]["score"]
