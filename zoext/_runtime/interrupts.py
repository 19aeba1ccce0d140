"""Defers signals while theta is partly modified."""

from __future__ import annotations

import inspect
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from types import FrameType
from typing import Any


@cache
def _valid_signals() -> tuple[int, ...]:
    return tuple(signal.valid_signals())


class Signals:
    """Defers signals except within ``allowed``; see ``deferred``."""

    def __init__(self) -> None:
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._allowed = False
        # Without their frames, whose variables would live on: views of displaced weights, for one.
        self._received: list[int] = []

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Delivers deferred signals, and lets new ones take effect immediately within the block."""
        self._allowed = True
        try:
            self._deliver()
            yield
        finally:
            self._allowed = False

    def held(self) -> AbstractContextManager[None]:
        """Defers signals again within the block, inside ``allowed``."""
        return _Held(self)

    def _hold(self) -> bool:
        before, self._allowed = self._allowed, False
        return before

    def _release(self, before: bool, deliver: bool) -> None:
        self._allowed = before
        if before and deliver:
            self._deliver()

    def _install(self) -> None:
        for number in _valid_signals():
            handler = signal.getsignal(number)
            if callable(handler):  # the others do not run Python code
                self._handlers[number] = handler
                signal.signal(number, self._receive)

    def _remove(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self._allowed:
            self._received.append(number)
            return
        self._deliver()
        self._handlers[number](number, frame)

    def _deliver(self) -> None:
        while self._received:
            number = self._received.pop(0)
            self._handlers[number](number, inspect.currentframe())


class _Held:
    """A class, since hooks enter it twice for each module, and a generator would cost as much as they do."""

    __slots__ = ("_before", "_hold", "_release")

    def __init__(self, signals: Signals) -> None:
        self._hold, self._release = signals._hold, signals._release

    def __enter__(self) -> None:
        self._before = self._hold()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._release(self._before, kind is None)


@contextmanager
def deferred() -> Iterator[Signals]:
    """Defers signals with Python handlers (Ctrl-C, SIGTERM, ...) until the block ends.

    Python may run signal handlers between any two bytecodes, and therefore between a kernel that moves theta
    and the bookkeeping of that move. Only the main thread receives signals; in other threads this does
    nothing.
    """
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    try:
        signals._install()
        yield signals
    finally:
        signals._remove()
        signals._deliver()
