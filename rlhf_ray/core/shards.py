"""Shards, the parts in which a batch is sampled and scored: how large they are, and which of them a rank reads."""

import numpy as np


def shard_sizes(responses: int, largest: int, least: int = 1) -> list[int]:
    """How many responses each shard of an engine has, in the order in which they finish.

    As many as may be; the last shard is cut into a half and two quarters, unless these had fewer than `least`. The last
    responses take longest and keep everybody waiting, so those before them had better be scored by then.
    """
    full = max(0, responses - 1) // largest
    last = [responses - full * largest]
    for _ in range(2):
        small = last[-1] // 2
        if small >= least:
            last[-1:] = [last[-1] - small, small]
    return [size for size in (*[largest] * full, *last) if size]


def of_rank(steps: list[np.ndarray], sizes: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """What one rank reads of a batch in shards, and its part of each optimizer step in numbers of that alone.

    steps: rollout numbers, each int64 [n]; sizes int [S]: rollouts in each shard. Returns the shards that hold any of
    them, ascending, the first if there are none, and the steps with rollouts numbered through these shards.
    """
    ends = np.cumsum(sizes)
    homes = [np.searchsorted(ends, rollouts, side="right") for rollouts in steps]
    shards = np.unique(np.concatenate(homes)) if any(map(len, homes)) else np.zeros(1, dtype=np.int64)
    left_out = np.zeros(len(sizes), dtype=np.int64)  # before each shard that is read
    left_out[shards] = ends[shards] - np.cumsum(sizes[shards])
    return shards, [rollouts - left_out[home] for rollouts, home in zip(steps, homes, strict=True)]
