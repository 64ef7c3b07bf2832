"""The report of a run, put together from what its stages left behind."""

from typing import Any

from rlhf_ray.config.load import to_yaml
from rlhf_ray.config.schema import STAGES, Config
from rlhf_ray.data.sources import load_task_data
from rlhf_ray.evaluation.report import write_report
from rlhf_ray.evaluation.schema import validate_report
from rlhf_ray.metrics.recorder import read_history
from rlhf_ray.stages.common import Paths, stage_record
from rlhf_ray.versions import installed


def build(cfg: Config, total_seconds: float | None = None) -> dict[str, Any]:
    """The report as a dictionary. `total_seconds`: wall time of the pipeline; by default the sum of its stages."""
    records = {name: r for name in STAGES if (r := stage_record(cfg, name))}
    evaluated, compared, rm = records["eval"], records.get("compare", {}), records.get("rm", {})
    actors = [{"role": a["role"], "class": a["actor_class"], "node": a["node"], "pid": a["pid"], "stage": name}
              for name, r in records.items() for a in r.get("actors", [])]
    return {
        "total_seconds": total_seconds or sum(r["seconds"] for r in records.values()),
        "stages": {name: {"seconds": r["seconds"], "peak_rss_gib": r["peak_rss_gib"]} for name, r in records.items()},
        "peak_rss_gib": max(r["peak_rss_gib"] for r in records.values()),
        "judge": evaluated["judge"],
        "labeler": compared.get("labeler"),
        "rm": {k: rm[k] for k in ("val_accuracy", "ci95", "val_pairs", "val_prompts", "score_shift") if k in rm},
        **{k: evaluated[k] for k in ("win_rate", "judge_score", "rm_score", "distinct_2", "held_out_loss",
                                     "mean_length", "kl_per_sequence")},
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
    write_report(report, read_history(paths.stage("ppo")), samples, paths.root)
    validate_report(report, cfg.eval.baselines)
