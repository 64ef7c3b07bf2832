import math

import pytest

from rlhf_ray.core.schedule import lr_scale

HALF = math.sqrt(0.5)


@pytest.mark.parametrize(
    ("total", "warmup", "schedule", "minimum", "expected"),
    [
        # 8 steps, W = 4: 1/4, 2/4, 3/4, 1 (the peak), then 4 steps down to the minimum
        (8, 0.5, "linear", 0.0, [0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25, 0.0]),
        (8, 0.5, "linear", 0.2, [0.25, 0.5, 0.75, 1.0, 0.8, 0.6, 0.4, 0.2]),
        (8, 0.5, "cosine", 0.0, [0.25, 0.5, 0.75, 1.0, (1 + HALF) / 2, 0.5, (1 - HALF) / 2, 0.0]),
        (8, 0.5, "constant", 0.0, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
        # no warm-up: the peak is step 0
        (5, 0.0, "linear", 0.0, [1.0, 0.75, 0.5, 0.25, 0.0]),
        (5, 0.0, "cosine", 0.5, [1.0, 0.75 + HALF / 4, 0.75, 0.75 - HALF / 4, 0.5]),
        # warm-up only, and a single step
        (4, 1.0, "cosine", 0.1, [0.25, 0.5, 0.75, 1.0]),
        (1, 0.03, "cosine", 0.1, [1.0]),
        # 0.07 * 100 is 7.000000000000001, which must not be rounded up to 8
        (100, 0.07, "constant", 0.0, [i / 7 for i in range(1, 7)] + [1.0] * 94),
    ],
)
def test_by_hand(total, warmup, schedule, minimum, expected):
    assert [lr_scale(s, total, warmup, schedule, minimum) for s in range(total)] == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_steps_past_the_end_keep_the_last_rate(schedule):
    assert lr_scale(500, 8, 0.5, schedule, 0.1) == pytest.approx(0.1)


BAD = [(-1, 8, "linear"), (0, 0, "linear"), (0, 8, "cosin")]


@pytest.mark.parametrize(("step", "total", "schedule"), BAD)
def test_bad_arguments(step, total, schedule):
    with pytest.raises(ValueError):
        lr_scale(step, total, 0.1, schedule, 0.0)
