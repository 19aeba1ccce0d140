"""Keeps Ctrl-C out of the moments in which theta is between two states."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupts:
    """Holds SIGINT back while ``allowed`` is not entered; see ``deferred``."""

    def __init__(self) -> None:
        self._handler = signal.getsignal(signal.SIGINT)
        self._allowed = False
        self._received: tuple[int, FrameType | None] | None = None

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Within the block, signals take effect as ever, one that was held back first of all."""
        self._allowed = True
        try:
            self._deliver()
            yield
        finally:
            self._allowed = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = (number, frame)
        if self._allowed:
            self._deliver()

    def _deliver(self) -> None:
        received, self._received = self._received, None
        if received and callable(self._handler):
            self._handler(*received)


@contextmanager
def deferred() -> Iterator[Interrupts]:
    """Holds SIGINT back until the block is done, then delivers it to its handler.

    Python runs signal handlers between any two bytecodes, so also between a kernel that moves theta
    and the note that it did. Only the main thread receives signals; elsewhere nothing is held.
    """
    interrupts = Interrupts()
    if threading.current_thread() is not threading.main_thread() or not callable(interrupts._handler):
        yield interrupts
        return
    signal.signal(signal.SIGINT, interrupts._receive)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, interrupts._handler)
        interrupts._deliver()
