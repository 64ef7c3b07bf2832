"""Stage `pipeline`: all stages in order; what is done and unchanged is skipped."""

import hashlib
import importlib
import json
import time

from rlhf_ray.cluster.runtime import session
from rlhf_ray.config.load import config_fingerprint
from rlhf_ray.config.schema import Config
from rlhf_ray.data.sources import load_task_data
from rlhf_ray.metrics.progress import console
from rlhf_ray.stages.common import Paths, write_json
from rlhf_ray.stages.report import publish, stage_record

# The sections of the configuration that each stage's result depends on, besides the stages before it.
DEPENDS = {
    "pretrain": ["seed", "model", "data", "pretrain", "roles.supervised"],
    "sft": ["seed", "model", "data", "sft", "roles.supervised"],
    "compare": ["seed", "model", "data", "compare", "roles.generator"],
    "rm": ["seed", "model", "data", "rm", "roles.supervised"],
    "ppo": ["seed", "model", "data", "rollout", "algorithm", "ppo", "roles", "weight_sync"],
    "eval": ["seed", "model", "data", "rollout", "eval", "roles"],
}


def fingerprints(cfg: Config) -> dict[str, str]:
    """Of every stage to run: a hash of its configuration, its data, and all stages before it."""
    chain, out = load_task_data(cfg.data).fingerprint(), {}
    for name in cfg.stages:
        chain = hashlib.sha256(f"{chain} {name} {config_fingerprint(cfg, DEPENDS[name])}".encode()).hexdigest()
        out[name] = chain
    return out


def run(cfg: Config) -> None:
    started, manifest_path = time.monotonic(), Paths(cfg).root / "pipeline.json"
    wanted = fingerprints(cfg)
    done: dict[str, str] = json.loads(manifest_path.read_text()) if manifest_path.is_file() else {}
    unchanged = [done.get(n) == wanted[n] and stage_record(cfg, n) is not None for n in cfg.stages]
    skipped = cfg.stages[: unchanged.index(False)] if False in unchanged else cfg.stages
    if skipped:
        console.print(f"done before and unchanged: {', '.join(skipped)}")
    with session(cfg):
        for name in cfg.stages:
            if name not in skipped:
                done.pop(name, None)
                importlib.import_module(f"rlhf_ray.stages.{name}").run(cfg)
                write_json(manifest_path, done := done | {name: wanted[name]})
    if "eval" in cfg.stages:
        publish(cfg, None if skipped else time.monotonic() - started)
