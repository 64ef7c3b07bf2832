"""Every algorithm on the quickstart's task over several seeds: who is preferred to the SFT policy, at what KL and cost.

    .venv/bin/rlhf-ray pipeline experiment=quickstart                 (once: makes sft, comparisons, reward model)
    .venv/bin/python benchmarks/algorithms.py --run outputs/quickstart --seeds 5

A seed is that of the algorithm's own stage (its prompts, samples, minibatches); SFT policy, rankings, reward model and
held-out prompts are common to all. Runs that are there are not repeated, so it can be interrupted. Prints a table and
writes benchmarks/results/algorithms.json with conditions.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import ray

from rlhf_ray.cluster.cast import Cast
from rlhf_ray.cluster.runtime import session
from rlhf_ray.config.load import compose
from rlhf_ray.config.schema import AlarmsConfig, Config
from rlhf_ray.data.blocks import some_blocks, token_blocks
from rlhf_ray.data.prompts import encode_prompts
from rlhf_ray.data.sources import load_task_data
from rlhf_ray.data.templates import render_prompt
from rlhf_ray.evaluation.statistics import distinct_n, win_rate
from rlhf_ray.metrics.alarms import replay
from rlhf_ray.metrics.recorder import read_history
from rlhf_ray.models.hub import load_tokenizer
from rlhf_ray.stages import dpo, ppo
from rlhf_ray.stages.common import Paths, stage_record
from rlhf_ray.stages.eval import examine, judge_of
from rlhf_ray.train import roles
from rlhf_ray.train.answers import prompt_set
from rlhf_ray.versions import installed

ALGORITHMS = ("ppo", "ppo_ptx", "grpo", "dr_grpo", "rloo", "reinforce_pp", "dpo")
RESULTS = Path(__file__).parent / "results" / "algorithms.json"


@dataclass(frozen=True)
class Row:
    """One policy against the SFT policy. kl in nats per response; seconds of all iterations, start-up apart."""

    algorithm: str
    seed: int
    wins: int
    ties: int
    losses: int
    rate: float
    low: float
    high: float
    kl: float
    judge: float
    rm: float
    distinct_2_ratio: float
    held_out_loss_ratio: float
    length: float
    seconds: float
    alarms: list[str]


def config(args: argparse.Namespace, algorithm: str, seed: int) -> Config:
    """The quickstart with another algorithm, in a directory of its own that shares the stages before it."""
    chosen = [] if algorithm == "dpo" else [f"algorithm={algorithm}"]
    cfg = compose(["experiment=quickstart", *chosen, *args.overrides, f"seed={seed}",
                   f"output_dir={args.out / f'{algorithm}-{seed}'}"])
    for stage in ("sft", "compare", "rm"):
        link = Paths(cfg).stage(stage)
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to((args.run / stage).resolve())
    return cfg


def train(args: argparse.Namespace) -> None:
    for seed in range(args.seeds):
        for algorithm in args.algorithms:
            cfg, name = config(args, algorithm, seed), "dpo" if algorithm == "dpo" else "ppo"
            if stage_record(cfg, name) is None:
                {"ppo": ppo, "dpo": dpo}[name].run(cfg)


def evaluate(args: argparse.Namespace) -> list[Row]:
    """All policies on the same held-out prompts with the same sampling seeds, in one session."""
    cfg = compose(["experiment=quickstart", *args.overrides, f"output_dir={args.run}"])
    paths, task_data = Paths(cfg), load_task_data(cfg.data)
    models, rows = {"sft": str(paths.sft)}, []
    for seed in range(args.seeds):
        for a in args.algorithms:
            mine = Paths(config(args, a, seed))
            models[f"{a}-{seed}"] = str(mine.dpo if a == "dpo" else mine.policy)
    tokenizer = load_tokenizer(models["sft"])
    kept, encoded, _ = encode_prompts(task_data.eval_prompts()[: cfg.eval.prompts], cfg.data, tokenizer)
    judge = judge_of(task_data, kept, [render_prompt(p, cfg.data.template, tokenizer) for p in kept], True)
    blocks = some_blocks(token_blocks(task_data.eval_texts(), tokenizer, cfg.model.max_length), cfg.eval.loss_blocks, 0)
    prompts = prompt_set(encoded)
    with session(cfg), Cast(roles.layout_of(cfg, ["generator", "reference", "reward"]), cfg.cluster) as cast:
        generators = roles.generators(cast, cfg, models["sft"], ray.put(prompts), "gloo")
        scorers = roles.reference_models(cast, cfg, models["sft"])
        reward = roles.reward_models(cast, cfg, str(paths.reward))
        cast.ready()
        answers = {name: examine(cfg, cast, name, models, generators, scorers, reward, prompts, blocks, tokenizer,
                                 judge) for name in models}
    sft = answers.pop("sft")
    for name, a in answers.items():
        algorithm, _, number = name.rpartition("-")
        won = win_rate(a.judge, sft.judge, cfg.eval.tie_margin, cfg.eval.bootstrap_samples, 0)
        directory = args.out / name / ("dpo" if algorithm == "dpo" else "ppo")
        history = read_history(directory)
        assert a.rm is not None
        rows.append(Row(
            algorithm, int(number), won.wins, won.ties, won.losses, won.rate, *won.ci95, float(a.kl.mean()),
            float(a.judge.mean()), float(a.rm.mean()), distinct_n(a.texts, 2) / distinct_n(sft.texts, 2),
            a.held_out_loss / sft.held_out_loss, float(a.lengths.mean()),
            history[-1]["seconds"] if algorithm == "dpo" else sum(sum(h["seconds"].values()) for h in history),
            [] if algorithm == "dpo" else [alarm.name for alarm in replay(AlarmsConfig(), history)],
        ))
    return sorted(rows, key=lambda r: (args.algorithms.index(r.algorithm), r.seed))


def table(rows: list[Row]) -> str:
    """Markdown: a line for each algorithm, the seeds' win rates with intervals, medians of the rest."""
    lines = ["| algorithm | preferred to SFT, each seed (95% interval) | least lower bound | KL | distinct-2 / SFT | "
             "held-out loss / SFT | length | seconds | alarms |", "|---|---|---|---|---|---|---|---|---|"]
    for name in dict.fromkeys(r.algorithm for r in rows):
        some = [r for r in rows if r.algorithm == name]
        rates = "; ".join(f"{r.rate:.1%} [{r.low:.1%}, {r.high:.1%}]" for r in some)
        lines.append(
            f"| {name} | {rates} | {min(r.low for r in some):.1%} | {median(r.kl for r in some):.1f} | "
            f"{median(r.distinct_2_ratio for r in some):.2f} | {median(r.held_out_loss_ratio for r in some):.3f} | "
            f"{median(r.length for r in some):.0f} | {median(r.seconds for r in some):.0f} | "
            f"{sum(len(r.alarms) for r in some)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("outputs/quickstart"), help="a finished quickstart")
    parser.add_argument("--out", type=Path, default=Path("outputs/algorithms"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--algorithms", type=lambda text: text.split(","), default=list(ALGORITHMS))
    parser.add_argument("--train-only", action="store_true")
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE for every run")
    args = parser.parse_args()
    args.run, args.out = args.run.absolute(), args.out.absolute()
    with session(compose(["experiment=quickstart", "cluster.num_cpus=8"])):
        train(args)
        if args.train_only:
            return
        rows = evaluate(args)
    conditions: dict[str, Any] = {
        "date": date.today().isoformat(), "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(), "versions": installed(), "overrides": args.overrides, "seeds": args.seeds,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"conditions": conditions, "rows": [asdict(r) for r in rows]}, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
