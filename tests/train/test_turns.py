"""Generators and policy on one device: never both at once, and whatever comes before, the same place is reached."""

from itertools import product
from typing import Any

import pytest

from rlhf_ray.train.turns import Turns

GIB = {"cache and weights": 10, "weights": 4, "everything": 9, "parameters": 3, "nothing": 0}


class Device:
    """What each side has on it; the largest sum so far."""

    def __init__(self) -> None:
        self.generator, self.policy, self.peak, self.calls = "cache and weights", "parameters", 0, 0

    def call(self, method: Any, everything: bool = False) -> None:
        self.calls += 1
        match method.__qualname__.split("."):
            case ["Generator", "sleep"]:
                self.generator = "nothing"
            case ["Generator", "wake"]:
                self.generator = "cache and weights"
            case ["Generator", "wake_weights"]:
                self.generator = "weights" if self.generator == "nothing" else self.generator
            case [_, "offload"]:
                self.policy = "nothing" if everything else "parameters" if self.policy == "everything" else self.policy
            case [_, "reload"]:
                self.policy = "everything"
        self.peak = max(self.peak, GIB[self.generator] + GIB[self.policy])


@pytest.fixture
def device() -> Device:
    return Device()


def turns(device: Any, shared: bool = True) -> Turns:
    return Turns(device, device, shared)


def test_an_iteration(device: Device) -> None:
    t = turns(device)
    t.sample()
    device.peak = 0
    t.learn()
    assert (device.generator, device.policy) == ("nothing", "everything")
    t.sync()
    assert (device.generator, device.policy) == ("weights", "parameters")
    t.sample()
    assert (device.generator, device.policy) == ("cache and weights", "nothing")
    assert device.peak == GIB["cache and weights"]


@pytest.mark.parametrize("before", list(product(("sample", "learn", "sync"), repeat=2)))
def test_after_a_failure_anything_may_be_asked_for(device: Device, before: tuple[str, ...]) -> None:
    """What `connect` needs of both sides, whatever was under way."""
    t = turns(device)
    for step in before:
        getattr(t, step)()
    t.sync()
    assert "weights" in device.generator and device.policy == "parameters"


def test_on_devices_of_their_own_nothing_is_asked(device: Device) -> None:
    t = turns(device, shared=False)
    t.sample()
    t.learn()
    t.sync()
    assert not device.calls
