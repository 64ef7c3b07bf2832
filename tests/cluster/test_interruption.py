"""SIGTERM and Ctrl-C: at once, or after what must not be cut in two."""

import signal
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from rlhf_ray.cluster.interruption import SIGNALS, Interruption, held


@pytest.fixture
def interruption() -> Iterator[Interruption]:
    with Interruption() as entered:
        yield entered


@pytest.mark.parametrize("number", SIGNALS)
def test_at_once(interruption: Interruption, number: signal.Signals) -> None:
    """143 = 128 + SIGTERM, as a shell says it."""
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as caught:
        signal.raise_signal(number)
    assert number == signal.SIGINT or caught.value.code == 143


def test_deferred_until_it_is_allowed(interruption: Interruption) -> None:
    interruption.defer()
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        interruption.allow()
    assert caught.value.code == 143
    interruption.allow()  # once is enough


def test_nothing_came_and_nothing_is_raised(interruption: Interruption) -> None:
    interruption.defer()
    interruption.allow()


def test_after_a_deferral_it_is_at_once_again(interruption: Interruption) -> None:
    interruption.defer()
    interruption.allow()
    with pytest.raises(SystemExit):
        signal.raise_signal(signal.SIGTERM)


def test_a_second_one_does_not_wait(interruption: Interruption) -> None:
    """Somebody pressed Ctrl-C while SIGTERM waited for the end of the iteration."""
    interruption.defer()
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_what_python_swallowed_is_raised_again(interruption: Interruption) -> None:
    with suppress(SystemExit):  # as Python does in the midst of a `__del__`
        signal.raise_signal(signal.SIGTERM)
    interruption.defer()
    with pytest.raises(SystemExit):
        interruption.allow()


@pytest.mark.parametrize("deferring", [False, True])
def test_what_is_held_is_done_whole(interruption: Interruption, deferring: bool) -> None:
    """One inside of the other, and two signals: the last one counts. Where an iteration is under way, it waits on."""
    done = []
    if deferring:
        interruption.defer()
    with suppress(KeyboardInterrupt), held():
        with held():
            signal.raise_signal(signal.SIGTERM)
            done.append("inner")
        signal.raise_signal(signal.SIGINT)
        done.append("outer")
    assert done == ["inner", "outer"]
    if deferring:
        with pytest.raises(KeyboardInterrupt):
            interruption.allow()
    with pytest.raises(SystemExit):  # nothing is left of it
        signal.raise_signal(signal.SIGTERM)


def test_what_another_thread_holds_holds_no_signal(interruption: Interruption) -> None:
    """They raise in the main thread."""
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        with held():
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(10)
    with pytest.raises(SystemExit):
        signal.raise_signal(signal.SIGTERM)
    done.set()
    thread.join()


def test_handlers_are_as_they_were_whatever_ended_it() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with suppress(ValueError), Interruption():
        assert all(signal.getsignal(n) != b for n, b in zip(SIGNALS, before, strict=True))
        raise ValueError
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_outside_the_main_thread_it_does_nothing() -> None:
    """Python sets signal handlers in the main thread only, and raises elsewhere."""
    before, seen = [signal.getsignal(number) for number in SIGNALS], []

    def other() -> None:
        with Interruption() as interruption:
            interruption.defer()
            seen.append([signal.getsignal(number) for number in SIGNALS])
            interruption.allow()

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [before] == [[signal.getsignal(number) for number in SIGNALS]]
