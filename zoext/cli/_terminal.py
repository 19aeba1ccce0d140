"""The terminal of a running command: the progress bar and Ctrl-C."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Self

from zoext.cli._ranks import Ranks


class Progress:
    """A bar with the loss, the forward passes per second and the time left; ``quiet`` hides everything."""

    def __init__(self, start: int, steps: int, quiet: bool) -> None:
        from tqdm import tqdm

        self._quiet = quiet
        self._bar = tqdm(initial=start, total=steps, unit="step", disable=quiet, dynamic_ncols=True)
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


class StopRequest:
    """Lets Ctrl-C stop a run between two steps, where it can be resumed.

    While entered, the first Ctrl-C is what ``poll`` finds; a second one raises KeyboardInterrupt.

    Attributes:
        received: what the last ``poll`` found: the same on all ranks.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.received = False
        self._ranks = ranks
        self._is_requested = False
        # Only the main thread receives signals and may set their handler.
        self._active = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Self:
        if self._active:
            self._previous = signal.signal(signal.SIGINT, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        if self._active:
            signal.signal(signal.SIGINT, self._previous)

    def poll(self) -> bool:
        """Whether any rank has received Ctrl-C. All ranks must call it between the same steps."""
        self.received = self._ranks.any(self._is_requested)
        return self.received

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._is_requested:
            raise KeyboardInterrupt
        self._is_requested = True
