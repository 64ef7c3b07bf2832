"""SIGTERM and Ctrl-C: at once, or after what must not be cut in two."""

import signal
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from rlhf_ray.train.interruption import SIGNALS, Interruption


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
