"""An iteration of PPO, by phase, beside its floor: the same engines called directly in one process.

    .venv/bin/python benchmarks/iteration.py [--workloads W1 W2 M125] [--repeats 2] [KEY=VALUE ...]

The floor has no Ray, no sync and no orchestration: vLLM samples, then plain torch modules make the four forward passes
(policy, reference, reward, critic) and the two training steps, one after the other, with all cores or a GPU each. Runs
and floors alternate, and only numbers of one call of this script may be set side by side. KEY=VALUE changes both.
Prints a table and writes benchmarks/results/iteration.json (on a GPU iteration_gpu.json) with conditions.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from conditions import keep
from workloads import config, make

from rlhf_ray.cluster.role import ROLE_ENV
from rlhf_ray.config.schema import Config

WARM_UP = 1  # iterations
MICRO = 8  # sequences in a forward pass
PHASES = ("generate", "policy forward", "reference forward", "reward forward", "critic forward", "policy step",
          "critic step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=["W1", "W2"])
    parser.add_argument("--models", type=Path, default=Path("outputs/workloads"))
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--short", action="store_true", help="W1 once, no results file")
    # what a child process does, here and of peers.py
    parser.add_argument("--one", choices=["floor", "run"], help=argparse.SUPPRESS)
    parser.add_argument("--workload", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--algorithm", default="ppo", help=argparse.SUPPRESS)
    args, overrides = parser.parse_known_args()
    if args.one:
        measure, name = floor if args.one == "floor" else run, args.workloads[0]
        workload = args.workload or args.models / name
        cfg = config(name, workload, args.models / "runs" / f"{workload.name}-{args.algorithm}", args.algorithm,
                     args.iterations, tuple(overrides))
        print(json.dumps(measure(cfg)))
        return
    if args.short:
        args.workloads, args.iterations, args.repeats = ["W1"], 3, 1
    table = {}
    for name in args.workloads:
        make(name, args.models)
        rows: dict[str, list[dict[str, float]]] = {"floor": [], "run": []}
        starts = []
        for _ in range(args.repeats):
            for kind in rows:
                began = time.time()
                result = child(kind, name, args, overrides)
                rows[kind] += result["iterations"][WARM_UP:]
                print(told(name, kind, summary(result["iterations"][WARM_UP:])), flush=True)
                starts += [result["first_rollout_at"] - began] if kind == "run" else []
        table[name] = {kind: summary(found) for kind, found in rows.items()}
        table[name] |= {"start_to_first_rollout_s": median(starts),
                        "floor_over_iteration": table[name]["floor"]["total"]["median"]
                        / table[name]["run"]["total"]["median"]}
    if not args.short:
        keep("iteration", overrides, {"workloads": table})
    print("all:")
    for name, found in table.items():
        for kind in ("floor", "run"):
            print(told(name, kind, found[kind]))
        print(f"{name} floor / iteration {found['floor_over_iteration']:.2f}; "
              f"start to first rollout {found['start_to_first_rollout_s']:.0f} s")


def child(kind: str, name: str, args: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, "--one", kind, "--workloads", name, "--models", str(args.models),
                           "--iterations", str(args.iterations), *overrides], stdout=subprocess.PIPE, check=True,
                          env={**os.environ, **ROLE_ENV})  # the floor has what the roles have
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def summary(rows: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    rows = [{**row, "total": sum(row.values())} for row in rows]
    return {phase: {"median": median(r[phase] for r in rows), "min": min(r[phase] for r in rows),
                    "max": max(r[phase] for r in rows)} for phase in rows[0]}


def told(name: str, kind: str, phases: dict[str, dict[str, float]]) -> str:
    return f"{name} {kind:<6}" + "  ".join(f"{phase} {t['median']:.2f}" for phase, t in phases.items())


def run(cfg: Config) -> dict[str, Any]:
    """Seconds of each phase of each iteration of the ppo stage, and when its first rollout began."""
    from rlhf_ray.cluster.runtime import session
    from rlhf_ray.metrics.recorder import read_history
    from rlhf_ray.stages import ppo
    from rlhf_ray.stages.common import Paths

    entered: list[tuple[str, float]] = []
    enter = ppo.PPOTrainer.enter

    def entering(self: Any, phase: str) -> None:
        entered.append((phase, time.time()))
        enter(self, phase)

    ppo.PPOTrainer.enter = entering  # type: ignore[method-assign]
    with session(cfg):
        ppo.run(cfg)
    rows = read_history(Paths(cfg).stage("ppo"))
    if any(row[key] for row in rows for key in row if key.endswith("_skipped_steps")):
        raise SystemExit(f"{cfg.output_dir}: optimizer steps were dropped, for their gradients were not finite: there "
                         "is nothing to compare")
    return {"iterations": [row["seconds"] for row in rows],
            "first_rollout_at": next(at for phase, at in entered if phase == "rollout")}


def floor(cfg: Config) -> dict[str, Any]:
    """Seconds of the same work in this process."""
    import numpy as np
    import torch

    from rlhf_ray.core.ragged import PackedRows, pack
    from rlhf_ray.engines.generation import GenerationEngine, Request
    from rlhf_ray.models.hub import load_causal_lm, load_scalar_model, load_tokenizer
    from rlhf_ray.models.modules import CausalLM, ScalarModel

    threads = os.cpu_count() or 1
    os.environ["OMP_NUM_THREADS"] = str(threads)
    cfg.roles.generator.threads = threads
    path, reward = cfg.model.path, str(Path(cfg.output_dir) / "rm/model")
    tokenizer = load_tokenizer(path)
    lines = Path(str(cfg.data.ppo_prompts)).read_text().splitlines()
    prompts = [[tokenizer.bos_token_id, *tokenizer(json.loads(line)["prompt"])["input_ids"]] for line in lines]
    engine = GenerationEngine(path, cfg.model, cfg.roles.generator, "gloo", 0)
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy, reference = (CausalLM(load_causal_lm(path, cfg.model)).to(device) for _ in range(2))
    scorer, critic = (ScalarModel(load_scalar_model(reward, cfg.model)).to(device) for _ in range(2))
    optimizers = {m: torch.optim.AdamW(m.parameters(), lr=1e-6, fused=True) for m in (policy, critic)}

    def logprobs(model: CausalLM, rows: PackedRows) -> torch.Tensor:
        return model(rows, rows.positions >= cfg.data.max_prompt_tokens, 1.0)[0]

    def values(model: ScalarModel, rows: PackedRows) -> torch.Tensor:
        return rows.before(model(rows))

    def forward(of: Callable[..., torch.Tensor], model: Any, batches: list[PackedRows]) -> None:
        with torch.no_grad():
            for rows in batches:
                of(model, rows.to(device))

    def step(of: Callable[..., torch.Tensor], model: Any, batches: list[PackedRows]) -> None:
        for rows in batches:
            (of(model, rows.to(device)).mean() / len(batches)).backward()
        optimizers[model].step()
        optimizers[model].zero_grad(set_to_none=True)

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    measured, n, longest = [], cfg.rollout.batch_size, cfg.rollout.max_response_tokens
    length = cfg.model.max_length  # of every prompt and response
    for i in range(cfg.ppo.iterations):
        clock = [now()]
        chosen = [prompts[(i * n + k) % len(prompts)] for k in range(n)]
        responses = list(engine.sample([Request(p, i * n + k) for k, p in enumerate(chosen)], 1.0, longest))
        assert all(len(r.ids) == longest for r in responses)
        clock.append(now())
        ids = np.concatenate([np.concatenate([chosen[r.index], r.ids]) for r in responses]).astype(np.int32)
        batches = pack(ids, np.full(n, length), length, MICRO * length)
        for work, of, model in ((forward, logprobs, policy), (forward, logprobs, reference), (forward, values, scorer),
                                (forward, values, critic), (step, logprobs, policy), (step, values, critic)):
            work(of, model, batches)
            clock.append(now())
        measured.append(dict(zip(PHASES, np.diff(clock).tolist(), strict=True)))
    return {"iterations": measured}


if __name__ == "__main__":
    main()
