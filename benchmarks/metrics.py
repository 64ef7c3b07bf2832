"""What it costs an iteration to be measured, at the quickstart's size.

    .venv/bin/rlhf-ray pipeline experiment=quickstart                 (once: makes sft and reward model)
    .venv/bin/python benchmarks/metrics.py --run outputs/quickstart

One run of the PPO stage with everything on: metrics.jsonl, samples, Ray's gauges, alarms, wandb offline, and what a Ray
job tells in its metadata. Timed are the calls that the loop makes for it, and the processor time of the thread and of
the process that work beside the loop. Prints a table and writes benchmarks/results/metrics.json with conditions.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import psutil
from ray._private.ray_constants import KV_NAMESPACE_JOB
from ray.dashboard.modules.job.common import JobInfoStorageClient
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from rlhf_ray.cluster import job
from rlhf_ray.cluster.health import Health
from rlhf_ray.cluster.runtime import session
from rlhf_ray.config.load import compose
from rlhf_ray.metrics.recorder import Recorder, read_history
from rlhf_ray.metrics.wandb_run import WandbRun
from rlhf_ray.stages import ppo
from rlhf_ray.stages.common import Paths
from rlhf_ray.train import measures
from rlhf_ray.train.ppo import PPOTrainer
from rlhf_ray.train.rollout import RolloutWorkers
from rlhf_ray.train.watch import Watch

RESULTS = Path(__file__).parent / "results" / "metrics.json"
WARM_UP = 2  # iterations
JOB = "benchmark"
KEY = JobInfoStorageClient.JOB_DATA_KEY.format(job_id=JOB)
# What the loop calls only in order to measure.
CALLS: dict[tuple[Any, str], str] = {
    (Recorder, "log"): "files, console, gauges, wandb", (Recorder, "positions"): "files to the disk",
    (RolloutWorkers, "waiting"): "queues", (RolloutWorkers, "read"): "samples, asked for",
    (RolloutWorkers, "texts"): "samples, waited for", (RolloutWorkers, "costs"): "working times",
    (measures, "_speeds"): "tokens per second", (Health, "memory_gib"): "memory", (Watch, "check"): "alarms",
}


@contextmanager
def metered() -> Iterator[tuple[list[Counter[str]], Counter[str]]]:
    """Seconds in each of CALLS by iteration, and processor seconds beside the loop, of what runs inside."""
    rows, beside = [Counter[str]()], Counter[str]()

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*args)
            finally:
                rows[-1][name] += time.perf_counter() - started

        return wrapped

    advance, close, tell = PPOTrainer.advance, WandbRun.close, job._tell

    def advancing(trainer: PPOTrainer) -> None:
        advance(trainer)
        rows.append(Counter())

    def closing(run: WandbRun) -> None:
        own = [p for p in psutil.Process().children() if "wandb" in p.name()]
        beside["wandb's process"] += sum(sum(p.cpu_times()[:2]) for p in own)
        close(run)

    def telling(*args: Any) -> None:
        started = time.thread_time()
        tell(*args)
        beside["job metadata"] += time.thread_time() - started

    with ExitStack() as stack:
        for (owner, name), shown in CALLS.items():
            call = vars(owner)[name]
            new = property(timed(shown, call.fget)) if isinstance(call, property) else timed(shown, call)
            stack.enter_context(patch.object(owner, name, new))
        for owner, name, new in ((PPOTrainer, "advance", advancing), (WandbRun, "close", closing),
                                 (job, "_tell", telling)):
            stack.enter_context(patch.object(owner, name, new))
        yield rows, beside


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("outputs/quickstart"), help="a finished quickstart")
    parser.add_argument("--out", type=Path, default=Path("outputs/metrics_cost"))
    parser.add_argument("--iterations", type=int, default=20)
    args = parser.parse_args()
    cfg = compose(["experiment=quickstart", "resume=never", f"output_dir={args.out}",
                   f"ppo.iterations={args.iterations}"])
    for stage in ("sft", "rm"):
        link = Paths(cfg).stage(stage)
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to((args.run / stage).resolve())
    with metered() as (rows, beside), session(cfg):
        _internal_kv_put(KEY, json.dumps({"status": "RUNNING"}), namespace=KV_NAMESPACE_JOB)  # as if this were a job
        os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"] = json.dumps({"metadata": {"job_submission_id": JOB}})
        with job.told(Paths(cfg).root):
            ppo.run(cfg)
        told = json.loads(_internal_kv_get(KEY, namespace=KV_NAMESPACE_JOB))["metadata"]
    seconds = [sum(row["seconds"].values()) for row in read_history(Paths(cfg).stage("ppo"))][WARM_UP:]
    loop = rows[WARM_UP : WARM_UP + len(seconds)]
    result = {
        "date": str(date.today()), "cpu": platform.processor() or platform.machine(), "cpus": os.cpu_count(),
        "iterations": len(seconds), "iteration_s": median(seconds),
        "in_the_loop_ms": {name: 1e3 * median(row[name] for row in loop) for name in CALLS.values()},
        "cost": median(sum(row.values()) / s for row, s in zip(loop, seconds, strict=True)),
        "beside_ms_per_iteration": {name: 1e3 * s / args.iterations for name, s in beside.items()},
        "beside": sum(beside.values()) / args.iterations / median(seconds),
        "job_metadata_bytes": len(told[job.OVERVIEW].encode()),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print("| what | ms per iteration |\n|---|---|")
    for name, ms in (result["in_the_loop_ms"] | result["beside_ms_per_iteration"]).items():
        print(f"| {name} | {ms:.2f} |")
    print(f"iteration {result['iteration_s']:.2f} s; in the loop {result['cost']:.2%} of it, beside it "
          f"{result['beside']:.2%} of one processor")


if __name__ == "__main__":
    main()
