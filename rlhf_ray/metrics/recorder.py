"""Where the numbers of an iteration or a step go: metrics.jsonl, the console, Ray's metrics, and wandb if asked for.

A few responses of a PPO iteration go to samples.jsonl, and to wandb.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from rlhf_ray.core.types import SampleText
from rlhf_ray.disk import Log
from rlhf_ray.metrics.gauges import Gauges
from rlhf_ray.metrics.progress import console
from rlhf_ray.metrics.wandb_run import WandbRun
from rlhf_ray.storage import run_name

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


class Listeners:
    """Who hears of a stage's numbers besides its files: Ray's gauges, and wandb if asked for.

    From here on the stage is `running`, at the iteration or step `done`, so that one that never ends its first is seen.
    run_dir: `<output_dir>/<stage>`. counted: iteration or step. wandb_mode: disabled, offline or online. config: the
    run's configuration, which wandb keeps. done: how many were before; a stage that goes on is the same run there.
    total: None if not known.
    """

    def __init__(self, run_dir: Path, counted: str, wandb_mode: str, project: str, config: Mapping[str, Any],
                 done: int, total: int | None) -> None:
        self._wandb: WandbRun | None = None
        if wandb_mode != "disabled":
            self._wandb = WandbRun(run_dir, wandb_mode, project, config, done > 0, total)
        self._counted, self._gauges = counted, Gauges(run_name(run_dir.parent), run_dir.name)
        self._gauges.set({"running": 1, counted: done})

    def log(self, number: int, values: Mapping[str, Any], samples: Sequence[SampleText] = ()) -> None:
        """One iteration or step (1-based)."""
        self._gauges.set({self._counted: number, **values})
        if self._wandb is not None:
            self._wandb.log(number, values, samples)

    def model(self, directory: Path) -> None:
        """The model that was made."""
        if self._wandb is not None:
            self._wandb.model(directory)

    def close(self) -> None:
        """The stage runs no more; a second call does nothing."""
        self._gauges.set({"running": 0})
        self._gauges.close()
        if self._wandb is not None:
            self._wandb.close()
            self._wandb = None


class Recorder:
    """Of ppo: appends to `<run_dir>/metrics.jsonl` and `samples.jsonl`, prints, and tells Listeners.

    The parameters are those of Listeners; `ppo.iterations` of config is the total on the console line.
    """

    def __init__(self, run_dir: Path, wandb_mode: str, project: str, config: Mapping[str, Any], done: int = 0) -> None:
        self._total: int | None = (config.get("ppo") or {}).get("iterations")
        self._files = {name: Log(run_dir / name) for name in (METRICS, SAMPLES)}
        self._listeners = Listeners(run_dir, "iteration", wandb_mode, project, config, done, self._total)

    def log(self, iteration: int, values: Mapping[str, Any], samples: Sequence[SampleText] = ()) -> None:
        """Record one iteration (1-based): numbers, and dicts of numbers such as `seconds` by phase.

        Raises UserError if the disk is full or read-only.
        """
        self._files[METRICS].add(json_lines({"iteration": iteration, **values}))
        self._files[SAMPLES].add(json_lines(*({"iteration": iteration, **asdict(sample)} for sample in samples)))
        console.print(console_line(iteration, self._total, values), markup=False, soft_wrap=True)
        self._listeners.log(iteration, values, samples)

    def log_model(self, directory: Path) -> None:
        """The model that was made, for wandb."""
        self._listeners.model(directory)

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
        self._listeners.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
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
