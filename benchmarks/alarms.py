"""False alarms on healthy runs, and what rings when the reward pays for length.

    .venv/bin/python benchmarks/algorithms.py ...                      (makes the healthy runs)
    .venv/bin/python benchmarks/alarms.py --run outputs/quickstart

The healthy runs are those of algorithms.py; alarms are replayed on their metrics.jsonl. The hacked run is the
quickstart's with the reward function below and hardly any KL penalty. Writes benchmarks/results/alarms.json.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from rlhf_ray.cluster.runtime import session
from rlhf_ray.config.load import compose
from rlhf_ray.config.schema import AlarmsConfig
from rlhf_ray.metrics.alarms import replay
from rlhf_ray.metrics.recorder import read_history
from rlhf_ray.stages import ppo
from rlhf_ray.stages.common import Paths

RESULTS = Path(__file__).parent / "results" / "alarms.json"


def pays_for_length(prompts: list[str], responses: list[str], metadata: list[dict]) -> list[float]:
    """Words, and nothing else."""
    return [len(r.split()) / 10 for r in responses]


def hacked(run: Path, out: Path, iterations: int) -> Path:
    cfg = compose(["experiment=quickstart", "algorithm=rloo", "reward.sources=['benchmarks.alarms:pays_for_length']",
                   "algorithm.kl_coef=0.01", f"ppo.iterations={iterations}", f"output_dir={out}"])
    link = Paths(cfg).stage("sft")
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        link.symlink_to((run / "sft").resolve())
    with session(cfg):
        ppo.run(cfg)
    return Paths(cfg).stage("ppo")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("outputs/quickstart"), help="a finished quickstart")
    parser.add_argument("--healthy", type=Path, default=Path("outputs/algorithms"), help="--out of algorithms.py")
    parser.add_argument("--out", type=Path, default=Path("outputs/hacked"))
    parser.add_argument("--iterations", type=int, default=16)
    args = parser.parse_args()
    healthy = {p.parent.name: [asdict(a) for a in replay(AlarmsConfig(), read_history(p))]
               for p in sorted(args.healthy.glob("*/ppo")) if read_history(p)}
    directory = hacked(args.run.absolute(), args.out.absolute(), args.iterations)
    rung = [asdict(a) for a in replay(AlarmsConfig(), read_history(directory))]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"healthy": healthy, "hacked": rung}, indent=1) + "\n")
    print(f"healthy: {sum(len(a) for a in healthy.values())} alarms in {len(healthy)} runs")
    for alarm in rung:
        print(f"hacked: iteration {alarm['iteration']}: {alarm['name']}: {alarm['message']}")


if __name__ == "__main__":
    main()
