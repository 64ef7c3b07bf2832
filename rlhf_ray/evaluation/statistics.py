"""Win rates, accuracies and diversity with 95% intervals that say over what they were resampled."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

Interval = tuple[float, float]
CONFIDENCE = 0.95
_TAILS = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
_CHUNK = 500  # resamples drawn at once by `cluster_interval`: bounds its memory, not its result


@dataclass(frozen=True)
class WinRate:
    """How often a was preferred over b: counts over n prompts, (wins + ties / 2) / n, its 95% interval."""

    wins: int
    ties: int
    losses: int
    rate: float
    ci95: Interval
    n: int

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, `ci95` as a list of two numbers: what report.json holds."""
        return asdict(self) | {"ci95": list(self.ci95)}


def win_rate(
    scores_a: ArrayLike, scores_b: ArrayLike, tie_margin: float, bootstrap_samples: int, seed: int
) -> WinRate:
    """How often the response of a beats that of b on the same prompt.

    scores_a, scores_b [n]: the judge's scores, entry i of both for prompt i. Scores at most `tie_margin`
    apart are a tie, which counts half. The prompts are the independent units, so the interval is over
    prompts, and each of its ends is the wider of two:

    - the percentile bootstrap over prompts (B. Efron and R. Tibshirani 1993, "An Introduction to the
      Bootstrap", ch. 13), which knows that ties vary less than wins and losses, but is too narrow when hardly
      any prompt goes the other way and a single point when none does;
    - the Wilson score interval at the tie-split rate (E. B. Wilson 1927; L. Brown, T. Cai, A. DasGupta 2001,
      "Interval Estimation for a Binomial Proportion"), which stays honest there, and is too wide with many
      ties, because p(1-p) is the largest variance that outcomes in [0, 1] with mean p can have.

    So the interval covers at least about 95%, more with many ties, and a lower end is never flattered.
    Raises ValueError for empty, unequal or non-finite scores and for a negative margin.
    """
    a, b = np.asarray(scores_a, np.float64), np.asarray(scores_b, np.float64)
    if a.ndim != 1 or a.shape != b.shape or len(a) == 0:
        raise ValueError(
            f"win_rate needs two equally long lists of scores, got shapes {a.shape} and {b.shape}"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("win_rate needs finite scores")
    if tie_margin < 0:
        raise ValueError(f"tie_margin must not be negative, got {tie_margin}")
    n = len(a)
    wins, losses = int((a - b > tie_margin).sum()), int((b - a > tie_margin).sum())
    ties = n - wins - losses
    rate = (wins + ties / 2) / n
    # There are three outcomes, so drawing n prompts with replacement is one multinomial draw of their counts.
    drawn = np.random.default_rng(seed).multinomial(
        n, np.array([wins, ties, losses]) / n, size=bootstrap_samples
    )
    low, high = np.quantile(drawn @ np.array([1.0, 0.5, 0.0]) / n, _TAILS)
    wilson = _wilson(rate, n)
    return WinRate(wins, ties, losses, rate, (min(float(low), wilson[0]), max(float(high), wilson[1])), n)


@dataclass(frozen=True)
class Accuracy:
    """How many of n answers were right, right / n, its 95% Wilson interval."""

    right: int
    n: int
    rate: float
    ci95: Interval

    def to_dict(self) -> dict[str, Any]:
        """As `WinRate.to_dict`."""
        return asdict(self) | {"ci95": list(self.ci95)}


def accuracy(right: ArrayLike) -> Accuracy:
    """The share of right answers, `right` bool [n], one per prompt. Raises ValueError for an empty list."""
    outcomes = _outcomes(right)
    n, count = len(outcomes), int(outcomes.sum())
    return Accuracy(count, n, count / n, _wilson(count / n, n))


@dataclass(frozen=True)
class AccuracyGain:
    """Accuracy of a less that of b, on the same n prompts; gained: only a was right; lost: only b; its 95% interval."""

    gained: int
    lost: int
    n: int
    difference: float
    ci95: Interval

    def to_dict(self) -> dict[str, Any]:
        """As `WinRate.to_dict`."""
        return asdict(self) | {"ci95": list(self.ci95)}


def accuracy_gain(right_a: ArrayLike, right_b: ArrayLike, bootstrap_samples: int, seed: int) -> AccuracyGain:
    """What a gained over b: (gained - lost) / n. right_a, right_b: bool [n], entry i of both for prompt i.

    Paired: prompts that both get right, or neither, do not widen the interval. Each of its ends is the wider of two:

    - the percentile bootstrap over prompts, as in `win_rate`;
    - the hybrid score interval of R. G. Newcombe 1998, "Improved confidence intervals for the difference between
      binomial proportions based on paired data", method 10, which stays honest where the bootstrap does not: when
      hardly any prompt differs, or all differ one way.

    Raises ValueError for empty or unequal lists.
    """
    a, b = _outcomes(right_a), _outcomes(right_b)
    if len(a) != len(b):
        raise ValueError(f"accuracy_gain needs two equally long lists, got {len(a)} and {len(b)}")
    n, gained, lost = len(a), int((a & ~b).sum()), int((b & ~a).sum())
    drawn = np.random.default_rng(seed).multinomial(
        n, np.array([gained, n - gained - lost, lost]) / n, size=bootstrap_samples
    )
    low, high = np.quantile((drawn[:, 0] - drawn[:, 2]) / n, _TAILS)
    score = _newcombe(int((a & b).sum()), gained, lost, n)
    return AccuracyGain(gained, lost, n, (gained - lost) / n, (min(float(low), score[0]), max(float(high), score[1])))


def cluster_interval(
    correct_by_group: ArrayLike, total_by_group: ArrayLike, bootstrap_samples: int = 10_000, seed: int = 0
) -> Interval:
    """95% interval of pair accuracy, sum(correct) / sum(total), resampled over prompts.

    correct_by_group, total_by_group [groups]: pairs ordered rightly, and pairs, of each prompt. The C(K,2)
    pairs of one prompt share their responses and are not independent, so whole prompts are drawn with
    replacement (A. C. Davison and D. V. Hinkley 1997, "Bootstrap Methods and their Application", sec. 3.8),
    percentile ends. Where every prompt is equally accurate the bootstrap is a point; then the Wilson interval
    with each prompt counted as one trial stands in. Raises ValueError for empty or unequal lists, a total
    below 1, or correct outside 0..total.
    """
    correct, total = np.asarray(correct_by_group, np.float64), np.asarray(total_by_group, np.float64)
    if correct.ndim != 1 or correct.shape != total.shape or len(total) == 0:
        raise ValueError(
            f"cluster_interval needs two equal lists, got shapes {correct.shape} and {total.shape}"
        )
    if not ((total >= 1) & (correct >= 0) & (correct <= total)).all():
        raise ValueError("cluster_interval needs total >= 1 and 0 <= correct <= total in every group")
    groups, rng = len(total), np.random.default_rng(seed)
    if np.ptp(correct / total) == 0:
        return _wilson(float(correct.sum() / total.sum()), groups)
    drawn: list[np.ndarray] = []
    for start in range(0, bootstrap_samples, _CHUNK):
        index = rng.integers(groups, size=(min(_CHUNK, bootstrap_samples - start), groups))
        drawn.append(correct[index].sum(axis=1) / total[index].sum(axis=1))
    low, high = np.quantile(np.concatenate(drawn), _TAILS)
    return float(low), float(high)


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Unique n-grams over all n-grams of the whole set, over lowercased words split at whitespace; 0 if none.

    J. Li et al. 2016, "A Diversity-Promoting Objective Function for Neural Conversation Models". New n-grams
    get rarer as text is added, so the value falls with the size of the set: compare only sets of equally many
    responses of similar length.
    """
    if n < 1:
        raise ValueError(f"distinct_n needs n >= 1, got {n}")
    unique: set[tuple[str, ...]] = set()
    count = 0
    for text in texts:
        words = text.lower().split()
        grams = list(zip(*(words[i:] for i in range(n)), strict=False))  # the shifted copies end one by one
        unique.update(grams)
        count += len(grams)
    return len(unique) / count if count else 0.0


def _outcomes(right: ArrayLike) -> np.ndarray:
    """bool [n], n > 0."""
    outcomes = np.asarray(right)
    if outcomes.ndim != 1 or len(outcomes) == 0 or outcomes.dtype != bool:
        raise ValueError(f"expected true or false per prompt, got {outcomes.dtype} of shape {outcomes.shape}")
    return outcomes


def _newcombe(both: int, only_a: int, only_b: int, n: int) -> Interval:
    """Interval of (only_a - only_b) / n from the Wilson intervals of both rates and phi, their correlation."""
    neither = n - both - only_a - only_b
    (p, low_p, high_p), (q, low_q, high_q) = (
        (rate, *_wilson(rate, n)) for rate in ((both + only_a) / n, (both + only_b) / n)
    )
    product = both * neither - only_a * only_b
    scale = sqrt((both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither))
    phi = (max(product - n / 2, 0) if product > 0 else product) / scale if scale else 0.0

    def half(x: float, y: float) -> float:
        return sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))

    return p - q - half(p - low_p, high_q - q), p - q + half(high_p - p, q - low_q)


def _wilson(rate: float, n: int) -> Interval:
    """Wilson score interval; unlike scipy's, the rate need not be a whole count over n (ties count half)."""
    z = float(special.ndtri(_TAILS[1]))
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)
