"""What saving costs an iteration at the quickstart's size.

    .venv/bin/rlhf-ray pipeline experiment=quickstart                 (once: makes sft and reward model)
    .venv/bin/python benchmarks/checkpoint.py --run outputs/quickstart

One run that saves after every second iteration: iterations beside which a checkpoint is copied and written are compared
with those beside which none is. Prints a table and writes benchmarks/results/checkpoint.json with conditions.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from datetime import date
from pathlib import Path
from statistics import median

from rlhf_ray.cluster.runtime import session
from rlhf_ray.config.load import compose
from rlhf_ray.metrics.recorder import read_history
from rlhf_ray.stages import ppo
from rlhf_ray.stages.common import Paths

RESULTS = Path(__file__).parent / "results" / "checkpoint.json"
WARM_UP = 2  # iterations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("outputs/quickstart"), help="a finished quickstart")
    parser.add_argument("--out", type=Path, default=Path("outputs/checkpoint_cost"))
    parser.add_argument("--iterations", type=int, default=40)
    args = parser.parse_args()
    cfg = compose(["experiment=quickstart", "checkpoint.iterations=2", "resume=never", f"output_dir={args.out}",
                   f"ppo.iterations={args.iterations}"])
    for stage in ("sft", "rm"):
        link = Paths(cfg).stage(stage)
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to((args.run / stage).resolve())
    with session(cfg):
        ppo.run(cfg)
    rows = read_history(Paths(cfg).stage("ppo"))[WARM_UP:]
    seconds = {kind: [sum(row["seconds"].values()) for row in rows if ("checkpoint" in row["seconds"]) == kind]
               for kind in (True, False)}
    size = sum(p.stat().st_size for p in sorted((Paths(cfg).stage("ppo") / "checkpoints").glob("step-*"))[-1].iterdir())
    result = {
        "date": str(date.today()), "cpu": platform.processor() or platform.machine(), "cpus": os.cpu_count(),
        "checkpoint_mib": size / 2**20, "iterations": {"with": len(seconds[True]), "without": len(seconds[False])},
        "with_s": median(seconds[True]), "without_s": median(seconds[False]),
        "cost": median(seconds[True]) / median(seconds[False]) - 1,
        "not_overlapped_s": median(row["seconds"]["checkpoint"] for row in rows if "checkpoint" in row["seconds"]),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print("| checkpoint | iteration with | without | cost | of it not overlapped |\n|---|---|---|---|---|")
    print(f"| {result['checkpoint_mib']:.0f} MiB | {result['with_s']:.2f} s | {result['without_s']:.2f} s | "
          f"{result['cost']:+.1%} | {result['not_overlapped_s']:.2f} s |")


if __name__ == "__main__":
    main()
