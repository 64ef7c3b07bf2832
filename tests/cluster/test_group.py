"""How actors are called."""

import signal
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_ray.cluster.group import Group
from rlhf_ray.cluster.interruption import Interruption
from rlhf_ray.cluster.role import Role


class Actor:
    """Says how it was called."""

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(options=lambda **options: SimpleNamespace(remote=lambda *args: (method, args, options)))


def test_a_call_is_named_after_who_does_what() -> None:
    """Not after the iteration: Ray keeps a metric for every name."""
    policy = Group("policy", [Actor(), Actor()], 1.0)
    assert policy.names == ["policy-0", "policy-1"]
    assert policy.start(Role.setup, 1) == [("setup", (1,), {"name": f"policy-{i} setup"}) for i in (0, 1)]
    assert policy.start_each(Role.setup, [(1,), (2, 3)])[1] == ("setup", (2, 3), {"name": "policy-1 setup"})
    assert policy.submit(1, Role.describe, (), num_returns=2) == (
        "describe", (), {"name": "policy-1 describe", "num_returns": 2})


@pytest.mark.parametrize("each", [False, True])
def test_a_signal_finds_all_called_or_none(each: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that was called alone would wait for the others for ever, and whoever wants to save, for it."""
    policy, called = Group("policy", [Actor(), Actor(), Actor()], 1.0), list[int]()

    def submit(i: int, *_: Any) -> None:
        called.append(i)
        if i == 0:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(policy, "submit", submit)
    with pytest.raises(SystemExit), Interruption():
        if each:
            policy.start_each(Role.setup, [(0,), (1,), (2,)])
        else:
            policy.start(Role.setup)
    assert called == [0, 1, 2]
