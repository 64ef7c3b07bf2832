"""Where the numbers of a PPO iteration go: metrics.jsonl, the console, Ray's metrics, and wandb if asked for.

A few of its responses go to samples.jsonl, and to wandb.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rlhf_ray.core.types import SampleText
from rlhf_ray.disk import Log
from rlhf_ray.metrics.gauges import Gauges
from rlhf_ray.metrics.progress import console
from rlhf_ray.metrics.wandb_run import WandbRun

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
# (key, label on the console, format)
_SHOWN = (
    ("score", "score", ".2f"),
    ("judge_score", "judge", ".2f"),
    ("kl_per_sequence", "kl", ".1f"),
    ("entropy", "entropy", ".1f"),
    ("response_length", "len", ".0f"),
    ("clip_fraction", "clip", ".0%"),
)


class Recorder:
    """Appends to `<run_dir>/metrics.jsonl` and `samples.jsonl`, prints, sets Ray's gauges, and forwards to wandb.

    run_dir: `<output_dir>/<stage>`; the gauges' label `run` is the name of the output_dir.
    wandb_mode: disabled, offline or online. config: the run's configuration, which wandb keeps; its `ppo.iterations`
    is the total on the console line.
    """

    def __init__(self, run_dir: Path, wandb_mode: str, project: str, config: dict[str, Any]) -> None:
        self._total: int | None = (config.get("ppo") or {}).get("iterations")
        self._files = {name: Log(run_dir / name) for name in (METRICS, SAMPLES)}
        self._gauges = Gauges(run_dir.resolve().parent.name)
        self._wandb: WandbRun | None = None
        if wandb_mode != "disabled":
            goes_on = self._files[METRICS].sync() > 0  # a stage that goes on is the same run there
            self._wandb = WandbRun(run_dir, wandb_mode, project, config, goes_on, self._total)

    def log(self, iteration: int, values: Mapping[str, Any], samples: Sequence[SampleText] = ()) -> None:
        """Record one iteration (1-based): numbers, and dicts of numbers such as `seconds` by phase.

        Raises UserError if the disk is full or read-only.
        """
        self._files[METRICS].add(json_lines({"iteration": iteration, **values}))
        self._files[SAMPLES].add(json_lines(*({"iteration": iteration, **asdict(sample)} for sample in samples)))
        console.print(console_line(iteration, self._total, values), markup=False, soft_wrap=True)
        self._gauges.set({"running": 1, "iteration": iteration, **values})
        if self._wandb is not None:
            self._wandb.log(iteration, values, samples)

    def log_model(self, directory: Path) -> None:
        """The model that was made, for wandb."""
        if self._wandb is not None:
            self._wandb.model(directory)

    @property
    def positions(self) -> dict[str, int]:
        """Length of each file, bytes; what was recorded so far is on the disk when this returns."""
        return {name: file.sync() for name, file in self._files.items()}

    def rewind(self, positions: Mapping[str, int]) -> None:
        """Forget everything after `positions`: a resumed run records it again."""
        for name, file in self._files.items():
            file.rewind(positions[name])

    def close(self) -> None:
        """Close the files and finish the wandb run; a second call does nothing."""
        for file in self._files.values():
            file.close()
        self._gauges.set({"running": 0})
        if self._wandb is not None:
            self._wandb.close()
            self._wandb = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def console_line(iteration: int, total: int | None, values: Mapping[str, Any]) -> str:
    """One iteration for a person: `ppo 12/40  score 0.61  kl 6.3  clip 4%  5.2 s (rollout 1.1 update 2.8)`.

    What `values` lacks is left out; times are in seconds.
    """
    parts = [f"ppo {iteration}" if total is None else f"ppo {iteration:>{len(str(total))}}/{total}"]
    parts += [f"{label} {values[key]:{form}}" for key, label, form in _SHOWN if values.get(key) is not None]
    seconds: Mapping[str, float] = values.get("seconds") or {}
    if seconds:
        phases = " ".join(f"{name.removeprefix('weight_')} {s:.1f}" for name, s in seconds.items())
        parts.append(f"{sum(seconds.values()):.1f} s ({phases})")
    return "  ".join(parts)


def read_history(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of `<run_dir>/metrics.jsonl`, oldest first; empty where there is none."""
    path = run_dir / METRICS
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def json_lines(*rows: Mapping[str, Any]) -> bytes:
    """A line for each. JSON has no NaN or infinity: these become null."""
    return "".join(json.dumps(_plain(row), allow_nan=False) + "\n" for row in rows).encode()


def _plain(value: Any) -> Any:
    """Numbers of numpy and torch as Python's, non-finite ones as None, through dicts and lists."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
