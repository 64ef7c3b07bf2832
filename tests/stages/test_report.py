"""What of a run's records becomes its report."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config.schema import Config
from rlhf_ray.evaluation.schema import validate_report
from rlhf_ray.stages.report import build, publish

ACTOR = {"role": "generator", "name": "generator-0", "actor_class": "Generator", "node": "n", "pid": 7}
ACCURACY = {"val_accuracy": 0.7, "ci95": [0.6, 0.8], "val_loss": 0.6, "val_pairs": 9, "val_prompts": 3, "data": "x"}
LABELER = {"held_out_accuracy": 0.8, "self_agreement": 0.7, "noise_ceiling": 0.8}


def run_of(directory: Path, policy: str, stages: list[str], rm: bool, **evaluated: Any) -> Config:
    """A run's directory with records as its stages leave them."""
    def each(x: float) -> dict[str, float]:
        return {"base": x, "sft": x, policy: x}

    win = {"wins": 1, "ties": 1, "losses": 0, "rate": 0.75, "ci95": [0.2, 0.9], "n": 2}
    records: dict[str, dict] = {name: {} for name in stages} | {
        "rm": ACCURACY | {"score_shift": 0.5}, "dpo": ACCURACY, "compare": {"labeler": LABELER},
        "eval": {
            "policy": policy, "judge": {"held_out_accuracy": None, "is": "somebody"},
            "win_rate": {f"{policy}_vs_{name}": win for name in ("base", "sft")}, "judge_score": each(1.0),
            "rm_score": each(0.5) if rm else None, "distinct_2": each(0.6), "held_out_loss": each(4.0),
            "mean_length": each(9.0), "kl_per_sequence": 2.0, "samples": [], "actors": [ACTOR], **evaluated,
        }}
    for i, name in enumerate(stages):
        (directory / name).mkdir(parents=True)
        (directory / name / "stage.json").write_text(
            json.dumps(records[name] | {"seconds": i + 1.0, "peak_rss_gib": 1.0}))
    cfg = Config(output_dir=str(directory), stages=stages)
    cfg.eval.policy = policy
    return cfg


def test_a_dpo_run_has_neither_reward_model_nor_algorithm_of_reinforcement_learning(tmp_path: Path) -> None:
    """ppo and rm were run in the same directory, for another report: they are no part of this one."""
    cfg = run_of(tmp_path, "dpo", ["sft", "compare", "rm", "ppo", "dpo", "eval"], rm=False)
    (tmp_path / "dpo" / "metrics.jsonl").write_text('{"step": 1, "loss": 0.7, "accuracy": 0.5, "seconds": 0.1}\n')
    report = build(cfg)
    validate_report(report, policy="dpo")
    assert list(report["stages"]) == ["sft", "compare", "dpo", "eval"]
    assert report["total_seconds"] == 1 + 2 + 5 + 6
    assert (report["policy"], report["algorithm"]) == ("dpo", "dpo")
    assert report["rm"] is None and report["rm_score"] is None and "accuracy" not in report
    assert report["dpo"] == {k: ACCURACY[k] for k in ("val_accuracy", "ci95", "val_loss", "val_pairs", "val_prompts")}
    assert report["labeler"] == LABELER
    publish(cfg)
    assert "DPO preferred over SFT" in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "report.json").read_text())["win_rate"].keys() == {"dpo_vs_base", "dpo_vs_sft"}


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_the_policy_keeps_the_stages_name_whatever_the_algorithm(algorithm: str, tmp_path: Path) -> None:
    cfg = run_of(tmp_path, "ppo", ["sft", "compare", "rm", "ppo", "eval"], rm=True)
    cfg.algorithm.name = algorithm
    report = build(cfg)
    validate_report(report)
    assert (report["policy"], report["algorithm"]) == ("ppo", algorithm)
    assert report["rm"]["score_shift"] == 0.5 and "dpo" not in report
    assert report["win_rate"].keys() == {"ppo_vs_base", "ppo_vs_sft"}


def test_a_verifiable_task_has_right_answers_and_no_labeler(tmp_path: Path) -> None:
    share = {"right": 1, "n": 2, "rate": 0.5, "ci95": [0.1, 0.9]}
    gain = {"gained": 0, "lost": 0, "n": 2, "difference": 0.0, "ci95": [-0.5, 0.5]}
    accuracy = {"base": share, "sft": share, "ppo": share, "ppo_minus_sft": gain}
    report = build(run_of(tmp_path, "ppo", ["sft", "ppo", "eval"], rm=False, accuracy=accuracy), 60.0)
    validate_report(report)
    assert report["accuracy"] == accuracy
    assert report["labeler"] is None and report["rm"] is None
    assert report["total_seconds"] == 60
