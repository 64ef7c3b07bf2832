"""Writes rlhf.json, the Grafana dashboard: `python deploy/monitoring/dashboard.py`."""

import json
from pathlib import Path
from typing import Any

from rlhf_ray.metrics.gauges import PREFIX, RUN, TABLE, UNITS

# Title: keys of metrics.jsonl, all of one unit.
PANELS = {
    "Score": ["score", "reward"],
    "Judge": ["judge_score"],
    "KL from the reference": ["kl_per_sequence"],
    "Entropy": ["entropy"],
    "Response length": ["response_length"],
    "Shares of responses": ["truncated", "repeated_ngrams", "equal_groups"],
    "Policy loss": ["policy_loss"],
    "Value loss": ["value_loss"],
    "Pre-training and KL losses": ["ptx_loss", "kl_loss"],
    "Clipped": ["clip_fraction", "value_clip_fraction"],
    "Gradient norms": ["policy_grad_norm", "critic_grad_norm"],
    "Trainer against engine": ["mismatch"],
    "Tokens per second of the run": ["tokens_per_second"],
    "Tokens per second of each role": ["role_tokens_per_second"],
    "Calls waiting after the rollout": ["waiting_calls"],
    "Seconds of each phase": ["seconds"],
    "Seconds of reward sources": ["reward_seconds"],
    "Retried reward calls": ["reward_retries"],
    "Memory": ["memory_gib"],
    "Replaced actors": ["restarts"],
    "Iteration and weights": ["iteration", "weight_version"],
    "Weights of each engine": ["weight_versions"],
    "Weights behind": ["staleness"],
}
WIDTH, HEIGHT = 8, 7  # of Grafana's 24 columns; in its rows
SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def target(key: str) -> dict[str, Any]:
    """One gauge, for the chosen runs. A driver that went on is another process: `max` makes one line of them."""
    measure = TABLE[key]
    labels = (RUN, *measure.labels)
    what = measure.name.removeprefix("rlhf_").removesuffix(f"_{measure.unit}").replace("_", " ")
    return {
        "expr": f'max by ({", ".join(labels)}) ({PREFIX}{measure.name}{{{RUN}=~"$run"}})',
        "legendFormat": " ".join([*(f"{{{{{label}}}}}" for label in labels), *([] if measure.labels else [what])]),
        "refId": key,
    }


def panel(i: int, title: str, keys: list[str]) -> dict[str, Any]:
    unit = TABLE[keys[0]].unit
    return {
        "id": i + 1, "type": "timeseries", "title": title, "datasource": SOURCE,
        "description": "\n".join([*(TABLE[key].help for key in keys), f"Unit: {unit.replace('_', ' ')}."]),
        "gridPos": {"x": i * WIDTH % 24, "y": i * WIDTH // 24 * HEIGHT, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": UNITS[unit]}, "overrides": []},
        "targets": [target(key) for key in keys],
    }


def dashboard() -> dict[str, Any]:
    iterations = PREFIX + TABLE["iteration"].name
    return {
        "uid": "rlhf", "title": "RLHF", "schemaVersion": 39, "refresh": "10s", "timezone": "browser",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": [
            {"name": "datasource", "type": "datasource", "query": "prometheus"},
            {"name": "run", "type": "query", "datasource": SOURCE, "query": f"label_values({iterations}, {RUN})",
             "multi": True, "includeAll": True, "allValue": ".*", "refresh": 2,
             "current": {"text": "All", "value": "$__all"}},
        ]},
        "panels": [panel(i, title, keys) for i, (title, keys) in enumerate(PANELS.items())],
    }


if __name__ == "__main__":
    text = json.dumps(dashboard(), indent=1) + "\n"
    Path(__file__).with_name("rlhf.json").write_text(text, encoding="utf-8")
