"""Is this the run that the checkpoint is of? What may change when a stage goes on, and what may not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rlhf_ray.config.schema import Config
from rlhf_ray.errors import UserError
from rlhf_ray.metrics.progress import console
from rlhf_ray.versions import find, installed

# May change between a checkpoint and the run that goes on from it: sections and keys. Files may move: what is in them
# is in the fingerprints of models and data.
FREE = ("output_dir", "roles", "weight_sync", "cluster", "logging", "alarms", "checkpoint", "eval",
        "ppo.iterations", "model.path", *(f"data.{name}" for name in (
            "demonstrations", "comparisons", "compare_prompts", "ppo_prompts", "eval_prompts", "texts", "eval_texts")))
# Their versions can change the last digits.
_COMPUTES = ("python", "torch", "vllm", "deepspeed", "transformers", "ray", "numpy", "safetensors")


def identity_of(
    stage: str, cfg: Config, data: str, models: Mapping[str, str], rewards: Mapping[str, str]
) -> dict[str, Any]:
    """What a checkpoint records of its run. Fingerprints, each short enough to be shown in one line: of the data; of
    models, by name; of the code of reward functions, by source."""
    versions = {name: version for name, version in installed().items() if name in _COMPUTES}
    return {"stage": stage, "config": asdict(cfg), "data": data, "models": dict(models),
            "rewards": dict(rewards),
            "versions": versions | {"rlhf_ray": find("rlhf-ray") or "checkout"}}


def differences(saved: Mapping[str, Any], now: Mapping[str, Any], sections: Sequence[str]) -> list[str]:
    """What makes `now` another run than `saved`, a line each; nothing if it may go on from a checkpoint of that.

    sections: of the configuration, what the stage's result depends on. Keys that only one of the two has come from
    another version of rlhf_ray and are passed over.
    """
    lines = [f"{key} was {was} in the checkpoint, is {new} now" for key, was, new
             in _changes(dict(_leaves(saved["config"])), dict(_leaves(now["config"])))
             if _within(key, sections) and not _within(key, FREE)]
    if saved["data"] != now["data"]:
        lines.append(f"the data of the run changed: fingerprint was {saved['data']}, is {now['data']}")
    lines += [f"the model `{name}` changed: fingerprint was {was}, is {new}"
              for name, was, new in _changes(saved["models"], now["models"])]
    return lines


def check_same_run(saved: Mapping[str, Any], now: Mapping[str, Any], sections: Sequence[str]) -> None:
    """Raise UserError, a line per difference, unless a run `now` may go on from a checkpoint of the run `saved`.

    What may change and can change the result all the same gets a line on the console: other versions of what computes,
    and reward functions, which are mended while a run stands still.
    """
    stage, lines = now["stage"], differences(saved, now, sections)
    if lines:
        lines += ["the checkpoint is of another run: set these back, start over with resume=never, or use another "
                  "output_dir", f"what may change when a run goes on: {', '.join(FREE)}"]
        raise UserError("\n".join(f"{stage}: {line}" for line in lines))
    others = [f"{name} {was}, now {new}" for name, was, new in _changes(saved["versions"], now["versions"])]
    if others:
        console.print(f"{stage}: the checkpoint was made with other versions ({'; '.join(others)}): results may differ "
                      "in the last digits", markup=False)
    for source, _, _ in _changes(saved["rewards"], now["rewards"]):
        console.print(f"{stage}: {source} was edited since the checkpoint: from here on it scores as it says now",
                      markup=False)


def _changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, saved value, value now) of what both have and differs."""
    return [(key, saved[key], now[key]) for key in saved if key in now and saved[key] != now[key]]


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _within(key: str, sections: Sequence[str]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)
