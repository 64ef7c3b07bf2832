"""What orchestration alone costs, and how it grows: engines that only sleep, on simulated nodes.

    .venv/bin/python benchmarks/scale.py [--sizes 2 4 16 64] [--short]

First, engines that take no time: an iteration with N generators and N learner ranks, half of the policy and half of the
critic, on simulated nodes (ray.cluster_utils), eight rollouts for each generator, is all orchestration. Second, engines
that sleep, with generation times that have a long tail: how much of scoring, and with schedule=one_step_off how much of
the learning, is hidden behind them. Prints two tables and writes benchmarks/results/scale.json with conditions.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from conditions import conditions, spread
from sleepers import Pace, timed, trainer

RESULTS = Path(__file__).parent / "results" / "scale.json"
GIB_EACH = 0.11  # of a sleeping actor, and of a simulated node with its agents about four times as much
PER_NODE = 16  # actors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 4, 16, 64])
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--short", action="store_true", help="small sizes, few iterations, no results file")
    args = parser.parse_args()
    if args.short:
        args.sizes, args.iterations = [2, 4], 5
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    growth, skipped = [], []
    for n in args.sizes:
        needs, free = (2 * n + 2) * GIB_EACH * 1.3 + 1, psutil.virtual_memory().available / 2**30
        if needs > free:
            skipped.append(f"{n} generators: {2 * n + 2} actors need about {needs:.0f} GiB, {free:.0f} are free")
            continue
        growth.append(orchestration(n, args.iterations))
    hidden = [overlap(schedule, args.iterations) for schedule in ("synchronous", "one_step_off")]
    result = {**conditions(), "growth": growth, "hidden": hidden, "skipped": skipped}
    if not args.short:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print("generators, learner ranks, each | nodes | rollouts | iteration s | the driver's processor s")
    for row in growth:
        print(f"{row['generators']:>32} | {row['nodes']:>5} | {row['rollouts']:>8} | "
              f"{row['iteration_s']['median']:>11.3f} | {row['driver_cpu_s']['median']:.3f}")
    for row in hidden:
        print(f"{row['schedule']:<12} generation {row['generation_s']:.1f} s, scoring {row['scoring_s']:.1f} s each, "
              f"update {row['update_s']:.1f} s: iteration {row['iteration_s']['median']:.2f} s, "
              f"{row['ratio']:.3f} x {row['beside']}")
    print("\n".join(f"skipped: {line}" for line in skipped))


def orchestration(n: int, iterations: int) -> dict[str, Any]:
    """Iterations in which nobody computes anything."""
    nodes = -(-(2 * n + 2) // PER_NODE)
    with cluster(nodes) as address, tempfile.TemporaryDirectory() as directory:
        with trainer(Pace(), Path(directory), f"cluster.address={address}", f"ppo.iterations={iterations}",
                     f"roles.generator.replicas={n}", f"roles.policy.ranks={n // 2}", f"roles.critic.ranks={n // 2}",
                     f"rollout.batch_size={8 * n}", f"algorithm.minibatch_size={8 * n}",
                     "cluster.start_timeout_s=900") as loop:
            found = timed(loop)
    return {"generators": n, "nodes": nodes, "rollouts": 8 * n, **{key: spread(v) for key, v in found.items()}}


def overlap(schedule: str, iterations: int) -> dict[str, Any]:
    """Four generators, two policy ranks, two critic ranks; engines sleep."""
    pace, batch = Pace(generation_s=4.0, forward_s=0.02, update_s=3.0, sync_s=0.05), 128
    with tempfile.TemporaryDirectory() as directory:
        with trainer(pace, Path(directory), f"schedule={schedule}", f"ppo.iterations={iterations}",
                     "checkpoint.iterations=1000000", "cluster.num_cpus=16", "roles.generator.replicas=4",
                     "roles.policy.ranks=2", "roles.critic.ranks=2", "roles.generator.shard_size=8",
                     f"rollout.batch_size={batch}", f"algorithm.minibatch_size={batch}") as loop:
            found = spread(timed(loop)["iteration_s"][:-1])  # the last has nothing to sample ahead
    scoring = batch * pace.forward_s
    if schedule == "synchronous":
        beside, floor = "(longest phase + update)", max(pace.generation_s, scoring) + pace.update_s
    else:  # learners score the batch when its turn comes, each of the two ranks one half
        beside, floor = "the longer of generation and learning", max(pace.generation_s,
                                                                     scoring / 2 + pace.update_s)
    return {"schedule": schedule, "generation_s": pace.generation_s, "scoring_s": scoring, "update_s": pace.update_s,
            "iteration_s": found, "beside": beside, "ratio": found["median"] / floor}


@contextmanager
def cluster(nodes: int) -> Iterator[str]:
    """Simulated nodes with a slot for each actor."""
    from ray.cluster_utils import Cluster

    simulated = Cluster(initialize_head=True, head_node_args={
        "num_cpus": PER_NODE, "object_store_memory": 2**27, "include_dashboard": False,
        "_system_config": {"prestart_worker_first_driver": False}})  # else a worker for every CPU that nobody needs
    try:
        for _ in range(nodes - 1):
            simulated.add_node(num_cpus=PER_NODE, object_store_memory=2**27)
        simulated.wait_for_nodes()
        yield simulated.address
    finally:
        simulated.shutdown()


if __name__ == "__main__":
    main()
