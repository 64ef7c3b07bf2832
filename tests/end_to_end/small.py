"""A model and a configuration small enough for seconds, on the real Ray, vLLM and DeepSpeed."""

import psutil

from rlhf_ray.config.schema import Config

WORDS = ["the", "film", "was", "a", "good", "bad", "long", "short", "story", "about", "love", "war", "and", "people",
         "who", "laugh", "cry", "run", "sing", "tell"]
TEXTS = [" ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 40)) + "." for i in range(1, 60)]


def small_config(path: str = "") -> Config:
    """One process per role, 64 tokens of context."""
    cfg = Config()
    cfg.model.path, cfg.model.max_length = path, 64
    cfg.data.max_prompt_tokens = 24
    cfg.roles.generator.threads = 1
    return cfg


def ray_processes() -> set[int]:
    """Every process of every Ray on this machine."""
    names = ("raylet", "gcs_server", "ray::", "ray/_private", "ray/dashboard")
    return {
        p.pid for p in psutil.process_iter(["cmdline"])
        if any(name in " ".join(p.info["cmdline"] or []) for name in names)
    }
