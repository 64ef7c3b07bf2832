"""Tasks whose answers can be verified, made by reasoning-gym (Apache-2.0): questions, answers, and the verifier.

Set up small, and asked in few words, for models of a few million parameters and short contexts. Every question is held
out or not by a hash of its text, whatever the seed: no demonstration and no training prompt, of any seed, asks what a
held-out prompt of any other seed asks. reasoning_gym is imported where it is used: it takes a second, and matplotlib.
"""

import hashlib
import random
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import numpy as np

from rlhf_ray.data.formats import Demonstration, Message, Prompt, canonical_json
from rlhf_ray.errors import UserError

# What reasoning-gym is asked for. `last_letters` is ours.
TASKS: dict[str, dict[str, int]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1},
    "letter_counting": {"min_words": 3, "max_words": 5},
    "coin_flip": {"min_trials": 1, "max_trials": 15},
    "last_letters": {"words": 2},
}
# Its questions in fewer words, from the metadata of an entry.
QUESTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "chain_sum": lambda m: f"{m['expression']} =",
    "letter_counting": lambda m: f'How many "{m["target_letter"]}" in "{" ".join(m["span"])}"?',
    "coin_flip": lambda m: f"Chance of {'exactly' if m['problem_type'] == 'exact' else 'at least'} {m['k_heads']} "
                           f"heads in {m['num_trials']} flips?",
    "last_letters": lambda m: f"Last letters of {' '.join(m['words'])}?",
}
STREAMS = ("demonstrations", "train", "held_out")
HELD_OUT_EVERY = 5  # one question in five
STRIDE = 2**32  # reasoning-gym seeds entry i with seed + i: seeds closer than this would share entries
PATIENCE = 20_000  # entries without a new question after which there are no more

NAMES = (
    "Ada Adam Alan Alice Amy Ana Anna Anton Arthur Ben Bob Brad Bruce Carl Carol Cathy Clara Craig Dan David Diana "
    "Doug Edith Eli Emil Emma Eric Eva Felix Fiona Frank Fred Gary George Grace Greg Hank Hannah Harry Heidi Helen "
    "Hugh Igor Ingrid Iris Jack Jacob James Jeff Jim Joan John Josh Judy Karl Kate Ken Kim Kurt Laura Leo Linda Lou "
    "Lucy Luis Marc Mark Mary Max Mia Mike Ned Nick Nina Nora Olaf Oscar Otto Paul Peter Phil Ralph Ray Rex Rita Rob "
    "Rose Ruth Sam Sarah Scott Sean Sid Stan Steve Sue Ted Tim Toby Tom Vera Victor Will Zack Zoe"
)


class LastLetters:
    """Last-letter concatenation (Wei et al. 2022, section 4), which reasoning-gym lacks, in the form of its data sets:
    entries by number, and who scores an answer to one."""

    def __init__(self, seed: int, words: int):
        self.seed, self.words = seed, words

    def __getitem__(self, i: int) -> dict[str, Any]:
        words = random.Random(self.seed + i).sample(NAMES.split(), self.words)
        return {
            "question": f'Take the last letters of the words in "{" ".join(words)}" and concatenate them.',
            "answer": "".join(w[-1] for w in words),
            "metadata": {"source_dataset": "last_letters", "source_index": i, "words": words},
        }

    def score_answer(self, answer: str, entry: dict[str, Any]) -> float:
        return float(answer == entry["answer"])


def _dataset(task: str, seed: int) -> Any:
    """Entries 0, 1, ... of a task, and its `score_answer`. Raises UserError if reasoning-gym is not installed."""
    if task == "last_letters":
        return LastLetters(seed, **TASKS[task])
    try:
        import reasoning_gym
    except ModuleNotFoundError as error:
        raise UserError(f"data.reasoning_task={task} needs the package reasoning-gym and all that it needs ({error}): "
                        "pip install reasoning-gym==0.1.25") from error
    return reasoning_gym.create_dataset(task, seed=seed, size=STRIDE, **TASKS[task])


def is_held_out(question: str) -> bool:
    """Whether a question is kept for evaluation: a property of its text alone."""
    return int(hashlib.sha256(question.encode()).hexdigest()[:8], 16) % HELD_OUT_EVERY == 0


def _draw(task: str, stream: str, seed: int, n: int) -> list[tuple[str, str]]:
    """n different questions with their answers, in a random order; all that turn up if there are fewer."""
    number = STREAMS.index(stream)
    entries = _dataset(task, (seed * len(STREAMS) + number) * STRIDE)
    found: dict[str, str] = {}
    i = last = 0
    while len(found) < n and i - last < PATIENCE:
        entry = entries[i]
        i += 1
        question = QUESTIONS[task](entry["metadata"])
        if question not in found and is_held_out(question) == (stream == "held_out"):
            found[question] = entry["answer"]
            last = i
    items = list(found.items())  # the rare ones last
    return [items[j] for j in np.random.default_rng((seed, 13, number)).permutation(len(items))]


def _prompt(task: str, question: str, answer: str) -> Prompt:
    return Prompt((Message("user", question),), metadata=canonical_json({"task": task, "answer": answer}))


def demonstrations(task: str, seed: int, n: int) -> list[Demonstration]:
    """Up to n different questions, none of them held out, each with nothing but its answer."""
    return [Demonstration(_prompt(task, *item), item[1]) for item in _draw(task, "demonstrations", seed, n)]


def prompts(task: str, part: Literal["train", "held_out"], seed: int, n: int) -> list[Prompt]:
    """Up to n different questions of a part, with the metadata that `verify` reads.

    No question is in both parts. Training prompts may ask what demonstrations answer: of some tasks there are few.
    """
    return [_prompt(task, *item) for item in _draw(task, part, seed, n)]


@cache
def _scorer(task: str) -> Callable[[str, dict[str, Any]], float]:
    score: Callable[[str, dict[str, Any]], float] = _dataset(task, 0).score_answer
    return score


def verify(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    """1.0 for every right response, 0.0 for the others: a source of rewards, rlhf_ray.data.reasoning:verify.

    Right is what has full marks from the task's own `score_answer` *and* is the answer character for character, but for
    white space around it. `score_answer` alone takes `07` for 7, which is harmless, and `0` for 0.375, which a policy
    would soon find: for coin_flip it gives full marks to any beginning of the answer.

    metadata: of every prompt, `task` (one of TASKS) and `answer` (text); raises UserError where they are missing.
    """
    return [_mark(p, r.strip(), m) for p, r, m in zip(prompts, responses, metadata, strict=True)]


def _mark(prompt: str, response: str, facts: dict[str, Any]) -> float:
    task, answer = facts.get("task"), facts.get("answer")
    if not isinstance(task, str) or task not in TASKS or not isinstance(answer, str):
        raise UserError(f"the prompt {prompt!r:.60} cannot be verified: its metadata must have `task`, one of "
                        f"{', '.join(TASKS)}, and `answer`, a string, as those of data.source=reasoning do; got "
                        f"{facts!r:.80}")
    return float(response == answer and _scorer(task)(response, facts) == 1.0)
