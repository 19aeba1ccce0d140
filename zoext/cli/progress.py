"""What a run shows while it runs."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from tqdm import tqdm


class Progress:
    """A bar with the loss, the forwards per second and the time left; ``quiet`` shows nothing at all."""

    def __init__(self, start: int, steps: int, quiet: bool) -> None:
        self._quiet = quiet
        self._bar = tqdm(initial=start, total=steps, unit="step", disable=quiet, dynamic_ncols=True)
        self._forwards = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._bar.close()

    def step(self, forwards: int) -> None:
        """One step is done, which took ``forwards`` forward passes."""
        self._forwards += forwards
        self._bar.update()

    def loss(self, value: float) -> None:
        """Shows the training loss."""
        seconds = self._bar.format_dict["elapsed"] if not self._quiet else 0.0
        rate = f"{self._forwards / seconds:.1f}" if seconds else "?"
        self._bar.set_postfix_str(f"loss {value:.4f}, {rate} forwards/s")

    def say(self, text: str) -> None:
        """A line above the bar."""
        if not self._quiet:
            self._bar.write(text)
