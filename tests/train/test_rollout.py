"""A share whose generator died is sampled again; what the others finished is kept. Actors are names here."""

from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from rlhf_ray.actors.generator import Sample
from rlhf_ray.cluster.group import Group
from rlhf_ray.train import rollout as module
from rlhf_ray.train.rollout import RolloutWorkers
from rlhf_ray.train.turns import Turns

SAMPLES = [Sample(i, i, i) for i in range(3)]


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
                return iter([ActorDiedError()] if self.dead else [what, f"numbers of {what}"])
            return self.name, what

        return SimpleNamespace(remote=remote, options=lambda **_: SimpleNamespace(remote=remote))


def get(ref: Any) -> Any:
    if isinstance(ref, Exception):
        raise ref
    return ref


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> RolloutWorkers:
    """Two generators, of which the first has shard 02 and the second shard 1; two reward models."""
    monkeypatch.setattr(module, "ray", SimpleNamespace(get=get, wait=lambda refs, **_: (refs[-1:], refs[:-1])))
    monkeypatch.setattr(module, "debtors", lambda refs: {name for name, _ in refs})
    monkeypatch.setattr(Actor, "calls", [], raising=False)
    generators, rewards, references, judges = (
        Group(names[0], [Actor(name) for name in names], 9.0)
        for names in (["g0", "g1"], ["r0", "r1"], ["ref"], ["judge"]))
    return RolloutWorkers(generators, [rewards], references, judges, Turns(generators, generators, False), 1.0, 8)


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
