"""The report of a run, put together from what its stages left behind."""

from dataclasses import asdict
from typing import Any

from rlhf_ray import storage
from rlhf_ray.config.load import to_yaml
from rlhf_ray.config.schema import STAGES, Config
from rlhf_ray.data.sources import load_task_data
from rlhf_ray.evaluation.report import write_report
from rlhf_ray.evaluation.schema import validate_report
from rlhf_ray.metrics.recorder import read_history
from rlhf_ray.metrics.wandb_run import WandbRun
from rlhf_ray.stages.common import Paths, stage_record
from rlhf_ray.versions import installed

# What eval measured. `accuracy`: only where answers can be verified.
MEASURED = ("win_rate", "judge_score", "rm_score", "distinct_2", "held_out_loss", "mean_length", "kl_per_sequence",
            "accuracy")


def build(cfg: Config, total_seconds: float | None = None) -> dict[str, Any]:
    """The report as a dictionary. `total_seconds`: wall time of the pipeline; by default the sum of its stages."""
    policy = cfg.eval.policy
    other = "dpo" if policy == "ppo" else "ppo"  # if it was trained here too, it is no part of this report
    records = {name: r for name in STAGES if name != other and (r := stage_record(cfg, name))}
    evaluated = records["eval"]
    if evaluated["rm_score"] is None:  # no reward model of this run took part
        records.pop("rm", None)
    learnt = {name: {k: r[k] for k in ("val_accuracy", "ci95", "val_loss", "val_pairs", "val_prompts", "score_shift")
                     if k in r} for name, r in records.items() if name in ("rm", "dpo")}
    actors = [{"role": a["role"], "class": a["actor_class"], "node": a["node"], "pid": a["pid"], "stage": name}
              for name, r in records.items() for a in r.get("actors", [])]
    return {
        "total_seconds": total_seconds or sum(r["seconds"] for r in records.values()),
        "stages": {name: {"seconds": r["seconds"], "peak_rss_gib": r["peak_rss_gib"]} for name, r in records.items()},
        "peak_rss_gib": max(r["peak_rss_gib"] for r in records.values()),
        "judge": evaluated["judge"],
        "policy": policy,
        "algorithm": cfg.algorithm.name if policy == "ppo" else policy,
        "labeler": records.get("compare", {}).get("labeler"),
        "rm": learnt.get("rm"),
        **{k: evaluated[k] for k in MEASURED if k in evaluated},
        **({"dpo": learnt["dpo"]} if policy == "dpo" else {}),
        "actors": actors,
        "data": load_task_data(cfg.data).counts(),
        "versions": installed(),
        "seed": cfg.seed,
        "config": to_yaml(cfg),
    }


def publish(cfg: Config, total_seconds: float | None = None) -> None:
    """Write report.json and report.html into the run's directory."""
    paths = Paths(cfg)
    report, samples = build(cfg, total_seconds), (stage_record(cfg, "eval") or {}).get("samples", [])
    write_report(report, read_history(paths.stage(cfg.eval.policy)), samples, paths.root)
    for name in ("report.json", "report.html"):
        storage.publish(paths.root / name)
    validate_report(report, cfg.eval.baselines, cfg.eval.policy)


def log_report(cfg: Config) -> None:
    """The same for wandb, in the run that trained the policy."""
    if cfg.logging.wandb == "disabled":
        return
    paths, record = Paths(cfg), stage_record(cfg, "eval") or {}
    run = WandbRun(paths.stage(cfg.eval.policy), cfg.logging.wandb, cfg.logging.wandb_project, asdict(cfg), True, None)
    run.report(paths.root / "report.html", {key: record[key] for key in MEASURED if key in record})
    run.close()
    storage.publish(paths.stage(cfg.eval.policy), storage.of_driver)
