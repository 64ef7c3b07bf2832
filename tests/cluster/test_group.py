"""How actors are called; what does not fit a cluster is refused at once, unless nodes may still come."""

import socket
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_ray.cluster import group
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
    def wait(self, timeout_s: float) -> bool:
        return True


def test_with_autoscaling_roles_wait_for_nodes_that_are_not_there_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(group, "nodes", lambda: [NodeResources("head", 0, 0)])
    monkeypatch.setattr(group, "placement_group", lambda bundles, strategy: asked.append(bundles) or _Placement())
    monkeypatch.setattr(group, "remove_placement_group", lambda placement: None)
    layout = plan_layout({"generator": RoleRequest(2, 1, 1)}, "separate")
    with pytest.raises(UserError, match="no room for 2 of 2 generator"):
        group.Cast(layout, ClusterConfig()).__enter__()
    with group.Cast(layout, ClusterConfig(autoscaling=True)):
        assert asked == [[{"CPU": 1, "GPU": 1}] * 2]
