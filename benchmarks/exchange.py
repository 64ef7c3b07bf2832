"""What it costs to move rollouts between the roles through the object store, and what the driver notices of it.

    .venv/bin/python benchmarks/exchange.py [--short]

The real loop around actors that compute nothing (sleepers.py), with responses of 64 tokens and of 6,400: the batch
grows a hundredfold, the number of calls stays. Reported: time of an iteration and of it what a token costs, memory and
processor time of the driver, bytes that a token has in the store, and how often they are copied on their way from who
makes them to who reads them. Prints a table and writes benchmarks/results/exchange.json with conditions.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import ray
from conditions import conditions
from sleepers import Pace, timed, trainer

RESULTS = Path(__file__).parent / "results" / "exchange.json"
BATCH = 64
# Arrays with an entry for each token, as the roles exchange them: RolloutBatch, logprobs and values, PolicyBatch,
# CriticBatch.
BYTES_PER_TOKEN = (4 + 4) + (4 + 4 + 4) + (4 + 1 + 4 * 4) + (4 + 1 + 4 + 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--short", action="store_true", help="few iterations, no results file")
    args = parser.parse_args()
    if args.short:
        args.iterations = 6
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as drivers:  # none inherits memory
        rows = list(drivers.map(measured, (64, 640, 6400), [args.iterations] * 3))
    first, last = rows[0], rows[-1]
    more = (last["tokens"] - first["tokens"])
    result = {**conditions(), "rows": rows, "bytes_per_token": BYTES_PER_TOKEN, "copies": copies(),
              "ns_per_token": 1e9 * (last["iteration_s"] - first["iteration_s"]) / more,
              "driver_growth_mib": last["driver_mib"] - first["driver_mib"]}
    if not args.short:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print("tokens per batch | MiB in the store | iteration s | driver: memory MiB | processor s")
    for row in rows:
        stored = row["tokens"] * BYTES_PER_TOKEN / 2**20
        print(f"{row['tokens']:>16,} | {stored:>16.2f} | {row['iteration_s']:>11.4f} | "
              f"{row['driver_mib']:>18.0f} | {row['driver_cpu_s']:.4f}")
    print(f"a token costs {result['ns_per_token']:.0f} ns in all exchanges of an iteration together; driver memory "
          f"grows by {result['driver_growth_mib']:.1f} MiB; copies between maker and reader: {result['copies']}")


def measured(tokens: int, iterations: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        with trainer(Pace(tokens=tokens), Path(directory), f"ppo.iterations={iterations}", "cluster.num_cpus=16",
                     "cluster.object_store_gib=1", "roles.generator.replicas=2", "roles.policy.ranks=2",
                     "roles.critic.ranks=2", f"rollout.batch_size={BATCH}",
                     f"algorithm.minibatch_size={BATCH}") as loop:
            found = timed(loop)
            memory = psutil.Process().memory_info().rss / 2**20
    return {"tokens": BATCH * tokens, "driver_mib": memory, **{key: median(v) for key, v in found.items()}}


@ray.remote(num_cpus=0)
class Reader:
    def own(self, array: np.ndarray) -> bool:
        """Whether it is a copy of what is in the store."""
        return bool(array.flags.owndata or array.flags.writeable)


def copies() -> int:
    """One when an array is put into the store; one more if a reader on the same node has a copy of its own."""
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        return 1 + int(ray.get(Reader.remote().own.remote(ray.put(np.zeros(1 << 20, dtype=np.float32)))))
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
