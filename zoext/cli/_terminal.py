"""The terminal of a running command: Ctrl-C, SIGTERM, and the progress of a run."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

from zoext.cli._bars import bar
from zoext.cli._ranks import Ranks

#: A signal may come from the terminal and from torchrun: within this many seconds it is the same one.
_SAME = 1.0


class Terminated(KeyboardInterrupt):
    """SIGTERM, by which schedulers end a job."""


@contextmanager
def terminable() -> Iterator[None]:
    """A block that SIGTERM ends as Ctrl-C does, with an exception, so that it can clean up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)  # None: not Python's


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def exit_code_of(error: KeyboardInterrupt) -> int:
    """The exit code that shells report for the signal behind ``error``."""
    return 128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)


class StopRequest:
    """Lets Ctrl-C and SIGTERM stop a run between two steps, where it can be resumed.

    While entered, the first signal is what ``poll`` finds; a second Ctrl-C raises KeyboardInterrupt.

    Attributes:
        exit_code: what the command ends with after the signal that the last ``poll`` found, the same on all
            ranks; 0 without one.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.exit_code = 0
        self._ranks = ranks
        self._signal = 0
        self._since = 0.0
        self._previous: dict[int, Any] = {}
        # Only the main thread receives signals and may set their handler.
        self._active = threading.current_thread() is threading.main_thread()

    @property
    def received(self) -> bool:
        """Whether the last ``poll`` found a signal."""
        return self.exit_code != 0

    def __enter__(self) -> Self:
        if self._active:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def poll(self) -> bool:
        """Whether any rank has received a signal. All ranks must call it between the same steps."""
        found = self._ranks.largest(self._signal)
        self.exit_code = 128 + found if found else 0
        return self.received

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # Schedulers repeat SIGTERM, and do not mean that the run shall not be saved.
        if self._signal and number == signal.SIGINT and time.monotonic() - self._since > _SAME:
            raise KeyboardInterrupt
        if not self._signal:
            self._signal, self._since = number, time.monotonic()


class Progress:
    """A bar with the loss, the forward passes per second and the time left; ``quiet`` hides everything."""

    def __init__(self, start: int, steps: int, quiet: bool) -> None:
        self._quiet = quiet
        self._bar = bar("step", steps, start, quiet)
        self._forwards = 0
        self._seconds = 0.0  # spent on steps, without evaluations
        self._since = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._bar.close()

    def step(self, forwards: int) -> None:
        """Counts one step of ``forwards`` forward passes."""
        now = time.monotonic()
        self._forwards += forwards
        self._seconds += now - self._since
        self._since = now
        self._bar.update()

    def loss(self, value: float) -> None:
        """Shows the training loss."""
        if self._seconds:
            self._bar.set_postfix_str(f"loss {value:.4f}, {self._forwards / self._seconds:.1f} forwards/s")

    def evaluated(self, text: str) -> None:
        """Prints a line above the bar about an evaluation that just ended."""
        self._since = time.monotonic()
        if not self._quiet:
            self._bar.write(text)
