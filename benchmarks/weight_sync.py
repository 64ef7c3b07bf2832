"""The weight sync from the policy to generators, beside a bare broadcast of the same bytes by gloo.

    .venv/bin/python benchmarks/weight_sync.py [--workloads W2 M125 M500] [--generators 1 2 4] [--short]

One policy rank and real vLLM engines. A sync is a whole one: gather, digest, buckets, layer by layer into the engine,
stamp, on the wire that a run on this machine takes (`weight_sync.backend=gloo` makes it the broadcast's). The broadcast
sends as many bytes in buckets of the same size between as many processes, and does nothing with them. Both alternate in
one run. Prints a table and writes benchmarks/results/weight_sync.json with conditions.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import ray
from conditions import conditions, spread
from workloads import config, make

from rlhf_ray.actors.policy import PolicyLearner
from rlhf_ray.cluster.cast import Cast
from rlhf_ray.cluster.runtime import free_port, session
from rlhf_ray.core.types import PromptSet
from rlhf_ray.train import roles

RESULTS = Path(__file__).parent / "results" / "weight_sync.json"
ENGINE_GIB = 1.5  # of an engine besides its weights: libraries, cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=["W2", "M125", "M500"])
    parser.add_argument("--generators", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--models", type=Path, default=Path("outputs/workloads"))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--short", action="store_true", help="the smallest case only, no results file")
    args, overrides = parser.parse_known_args()
    if args.short:
        args.workloads, args.generators, args.repeats = ["W2"], [1], 3
    rows, skipped = [], []
    for name in args.workloads:
        make(name, args.models)
        size = sum(f.stat().st_size for f in (args.models / name / "sft/model").glob("*.safetensors")) / 2**30
        for count in args.generators:
            # The learner holds parameters and their float32 masters; an engine its weights, and a layer twice.
            needs, free = 3 * size + count * (1.3 * size + ENGINE_GIB), psutil.virtual_memory().available / 2**30
            if needs > free:
                skipped.append(f"{name} to {count} generators: needs about {needs:.0f} GiB, {free:.0f} are free")
                continue
            rows.append(measured(name, count, args.models, args.repeats, tuple(overrides)))
            print(line(rows[-1]), flush=True)
    if not args.short:
        RESULTS.write_text(json.dumps({**conditions(), "rows": rows, "skipped": skipped}, indent=1) + "\n")
    print("\n".join(f"skipped: {text}" for text in skipped))


def line(row: dict[str, Any]) -> str:
    return (f"{row['workload']:<5} {row['mib']:7.0f} MiB to {row['generators']} by {row['wire']}: "
            f"sync {row['sync_s']['median']:.3f} s ({row['gb_per_s']:.2f} GB/s), "
            f"broadcast {row['broadcast_s']['median']:.3f} s, broadcast / sync {row['ratio']:.2f}")


def measured(name: str, count: int, models: Path, repeats: int, overrides: tuple[str, ...]) -> dict[str, Any]:
    cfg = config(name, models / name, models / "runs" / f"{name}-sync", overrides=(
        f"roles.generator.replicas={count}", "cluster.num_cpus=16", *overrides))
    path = str(models / name / "sft/model")
    with session(cfg), Cast(roles.layout_of(cfg, ["generator", "policy"]), cfg.cluster) as cast:
        generators = roles.generators(cast, cfg, path, PromptSet(np.ones(4, np.int32), np.array([4], np.int32)),
                                      roles.sync_backend(cfg))
        policy = roles.policy_learners(cast, cfg, path, 10, None)
        cast.ready()
        policy.call(PolicyLearner.connect, generators.actors, cfg.roles.generator.tensor_parallel_size,
                    roles.sync_backend(cfg), cast.meeting_point("policy"), cfg.weight_sync.bucket_mib,
                    cfg.cluster.call_timeout_s)
        total = sum(f.stat().st_size for f in Path(path).glob("*.safetensors"))
        port, bucket = free_port(), int(cfg.weight_sync.bucket_mib * 2**20)
        wire = [Wire.remote() for _ in range(1 + count)]
        ray.get([w.join.remote(port, rank, len(wire)) for rank, w in enumerate(wire)])
        syncs, broadcasts = [], []
        for version in range(1, repeats + 2):
            started = time.perf_counter()
            policy.call(PolicyLearner.push, version)
            syncs.append(time.perf_counter() - started)
            started = time.perf_counter()
            ray.get([w.broadcast.remote(total, bucket) for w in wire])
            broadcasts.append(time.perf_counter() - started)
    sync, broadcast = spread(syncs[1:]), spread(broadcasts[1:])
    return {"workload": name, "parameters": parameters(path), "mib": total / 2**20, "generators": count,
            "wire": roles.sync_backend(cfg),
            "sync_s": sync, "broadcast_s": broadcast, "gb_per_s": total / 1e9 / sync["median"],
            "ratio": median(b / s for b, s in zip(broadcasts[1:], syncs[1:], strict=True))}


@ray.remote(num_cpus=0)
class Wire:
    """One end of a gloo broadcast."""

    def join(self, port: int, rank: int, world_size: int) -> None:
        from rlhf_ray.engines.wire_gloo import join

        self.rank, self.group = rank, join("127.0.0.1", port, rank, world_size, 120.0)

    def broadcast(self, total: int, bucket: int) -> None:
        import torch

        from rlhf_ray.engines.wire_gloo import broadcast

        buffer = torch.zeros(min(bucket, total) // 4)
        for first in range(0, total // 4, len(buffer)):
            broadcast(self.group, buffer[: total // 4 - first]).wait()


def parameters(path: str) -> int:
    from safetensors import safe_open

    return sum(int(np.prod(f.get_slice(key).get_shape())) for file in Path(path).glob("*.safetensors")
               for f in [safe_open(file, "np")] for key in f.keys())  # noqa: SIM118


if __name__ == "__main__":
    main()
