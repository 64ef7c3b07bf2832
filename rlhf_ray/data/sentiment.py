"""Sentiment classifiers fitted on people's labels: a simulated labeler, and a judge that never saw what it saw."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_ray.data.reviews import Review, ReviewSplit

if TYPE_CHECKING:
    from numpy.random import Generator

WINDOW_WORDS = 30  # the length of the responses that are judged
WINDOWS_PER_REVIEW = 8
WORD = r"(?u)\b\w[\w']*|[!?]"  # "don't" is a word, and so are marks of excitement


def windows(text: str, rng: Generator, count: int = WINDOWS_PER_REVIEW) -> list[str]:
    """Up to `count` stretches of WINDOW_WORDS words, none overlapping; a shorter text is its own only window."""
    words = text.split()
    starts = range(0, max(1, len(words) - WINDOW_WORDS + 1), WINDOW_WORDS)
    chosen = rng.permutation(len(starts))[:count]
    return [" ".join(words[starts[i] : starts[i] + WINDOW_WORDS]) for i in sorted(chosen)]


class SentimentClassifier:
    """TF-IDF of words and word pairs, and logistic regression: the log-odds that a text is positive."""

    def __init__(self, texts: Sequence[str], labels: Sequence[int]):
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression

        self._vectorizer = TfidfVectorizer(token_pattern=WORD, ngram_range=(1, 2), min_df=3, sublinear_tf=True,
                                           max_features=150_000, dtype=np.float32)
        self._model = LogisticRegression(C=2.0, solver="liblinear", tol=1e-2, random_state=0)
        self._model.fit(self._vectorizer.fit_transform(texts), labels)
        self.held_out: dict[str, Any] = {}

    def log_odds(self, texts: Sequence[str]) -> np.ndarray:
        """log p(positive) / p(negative), float64 [n]; an empty text gets the prior's."""
        return np.asarray(self._model.decision_function(self._vectorizer.transform(list(texts))), dtype=np.float64)

    def measure(self, texts: Sequence[str], labels: Sequence[int]) -> dict[str, Any]:
        """held_out_accuracy, its 95% interval held_out_ci95, and held_out_n, on texts that it was not fitted on."""
        right = (self.log_odds(texts) > 0) == (np.asarray(labels) == 1)
        return {"held_out_accuracy": float(right.mean()), "held_out_n": len(right),
                "held_out_ci95": wilson_interval(int(right.sum()), len(right))}


def wilson_interval(successes: int, n: int) -> list[float]:
    """95% interval [low, high] of a proportion (E. B. Wilson 1927)."""
    z, p = 1.959964, successes / n
    centre, half = p + z * z / (2 * n), z * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [(centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)]


def fit_labeler_and_judge(
    reviews: Sequence[Review], split: ReviewSplit, seed: int
) -> tuple[SentimentClassifier, SentimentClassifier]:
    """Two classifiers fitted on disjoint halves of the documents outside the held-out part.

    Their `held_out` says how often each is right about a window of WINDOW_WORDS words, one of each held-out document
    so that they are independent; `held_out_whole_accuracy` is about these documents as a whole.
    """
    rng = np.random.default_rng((seed, 21))
    seen = np.concatenate([ids for name, ids in split.parts.items() if name != "held_out"])
    order = rng.permutation(seen)
    halves = order[: len(order) // 2], order[len(order) // 2 :]
    documents = [reviews[d] for d in split.parts["held_out"]]
    labels = [r.label for r in documents]
    held = [windows(r.text, rng, 1)[0] for r in documents]
    classifiers = []
    for half in halves:
        pairs = [(w, reviews[d].label) for d in half for w in windows(reviews[d].text, rng)]
        classifier = SentimentClassifier([t for t, _ in pairs], [y for _, y in pairs])
        whole = classifier.measure([r.text for r in documents], labels)["held_out_accuracy"]
        classifier.held_out = classifier.measure(held, labels) | {"held_out_whole_accuracy": whole}
        classifiers.append(classifier)
    return classifiers[0], classifiers[1]


class SimulatedLabeler:
    """Ranks responses by sentiment, with noise: utility = scale * log-odds, Bradley-Terry choices.

    A ranking is drawn from the Plackett-Luce model by sorting utility + Gumbel noise (Yellott 1977), whose pairs
    are exactly Bradley-Terry: P(i before j) = sigmoid(u_i - u_j).
    """

    def __init__(self, classifier: SentimentClassifier, scale: float):
        self.classifier, self.scale = classifier, scale

    def utilities(self, responses: Sequence[str]) -> np.ndarray:
        """float64 [n]."""
        return self.scale * self.classifier.log_odds(responses)

    @staticmethod
    def rank(utilities: np.ndarray, rng: Generator, responses: Sequence[str] | None = None) -> np.ndarray:
        """Ranks int64 [K], 1 is best. Responses that are the same text but for spaces around it share a rank."""
        noisy = utilities + rng.gumbel(size=len(utilities))
        if responses is not None:
            first = {text.strip(): i for i, text in reversed(list(enumerate(responses)))}
            noisy = noisy[[first[text.strip()] for text in responses]]
        return 1 + np.array([(noisy > x).sum() for x in noisy])

    @staticmethod
    def expected_self_agreement(utilities: np.ndarray) -> float:
        """Expected share of pairs that two rankings of the same responses order alike: mean of p^2 + (1-p)^2."""
        p = _pair_probabilities(utilities)
        return float((p**2 + (1 - p) ** 2).mean())

    @staticmethod
    def noise_ceiling(utilities: np.ndarray) -> float:
        """Expected pair accuracy of somebody who knows the utilities against one noisy ranking: mean of max(p, 1-p)."""
        p = _pair_probabilities(utilities)
        return float(np.maximum(p, 1 - p).mean())


def _pair_probabilities(utilities: np.ndarray) -> np.ndarray:
    i, j = np.triu_indices(len(utilities), k=1)
    return np.asarray(1 / (1 + np.exp(utilities[j] - utilities[i])))
