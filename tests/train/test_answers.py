"""Who samples which part when, and that nothing is sampled twice. Generators and Ray are played by a few lines here."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rlhf_ray.cluster import group
from rlhf_ray.cluster.group import Group
from rlhf_ray.train import answers
from rlhf_ray.train.answers import ANSWERS, forget_answers, prompt_set, sample_answers

NOBODY_COMES_BACK: Any = SimpleNamespace(persist=lambda call, done: call())
PROMPTS = prompt_set([[5, 6], [7], [8, 9, 10], [11], [12]])


class Killed(Exception):
    pass


class Generators:
    """Ray with actors whose calls end in the order given by `finishes`: numbers of the calls, or None for never."""

    def __init__(self, count: int, finishes: list[int | None] | None = None, kill_after: int = 99):
        self.calls: list[tuple[int, list[int]]] = []  # (generator, positions of its samples)
        self.loaded: list[tuple[int, str]] = []  # (generator, path)
        self.cancelled: list[int] = []  # numbers of calls
        self.in_hand: dict[int, int] = {}
        self.results: dict[int, list[np.ndarray]] = {}
        self.finishes, self.kill_after = deque(finishes or []), kill_after
        self.group = Group("generator", [Actor(self, i) for i in range(count)], timeout_s=5.0)

    def wait(self, refs: list[int], timeout: float) -> tuple[list[int], list[int]]:
        if self.kill_after == 0:
            raise Killed
        self.kill_after -= 1
        done = self.finishes.popleft() if self.finishes else refs[0]
        if done is None:
            assert 4.0 < timeout <= 5.0
            return [], refs
        assert done in refs
        self.in_hand.pop(done)
        return [done], [r for r in refs if r != done]

    def get(self, ref: int) -> Any:
        return self.results[ref]

    def cancel(self, ref: int) -> None:
        self.cancelled.append(ref)


class Actor:
    def __init__(self, ray: Generators, number: int):
        self.ray, self.number = ray, number

    def __getattr__(self, method: str) -> Any:
        remote = {"answer": self._answer, "load": lambda path: self.ray.loaded.append((self.number, path))}[method]
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=remote))

    def _answer(self, samples: Any, temperature: float, max_tokens: int) -> int:
        ray, ref = self.ray, len(self.ray.calls)
        assert self.number not in ray.in_hand.values(), "one part at a time"
        ray.calls.append((self.number, [s.position for s in samples]))
        ray.in_hand[ref] = self.number
        # A sample's seed alone decides its response, whoever samples it.
        ray.results[ref] = [np.array([s.seed % 1000, s.prompt_index], np.int32) for s in samples]
        return ref


def sampled(
    ray: Generators, monkeypatch: pytest.MonkeyPatch, cast: Any = NOBODY_COMES_BACK, **changes: Any
) -> list[list[list[int]]]:
    monkeypatch.setattr(answers, "ray", ray)
    monkeypatch.setattr(group, "wait", lambda refs, timeout_s, what: refs)
    asked = {"per_prompt": 2, "temperature": 1.0, "max_tokens": 8, "seed": 3, "chunk": 1, **changes}
    monkeypatch.setattr(answers, "debtors", lambda refs: set())
    found = sample_answers(cast, ray.group, "model", PROMPTS, "test", **asked)
    return [[r.tolist() for r in some] for some in found]


def test_every_prompt_has_its_responses_in_order_whoever_finishes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = sampled(Generators(1), monkeypatch)
    assert [[r[1] for r in some] for some in expected] == [[i, i] for i in range(5)]
    assert len({r[0] for some in expected for r in some}) == 10
    assert sampled(Generators(2, [1, 0, 3, 2, 4]), monkeypatch) == expected
    assert sampled(Generators(9), monkeypatch) == expected
    assert sampled(Generators(2), monkeypatch, chunk=3) == expected


def test_the_next_part_goes_to_whoever_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first generator is slow: the second does all other parts meanwhile."""
    ray = Generators(2, [1, 2, 3, 4, 0])
    sampled(ray, monkeypatch)
    assert ray.calls == [(0, [0, 1]), (1, [2, 3]), (1, [4, 5]), (1, [6, 7]), (1, [8, 9])]


def test_a_generator_that_does_not_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Generators(2, [1, None])
    with pytest.raises(TimeoutError, match=r"generator\.answer did not answer within 5 s"):
        sampled(ray, monkeypatch)
    assert ray.cancelled == [0, 2]  # the others need not go on


def test_when_generators_are_replaced_only_what_is_missing_is_sampled_by_the_right_model(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new one begins with the model that the stage began with."""
    ray, seen = Generators(2, [1, 0, None]), []

    def persist(call: Any, done: Any) -> None:
        with suppress(TimeoutError):
            call()
        seen.append(done())
        ray.in_hand.clear()
        call()

    assert sampled(ray, monkeypatch, SimpleNamespace(persist=persist)) == sampled(Generators(1), monkeypatch)
    assert seen == [2] and ray.loaded == [(0, "model"), (1, "model")] * 2
    assert [positions for _, positions in ray.calls[4:]] == [[4, 5], [6, 7], [8, 9]]


@pytest.mark.parametrize("kills", range(6))
def test_cut_off_after_any_part_it_goes_on_with_the_missing_ones(kills: int, monkeypatch: pytest.MonkeyPatch,
                                                                  tmp_path: Path) -> None:
    expected, journal = sampled(Generators(2), monkeypatch), tmp_path / "answers.jsonl"
    first, again = Generators(2, [1, 0, 2, 3, 4], kill_after=kills), Generators(1)
    if kills < 5:
        with pytest.raises(Killed):
            sampled(first, monkeypatch, journal=journal, model="m")
    else:
        assert sampled(first, monkeypatch, journal=journal, model="m") == expected
    assert sampled(again, monkeypatch, journal=journal, model="m") == expected
    finished = [1, 0, 2, 3, 4][:kills]
    assert again.calls == [(0, [2 * i, 2 * i + 1]) for i in range(5) if i not in finished]


@pytest.mark.parametrize("change", [{"model": "n"}, {"seed": 4}, {"temperature": 0.5}, {"max_tokens": 9}, {"chunk": 2},
                                    {"per_prompt": 1}])
def test_parts_of_another_question_are_not_taken(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch,
                                                 tmp_path: Path) -> None:
    journal = tmp_path / "answers.jsonl"
    sampled(Generators(1), monkeypatch, journal=journal, model="m")
    other = Generators(1)
    assert sampled(other, monkeypatch, **{"journal": journal, "model": "m", **change}) == \
        sampled(Generators(1), monkeypatch, **change)
    assert sum(len(positions) for _, positions in other.calls) == 5 * change.get("per_prompt", 2)


def test_nor_those_of_other_prompts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same tokens, cut into prompts elsewhere."""
    journal, other = tmp_path / "answers.jsonl", Generators(1)
    sampled(Generators(1), monkeypatch, journal=journal)
    monkeypatch.setattr(answers, "ray", other)
    prompts = prompt_set([[5], [6, 7], [8, 9, 10], [11], [12]])
    sample_answers(NOBODY_COMES_BACK, other.group, "model", prompts, "test", 2, 1.0, 8, 3, chunk=1, journal=journal)
    assert len(other.calls) == 5


def test_a_stage_forgets_all_its_journals_and_nothing_else(tmp_path: Path) -> None:
    for name in (f"{ANSWERS}.jsonl", f"{ANSWERS}-sft.jsonl", "comparisons.jsonl", "stage.json"):
        (tmp_path / name).write_text("")
    forget_answers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["comparisons.jsonl", "stage.json"]
