"""Writes rlhf.json, the Grafana dashboard: `python deploy/monitoring/dashboard.py`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_ray.metrics.gauges import PREFIX, RUN, SUPERVISED, TABLE, UNITS, Measure

# Of each row the table of its gauges and, by title, the keys of its panels; those of a panel are of one unit.
ROWS: dict[str, tuple[Mapping[str, Measure], dict[str, list[str]]]] = {
    "Policy": (TABLE, {
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
        "Running": ["running"],
    }),
    "Supervised stages": (SUPERVISED, {
        "Loss": ["loss"],
        "Pairs ordered as ranked": ["accuracy"],
        "Learning rate": ["lr"],
        "Step": ["step"],
        "Tokens per second": ["tokens_per_second"],
        "Running": ["running"],
    }),
}
WIDTH, HEIGHT = 8, 7  # of Grafana's 24 columns; in its rows
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
RUNS = f'{{__name__=~"{PREFIX}rlhf_(trainer|supervised)_running_stages"}}'  # whoever has begun


def target(measure: Measure) -> dict[str, Any]:
    """One gauge, for the chosen runs. A driver that went on is another process: `max` makes one line of them."""
    labels = (RUN, *measure.labels)
    what = measure.name.removeprefix("rlhf_").removesuffix(f"_{measure.unit}").replace("_", " ")
    return {
        "expr": f'max by ({", ".join(labels)}) ({PREFIX}{measure.name}{{{RUN}=~"$run"}})',
        "legendFormat": " ".join([*(f"{{{{{label}}}}}" for label in labels), *([] if measure.labels else [what])]),
        "refId": measure.key,
    }


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    y = 0
    for row, (table, graphs) in ROWS.items():
        found.append({"id": len(found) + 1, "type": "row", "title": row, "collapsed": False, "panels": [],
                      "gridPos": {"x": 0, "y": y, "w": 24, "h": 1}})
        y += 1
        for i, (title, keys) in enumerate(graphs.items()):
            measures = [table[key] for key in keys]
            unit = measures[0].unit
            found.append({
                "id": len(found) + 1, "type": "timeseries", "title": title, "datasource": SOURCE,
                "description": "\n".join([*(m.help for m in measures), f"Unit: {unit.replace('_', ' ')}."]),
                "gridPos": {"x": i * WIDTH % 24, "y": y + i * WIDTH // 24 * HEIGHT, "w": WIDTH, "h": HEIGHT},
                "fieldConfig": {"defaults": {"unit": UNITS[unit]}, "overrides": []},
                "targets": [target(m) for m in measures],
            })
        y += -(-len(graphs) * WIDTH // 24) * HEIGHT
    return found


def dashboard() -> dict[str, Any]:
    return {
        "uid": "rlhf", "title": "RLHF", "schemaVersion": 39, "refresh": "10s", "timezone": "browser",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": [
            {"name": "datasource", "type": "datasource", "query": "prometheus"},
            {"name": "run", "type": "query", "datasource": SOURCE, "query": f"label_values({RUNS}, {RUN})",
             "multi": True, "includeAll": True, "allValue": ".*", "refresh": 2,
             "current": {"text": "All", "value": "$__all"}},
        ]},
        "panels": panels(),
    }


if __name__ == "__main__":
    text = json.dumps(dashboard(), indent=1) + "\n"
    Path(__file__).with_name("rlhf.json").write_text(text, encoding="utf-8")
