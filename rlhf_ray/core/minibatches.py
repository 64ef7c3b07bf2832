"""Which rollouts make up each optimizer step, and which rank computes which of them."""

import numpy as np


def plan_minibatches(
    lengths: np.ndarray, num_ranks: int, minibatch_size: int, epochs: int, rng: np.random.Generator
) -> list[list[np.ndarray]]:
    """Optimizer steps; each a list over ranks of rollout numbers, int64 [n], n >= 0.

    lengths int [N]: tokens per rollout. Every epoch shuffles all N rollouts and cuts them into minibatches of
    `minibatch_size`; the last, smaller one is kept. Membership depends on N, minibatch_size, epochs and rng
    alone, never on num_ranks, so one rank and many make the same updates. Within a minibatch ranks are
    balanced by tokens; with fewer rollouts than ranks some get none. Raises ValueError for a count below 1.
    """
    if num_ranks < 1 or minibatch_size < 1 or epochs < 1:
        raise ValueError(f"below 1: {num_ranks=}, {minibatch_size=} or {epochs=}")
    lengths = np.asarray(lengths)
    steps = []
    for _ in range(epochs):
        order = rng.permutation(len(lengths))
        for start in range(0, len(order), minibatch_size):
            steps.append(balance(order[start : start + minibatch_size], lengths, num_ranks))
    return steps


def balance(rollouts: np.ndarray, lengths: np.ndarray, num_ranks: int) -> list[np.ndarray]:
    """Longest first, each to the rank with the fewest tokens: at most 4/3 of the best possible (Graham
    1969)."""
    loads = [0] * num_ranks
    parts: list[list[int]] = [[] for _ in range(num_ranks)]
    for rollout in sorted(rollouts.tolist(), key=lambda i: -int(lengths[i])):
        rank = loads.index(min(loads))
        parts[rank].append(rollout)
        loads[rank] += int(lengths[rollout])
    return [np.array(part, dtype=np.int64) for part in parts]
