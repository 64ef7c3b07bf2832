"""Numbers as a line of text: a series as a sparkline, shares as the parts of a bar."""

import math
from collections.abc import Sequence
from typing import Any

_BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float | None], width: int) -> str:
    """At most `width` characters, low to high from the least to the largest; a gap where nothing is finite.

    More values than that are averaged, neighbours with neighbours. All equal: the middle.
    """
    width = min(width, len(values))
    parts = [values[i * len(values) // width : (i + 1) * len(values) // width] for i in range(width)]
    finite = [[v for v in map(number, part) if v is not None] for part in parts]
    means = [number(sum(some) / len(some)) if some else None for some in finite]
    there = [m for m in means if m is not None]
    low, high = min(there, default=0.0) / 2, max(there, default=0.0) / 2  # halves, so that no difference overflows
    return "".join(" " if m is None else _BARS[3] if low == high else
                   _BARS[min(7, int(8 * ((m / 2 - low) / (high - low))))] for m in means)


def apportion(shares: Sequence[float], width: int) -> list[int]:
    """Whole numbers that add up to `width`, in proportion to `shares`, each less than 1 away (largest remainders)."""
    if sum(shares) <= 0:
        return [0] * len(shares)
    exact = [share / sum(shares) * width for share in shares]
    parts = [int(x) for x in exact]
    for i in sorted(range(len(parts)), key=lambda i: parts[i] - exact[i])[: width - sum(parts)]:
        parts[i] += 1
    return parts


def number(value: Any) -> float | None:
    """A recorded number; None where it is absent or not finite."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
