"""The weight sync from the policy to generators, beside a bare broadcast of the same bytes: by gloo, on GPUs by NCCL.

    .venv/bin/python benchmarks/weight_sync.py [--workloads W2 M125 M500] [--generators 1 2 4] [--short] [KEY=VALUE ...]

One policy rank and real vLLM engines. A sync is a whole one: gather, digest, buckets, layer by layer into the engine,
stamp, on the wire that a run on this machine takes (`weight_sync.backend=gloo` makes it the broadcast's). The broadcast
sends as many bytes in buckets of the same size between as many processes, and does nothing with them; where generators
share the policy's GPU (cluster.placement=colocated), it is a copy within that GPU. Both alternate in one run. Prints a
table and writes benchmarks/results/weight_sync.json (on a GPU weight_sync_gpu.json) with conditions.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import ray
from conditions import keep, spread
from workloads import config, make

from rlhf_ray.actors.policy import PolicyLearner
from rlhf_ray.cluster.cast import Cast
from rlhf_ray.cluster.runtime import free_port, session
from rlhf_ray.core.types import PromptSet
from rlhf_ray.train import roles

ENGINE_GIB = 2.5  # of an engine and its end of the broadcast, besides weights: libraries, cache, buckets
GPU_SHARE = 0.01  # of an end of the bare broadcast


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
            # The learner holds parameters, their masters, gradients and DeepSpeed's bucket; an engine its weights, and
            # a while after it was loaded what that took. Ray ends workers where less than a twentieth is free.
            needs = 5 * size + count * (2 * size + ENGINE_GIB)
            free = 0.9 * psutil.virtual_memory().available / 2**30
            if needs > free:
                skipped.append(f"{name} to {count} generators: needs about {needs:.0f} GiB, {free:.0f} are free")
                continue
            rows.append(measured(name, count, args.models, args.repeats, tuple(overrides)))
            print(line(rows[-1]), flush=True)
    if not args.short:
        keep("weight_sync", overrides, {"rows": rows, "skipped": skipped})
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
        total = parameters(path) * (2 if cfg.model.dtype == "bfloat16" else 4)
        port, bucket = free_port(), int(cfg.weight_sync.bucket_mib * 2**20)
        backend = roles.sync_backend(cfg)
        ends = 1 if backend == "ipc" else 1 + count
        wire = [Wire.options(num_gpus=GPU_SHARE if cfg.roles.policy.gpus else 0).remote() for _ in range(ends)]
        ray.get([w.join.remote(port, rank, len(wire), backend) for rank, w in enumerate(wire)])
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
            "wire": backend,
            "sync_s": sync, "broadcast_s": broadcast, "gb_per_s": total / 1e9 / sync["median"],
            "ratio": median(b / s for b, s in zip(broadcasts[1:], syncs[1:], strict=True))}


@ray.remote(num_cpus=0)
class Wire:
    """One end of a broadcast; of a copy within a GPU, both."""

    def join(self, port: int, rank: int, world_size: int, backend: str) -> None:
        import torch
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
        from vllm.distributed.utils import StatelessProcessGroup

        from rlhf_ray.engines.wire_gloo import join

        self.backend, self.device = backend, torch.device("cuda:0" if backend in ("nccl", "ipc") else "cpu")
        if backend == "nccl":
            group = StatelessProcessGroup.create("127.0.0.1", port, rank, world_size)
            self.group: Any = PyNcclCommunicator(group, self.device)
        elif backend != "ipc":
            self.group = join("127.0.0.1", port, rank, world_size, 120.0)

    def broadcast(self, total: int, bucket: int) -> None:
        import torch

        from rlhf_ray.engines.wire_gloo import broadcast

        buffer = torch.zeros(min(bucket, total) // 4, device=self.device)
        other = torch.empty_like(buffer)
        for first in range(0, total // 4, len(buffer)):
            part = buffer[: total // 4 - first]
            if self.backend == "ipc":
                other[: len(part)].copy_(part)
            elif self.backend == "nccl":
                self.group.broadcast(part, src=0)
            else:
                broadcast(self.group, part).wait()
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def parameters(path: str) -> int:
    from safetensors import safe_open

    return sum(int(np.prod(f.get_slice(key).get_shape())) for file in Path(path).glob("*.safetensors")
               for f in [safe_open(file, "np")] for key in f.keys())  # noqa: SIM118


if __name__ == "__main__":
    main()
