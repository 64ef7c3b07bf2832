"""How actors are called; what does not fit a cluster is refused at once, unless nodes may still come."""

import re
import socket
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_ray.cluster import group
from rlhf_ray.cluster.health import Member
from rlhf_ray.cluster.role import Role
from rlhf_ray.config.schema import ClusterConfig
from rlhf_ray.core.layout import RoleRequest, plan_layout
from rlhf_ray.core.packing import NodeResources
from rlhf_ray.errors import UserError


class Actor:
    """Says how it was called."""

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(options=lambda **options: SimpleNamespace(remote=lambda *args: (method, args, options)))


def test_a_call_is_named_after_who_does_what() -> None:
    """Not after the iteration: Ray keeps a metric for every name."""
    policy = group.Group("policy", [Actor(), Actor()], 1.0)
    assert policy.names == ["policy-0", "policy-1"]
    assert policy.start(Role.setup, 1) == [("setup", (1,), {"name": f"policy-{i} setup"}) for i in (0, 1)]
    assert policy.start_each(Role.setup, [(1,), (2, 3)])[1] == ("setup", (2, 3), {"name": "policy-1 setup"})
    assert policy.submit(1, Role.describe, (), num_returns=2) == (
        "describe", (), {"name": "policy-1 describe", "num_returns": 2})


def test_a_free_port_is_one_that_no_system_hands_out_by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is bound seconds after it was found."""
    with socket.socket() as taken:
        taken.bind(("", group.free_port()))
        port = taken.getsockname()[1]
        assert 20_000 <= port < 30_000  # Linux's own begin at 32768, the workers of Ray's end at 19999
        monkeypatch.setattr(group, "_PORTS", range(port, port + 1))
        with pytest.raises(UserError, match=f"no TCP port of {port} to {port} is free"):
            group.free_port()


class _Placement:
    def __init__(self, there: bool = True) -> None:
        self.there = there

    def wait(self, timeout_s: float) -> bool:
        return self.there


LAYOUT = plan_layout({"generator": RoleRequest(2, 1, 1)}, "separate")


def test_with_autoscaling_roles_wait_for_nodes_that_are_not_there_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(group, "nodes", lambda: {"1": NodeResources("head", 0, 0)})
    monkeypatch.setattr(group, "placement_group", lambda bundles, strategy: asked.append(bundles) or _Placement())
    monkeypatch.setattr(group, "remove_placement_group", lambda placement: None)
    with pytest.raises(UserError, match="no room for 2 of 2 generator"):
        group.Cast(LAYOUT, ClusterConfig()).__enter__()
    with group.Cast(LAYOUT, ClusterConfig(autoscaling=True)):
        assert asked == [[{"CPU": 1, "GPU": 1}] * 2]


def test_who_waits_in_vain_is_told_what_is_free_beside_what_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[_Placement] = []
    monkeypatch.setattr(group, "nodes", lambda: {"1": NodeResources("a", 4, 2)})
    monkeypatch.setattr(group, "free", lambda: [NodeResources("a", 3, 1)])
    monkeypatch.setattr(group, "placement_group", lambda bundles, strategy: _Placement(there=False))
    monkeypatch.setattr(group, "remove_placement_group", removed.append)
    with pytest.raises(UserError) as told:
        group.Cast(LAYOUT, ClusterConfig(queue_timeout_s=60)).__enter__()
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
def cast(monkeypatch: pytest.MonkeyPatch) -> group.Cast:
    """Of a joined cluster, with one generator. A reference is True if its answer is there."""
    monkeypatch.setattr(group, "Visit", Visit)
    monkeypatch.setattr(Visit, "answer", False)
    monkeypatch.setattr(group, "placement_group", lambda bundles: _Placement())
    monkeypatch.setattr(group, "remove_placement_group", lambda placement: None)
    monkeypatch.setattr(group.ray, "kill", lambda actor: None)
    monkeypatch.setattr(group.ray, "get", lambda refs: refs)
    monkeypatch.setattr(group.ray, "wait", lambda refs, timeout, num_returns=1: (
        [ref for ref in refs if ref], [ref for ref in refs if not ref]))

    def launch(cast: group.Cast, role: str, i: int) -> Ended:
        actor = cast._actors[role, i] = Ended()
        cast.health.watch(Member(role, i, cast._name(role, i), actor))
        return actor

    monkeypatch.setattr(group.Cast, "_launch", launch)
    made = group.Cast(plan_layout({"generator": RoleRequest(1, 1)}, "separate"), ClusterConfig(address="10.0.0.1:6379"))
    made._placement = _Placement()  # type: ignore[assignment]
    made.start(Role, "generator", [()], 1, elastic=True)
    made._setups.clear()
    return made


def test_a_generator_joins_from_no_node_that_lacks_something(cast: group.Cast, monkeypatch: pytest.MonkeyPatch) -> None:
    cast.recruit("generator", 1)
    visit = cast._visits["generator", 1]
    assert cast.enlist("generator") == [] and not cast.fallen("generator")  # it is up, and the node has not answered
    monkeypatch.setattr(Visit, "answer", True)
    assert cast.enlist("generator") == []
    assert [(member.index, member.words) for member in cast.fallen("generator")] == [(1, LACKS)]
    assert visit.closed and not cast._visits  # type: ignore[attr-defined]


def test_a_generator_joins_when_nothing_is_wrong(cast: group.Cast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Visit, "answer", True)
    monkeypatch.setattr(Visit, "problem", lambda visit: "")
    cast.recruit("generator", 1)
    assert cast.enlist("generator") == [1]


def test_who_takes_a_lost_ones_place_does_so_on_no_node_that_lacks_something(
    cast: group.Cast, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the node lacks is told, not that the actor died of it."""
    monkeypatch.setattr(Visit, "answer", True)
    monkeypatch.setattr(group, "wait", lambda *_: 1 / 0)
    member, = cast.health.members.values()
    cast.replace(member)
    with pytest.raises(UserError, match=re.escape(LACKS)):
        cast.ready()


def test_a_visit_that_was_not_answered_ends_with_the_cast(cast: group.Cast) -> None:
    cast.recruit("generator", 1)
    cast.recruit("generator", 2)
    first, second = cast._visits.values()
    cast.dismiss("generator", 1)
    assert first.closed and not second.closed  # type: ignore[attr-defined]
    cast._end()
    assert second.closed  # type: ignore[attr-defined]
