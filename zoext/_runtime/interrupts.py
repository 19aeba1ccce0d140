"""Defers signals while theta is partly modified."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_Received = tuple[int, FrameType | None]


class Signals:
    """Defers signals except within ``allowed``; see ``deferred``."""

    def __init__(self) -> None:
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._allowed = False
        self._received: list[_Received] = []

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Delivers deferred signals, and lets new ones take effect immediately within the block."""
        self._allowed = True
        try:
            self._deliver()
            yield
        finally:
            self._allowed = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Defers signals again within the block, inside ``allowed``."""
        before, self._allowed = self._allowed, False
        try:
            yield
        finally:
            self._allowed = before
        if before:
            self._deliver()

    def _install(self) -> None:
        for number in signal.valid_signals():
            handler = signal.getsignal(number)
            if callable(handler):  # the others do not run Python code
                self._handlers[number] = handler
                signal.signal(number, self._receive)

    def _remove(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received.append((number, frame))
        if self._allowed:
            self._deliver()

    def _deliver(self) -> None:
        while self._received:
            number, frame = self._received.pop(0)
            self._handlers[number](number, frame)


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
