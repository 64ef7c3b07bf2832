"""Directories as runs leave them, made up."""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

NOW = float(int(time.time()) + 10_000)  # unix seconds; ahead, so that this process is older than made-up locks


def at(path: Path, ago_s: float) -> Path:
    """The file as if written `ago_s` seconds before NOW."""
    os.utime(path, (NOW - ago_s, NOW - ago_s))
    return path


def text(path: Path, content: str, ago_s: float = 0.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return at(path, ago_s)


def jsonl(path: Path, rows: list[dict[str, Any]], ago_s: float = 0.0) -> Path:
    return text(path, "".join(json.dumps(row) + "\n" for row in rows), ago_s)


def lock(run: Path, pid: int, ago_s: float, host: str = "") -> None:
    text(run / ".lock", json.dumps({"pid": pid, "host": host or socket.gethostname(), "started": "2027-01-15 08:00:00",
                                    "command": "rlhf-ray pipeline output_dir=runs/a"}), ago_s)


def begun(run: Path, name: str, ago_s: float, iterations: int = 40, warm: int = 2) -> None:
    text(run / name / "config.yaml", f"stages: [sft, compare, rm, ppo, eval]\nppo: {{iterations: {iterations}}}\n"
                                     f"alarms: {{warmup_iterations: {warm}}}\n", ago_s)


def done(run: Path, name: str, seconds: float) -> None:
    begun(run, name, 900)
    text(run / name / "stage.json", json.dumps({"seconds": seconds}))


def post_mortem(run: Path, name: str, stamp: str, summary: str, ago_s: float) -> Path:
    return at(text(run / name / f"post_mortem-{stamp}" / "summary.txt", summary, ago_s).parent, ago_s)


def iteration(k: int, **values: Any) -> dict[str, Any]:
    """A line of ppo: 4 seconds, of which 1 for sampling."""
    return {"iteration": k, "score": k / 10, "judge_score": k / 20, "kl_per_sequence": k / 4, "entropy": 3 - k / 10,
            "response_length": 20.0 + k, "mismatch": 1.7e-6, "seconds": {"rollout": 1.0, "update": 3.0},
            "memory_gib": {"policy-0": 2.0, "generator-0": 1.5}, "restarts": {"policy": 0, "generator": 0}, **values}


def sample(k: int, prompt: str, response: str, score: float | None = 1.5) -> dict[str, Any]:
    """A line of samples.jsonl."""
    return {"iteration": k, "position": 0, "prompt": prompt, "response": response, "tokens": 7, "truncated": False,
            "score": score}


def running(run: Path, iterations: int = 12) -> Path:
    """sft and rm are done, ppo has done 12 of 40 iterations and is at work in this process."""
    for name, seconds in (("sft", 83.2), ("compare", 59.0), ("rm", 121.0)):
        done(run, name, seconds)
    jsonl(run / "sft/metrics.jsonl", [{"step": k, "loss": 5 - k / 10, "pairs": 0.0} for k in range(1, 11)], 600)
    jsonl(run / "rm/metrics.jsonl", [{"step": k, "loss": 0.7 - k / 100, "accuracy": 0.5 + k / 40}
                                     for k in range(1, 11)], 300)
    lock(run, os.getpid(), 600)
    begun(run, "ppo", 125)
    jsonl(run / "ppo/metrics.jsonl", [iteration(k) for k in range(1, iterations + 1)], 3)
    text(run / "ppo/checkpoints/step-00000011/manifest.json", "{}", 7)
    text(run / "ppo/checkpoints/step-00000010/manifest.json", "{}", 11)
    text(run / "ppo/checkpoints/.step-00000012.tmp/manifest.json", "{}")
    return run
