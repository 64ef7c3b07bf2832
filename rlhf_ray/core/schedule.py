"""Learning-rate schedule: a pure function of the optimizer step."""

import math


def lr_scale(step: int, total_steps: int, warmup_ratio: float, schedule: str, min_lr_ratio: float) -> float:
    """Learning rate of optimizer step `step` (from 0, after accumulation) as a share of the peak.

    Of `total_steps`, round(warmup_ratio * total_steps) = W rise linearly: 1/W, 2/W, ..., 1. From that peak
    (step 0 if W = 0) `cosine` and `linear` fall and reach `min_lr_ratio` on the last step; `constant` stays
    at 1. Steps past the last keep its rate. Raises ValueError for an unknown schedule, a negative step or
    total_steps < 1.
    """
    if step < 0 or total_steps < 1:
        raise ValueError(f"step ({step}) must be at least 0 and total_steps ({total_steps}) at least 1")
    if schedule not in ("cosine", "linear", "constant"):
        raise ValueError(f"unknown learning-rate schedule {schedule!r}: cosine, linear or constant")
    warmup_steps = round(warmup_ratio * total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    peak = max(warmup_steps - 1, 0)
    progress = min(1.0, (step - peak) / max(1, total_steps - 1 - peak))
    remaining = 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return min_lr_ratio + (1 - min_lr_ratio) * remaining
