"""What a run shows while it runs."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self


class Progress:
    """A bar with the loss, the forwards per second and the time left; ``quiet`` shows nothing at all."""

    def __init__(self, start: int, steps: int, quiet: bool) -> None:
        from tqdm import tqdm

        self._quiet = quiet
        self._bar = tqdm(initial=start, total=steps, unit="step", disable=quiet, dynamic_ncols=True)
        self._forwards = 0
        self._seconds = 0.0  # spent on steps, evaluations left out
        self._since = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._bar.close()

    def step(self, forwards: int) -> None:
        """One step is done, which took ``forwards`` forward passes."""
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
        """A line above the bar about an evaluation that is done."""
        self._since = time.monotonic()
        if not self._quiet:
            self._bar.write(text)
