"""Generators and learners on one device: never both at once, and whatever comes before, the same place is reached."""

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_ray.train.turns import Turns

GIB = {"cache and weights": 10, "weights": 3, "everything": 5, "parameters": 3, "nothing": 0}


class Device:
    """What each role has on it; the largest sum so far; what was asked for."""

    def __init__(self) -> None:
        self.holds = {"generator": "cache and weights", "policy": "parameters", "critic": "parameters"}
        self.peak = 0
        self.calls: list[str] = []

    def group(self, role: str) -> Any:
        def call(method: Any, everything: bool = False) -> None:
            self.calls.append(role)
            match method.__qualname__.split("."):
                case ["Generator", "sleep"]:
                    self.holds[role] = "nothing"
                case ["Generator", "wake"]:
                    self.holds[role] = "cache and weights"
                case ["Generator", "wake_weights"]:
                    self.holds[role] = "weights" if self.holds[role] == "nothing" else self.holds[role]
                case [_, "offload"] if everything:
                    self.holds[role] = "nothing"
                case [_, "offload"] if self.holds[role] == "everything":
                    self.holds[role] = "parameters"
                case [_, "reload"]:
                    self.holds[role] = "everything"
            self.peak = max(self.peak, sum(GIB[what] for what in self.holds.values()))

        return SimpleNamespace(call=call)

    def turns(self, *learners: str) -> Turns:
        return Turns(self.group("generator"), [self.group(role) for role in learners])


@pytest.fixture
def device() -> Device:
    return Device()


def test_an_iteration(device: Device) -> None:
    t = device.turns("policy", "critic")
    t.sample()
    device.peak = 0
    assert not t.stale
    t.learn()
    assert t.stale
    assert device.holds == {"generator": "nothing", "policy": "everything", "critic": "everything"}
    t.sync()
    assert device.holds == {"generator": "weights", "policy": "parameters", "critic": "parameters"}
    t.sample()
    assert device.holds == {"generator": "cache and weights", "policy": "nothing", "critic": "nothing"}
    assert device.peak == GIB["cache and weights"]


@pytest.mark.parametrize("before", list(product(("sample", "learn", "sync"), repeat=2)))
def test_after_a_failure_anything_may_be_asked_for(device: Device, before: tuple[str, ...]) -> None:
    """What `connect` needs of both sides, whatever was under way."""
    t = device.turns("policy", "critic")
    for step in before:
        getattr(t, step)()
    t.sync()
    assert "weights" in device.holds["generator"] and device.holds["policy"] == "parameters"
    assert device.holds["critic"] != "everything"


def test_a_critic_on_a_device_of_its_own_stays_there(device: Device) -> None:
    t = device.turns("policy")
    t.sample()
    t.learn()
    t.sync()
    assert set(device.calls) == {"generator", "policy"}


def test_on_devices_of_their_own_nothing_is_asked(device: Device) -> None:
    t = device.turns()
    t.sample()
    t.learn()
    t.sync()
    assert not device.calls
