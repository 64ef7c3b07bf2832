"""Numbers as text, by hand."""

import math

import pytest

from rlhf_ray.metrics.sparkline import apportion, number, sparkline


@pytest.mark.parametrize(("values", "width", "line"), [
    ([], 5, ""),
    ([0, 1, 2, 3, 4, 5, 6, 7], 8, "▁▂▃▄▅▆▇█"),
    ([0, 7], 8, "▁█"),  # never wider than the series
    ([3.0, 3.0], 8, "▄▄"),
    ([0, 0, 8, 8, 4, 4], 3, "▁█▅"),  # means of two: 0, 8, 4; 4 is half of the range, the fifth of eight levels
    ([0, 2, 4, 6, 100], 2, "▁█"),  # means of 0, 2 and of 4, 6, 100
    ([0, None, 7, math.nan, math.inf], 5, "▁ █  "),
    ([0, None, 7, 7], 2, "▁█"),  # the mean of what is there
    ([None, None], 2, "  "),
    ([-1.5e308, 0, 1.5e308], 3, "▁▅█"),
    ([1e308, 1e308, 0, 0], 2, " ▄"),  # a mean that overflows is not finite
])
def test_sparkline(values: list[float | None], width: int, line: str) -> None:
    assert sparkline(values, width) == line


@pytest.mark.parametrize(("shares", "width", "parts"), [
    ([1, 3], 80, [20, 60]),
    ([1, 1, 1], 10, [4, 3, 3]),  # 3.33 each; the first gets what is left
    ([1.5, 1.3, 0.02, 3.1], 10, [3, 2, 0, 5]),  # 2.53, 2.20, 0.03, 5.24
    ([0, 0], 10, [0, 0]),
    ([], 10, []),
])
def test_parts_of_a_bar(shares: list[float], width: int, parts: list[int]) -> None:
    assert apportion(shares, width) == parts


def test_number() -> None:
    assert [number(v) for v in (1, 0.5, None, math.nan, -math.inf, "1")] == [1.0, 0.5, None, None, None, None]
