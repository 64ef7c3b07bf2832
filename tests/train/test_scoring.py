"""Asking ranks in waves, and putting their answers back in order. Actors are names here."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rlhf_ray.actors.policy import OldLogprobs
from rlhf_ray.cluster.group import Group
from rlhf_ray.core.types import ScoredShard
from rlhf_ray.errors import UserError
from rlhf_ray.train import scoring as module
from rlhf_ray.train.rollout import Rollouts
from rlhf_ray.train.scoring import Scoring, in_order


def test_answers_come_back_in_the_order_of_the_shards() -> None:
    assert in_order([np.array([3, 0]), np.array([], dtype=np.int64), np.array([1, 2])],
                    [["D", "A"], [], ["B", "C"]]) == ["A", "B", "C", "D"]


class Rank:
    """Answers with what it was asked of; `calls`: of all ranks, in order."""

    def __init__(self, name: str, calls: list[str]):
        self.name, self.calls = name, calls

    def __getattr__(self, method: str) -> Any:
        def remote(shards: list[str]) -> tuple[str, ...]:
            self.calls.append(f"{self.name} {method} {' '.join(shards)}".rstrip())
            return (self.name, method, *shards)

        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=remote))


def answer(call: tuple[str, ...]) -> Any:
    name, method, *shards = call
    if method == "fails":
        raise ValueError(name)
    if method == "values":
        return [f"values of {shard} by {name}" for shard in shards]
    return [OldLogprobs(f"logprobs of {shard} by {name}", 10, 20.0, int(shard)) for shard in shards]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(module, "wait", lambda refs, *_: [answer(ref) for ref in refs])
    monkeypatch.setattr(module, "ray", SimpleNamespace(wait=lambda refs, **_: (refs, [])))  # they keep up
    return []


def rollouts(*shards: str) -> Rollouts:
    return Rollouts([ScoredShard(s, (("reward", "values", s),), ("reference", "values", s)) for s in shards])


def test_learners_score_in_waves_while_shards_come(calls: list[str]) -> None:
    """Two policy ranks want two shards for a wave, one critic rank wants one; the last wave is what is left."""
    scoring = Scoring(Group("p", [Rank(n, calls) for n in ("p0", "p1")], 9.0), Group("c", [Rank("c0", calls)], 9.0),
                      eager=True)
    for shard in ("3", "1", "2"):
        scoring.add(shard, 10)
        calls.append("-")
    found = rollouts("1", "2", "3")
    numbers = scoring.finish(found, 9.0)
    assert calls == ["c0 values 3", "-", "p0 score 3", "p1 score 1", "c0 values 1", "-", "c0 values 2", "-",
                     "p0 score 2", "p1 score"]
    assert [(s.old_logprobs, s.values) for s in found.shards] == [
        ("logprobs of 1 by p1", "values of 1 by c0"), ("logprobs of 2 by p0", "values of 2 by c0"),
        ("logprobs of 3 by p0", "values of 3 by c0")]
    assert numbers == {"entropy": 60 / 30, "mismatch": 6 / 30}


def test_while_two_waves_are_under_way_shards_wait_for_more(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first wave is done when the fifth shard is there, so three make the third, and what is left the fourth."""
    looked: list[Any] = []

    def wait(refs: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        looked.append(refs)
        return (refs, []) if len(looked) > 2 else ([], refs)

    monkeypatch.setattr(module, "ray", SimpleNamespace(wait=wait))
    scoring = Scoring(Group("p", [Rank("p0", calls)], 9.0), None, eager=True)
    for shard in "12345":
        scoring.add(shard, 10)
    scoring.add("6", 10)
    scoring.finish(rollouts(*"123456"), 9.0)
    assert calls == ["p0 score 1", "p0 score 2", "p0 score 3 4 5", "p0 score 6"]
    assert looked[:3] == [[("p0", "score", "1")]] * 3


def test_without_time_for_it_they_score_all_at_once(calls: list[str]) -> None:
    """Each rank as many tokens, not as many shards."""
    scoring = Scoring(Group("p", [Rank(n, calls) for n in ("p0", "p1")], 9.0), None, eager=False)
    for shard, tokens in (("1", 16), ("2", 32), ("3", 16)):
        scoring.add(shard, tokens)
    assert not calls
    found = rollouts("1", "2", "3")
    scoring.finish(found, 9.0)
    assert calls == ["p0 score 2", "p1 score 1 3"]
    assert [s.values for s in found.shards] == [None] * 3


def test_a_shard_of_a_lost_generator_is_scored_in_vain(calls: list[str]) -> None:
    scoring = Scoring(Group("p", [Rank("p0", calls)], 9.0), None, eager=True)
    scoring.add("1", 10)
    scoring.add("2", 10)
    found = rollouts("2")
    assert scoring.finish(found, 9.0)["mismatch"] == 2 / 10
    assert [s.old_logprobs for s in found.shards] == ["logprobs of 2 by p0"]


@pytest.mark.parametrize("who", ["reward", "reference"])
def test_whoever_fails_is_heard_before_a_learner_would_miss_its_answer(calls: list[str], who: str) -> None:
    (shard,) = rollouts("1").shards
    failing = replace(shard, **{"reward": {"scores": (("reward", "fails"),)},
                                "reference": {"ref_logprobs": ("reference", "fails")}}[who])
    with pytest.raises(ValueError, match=who):
        Scoring(None, None, eager=True).finish(Rollouts([failing]), 9.0)


def test_nothing_to_score_says_why() -> None:
    with pytest.raises(UserError, match="every response of this iteration is empty"):
        Scoring(None, None, eager=True).finish(Rollouts(), 9.0)
