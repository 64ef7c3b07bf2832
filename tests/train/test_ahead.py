"""A rollout on its way: taken when it is there, or dropped."""

import os
import signal
import threading
from typing import Any

import pytest

from rlhf_ray.train.ahead import Ahead
from rlhf_ray.train.rollout import Forgotten


class Workers:
    """`run` ends when it is told to, or when it is forgotten."""

    def __init__(self) -> None:
        self.end, self.forgotten, self.asked = threading.Event(), False, ()

    def run(self, *args: Any) -> str:
        self.asked = args
        assert self.end.wait(10)
        if self.forgotten:
            raise Forgotten
        return "rollouts"

    def forget(self) -> None:
        self.forgotten = True
        self.end.set()


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
    ahead.begin({}, [])
    workers.forget()
    with pytest.raises(Forgotten):
        ahead.take()


def test_who_is_interrupted_while_waiting_can_still_drop_it() -> None:
    """Else its thread would ask actors that are gone."""
    workers: Any = Workers()
    ahead = Ahead(workers)
    ahead.begin({}, [])
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
    ahead.begin({"drawn": 4}, [])
    ahead.drop()
    assert workers.forgotten and ahead.prompts is None and ahead.take() is None
    workers.forgotten = False
    ahead.begin({}, [])
    assert ahead.take() == "rollouts"
