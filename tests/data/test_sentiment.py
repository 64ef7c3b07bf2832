"""Sentiment classifiers, and the labeler that ranks with noise, exactly Bradley-Terry.

Some tests use every eighth review; the others two vocabularies that make texts whose sentiment is known.
"""

from math import exp

import numpy as np
import pytest

from rlhf_ray.data.reviews import Review, ReviewSplit, load_reviews, split_reviews
from rlhf_ray.data.sentiment import (
    WINDOW_WORDS,
    SentimentClassifier,
    SimulatedLabeler,
    fit_labeler_and_judge,
    wilson_interval,
    windows,
)

WORDS = {1: ["wonderful", "moving", "funny", "brilliant"], 0: ["awful", "boring", "stupid", "dull"]}
COMMON = ["film", "actor", "scene", "story", "music", "plot"]


def text(label: int, rng: np.random.Generator, length: int = 30) -> str:
    """Every third word or so tells the sentiment."""
    return " ".join(rng.choice(WORDS[label] if rng.random() < 0.3 else COMMON) for _ in range(length))


@pytest.fixture(scope="module")
def classifier() -> SentimentClassifier:
    rng = np.random.default_rng(0)
    labels = [i % 2 for i in range(200)]
    return SentimentClassifier([text(y, rng) for y in labels], labels)


# -- windows -----------------------------------------------------------------------------------------------------


def test_windows_are_stretches_that_do_not_overlap() -> None:
    words = [f"w{i}" for i in range(100)]  # three whole windows; the last 10 words fill none
    found = windows(" ".join(words), np.random.default_rng(0))
    assert found == [" ".join(words[i : i + 30]) for i in (0, 30, 60)]
    assert WINDOW_WORDS == 30


def test_fewer_windows_are_chosen_at_random_and_kept_in_order() -> None:
    words = " ".join(f"w{i}" for i in range(300))
    firsts = {windows(words, np.random.default_rng(seed), 1)[0].split()[0] for seed in range(60)}
    assert firsts == {f"w{30 * i}" for i in range(10)}
    starts = [int(w.split()[0][1:]) for w in windows(words, np.random.default_rng(1), 4)]
    assert len(starts) == 4
    assert starts == sorted(starts)


def test_a_short_text_is_its_own_window() -> None:
    assert windows("only four words here", np.random.default_rng(0)) == ["only four words here"]
    assert windows("", np.random.default_rng(0)) == [""]


# -- classifier --------------------------------------------------------------------------------------------------


def test_log_odds_are_positive_for_what_people_like(classifier: SentimentClassifier) -> None:
    liked, disliked, neither = classifier.log_odds(["a wonderful moving film", "an awful boring film", "film"])
    assert liked > 0.5
    assert disliked < -0.5
    assert disliked < neither < liked
    assert classifier.log_odds(["wonderful"] * 3).dtype == np.float64


def test_an_empty_text_or_unknown_words_get_the_prior(classifier: SentimentClassifier) -> None:
    empty, unknown = classifier.log_odds(["", "xyzzy"])
    assert empty == unknown == pytest.approx(0, abs=0.3)  # half the texts were positive


def test_measure_counts_by_hand(classifier: SentimentClassifier) -> None:
    """Three of four right."""
    measured = classifier.measure(["wonderful", "awful", "brilliant", "funny"], [1, 0, 1, 0])
    assert measured["held_out_accuracy"] == 0.75
    assert measured["held_out_n"] == 4
    assert measured["held_out_ci95"] == wilson_interval(3, 4)


def test_wilsons_interval() -> None:
    """Wilson's formula with z = 1.96 for 8 of 10: (0.8 + 0.19208 +- 1.96 sqrt(0.016 + 0.009604)) / 1.38416."""
    assert wilson_interval(8, 10) == pytest.approx([0.4902, 0.9433], abs=1e-4)
    assert wilson_interval(0, 10)[0] == pytest.approx(0, abs=1e-12)
    assert wilson_interval(10, 10)[1] == pytest.approx(1)


# -- labeler and judge -------------------------------------------------------------------------------------------


def corpus(flipped: bool = False) -> tuple[list[Review], ReviewSplit]:
    rng = np.random.default_rng(1)
    reviews = [Review(text(i % 2, rng, 60), i % 2, "imdb") for i in range(160)]
    if flipped:
        reviews[120:] = [Review(r.text, 1 - r.label, r.source) for r in reviews[120:]]
    return reviews, ReviewSplit({"base": np.arange(100), "ppo": np.arange(100, 120), "held_out": np.arange(120, 160)},
                                0, "")


def test_labeler_and_judge_are_two_classifiers_measured_on_what_neither_saw() -> None:
    labeler, judge = fit_labeler_and_judge(*corpus(), seed=0)
    probe = [text(1, np.random.default_rng(9), 12)]
    assert labeler.log_odds(probe) != judge.log_odds(probe)  # fitted on different halves
    for c in (labeler, judge):
        assert c.held_out["held_out_n"] == 40  # one window of each held-out document
        assert c.held_out["held_out_accuracy"] > 0.9
        assert c.held_out["held_out_whole_accuracy"] > 0.9
        low, high = c.held_out["held_out_ci95"]
        assert low < c.held_out["held_out_accuracy"] <= high


def test_the_held_out_part_is_not_learnt_from() -> None:
    """With every held-out label turned around the classifiers stay as they were, and are wrong about all of these."""
    honest, wrong = (fit_labeler_and_judge(*corpus(flipped), seed=0) for flipped in (False, True))
    probe = [text(1, np.random.default_rng(9))]
    for a, b in zip(honest, wrong, strict=True):
        assert a.log_odds(probe) == b.log_odds(probe)
        assert a.held_out["held_out_accuracy"] + b.held_out["held_out_accuracy"] == pytest.approx(1)


def test_the_judge_saw_nothing_that_the_labeler_saw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every document has a word of its own; which words a classifier was fitted on tells which documents."""
    reviews, split = corpus()
    named = [Review(f"{r.text} {' '.join([f'doc{i}'] * 3)}", r.label, r.source) for i, r in enumerate(reviews)]
    seen: list[set[str]] = []
    fit = SentimentClassifier.__init__

    def watched(self: SentimentClassifier, texts: list[str], labels: list[int]) -> None:
        seen.append({w for t in texts for w in t.split() if w.startswith("doc")})
        fit(self, texts, labels)

    monkeypatch.setattr(SentimentClassifier, "__init__", watched)
    monkeypatch.setattr("rlhf_ray.data.sentiment.WINDOW_WORDS", 100)  # whole documents
    fit_labeler_and_judge(named, split, seed=0)
    assert [len(s) for s in seen] == [60, 60]
    assert seen[0] | seen[1] == {f"doc{i}" for i in range(120)}  # all but the held-out ones
    assert not seen[0] & seen[1]


@pytest.fixture(scope="module")
def few() -> tuple[list[Review], ReviewSplit]:
    """Every eighth review."""
    reviews = load_reviews()[::8]
    return reviews, split_reviews(reviews, seed=0)


def test_on_real_reviews_both_know_good_from_bad(few: tuple[list[Review], ReviewSplit]) -> None:
    for classifier in fit_labeler_and_judge(*few, seed=0):
        good, bad, empty = classifier.log_odds(["a wonderful film, I loved it", "awful and boring, don't bother", ""])
        assert good > 1
        assert bad < -1
        assert abs(empty) < 0.5
        said = classifier.held_out
        assert said["held_out_n"] == len(few[1].parts["held_out"])
        assert said["held_out_accuracy"] > 0.65  # of an eighth of the data; all of it gives 0.75
        assert said["held_out_whole_accuracy"] > said["held_out_accuracy"]  # a whole document tells more


def test_utilities_are_log_odds_times_scale(classifier: SentimentClassifier) -> None:
    texts = ["wonderful", "awful", "film"]
    found = SimulatedLabeler(classifier, 2.5).utilities(texts)
    assert found == pytest.approx(2.5 * classifier.log_odds(texts))


# -- ranking -----------------------------------------------------------------------------------------------------


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


def test_every_pair_of_a_ranking_is_a_bradley_terry_choice() -> None:
    """P(i before j) = sigmoid(u_i - u_j); with 20,000 rankings three standard errors are at most 0.011."""
    utilities, rng = np.array([0.0, 1.0, -0.5, 2.0]), np.random.default_rng(0)
    ranks = np.array([SimulatedLabeler.rank(utilities, rng) for _ in range(20_000)])
    assert (np.sort(ranks, axis=1) == [1, 2, 3, 4]).all()
    for i in range(4):
        for j in range(i):
            before = float((ranks[:, i] < ranks[:, j]).mean())
            assert before == pytest.approx(sigmoid(utilities[i] - utilities[j]), abs=0.011), (i, j)


def test_the_first_of_a_ranking_is_plackett_luces_choice() -> None:
    """P(i first) = exp(u_i) / sum: for utilities ln 1, ln 2, ln 5 these are 1/8, 2/8, 5/8."""
    rng = np.random.default_rng(0)
    firsts = [int(np.argmin(SimulatedLabeler.rank(np.log([1.0, 2.0, 5.0]), rng))) for _ in range(20_000)]
    assert np.bincount(firsts) / 20_000 == pytest.approx([0.125, 0.25, 0.625], abs=0.011)


def test_the_same_text_has_the_same_rank() -> None:
    """Spaces around it do not count. Two share a place; the next rank is that of the count of those before."""
    rng, seen = np.random.default_rng(0), set()
    for _ in range(50):
        ranks = SimulatedLabeler.rank(np.array([0.0, 0.0, 0.5]), rng, ["same", " same\n", "other"])
        seen.add(tuple(ranks.tolist()))
    assert seen == {(1, 1, 3), (2, 2, 1)}
    assert SimulatedLabeler.rank(np.zeros(4), rng, ["a"] * 4).tolist() == [1, 1, 1, 1]


def test_different_texts_never_tie() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        assert sorted(SimulatedLabeler.rank(np.zeros(4), rng, ["a", "b", "c", "d"])) == [1, 2, 3, 4]


def test_the_generator_decides_the_ranking() -> None:
    first, again, other = (SimulatedLabeler.rank(np.zeros(9), np.random.default_rng(s)).tolist() for s in (0, 0, 1))
    assert first == again != other


def test_noise_by_hand_for_a_pair() -> None:
    """u = (ln 3, 0): p = 3/4. Two rankings agree with 9/16 + 1/16 = 0.625; whoever knows u is right with 0.75."""
    for utilities in (np.log([3.0, 1.0]), np.log([1.0, 3.0])):
        assert SimulatedLabeler.expected_self_agreement(utilities) == pytest.approx(0.625)
        assert SimulatedLabeler.noise_ceiling(utilities) == pytest.approx(0.75)


def test_noise_of_equals_and_of_extremes() -> None:
    assert SimulatedLabeler.expected_self_agreement(np.zeros(4)) == pytest.approx(0.5)
    assert SimulatedLabeler.noise_ceiling(np.zeros(4)) == pytest.approx(0.5)
    assert SimulatedLabeler.expected_self_agreement(np.array([0.0, 50.0])) == pytest.approx(1)
    assert SimulatedLabeler.noise_ceiling(np.array([0.0, 50.0])) == pytest.approx(1)


def test_noise_is_the_mean_over_all_pairs() -> None:
    """u = ln (3, 1, 1): two pairs with p = 3/4 and one with 1/2."""
    utilities = np.log([3.0, 1.0, 1.0])
    assert SimulatedLabeler.noise_ceiling(utilities) == pytest.approx((0.75 + 0.75 + 0.5) / 3)
    assert SimulatedLabeler.expected_self_agreement(utilities) == pytest.approx((0.625 + 0.625 + 0.5) / 3)


def test_noise_is_what_simulation_shows() -> None:
    """20,000 pairs of rankings; three standard errors of a share are at most 0.011."""
    utilities, rng = np.array([1.2, 0.0, -0.4, 0.3]), np.random.default_rng(1)
    a, b = (np.array([SimulatedLabeler.rank(utilities, rng) for _ in range(20_000)]) for _ in range(2))
    i, j = np.triu_indices(4, k=1)
    agree = ((a[:, i] < a[:, j]) == (b[:, i] < b[:, j])).mean()
    best = ((a[:, i] < a[:, j]) == (utilities[i] > utilities[j])).mean()
    assert SimulatedLabeler.expected_self_agreement(utilities) == pytest.approx(agree, abs=0.011)
    assert SimulatedLabeler.noise_ceiling(utilities) == pytest.approx(best, abs=0.011)
