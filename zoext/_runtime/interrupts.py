"""Keeps signals out of the moments in which theta is between two states."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_Received = tuple[int, FrameType | None]


class Signals:
    """Holds signals back except within ``allowed``; see ``deferred``."""

    def __init__(self) -> None:
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._allowed = False
        self._received: list[_Received] = []

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Within the block signals take effect as ever, those that were held back first of all."""
        self._allowed = True
        try:
            self._deliver()
            yield
        finally:
            self._allowed = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within the block, inside of ``allowed``, signals are held back again."""
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
    """Holds signals with Python handlers (Ctrl-C, SIGTERM, ...) back until the block is done.

    Python runs signal handlers between any two bytecodes, so also between a kernel that moves theta
    and the note that it did. Only the main thread receives signals; elsewhere nothing is held.
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
