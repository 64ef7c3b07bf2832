"""Shards, the parts in which a batch is sampled and scored: how large they are, and which of them a rank reads."""

import numpy as np


def shard_sizes(responses: int, largest: int) -> list[int]:
    """How many responses each shard of an engine has, in the order in which they finish.

    As many as may be; the last shard is cut into a half and two quarters. The last responses take longest and keep
    everybody waiting, so those before them had better be scored by then.
    """
    full = max(0, responses - 1) // largest
    last = responses - full * largest
    half, rest = last - last // 2, last // 2
    return [size for size in (*[largest] * full, half, rest - rest // 2, rest // 2) if size]


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
