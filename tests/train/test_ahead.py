"""A rollout on its way: taken when it is there, or dropped."""

import os
import signal
import threading
from typing import Any

import pytest

from rlhf_ray.train.ahead import Ahead
from rlhf_ray.train.rollout import Forgotten


class Workers:
    """`run` ends when it is told to, or when it is dropped."""

    def __init__(self) -> None:
        self.begins, self.end = threading.Event(), threading.Event()
        self.begins.set()
        self.forgotten, self.asked = False, ()

    def run(self, *args: Any, dropped: threading.Event) -> str:
        assert self.begins.wait(10)
        self.asked = args
        for _ in range(1000):
            if dropped.is_set():
                raise Forgotten
            if self.end.wait(0.01):
                return "rollouts"
        raise AssertionError("nobody told it to end")

    def forget(self) -> None:
        self.forgotten = True


def test_what_is_on_its_way_is_waited_for_and_taken_once() -> None:
    workers: Any = Workers()
    ahead = Ahead(workers)
    assert ahead.take() is None
    ahead.begin({"drawn": 4}, ["sample"], 3, 2)  # type: ignore[list-item]
    assert ahead.prompts == {"drawn": 4}
    threading.Timer(0.05, workers.end.set).start()
    assert ahead.take() == "rollouts" and workers.asked == (["sample"], 3, 2)
    assert ahead.prompts is None and ahead.take() is None


def test_what_goes_wrong_is_raised_by_who_takes_it() -> None:
    workers: Any = Workers()
    ahead = Ahead(workers)
    workers.run = lambda *_, **__: 1 / 0
    ahead.begin({}, [], 1, 1)
    with pytest.raises(ZeroDivisionError):
        ahead.take()


def test_who_is_interrupted_while_waiting_can_still_drop_it() -> None:
    """Else its thread would ask actors that are gone."""
    workers: Any = Workers()
    ahead = Ahead(workers)
    ahead.begin({}, [], 1, 1)
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        ahead.take()
    ahead.drop()
    assert workers.forgotten and ahead.take() is None


def test_what_is_dropped_is_nobodys_and_another_may_begin() -> None:
    workers: Any = Workers()
    ahead = Ahead(workers)
    ahead.drop()
    assert not workers.forgotten  # nothing was on its way, so that what is kept stays
    ahead.begin({"drawn": 4}, [], 1, 1)
    ahead.drop()
    assert workers.forgotten and ahead.prompts is None and ahead.take() is None
    workers.end.set()
    ahead.begin({}, [], 1, 1)
    assert ahead.take() == "rollouts"


def test_what_is_dropped_before_it_has_begun_never_does() -> None:
    """Its thread gets to it a moment later, and forgets nothing of that."""
    workers: Any = Workers()
    workers.begins.clear()
    ahead = Ahead(workers)
    ahead.begin({}, [], 1, 1)
    threading.Timer(0.05, workers.begins.set).start()
    ahead.drop()
    assert workers.forgotten and ahead.take() is None
