"""What does not fit a cluster is refused at once, unless nodes may still come; who takes the
place of a lost one."""

import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

from rlhf_ray.cluster import cast as module
from rlhf_ray.cluster import group, health
from rlhf_ray.cluster.cast import Cast
from rlhf_ray.cluster.group import Overdue
from rlhf_ray.cluster.health import Member
from rlhf_ray.cluster.role import Role
from rlhf_ray.config.schema import ClusterConfig
from rlhf_ray.core.layout import RoleRequest, plan_layout
from rlhf_ray.core.packing import NodeResources
from rlhf_ray.errors import UserError


class _Placement:
    def __init__(self, there: bool = True) -> None:
        self.there = there

    def wait(self, timeout_s: float) -> bool:
        return self.there


LAYOUT = plan_layout({"generator": RoleRequest(2, 1, 1)}, "separate")


def test_with_autoscaling_roles_wait_for_nodes_that_are_not_there_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(module, "nodes", lambda: {"1": NodeResources("head", 0, 0)})
    monkeypatch.setattr(module, "placement_group", lambda bundles, strategy: asked.append(bundles) or _Placement())
    monkeypatch.setattr(module, "remove_placement_group", lambda placement: None)
    with pytest.raises(UserError, match="no room for 2 of 2 generator"):
        Cast(LAYOUT, ClusterConfig()).__enter__()
    with Cast(LAYOUT, ClusterConfig(autoscaling=True)):
        assert asked == [[{"CPU": 1, "GPU": 1}] * 2]


def test_who_waits_in_vain_is_told_what_is_free_beside_what_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[_Placement] = []
    monkeypatch.setattr(module, "nodes", lambda: {"1": NodeResources("a", 4, 2)})
    monkeypatch.setattr(module, "free", lambda: [NodeResources("a", 3, 1)])
    monkeypatch.setattr(module, "placement_group", lambda bundles, strategy: _Placement(there=False))
    monkeypatch.setattr(module, "remove_placement_group", removed.append)
    with pytest.raises(UserError) as told:
        Cast(LAYOUT, ClusterConfig(queue_timeout_s=60)).__enter__()
    assert str(told.value) == (
        "no resources within cluster.queue_timeout_s=60 s; is another run using the cluster?\n"
        "  cpus: 2 wanted, 3 free; in bundles of 2 x 1; a 3\n"
        "  gpus: 2 wanted, 1 free; in bundles of 2 x 1; a 1\n"
        "  no room for 1 of 2 generator: 1 cpus, 1 gpus each on one node")
    assert len(removed) == 1


# --- nodes that were not there at the start ---

LACKS = "node beta (10.0.0.2) has no rlhf_ray: install it there"


class Visit:
    """To the node of generator-1, which lacks something. answer: True as soon as it has said so."""

    answer = False

    def __init__(self, where: Any, directory: Any) -> None:
        self.closed = False

    def problem(self) -> str:
        return LACKS

    def close(self) -> None:
        self.closed = True


class Ended:
    """An actor that can be killed, and has nothing to say."""

    _actor_id = b""

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(options=lambda **options: SimpleNamespace(remote=lambda *args: True))


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> Cast:
    """Of a joined cluster, with one generator. A reference is True if its answer is there."""
    monkeypatch.setattr(module, "Visit", Visit)
    monkeypatch.setattr(Visit, "answer", False)
    monkeypatch.setattr(module, "placement_group", lambda bundles: _Placement())
    monkeypatch.setattr(module, "remove_placement_group", lambda placement: None)
    monkeypatch.setattr(module.ray, "kill", lambda actor: None)
    monkeypatch.setattr(module.ray, "get", lambda refs: refs)
    monkeypatch.setattr(module.ray, "wait", lambda refs, timeout, num_returns=1: (
        [ref for ref in refs if ref], [ref for ref in refs if not ref]))

    def launch(cast: Cast, role: str, i: int) -> Ended:
        actor = cast._actors[role, i] = Ended()
        cast.health.watch(Member(role, i, cast._name(role, i), actor))
        return actor

    monkeypatch.setattr(Cast, "_launch", launch)
    made = Cast(plan_layout({"generator": RoleRequest(1, 1)}, "separate"), ClusterConfig(address="10.0.0.1:6379"))
    made._placement = _Placement()  # type: ignore[assignment]
    made.start(Role, "generator", [()], 1, elastic=True)
    made._setups.clear()
    return made


def test_a_generator_joins_from_no_node_that_lacks_something(
    joined: Cast, monkeypatch: pytest.MonkeyPatch,
) -> None:
    joined.recruit("generator", 1)
    visit = joined._visits["generator", 1]
    assert joined.enlist("generator") == [] and not joined.fallen("generator")  # it is up, the node has not answered
    monkeypatch.setattr(Visit, "answer", True)
    assert joined.enlist("generator") == []
    assert [(member.index, member.words) for member in joined.fallen("generator")] == [(1, LACKS)]
    assert visit.closed and not joined._visits  # type: ignore[attr-defined]


def test_a_generator_joins_when_nothing_is_wrong(joined: Cast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Visit, "answer", True)
    monkeypatch.setattr(Visit, "problem", lambda visit: "")
    joined.recruit("generator", 1)
    assert joined.enlist("generator") == [1]


def test_who_takes_a_lost_ones_place_does_so_on_no_node_that_lacks_something(
    joined: Cast, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the node lacks is told, not that the actor died of it."""
    monkeypatch.setattr(Visit, "answer", True)
    monkeypatch.setattr(module, "wait", lambda *_: 1 / 0)
    member, = joined.health.members.values()
    joined.replace(member)
    with pytest.raises(UserError, match=re.escape(LACKS)):
        joined.ready()


def test_a_visit_that_was_not_answered_ends_with_the_cast(joined: Cast) -> None:
    joined.recruit("generator", 1)
    joined.recruit("generator", 2)
    first, second = joined._visits.values()
    joined.dismiss("generator", 1)
    assert first.closed and not second.closed  # type: ignore[attr-defined]
    joined._end()
    assert second.closed  # type: ignore[attr-defined]


# -- who takes the place of a lost one. Ray is played by a few lines here --------------------------------------------


class Ref:
    """A call on an actor. answer: what comes of it, or is raised; None: nothing yet."""

    def __init__(self, actor: str, answer: Any):
        self.actor, self.answer = actor, answer

    def task_id(self) -> Any:
        return SimpleNamespace(actor_id=lambda: SimpleNamespace(hex=lambda: self.actor))


class Ray:
    """Every actor's `setup` gives the next of `setups[ROLE-NUMBER]`, or is done at once; an actor in `dead` raises,
    whatever it is asked. calls: (full name, method)."""

    def __init__(self) -> None:
        self.setups: dict[str, list[Any]] = {}
        self.dead, self.calls, self.killed = set[str](), list[tuple[str, str]](), list[str]()
        self.busy = set[str]()  # actors that do not answer

    def remote(self, **_: Any) -> Any:
        return lambda kind: SimpleNamespace(options=lambda name, **_: SimpleNamespace(remote=lambda: Named(self, name)))

    def wait(self, refs: list[Ref], num_returns: int = 1, timeout: float | None = None) -> tuple[list[Ref], list[Ref]]:
        return [r for r in refs if r.answer is not None], [r for r in refs if r.answer is None]

    def get(self, refs: Any, timeout: float | None = None) -> Any:
        if isinstance(refs, list):
            return [self.get(ref) for ref in refs]
        if isinstance(refs.answer, Exception):
            raise refs.answer
        return refs.answer

    def kill(self, actor: Any) -> None:
        self.killed.append(actor.name)
        self.dead.add(actor.name)


class Named:
    def __init__(self, ray: Ray, name: str):
        self.ray, self.name = ray, name
        self._actor_id = SimpleNamespace(hex=lambda: name)

    def __getattr__(self, method: str) -> Any:
        def remote(*_: Any) -> Ref:
            self.ray.calls.append((self.name, method))
            who = {"name": self.name, "actor_class": "Role", "node": "n", "node_id": "n", "pid": 7, "logs": ()}
            planned = self.ray.setups.get(self.name.split(".")[0], []) if method == "setup" else []
            answer = planned.pop(0) if planned else who if self.name not in self.ray.busy else LATER
            return Ref(self.name, ActorDiedError() if self.name in self.ray.dead else answer)

        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=remote), remote=remote)


LATER = None  # an answer that has not come yet


def failed(cause: Exception) -> Exception:
    error: Exception = RayTaskError("setup", f"Traceback\n{cause!r}", cause).as_instanceof_cause()
    return error


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Ray:
    fake = Ray()
    for user in (module, group, health):
        monkeypatch.setattr(user, "ray", fake)
    monkeypatch.setattr(module, "nodes", lambda: {"1": NodeResources("head", 8, 0)})
    monkeypatch.setattr(module, "placement_group", lambda bundles, strategy: _Placement())
    monkeypatch.setattr(module, "remove_placement_group", lambda placement: None)
    monkeypatch.setattr(module, "_GRACE_S", 0.0)
    return fake


@pytest.fixture
def cast(ray: Ray) -> Iterator[Cast]:
    """One reward model and one reference, of which each may be tried for a second, and again twice."""
    layout = plan_layout({"reward": RoleRequest(1, 1, 0), "reference": RoleRequest(1, 1, 0)}, "separate")
    with Cast(layout, ClusterConfig(heartbeat_s=1000, start_timeout_s=1, attempts=2)) as made:
        made._number = 1  # those of a process are numbered
        for role in ("reward", "reference"):
            made.start(Role, role, [()], 1)
        yield made


def names(members: list[Member]) -> list[tuple[str, str]]:
    return [(member.name, member.gone) for member in members]


def set_up(ray: Ray) -> list[str]:
    return [name for name, method in ray.calls if method == "setup"]


def test_what_a_setup_raises_at_the_start_is_raised_and_nobody_is_gone(ray: Ray, cast: Cast) -> None:
    cast._setups["reward", 0].answer = failed(ValueError("no such model"))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="no such model") as caught:
        cast.ready()
    assert cast.lost(caught.value) == [] and ray.killed == []


def lose(ray: Ray, cast: Cast, name: str) -> None:
    """Everybody has come up, and then one dies and is replaced."""
    cast.ready()
    ray.dead.add(name)
    (gone,) = cast.lost(ActorDiedError())
    cast.replace(gone)


def test_who_comes_for_another_and_fails_is_gone_too(ray: Ray, cast: Cast) -> None:
    """Its GPU was still full, say: the next one may find it free."""
    ray.setups["reward-0"] = [failed(OSError("busy"))]
    lose(ray, cast, "reward-0.1")
    with pytest.raises(OSError, match="busy") as caught:
        cast.ready()
    (gone,) = cast.lost(caught.value)
    assert (gone.name, gone.gone, ray.killed[-1]) == ("reward-0.1.1", "failed", "reward-0.1.1")
    assert "busy" in gone.words
    cast.replace(gone)
    assert [info.name for info in cast.ready()] == ["reward-0.1.2", "reference-0.1"]
    assert set_up(ray) == ["reward-0.1", "reference-0.1", "reward-0.1.1", "reward-0.1.2"]


def test_who_has_not_come_up_yet_is_waited_for_the_next_time(ray: Ray, cast: Cast) -> None:
    ray.setups = {"reward-0": [failed(OSError("busy"))], "reference-0": [LATER]}
    lose(ray, cast, "reward-0.1")
    ray.dead.add("reference-0.1")
    (gone,) = cast.lost(ActorDiedError())
    cast.replace(gone)
    with pytest.raises(OSError, match="busy") as caught:
        cast.ready()
    (gone,) = cast.lost(caught.value)
    cast.replace(gone)
    with pytest.raises(Overdue, match="start of reference, reward did not answer") as overdue:
        cast.ready()
    assert names(cast.lost(overdue.value)) == [("reference-0.1.1", "overdue")]


def test_who_cannot_be_reached_is_ended(ray: Ray, cast: Cast) -> None:
    """Nobody waits for what it may or may not have done."""
    cast.ready()
    error = ActorUnavailableError("connection reset", None)
    error.actor_id = "reward-0.1"
    assert names(cast.lost(error)) == [("reward-0.1", "died")]
    assert ray.killed == ["reward-0.1"]


def test_who_waits_for_a_lost_one_is_ended_even_if_it_never_came_up(ray: Ray, cast: Cast) -> None:
    """A rank that looks for the others in its first `setup`, where one of them has died."""
    ray.busy = {"reward-0.1"}
    assert names(cast.stuck({"reward", "policy"})) == [("reward-0.1", "hung")]
    assert cast.stuck({"reference"}) == []


# -- a call that outlives its actors -----------------------------------------------------------------------------------


def test_a_call_is_made_again_by_whoever_takes_the_place(ray: Ray, cast: Cast) -> None:
    """The second dies while it comes up: that is a loss like the first."""
    cast.ready()
    ray.setups["reward-0"] = [ActorDiedError()]
    ray.dead.add("reward-0.1")
    (info,) = cast.persist(lambda: cast.group("reward").call(Role.describe))
    assert info["name"] == "reward-0.1.2"


def test_the_start_is_such_a_call(ray: Ray, cast: Cast) -> None:
    cast._setups["reference", 0].answer = ActorDiedError()  # type: ignore[attr-defined]
    ray.dead.add("reference-0.1")
    assert [info.name for info in cast.persist(cast.ready)] == ["reward-0.1", "reference-0.1.1"]


@pytest.mark.parametrize("error", [ValueError("bad number"), failed(UserError("disk full"))])
def test_what_no_loss_explains_is_raised(ray: Ray, cast: Cast, error: Exception) -> None:
    calls: list[int] = []

    def call() -> None:
        calls.append(1)
        raise error

    with pytest.raises(type(error)) as caught:
        cast.persist(call)
    assert caught.value is error and len(calls) == 1


def test_attempts_are_counted_from_the_last_that_got_further(ray: Ray, cast: Cast) -> None:
    """Two more are allowed. The second and the fourth do a part each, so the sixth is the last."""
    progress = iter([0, 1, 1, 2, 2, 2])
    done = 0

    def call() -> None:
        nonlocal done
        done = next(progress)
        name = cast.group("reward").actors[0].name
        ray.dead.add(name)
        cast.group("reward").call(Role.describe)

    with pytest.raises(ActorDiedError):
        cast.persist(call, lambda: done)
    assert list(progress) == []
