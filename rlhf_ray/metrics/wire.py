"""An overview as a few kilobytes of JSON, and back: how a run is watched from where its files cannot be read.

What the terminal would not show is left out: curves are thinned, texts cut, of many actors those that grew most are
named.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from rlhf_ray.metrics.overview import Actor, Holder, Overview, Policy, Ring, Sample, Saved, Series, Stage

POINTS = 60  # of a curve: as many as the widest view has columns for
TEXT = 240  # characters of a prompt, a response, a message
ACTORS, POST_MORTEMS = 8, 5  # how many are named


def to_json(overview: Overview) -> str:
    """At most about 16 KiB, whatever the run."""
    p = overview.policy
    small = replace(
        overview,
        holder=overview.holder and replace(overview.holder, command=overview.holder.command[:TEXT]),
        stages=[replace(s, why=s.why[:TEXT], series={key: thinned(values, POINTS) for key, values in s.series.items()},
                        post_mortems=s.post_mortems[-POST_MORTEMS:]) for s in overview.stages],
        policy=p and replace(
            p, memory=_most(p.memory), paused=p.paused and p.paused[:TEXT],
            alarms=[replace(a, message=a.message[:TEXT]) for a in p.alarms],
            samples=[replace(s, prompt=s.prompt[-TEXT:], response=s.response[:TEXT]) for s in p.samples]),
    )
    return json.dumps(_short(asdict(small)), default=str, ensure_ascii=False, separators=(",", ":"))


def from_json(text: str) -> Overview:
    """What `to_json` was given. Raises ValueError if it is of another version of rlhf-ray, or was never one."""
    try:
        tree: dict[str, Any] = json.loads(text)
        holder, policy = tree["holder"], tree["policy"]
        return Overview(
            Path(tree["directory"]), Holder(**holder) if holder else None, [_stage(s) for s in tree["stages"]],
            _policy(policy) if policy else None, tree["heard"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"not the overview of a run: {error}") from error


def thinned(values: Sequence[float | None], points: int) -> Series:
    """At most `points` values: means of neighbours, but the last, the least and the greatest as they are."""
    if len(values) <= points:
        return list(values)
    body, n = values[:-1], points - 1
    starts = [i * len(body) // n for i in range(n + 1)]
    parts = [[v for v in body[a:b] if v is not None] for a, b in pairwise(starts)]
    means: Series = [sum(part) / len(part) if part else None for part in parts]
    finite = [(v, k) for k, v in enumerate(body) if v is not None]
    if finite:
        low, high = min(finite), max(finite)
        i, j = (bisect_right(starts, k) - 1 for _, k in (low, high))
        if i == j and low != high:
            j = i - 1 if i else 1  # there is room for both
        means[i], means[j] = low[0], high[0]
    return [*means, values[-1]]


def _most(memory: Sequence[Actor]) -> list[Actor]:
    """Those that grew most, and the sum of the others."""
    ordered = sorted(memory, key=lambda a: -(a.growth or 0.0))
    if len(ordered) <= ACTORS:
        return ordered
    others = ordered[ACTORS - 1 :]
    return [*ordered[: ACTORS - 1], Actor(f"{len(others)} others", sum(a.gib for a in others), None)]


def _short(value: Any) -> Any:
    """Floats with 7 digits, through dicts and lists."""
    if isinstance(value, Mapping):
        return {key: _short(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_short(entry) for entry in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _stage(tree: dict[str, Any]) -> Stage:
    saved = tree.pop("saved")
    return Stage(**tree | {"saved": Saved(**saved) if saved else None,
                           "post_mortems": [Path(path) for path in tree["post_mortems"]]})


def _policy(tree: dict[str, Any]) -> Policy:
    return Policy(**tree | {"memory": [Actor(**a) for a in tree["memory"]],
                            "alarms": [Ring(**a) for a in tree["alarms"]],
                            "samples": [Sample(**s) for s in tree["samples"]]})
