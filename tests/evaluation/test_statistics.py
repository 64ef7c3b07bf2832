"""Intervals and counts against numbers derived by hand, scipy, and simulation."""

import numpy as np
import pytest
from scipy import stats

from rlhf_ray.evaluation.statistics import (
    _newcombe,
    accuracy,
    accuracy_gain,
    cluster_interval,
    distinct_n,
    win_rate,
)


def wilson(successes: int, n: int) -> tuple[float, float]:
    found = stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
    return found.low, found.high


def test_win_rate_counts_by_hand():
    # Differences 1.0, -0.5, 0.05, 0.1, 0.3 at margin 0.1: win, loss, tie, tie (at the margin), win.
    result = win_rate([1.0, 0.0, 0.05, 0.1, 0.3], [0.0, 0.5, 0.0, 0.0, 0.0], 0.1, 200, seed=0)
    assert (result.wins, result.ties, result.losses, result.n) == (2, 2, 1, 5)
    assert result.rate == pytest.approx(0.6)
    assert result.ci95[0] < 0.6 < result.ci95[1]
    shown = result.to_dict()
    assert shown["ci95"] == list(result.ci95)
    assert set(shown) == {"wins", "ties", "losses", "rate", "ci95", "n"}


def test_win_rate_swaps_sides():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.3, 1, 200), rng.normal(0, 1, 200)
    forth, back = win_rate(a, b, 0.1, 5000, 0), win_rate(b, a, 0.1, 5000, 0)
    assert (forth.wins, forth.ties, forth.losses) == (back.losses, back.ties, back.wins)
    assert forth.rate == pytest.approx(1 - back.rate)
    assert forth.ci95[0] == pytest.approx(1 - back.ci95[1], abs=0.01)


@pytest.mark.parametrize(("a", "rate"), [(1.0, 1.0), (0.0, 0.5), (-1.0, 0.0)])
def test_win_rate_of_equal_outcomes_is_not_a_point(a, rate):
    n = 50
    result = win_rate(np.full(n, a), np.zeros(n), 0.1, 1000, 0)
    assert result.rate == rate
    assert result.ci95[1] - result.ci95[0] > 0.05
    if rate == 1.0:  # Wilson at p = 1: [n / (n + z^2), 1]
        assert result.ci95 == pytest.approx((n / (n + 1.959964**2), 1.0))


def test_win_rate_is_never_narrower_than_wilson():
    scores = np.r_[np.ones(509), -np.ones(3)]
    result, (low, high) = win_rate(scores, np.zeros(512), 0.1, 5000, 0), wilson(509, 512)
    assert result.ci95[0] <= low + 1e-12
    assert result.ci95[1] >= high - 1e-12


@pytest.mark.parametrize("probabilities", [(0.5, 0.0, 0.5), (0.75, 0.08, 0.17), (0.97, 0.0, 0.03)])
def test_win_rate_interval_covers_the_truth(probabilities):
    rng, truth, sets = np.random.default_rng(7), probabilities[0] + probabilities[1] / 2, 400
    covered = 0
    for _ in range(sets):
        scores = rng.choice([1.0, 0.0, -1.0], p=probabilities, size=300)
        low, high = win_rate(scores, np.zeros(300), 0.1, 1000, 0).ci95
        covered += low <= truth <= high
    assert 0.92 <= covered / sets <= 0.98


def test_win_rate_with_many_ties_covers_at_least_the_level():
    rng, covered = np.random.default_rng(3), 0
    for _ in range(400):
        scores = rng.choice([1.0, 0.0, -1.0], p=(0.3, 0.6, 0.1), size=300)
        low, high = win_rate(scores, np.zeros(300), 0.1, 1000, 0).ci95
        covered += low <= 0.6 <= high
    assert covered / 400 >= 0.95


@pytest.mark.parametrize(
    ("a", "b", "margin"),
    [
        ([], [], 0.1),
        ([1.0], [1.0, 2.0], 0.1),
        ([np.nan], [0.0], 0.1),
        ([1.0], [0.0], -0.1),
        ([[1.0]], [[1.0]], 0.1),
    ],
)
def test_win_rate_refuses(a, b, margin):
    with pytest.raises(ValueError):
        win_rate(a, b, margin, 100, 0)


@pytest.mark.parametrize(("successes", "n"), [(0, 7), (3, 7), (7, 7), (412, 512)])
def test_cluster_interval_of_equal_prompts_is_scipys_wilson(successes, n):
    """n prompts, each with the accuracy successes / n."""
    found = cluster_interval(np.full(n, successes), np.full(n, n))
    assert found == pytest.approx(wilson(successes, n), abs=1e-12)


def test_cluster_interval_covers_the_truth_where_pairs_of_a_prompt_go_together():
    rng, sets, groups, pairs = np.random.default_rng(5), 400, 150, 6
    covered = naive = 0
    for _ in range(sets):
        correct = rng.binomial(pairs, rng.beta(2, 1, size=groups))  # mean 2/3, far more spread than binomial
        low, high = cluster_interval(correct, np.full(groups, pairs), 1000, seed=1)
        covered += low <= 2 / 3 <= high
        low, high = wilson(int(correct.sum()), groups * pairs)
        naive += low <= 2 / 3 <= high
    assert 0.92 <= covered / sets <= 0.98
    assert naive / sets < 0.90  # why pairs must not be counted as independent


def test_cluster_interval_weighs_by_pairs_and_never_collapses():
    low, high = cluster_interval([6, 6, 6], [6, 6, 6])
    assert (low, high) == pytest.approx(wilson(3, 3))
    # Two groups: the four equally likely draws have accuracies 0, 9/10 twice, 1.
    assert cluster_interval([0, 9], [1, 9], 4000) == pytest.approx((0.0, 1.0))
    for bad in (([], []), ([1], [1, 2]), ([2], [1]), ([0], [0])):
        with pytest.raises(ValueError):
            cluster_interval(*bad)


def test_distinct_n_by_hand():
    # (a, b), (b, a), (a, b) and (a, b): two unique of four; pairs do not cross texts.
    assert distinct_n(["a b A b", "a  b"]) == pytest.approx(2 / 4)
    assert distinct_n(["a b A b"], n=1) == pytest.approx(2 / 4)
    assert distinct_n(["x", ""]) == 0.0
    with pytest.raises(ValueError):
        distinct_n(["a"], n=0)


# -- right answers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("right", "n"), [(0, 7), (3, 7), (7, 7), (412, 512)])
def test_accuracy_has_scipys_wilson_interval(right, n):
    found = accuracy(np.arange(n) < right)
    assert (found.right, found.n, found.rate) == (right, n, right / n)
    assert found.ci95 == pytest.approx(wilson(right, n), abs=1e-12)
    assert found.to_dict() == {"right": right, "n": n, "rate": right / n, "ci95": list(found.ci95)}


def test_accuracy_gain_by_hand():
    """Of 5 prompts a alone is right on 2, b alone on 1: (2 - 1) / 5."""
    a, b = np.array([1, 1, 0, 1, 0], bool), np.array([0, 0, 1, 1, 0], bool)
    found = accuracy_gain(a, b, 500, 0)
    assert (found.gained, found.lost, found.n) == (2, 1, 5)
    assert found.difference == pytest.approx(0.2)
    assert found.ci95[0] < 0 < 0.2 < found.ci95[1]
    back = accuracy_gain(b, a, 500, 0)
    assert back.difference == -found.difference
    assert set(found.to_dict()) == {"gained", "lost", "n", "difference", "ci95"}


def test_newcombe_by_hand():
    """n = 50: both 36, only a 12, only b 2, neither 0: p = 0.96, q = 0.76.

    Wilson: p in [0.8654, 0.9890], q in [0.6259, 0.8570]. Product 36 * 0 - 12 * 2 = -24, not positive, so no correction:
    phi = -24 / sqrt(48 * 2 * 38 * 12) = -0.1147. Lower: 0.2 - sqrt(0.0946^2 + 2 * 0.1147 * 0.0946 * 0.0970 + 0.0970^2)
    = 0.2 - 0.1431. Upper: 0.2 + sqrt(0.0290^2 + 2 * 0.1147 * 0.0290 * 0.1341 + 0.1341^2) = 0.2 + 0.1404.
    """
    assert _newcombe(36, 12, 2, 50) == pytest.approx((0.0569, 0.3404), abs=1e-4)


@pytest.mark.parametrize("right", [0, 30, 60])
def test_no_difference_on_any_prompt_is_not_a_point_nor_as_wide_as_unpaired(right):
    """Of 60 prompts none differs: about 3 / n could still be the truth (rule of three)."""
    same = np.arange(60) < right
    low, high = accuracy_gain(same, same, 1000, 0).ci95
    assert high == pytest.approx(-low)
    assert 0.01 < high < 0.08


@pytest.mark.parametrize(("p_gain", "p_lose"), [(0.3, 0.1), (0.05, 0.05), (0.02, 0.0), (0.6, 0.02)])
def test_accuracy_gain_covers_the_truth(p_gain, p_lose):
    """The rest is half right by both, half by neither; 300 prompts, 400 sets."""
    rng, sets, covered = np.random.default_rng(11), 400, 0
    rest = (1 - p_gain - p_lose) / 2
    for _ in range(sets):
        outcome = rng.choice(4, p=(p_gain, p_lose, rest, rest), size=300)
        low, high = accuracy_gain((outcome == 0) | (outcome == 2), (outcome == 1) | (outcome == 2), 1000, 0).ci95
        covered += low <= p_gain - p_lose <= high
    assert covered / sets >= 0.92


def test_right_answers_must_be_true_or_false_for_the_same_prompts():
    for bad in ([], [0.5, 1.0], [[True]]):
        with pytest.raises(ValueError, match="true or false"):
            accuracy(bad)
    with pytest.raises(ValueError, match="equally long"):
        accuracy_gain([True], [True, False], 100, 0)
