"""A model and a configuration small enough for seconds, on the real Ray, vLLM and DeepSpeed."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from rlhf_ray.config.load import compose
from rlhf_ray.config.schema import Config
from rlhf_ray.stages import ppo

WORDS = ["the", "film", "was", "a", "good", "bad", "long", "short", "story", "about", "love", "war", "and", "people",
         "who", "laugh", "cry", "run", "sing", "tell"]
TEXTS = [" ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 40)) + "." for i in range(1, 60)]

ITERATIONS = 20


def small_config(path: str = "") -> Config:
    """One process per role, 64 tokens of context."""
    cfg = Config()
    cfg.model.path, cfg.model.max_length = path, 64
    cfg.data.max_prompt_tokens = 24
    cfg.logging.wandb = "disabled"  # test_watching.py and test_pipeline.py have it
    cfg.roles.generator.threads = 1
    return cfg


def ray_processes() -> set[int]:
    """Every process of every Ray on this machine."""
    names = ("raylet", "gcs_server", "ray::", "ray/_private", "ray/dashboard")
    return {
        p.pid for p in psutil.process_iter(["cmdline"])
        if any(name in " ".join(p.info["cmdline"] or []) for name in names)
    }


def until(condition: Callable[[], Any], what: str | Callable[[], str], seconds: float = 90.0) -> Any:
    """Wait until the condition holds, and return it; else fail and say what."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, what if isinstance(what, str) else what()
        time.sleep(0.3)
    return found


def ppo_run(
    directory: Path, start: str, reward: str, algorithm: str, sources: list[str] | None = None,
    minibatch_size: int = 8, old_logprobs: str = "learner", **change: int,
) -> list[dict[str, Any]]:
    """metrics.jsonl of a run of the ppo stage on made-up prompts. change: of cfg.roles, as ROLE_OPTION=value."""
    cfg = ppo_config(directory, start, algorithm)
    cfg.reward.sources = sources or cfg.reward.sources
    cfg.algorithm.minibatch_size, cfg.algorithm.old_logprobs = minibatch_size, old_logprobs
    for key, value in change.items():
        section, name = key.split("_", 1)
        setattr(getattr(cfg.roles, section), name, value)
    earlier_stages(directory, start, reward)
    ppo.run(cfg)
    return [json.loads(line) for line in (directory / "ppo/metrics.jsonl").read_text().splitlines()]


def earlier_stages(directory: Path, start: str, reward: str) -> None:
    """As if sft and rm had made these models."""
    for stage, model in (("sft", start), ("rm", reward)):
        (directory / stage).mkdir(parents=True)
        (directory / stage / "model").symlink_to(model)
        (directory / stage / "stage.json").write_text("{}")


def ppo_config(directory: Path, start: str, algorithm: str) -> Config:
    chosen = compose(["experiment=null", f"algorithm={algorithm}"])
    cfg = small_config(start)
    cfg.output_dir, cfg.stages, cfg.algorithm, cfg.rollout = str(directory), ["ppo"], chosen.algorithm, chosen.rollout
    directory.mkdir(parents=True, exist_ok=True)
    prompts, texts = directory / "prompts.jsonl", directory / "texts.txt"
    prompts.write_text("".join(json.dumps({"prompt": f"tell of {a} and {b}"}) + "\n" for a in WORDS for b in WORDS[:3]))
    texts.write_text("\n\n".join(TEXTS))
    cfg.data.source, cfg.data.ppo_prompts, cfg.data.texts = "files", str(prompts), str(texts)
    cfg.rollout.batch_size, cfg.rollout.max_response_tokens, cfg.algorithm.minibatch_size = 16, 12, 8
    cfg.algorithm.kl_coef, cfg.algorithm.ptx_blocks, cfg.roles.generator.shard_size = 0.1, 2, 4
    cfg.ppo.iterations = ITERATIONS
    for optimizer in (cfg.ppo.policy_optimizer, cfg.ppo.critic_optimizer):
        optimizer.lr, optimizer.eps, optimizer.schedule = 1e-3, 1e-4, "constant"
    return cfg
