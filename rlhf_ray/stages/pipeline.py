"""Stage `pipeline`: all stages in order; what is done and unchanged is skipped."""

import importlib
import time
from collections.abc import Sequence

from rlhf_ray.cluster.preflight import check_nodes
from rlhf_ray.cluster.runtime import address_of, nodes, session
from rlhf_ray.config.schema import Config
from rlhf_ray.core.packing import hosts
from rlhf_ray.metrics.progress import console
from rlhf_ray.stages.common import Paths, fingerprints, stage_record
from rlhf_ray.stages.lock import locked
from rlhf_ray.stages.report import publish
from rlhf_ray.train.stage_roles import layout_of, roles_of


def done_stages(cfg: Config) -> list[str]:
    """The stages, from the first on, whose record says that they ended well with this configuration and data."""
    wanted = fingerprints(cfg)
    done = [(stage_record(cfg, name) or {}).get("fingerprint") == wanted[name] for name in cfg.stages]
    return cfg.stages[: done.index(False)] if False in done else cfg.stages


def run(cfg: Config) -> None:
    with locked(Paths(cfg).root):
        _run(cfg)


def _run(cfg: Config) -> None:
    started, skipped = time.monotonic(), done_stages(cfg)
    if skipped:
        console.print(f"done before and unchanged: {', '.join(skipped)}")
    todo = cfg.stages[len(skipped) :]
    if todo:
        with session(cfg):
            look_ahead(cfg, todo)
            for name in todo:
                importlib.import_module(f"rlhf_ray.stages.{name}").run(cfg)
    if "eval" in cfg.stages:
        publish(cfg, None if skipped else time.monotonic() - started)


def look_ahead(cfg: Config, todo: Sequence[str]) -> None:
    """Raise UserError for a node of a cluster where a stage could not work: now, not after the hours before it."""
    if address_of(cfg.cluster) == "local":
        return
    there = nodes()
    may_work = set[str]().union(*(hosts(layout_of(cfg, roles_of(cfg, name)), there) for name in todo))
    check_nodes(may_work, Paths(cfg).root, cfg.cluster.start_timeout_s)
