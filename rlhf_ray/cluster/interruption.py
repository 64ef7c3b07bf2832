"""SIGTERM and Ctrl-C: between two states of a run, not in the middle of an update."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_came: list[int] = []  # SIGTERMs
_held: list[int] = []  # signals that came inside of `held`
_depth = 0


def terminate(number: int, frame: FrameType | None = None) -> None:
    """The handler of SIGTERM: end with the status that a shell would give it."""
    if _depth:
        _held.append(number)
    else:
        _raise(number)


def terminated() -> bool:
    """Whether SIGTERM came to this process. A SystemExit does not say it: one that is raised while a call of Ray waits
    comes out of it with status 1."""
    return bool(_came)


@contextmanager
def held() -> Iterator[None]:
    """What must be done whole, if it takes no time: a signal that comes meanwhile raises when it is done."""
    global _depth
    if threading.current_thread() is not threading.main_thread():  # signals raise in that one
        yield
        return
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if _held and not _depth:
            number = _held[-1]
            _held.clear()
            signal.raise_signal(number)


class Interruption:
    """A context in which the two signals raise SystemExit(143) and KeyboardInterrupt at once, or, between `defer` and
    `allow`, as soon as that is over. A second one does not wait. Does nothing outside the main thread.

    Python drops what a handler raises while some object's `__del__` happens to run (Ray's references have one):
    `allow` raises it again.
    """

    def __init__(self) -> None:
        self._deferring = False
        self._pending: int | None = None
        self._before: list[Any] = []

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = [signal.signal(number, self._handle) for number in SIGNALS]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in zip(SIGNALS, self._before, strict=False):
            signal.signal(number, handler)

    def defer(self) -> None:
        self._deferring = True

    def allow(self) -> None:
        """Raise what came meanwhile."""
        self._deferring = False
        if self._pending is not None:
            number, self._pending = self._pending, None
            _raise(number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if _depth:
            _held.append(number)
            return
        wait = self._deferring and self._pending is None
        self._pending = number
        if not wait:
            _raise(number)


def _raise(number: int) -> NoReturn:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    _came.append(number)
    raise SystemExit(128 + number)
