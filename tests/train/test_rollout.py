"""A share whose generator died is sampled again; what the others finished is kept; what is asked of all of it.

Actors are names here."""

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError

from rlhf_ray.actors.reader import Reader
from rlhf_ray.cluster.group import Group, Overdue
from rlhf_ray.core.types import Sample, ScoredShard
from rlhf_ray.train import rollout as module
from rlhf_ray.train.rollout import Forgotten, Rollouts, RolloutWorkers
from rlhf_ray.train.turns import Turns

SAMPLES = [Sample(i, i, i) for i in range(3)]
NUMBERS = SimpleNamespace(tokens=7)  # of any shard


class Actor:
    """A generator streams one shard, named after positions, and its numbers; `dead`, an error. A scorer's answer is
    (the actor, what it was asked). `calls`: all that was asked."""

    def __init__(self, name: str, dead: bool = False):
        self.name, self.dead, self._actor_id = name, dead, SimpleNamespace(hex=lambda: name)

    def __getattr__(self, method: str) -> Any:
        def remote(first: Any, *_: Any) -> Any:
            what = first if isinstance(first, str) else "shard " + "".join(str(s.position) for s in first)
            self.calls.append(f"{self.name} {what}")
            if method == "rollout":
                return iter([ActorDiedError()] if self.dead else [what, NUMBERS])
            return self.name, what

        return SimpleNamespace(remote=remote, options=lambda **_: SimpleNamespace(remote=remote))


def cancelled(stream: Any) -> None:
    """What was still to come of it is not any more."""
    Actor.calls.append(f"cancelled: {next(stream, 'nothing')}")


def get(ref: Any) -> Any:
    if isinstance(ref, Exception):
        raise ref
    return ref


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> RolloutWorkers:
    """Two generators, of which the first has shard 02 and the second shard 1; two reward models."""
    monkeypatch.setattr(module, "ray", SimpleNamespace(wait=lambda refs, **_: (refs[-1:], refs[:-1]), cancel=cancelled))
    monkeypatch.setattr(module, "wait", lambda refs, timeout_s, what: [get(ref) for ref in refs])
    monkeypatch.setattr(module, "debtors", lambda refs: {name for name, _ in refs})
    monkeypatch.setattr(Actor, "calls", [], raising=False)
    generators, rewards, references, judges = (
        Group(names[0], [Actor(name) for name in names], 9.0)
        for names in (["g0", "g1"], ["r0", "r1"], ["ref"], ["judge"]))
    return RolloutWorkers(generators, [rewards], references, judges, Turns(generators, []), 1.0, 8)


def test_how_long_the_queues_are(workers: RolloutWorkers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two shards, each to be scored by the reward model, the reference and the judge, the reference has both yet to
    do and the judge one; nothing is fetched to find that out."""
    def wait(refs: list[Any], num_returns: int, timeout: float, fetch_local: bool) -> tuple[list[Any], list[Any]]:
        assert num_returns == len(refs) == 6 and timeout == 0 and not fetch_local
        late = [ref for ref in refs if ref[0] == "ref" or ref == ("judge", "shard 1")]
        return [ref for ref in refs if ref not in late], late

    rollouts = workers.run(SAMPLES, 1, 2)
    monkeypatch.setattr(module.ray, "wait", wait)
    assert workers.waiting(rollouts) == {"ref": 2, "r0": 0, "judge": 1}
    assert workers.waiting(Rollouts()) == {}


def test_samples_are_at_places_spread_over_the_batch(workers: RolloutWorkers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 8 responses those at 0, 3 and 6; the one at 3 was empty and is in no shard."""
    asked: list[Any] = []
    monkeypatch.setattr(Group, "submit",
                        lambda group, i, method, args, **_: asked.append((group.role, i, method, args)))
    infos: list[Any] = [SimpleNamespace(positions=np.array(p)) for p in ([1, 2, 4], [0, 6, 7], [5])]
    shards = [ScoredShard(f"shard {i}", (f"scores {i}", f"others {i}"), None) for i in range(3)]
    workers.read(Rollouts(shards, infos), [1.0, 0.5], 8)
    assert asked == [("r0", 0, Reader.samples, ("shard 1", [0, 1], [1.0, 0.5], "scores 1", "others 1"))]


def failed(workers: RolloutWorkers) -> None:
    """The first generator dies, and another takes its place."""
    workers.generators.actors[0].dead = True
    with pytest.raises(ActorDiedError):
        workers.run(SAMPLES, 1, 2)
    workers.generators.actors[0] = Actor("g2")
    Actor.calls.clear()


def test_shards_come_in_the_order_of_the_shares_whoever_was_first(workers: RolloutWorkers) -> None:
    """The stream that began last is ready first, so the first reward model has shard 1."""
    assert [(s.rollout, s.scores[0][0]) for s in workers.run(SAMPLES, 1, 2).shards] == [
        ("shard 02", "r1"), ("shard 1", "r0")]


def test_only_the_missing_share_is_sampled_and_only_who_is_gone_is_asked_again(workers: RolloutWorkers) -> None:
    """Of the scorers of shard 1 the first reward model is gone, the reference and the judge are not."""
    failed(workers)
    workers.rewards[0].actors[0] = Actor("r2")
    assert [s.rollout for s in workers.run(SAMPLES, 1, 2).shards] == ["shard 02", "shard 1"]
    assert Actor.calls == ["r1 shard 1", "g2 shard 02", "r2 shard 02", "ref shard 02", "judge shard 02"]


@pytest.mark.parametrize(("samples", "version"), [(SAMPLES, 2), ([*SAMPLES[:2], Sample(2, 2, 99)], 1)])
def test_of_other_weights_or_samples_nothing_is_kept(workers: RolloutWorkers, samples: Any, version: int) -> None:
    failed(workers)
    workers.run(samples, version, 2)
    assert [call for call in Actor.calls if call.startswith("g")] == ["g2 shard 02", "g1 shard 1"]


def test_every_shard_is_told_of_when_it_is_there_and_those_that_were_kept_at_once(workers: RolloutWorkers) -> None:
    heard: list[tuple[str, int]] = []

    def hear(shard: str, tokens: int) -> None:
        heard.append((shard, tokens))

    workers.run(SAMPLES, 1, 2, hear)
    assert heard == [("shard 1", 7), ("shard 02", 7)]
    heard.clear()
    workers.run(SAMPLES, 1, 2, hear)
    assert heard == [("shard 02", 7), ("shard 1", 7)]


def test_a_rollout_that_is_dropped_ends_and_the_generators_stop(
    workers: RolloutWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it waits for what takes long."""
    dropped = threading.Event()
    monkeypatch.setattr(module.ray, "wait", lambda refs, **_: dropped.set() or ([], refs))
    with pytest.raises(Forgotten):
        workers.run(SAMPLES, 1, 2, dropped=dropped)
    assert Actor.calls == ["g0 shard 02", "g1 shard 1", "cancelled: shard 02", "cancelled: shard 1"]


def test_so_it_is_if_it_was_dropped_before_anybody_was_asked(workers: RolloutWorkers) -> None:
    dropped = threading.Event()
    dropped.set()
    with pytest.raises(Forgotten):
        workers.run(SAMPLES, 1, 2, dropped=dropped)
    assert Actor.calls[2:] == ["cancelled: shard 02", "cancelled: shard 1"]


def test_generators_that_are_late_are_named_and_stopped(
    workers: RolloutWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second has delivered its shard, and does not end."""
    clock = iter([0.0, 0.0, 1.0, 5.0, 10.5])
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    answers = iter([[-1], [-1], [], []])
    monkeypatch.setattr(module.ray, "wait", lambda refs, **_: ([refs[i] for i in next(answers)], []))
    with pytest.raises(Overdue, match="2 of 2 generators delivered nothing within 9 s") as caught:
        workers.run(SAMPLES, 1, 2)
    assert caught.value.debtors == {"g0", "g1"}
    assert Actor.calls[-2:] == ["cancelled: shard 02", "cancelled: nothing"]


def test_what_is_done_is_not_cancelled(workers: RolloutWorkers) -> None:
    workers.run(SAMPLES, 1, 2)
    assert not [call for call in Actor.calls if call.startswith("cancelled")]
