"""Tasks with answers that can be verified: short questions, parts that share none, a verifier that is not fooled."""

import json
import subprocess
import sys
from math import comb
from pathlib import Path
from typing import Any

import pytest
from pytest import approx

from rlhf_ray.config.schema import DataConfig
from rlhf_ray.data import reasoning
from rlhf_ray.data.formats import Prompt
from rlhf_ray.data.reasoning import (
    NAMES,
    QUESTIONS,
    TASKS,
    LastLetters,
    demonstrations,
    is_held_out,
    prompts,
    verify,
)
from rlhf_ray.data.templates import encode_prompt, encode_response, render_prompt
from rlhf_ray.errors import UserError
from rlhf_ray.models.hub import load_tokenizer

BASE = Path(reasoning.__file__).parents[1] / "assets" / "reviews_base"


def asked(some: list[Prompt]) -> list[str]:
    return [p.turns[0].content for p in some]


def facts(p: Prompt) -> dict[str, Any]:
    return dict(json.loads(p.metadata))


# -- questions ---------------------------------------------------------------------------------------------------


def test_there_are_options_and_words_for_every_task_that_can_be_chosen() -> None:
    choices = DataConfig.__dataclass_fields__["reasoning_task"].metadata["choices"]
    assert set(TASKS) == set(QUESTIONS) == set(choices)


def solve(task: str, question: str) -> str:
    """The answer, worked out from the words of the question alone."""
    words = question.replace("?", "").replace('"', "").split()
    if task == "chain_sum":
        return str(eval(question.removesuffix("=")))
    if task == "letter_counting":
        letter = question.split('"')[1]
        return str(question.split('"')[3].lower().count(letter))
    if task == "last_letters":
        return "".join(word[-1] for word in words[3:])
    heads, flips = int(words[-5]), int(words[-2])
    ways = [comb(flips, k) for k in (range(heads, flips + 1) if words[2] == "at" else [heads])]
    return f"{sum(ways) / 2**flips:.10g}"


@pytest.mark.parametrize("task", TASKS)
def test_a_short_question_has_all_that_its_answer_needs(task: str) -> None:
    for d in demonstrations(task, seed=3, n=150):
        question = d.prompt.turns[0].content
        assert d.response == solve(task, question)
        assert facts(d.prompt) == {"task": task, "answer": d.response}


@pytest.mark.parametrize(("task", "metadata", "question"), [
    ("chain_sum", {"expression": "1 - 7"}, "1 - 7 ="),
    ("letter_counting", {"target_letter": "e", "span": ["the", "Earth"]}, 'How many "e" in "the Earth"?'),
    ("coin_flip", {"problem_type": "exact", "k_heads": 2, "num_trials": 3}, "Chance of exactly 2 heads in 3 flips?"),
    ("coin_flip", {"problem_type": "at_least", "k_heads": 0, "num_trials": 9},
     "Chance of at least 0 heads in 9 flips?"),
    ("last_letters", {"words": ["Amy", "Ken"]}, "Last letters of Amy Ken?"),
])
def test_the_words_of_a_question(task: str, metadata: dict[str, Any], question: str) -> None:
    assert QUESTIONS[task](metadata) == question


def test_last_letters_are_two_names_and_what_they_end_in() -> None:
    names = NAMES.split()
    assert len(set(names)) == len(names) > 100
    entries = LastLetters(seed=5, words=2)
    for i in range(100):
        first, last = entries[i]["metadata"]["words"]
        assert {first, last} <= set(names) and first != last
        assert entries[i]["answer"] == first[-1] + last[-1]
        assert f'"{first} {last}"' in entries[i]["question"]
    assert entries[7] == LastLetters(seed=7, words=2)[5] | {"metadata": entries[7]["metadata"]}  # as reasoning-gym does


@pytest.mark.parametrize("task", TASKS)
def test_questions_and_answers_are_short_for_a_small_model(task: str) -> None:
    tokenizer = load_tokenizer(str(BASE))
    for d in demonstrations(task, seed=0, n=300):
        assert len(encode_prompt(d.prompt, "chat", tokenizer)) <= 48
        assert len(encode_response(d.response, tokenizer)) <= 16


def test_the_model_does_not_see_the_metadata() -> None:
    tokenizer = load_tokenizer(str(BASE))
    (p,) = prompts("last_letters", "train", seed=0, n=1)
    for template in ("chat", "alpaca", "none"):
        assert render_prompt(p, template, tokenizer) == render_prompt(Prompt(p.turns), template, tokenizer)


# -- parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_no_held_out_question_is_ever_demonstrated_or_trained_on_whatever_the_seeds(task: str) -> None:
    held = {q for seed in (0, 1) for q in asked(prompts(task, "held_out", seed, 200))}
    met = {q for seed in (0, 1) for q in asked(prompts(task, "train", seed, 1000))}
    met |= {d.prompt.turns[0].content for seed in (0, 1) for d in demonstrations(task, seed, 1000)}
    assert len(held) > 40 and len(met) > 200
    assert not held & met
    assert all(is_held_out(q) for q in held)


@pytest.mark.parametrize("task", TASKS)
def test_questions_do_not_repeat_and_are_the_same_for_the_same_seed(task: str) -> None:
    for draw in (lambda seed, n: asked([d.prompt for d in demonstrations(task, seed, n)]),
                 lambda seed, n: asked(prompts(task, "train", seed, n)),
                 lambda seed, n: asked(prompts(task, "held_out", seed, n))):
        some = draw(0, 40)
        assert len(set(some)) == 40
        assert draw(0, 40) == some != draw(1, 40)


def test_neighbouring_seeds_share_no_more_questions_than_any_others() -> None:
    """reasoning-gym makes entry i of seed s from s + i, so that seeds 0 and 1 as they are would share all but one."""
    drawn = [set(asked(prompts("letter_counting", "train", seed, 300))) for seed in range(3)]
    drawn.append({d.prompt.turns[0].content for d in demonstrations("letter_counting", 0, 300)})
    for i, one in enumerate(drawn):
        assert all(len(one & other) < 30 for other in drawn[:i])


def test_all_questions_are_found_when_there_are_fewer_than_asked_for() -> None:
    """Of 1 to 15 flips, 0 to all heads, exactly or at least: 2 (2 + ... + 16) = 270."""
    train, held = prompts("coin_flip", "train", 0, 1000), prompts("coin_flip", "held_out", 0, 1000)
    assert len(train) + len(held) == 270
    assert 30 < len(held) < 80  # a fifth is 54
    assert {p.turns[0].content for p in train} == {d.prompt.turns[0].content for d in
                                                   demonstrations("coin_flip", 1, 1000)}


def test_sums_of_two_terms_are_not_all_at_the_start() -> None:
    """Half of what is drawn has two terms, of which there are only 200: they run out. The order is random all the
    same, so that the first few prompts are a fair sample."""
    questions = asked(prompts("chain_sum", "train", 0, 3000))
    share = [sum(len(q.split()) == 4 for q in part) / len(part) for part in (questions[:1000], questions[-1000:])]
    assert share == approx([0.054, 0.054], abs=0.02)  # 160 of 3000


# -- the verifier ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_every_answer_of_a_task_is_right_and_other_answers_are_wrong(task: str) -> None:
    some = prompts(task, "held_out", seed=0, n=40)
    metadata, questions = [facts(p) for p in some], asked(some)
    answers = [m["answer"] for m in metadata]
    assert verify(questions, answers, metadata) == [1.0] * len(some)
    others = answers[1:] + answers[:1]
    assert verify(questions, others, metadata) == [float(a == b) for a, b in zip(answers, others, strict=True)]


@pytest.mark.parametrize(("task", "answer", "response", "mark"), [
    ("chain_sum", "-7", "-7", 1.0),
    ("chain_sum", "-7", " -7\n", 1.0),
    ("chain_sum", "-7", "7", 0.0),
    ("chain_sum", "-7", "-7 =", 0.0),
    ("chain_sum", "-7", "it is -7", 0.0),
    ("chain_sum", "-7", "- 7", 0.0),
    ("chain_sum", "7", "07", 0.0),  # the same number, but not the answer that was shown
    ("chain_sum", "7", "7.0", 0.0),
    ("chain_sum", "7", "", 0.0),
    ("letter_counting", "1", "11", 0.0),
    ("coin_flip", "0.375", "0.375", 1.0),
    ("coin_flip", "0.375", "3/8", 0.0),
    ("coin_flip", "0.375", "0", 0.0),  # reasoning-gym's score_answer gives 1.0 for any beginning of the answer
    ("coin_flip", "0.375", "0.3", 0.0),
    ("coin_flip", "3.051757812e-05", "0", 0.0),  # and for what is nearer than 1e-4
    ("last_letters", "yn", "yn", 1.0),
    ("last_letters", "yn", "ny", 0.0),
    ("last_letters", "yn", "Yn", 0.0),
])
def test_only_the_answer_itself_is_right(task: str, answer: str, response: str, mark: float) -> None:
    assert verify(["?"], [response], [{"task": task, "answer": answer}]) == [mark]


def test_the_tasks_own_verifier_has_a_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reasoning, "_scorer", lambda task: lambda response, entry: 0.5)
    assert verify(["?"], ["7"], [{"task": "chain_sum", "answer": "7"}]) == [0.0]


@pytest.mark.parametrize("metadata", [
    {}, {"answer": "7"}, {"task": "chain_sum"}, {"task": "chain_sum", "answer": 7}, {"task": "sums", "answer": "7"},
    {"task": ["chain_sum"], "answer": "7"},
])
def test_a_prompt_that_cannot_be_verified_is_named(metadata: dict[str, Any]) -> None:
    with pytest.raises(UserError) as error:
        verify(["1 + 1 =", "3 + 4 ="], ["2", "7"], [{"task": "chain_sum", "answer": "2"}, metadata])
    assert str(error.value).startswith("the prompt '3 + 4 =' cannot be verified: its metadata must have `task`")


def test_each_response_needs_its_metadata() -> None:
    with pytest.raises(ValueError, match="zip"):
        verify(["?", "?"], ["7", "7"], [{"task": "chain_sum", "answer": "7"}])


# -- the package -------------------------------------------------------------------------------------------------


def test_without_reasoning_gym_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match=r"data\.reasoning_task=coin_flip needs .* pip install reasoning-gym=="):
        demonstrations("coin_flip", seed=0, n=1)
    assert len(demonstrations("last_letters", seed=0, n=1)) == 1  # ours


def test_nobody_else_pays_for_reasoning_gym() -> None:
    code = "import sys, rlhf_ray.data.sources; sys.exit('reasoning_gym' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
