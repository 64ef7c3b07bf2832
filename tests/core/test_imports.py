"""`rlhf_ray.core` is pure maths: torch, numpy and the standard library."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOREIGN = {"ray", "vllm", "deepspeed", "transformers", "hydra", "omegaconf", "wandb"}


def loaded_by(code: str) -> set[str]:
    """Names of all modules in a fresh interpreter after `code`."""
    script = f"{code}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_core_pulls_in_no_engine():
    files = [p.relative_to(ROOT).with_suffix("") for p in (ROOT / "rlhf_ray/core").rglob("*.py")]
    names = [".".join(f.parts) for f in files if f.stem != "__init__"]
    assert {"rlhf_ray.core.losses", "rlhf_ray.core.algorithms.grpo"} <= set(names)
    loaded = loaded_by(f"import {', '.join(names)}")
    assert set(names) <= loaded
    assert not {name.split(".")[0] for name in loaded} & FOREIGN
    other_rooms = {n for n in loaded if n.startswith("rlhf_ray.") and not n.startswith("rlhf_ray.core")}
    assert not other_rooms
