"""The simulated labeler, whose noise is exactly Bradley-Terry, and the judge that saw none of its documents."""

from itertools import pairwise

import numpy as np
import pytest

from rlhf_ray.data.reviews import PARTS, Review, ReviewSplit, load_reviews
from rlhf_ray.data.sentiment import (
    WINDOW_WORDS,
    SentimentClassifier,
    SimulatedLabeler,
    fit_labeler_and_judge,
    wilson_interval,
    windows,
)

UTILITIES = np.array([1.2, 0.0, -0.4, 0.3])


class Numbers:
    """In place of a classifier: the log-odds are the number in the text."""

    def log_odds(self, texts: list[str]) -> np.ndarray:
        return np.array([float(t) for t in texts])


@pytest.fixture(scope="module")
def few() -> tuple[list[Review], ReviewSplit]:
    """Every eighth review."""
    reviews = load_reviews()[::8]
    bounds = np.cumsum([round(share * len(reviews)) for share in PARTS.values()])[:-1]
    order = np.random.default_rng(0).permutation(len(reviews))
    return reviews, ReviewSplit(dict(zip(PARTS, np.split(order, bounds), strict=True)), 0, "")


@pytest.fixture(scope="module")
def pair(few: tuple[list[Review], ReviewSplit]) -> tuple[SentimentClassifier, SentimentClassifier]:
    return fit_labeler_and_judge(*few, seed=0)


# -- the classifiers ---------------------------------------------------------------------------------------------


def test_both_know_good_from_bad(pair: tuple[SentimentClassifier, SentimentClassifier]) -> None:
    for classifier in pair:
        good, bad, empty = classifier.log_odds(["a wonderful film, I loved it", "awful and boring, don't bother", ""])
        assert good > 1 and bad < -1 and abs(empty) < 0.5
        assert classifier.log_odds(["x"]).dtype == np.float64


def test_what_is_said_of_their_accuracy(
    few: tuple[list[Review], ReviewSplit], pair: tuple[SentimentClassifier, SentimentClassifier]
) -> None:
    for classifier in pair:
        said = classifier.held_out
        assert said["held_out_n"] == len(few[1].parts["held_out"])
        assert said["held_out_accuracy"] > 0.65  # of an eighth of the data; all of it gives 0.75
        assert said["held_out_whole_accuracy"] > said["held_out_accuracy"]
        assert said["held_out_ci95"][0] < said["held_out_accuracy"] < said["held_out_ci95"][1]


def test_labeler_and_judge_are_fitted_on_different_documents(
    few: tuple[list[Review], ReviewSplit], monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted: list[set[str]] = []

    def spy(self: SentimentClassifier, texts: list[str], labels: list[int]) -> None:
        fitted.append(set(texts))

    monkeypatch.setattr(SentimentClassifier, "__init__", spy)
    monkeypatch.setattr(SentimentClassifier, "measure", lambda *_: {"held_out_accuracy": 0.0})
    fit_labeler_and_judge(*few, seed=0)
    reviews, split = few
    spaced = [" ".join(r.text.split()) for r in reviews]
    held_out = "\n".join(spaced[d] for d in split.parts["held_out"])
    assert len(fitted) == 2
    assert not fitted[0] & fitted[1]
    assert not [w for texts in fitted for w in list(texts)[:300] if w in held_out]


def test_windows_do_not_overlap_and_short_texts_are_whole() -> None:
    words = [str(i) for i in range(200)]
    found = windows(" ".join(words), np.random.default_rng(0), 3)
    assert [len(w.split()) for w in found] == [WINDOW_WORDS] * 3
    assert all(int(a.split()[-1]) < int(b.split()[0]) for a, b in pairwise(found))
    assert windows("a short one", np.random.default_rng(0), 3) == ["a short one"]


def test_wilson_interval() -> None:
    assert wilson_interval(8, 10) == pytest.approx([0.4902, 0.9433], abs=1e-4)  # Brown, Cai, DasGupta 2001
    assert wilson_interval(10, 10)[1] == pytest.approx(1.0)


# -- the labeler -------------------------------------------------------------------------------------------------


def test_utilities_are_scaled_log_odds() -> None:
    labeler = SimulatedLabeler(Numbers(), scale=0.5)  # type: ignore[arg-type]
    assert labeler.utilities(["2", "-1"]).tolist() == [1.0, -0.5]


def test_pairs_of_a_ranking_are_bradley_terry() -> None:
    rng, n = np.random.default_rng(0), 20_000
    ranks = np.array([SimulatedLabeler.rank(UTILITIES, rng) for _ in range(n)])
    assert (np.sort(ranks, axis=1) == [1, 2, 3, 4]).all()
    for i in range(4):
        for j in range(i):
            wanted = 1 / (1 + np.exp(UTILITIES[j] - UTILITIES[i]))
            assert (ranks[:, i] < ranks[:, j]).mean() == pytest.approx(wanted, abs=4 * 0.5 / n**0.5)


def test_self_agreement_and_noise_ceiling_are_what_simulation_shows() -> None:
    rng, n = np.random.default_rng(1), 20_000
    a, b = (np.array([SimulatedLabeler.rank(UTILITIES, rng) for _ in range(n)]) for _ in range(2))
    i, j = np.triu_indices(4, k=1)
    agree = ((a[:, i] < a[:, j]) == (b[:, i] < b[:, j])).mean()
    best = ((a[:, i] < a[:, j]) == (UTILITIES[i] > UTILITIES[j])).mean()
    assert SimulatedLabeler.expected_self_agreement(UTILITIES) == pytest.approx(agree, abs=0.01)
    assert SimulatedLabeler.noise_ceiling(UTILITIES) == pytest.approx(best, abs=0.01)


def test_their_limits() -> None:
    alike, apart = np.zeros(3), np.array([100.0, 0.0, -100.0])
    assert SimulatedLabeler.expected_self_agreement(alike) == SimulatedLabeler.noise_ceiling(alike) == 0.5
    assert SimulatedLabeler.expected_self_agreement(apart) == pytest.approx(1.0)
    assert SimulatedLabeler.noise_ceiling(apart) == pytest.approx(1.0)


def test_the_same_text_gets_the_same_rank() -> None:
    rng = np.random.default_rng(2)
    for _ in range(20):
        ranks = SimulatedLabeler.rank(np.zeros(4), rng, ["a", "b", " a", "c"])
        assert ranks[0] == ranks[2]
        assert len(set(ranks)) == 3
        assert min(ranks) == 1
