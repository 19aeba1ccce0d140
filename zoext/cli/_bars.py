"""Shows how far a command is: a bar in a terminal and in a notebook, a line now and then elsewhere."""

from __future__ import annotations

import math
import os
import sys
import time
from typing import Protocol

#: Seconds between two lines in a file or a pipe, where a bar would leave thousands of carriage returns.
_EVERY = 30.0
#: The size of a terminal that does not tell its own.
_COLUMNS, _ROWS = 80, 24


class Bar(Protocol):
    """What is used of tqdm.

    Attributes:
        n: how much is done.
        total: how much there is to do.
    """

    n: int
    total: int

    def update(self, n: int = 1) -> object:
        """Counts what has been done."""

    def set_description_str(self, desc: str) -> object:
        """Says what is being done."""

    def set_postfix_str(self, s: str) -> object:
        """Says how it goes."""

    def write(self, s: str) -> object:
        """Prints a line above the bar."""

    def close(self) -> object:
        """Ends the bar, or prints the last line."""


def bar(unit: str, total: int, done: int, quiet: bool) -> Bar:
    """A bar over ``total`` units, of which ``done`` are done, on stderr; ``quiet`` shows none."""
    if quiet:
        return Lines(unit, total, done, every=math.inf)
    from tqdm import autonotebook, std

    if autonotebook.tqdm is not std.tqdm:  # in a notebook
        notebook: Bar = autonotebook.tqdm(initial=done, total=total, unit=unit)
        return notebook
    if not sys.stderr.isatty():
        return Lines(unit, total, done, every=_EVERY)
    if 0 in os.get_terminal_size(sys.stderr.fileno()):  # tqdm would show nothing
        fixed: Bar = std.tqdm(initial=done, total=total, unit=unit, ncols=_COLUMNS, nrows=_ROWS)
        return fixed
    fitting: Bar = std.tqdm(initial=done, total=total, unit=unit, dynamic_ncols=True)
    return fitting


class Lines:
    """Prints a line to stderr every ``every`` seconds, and a last one at the end."""

    def __init__(self, unit: str, total: int, done: int, every: float) -> None:
        self.n = done
        self.total = total
        self._unit = unit
        self._every = every
        self._description = self._postfix = ""
        self._from = done
        self._began = self._printed_at = time.monotonic()
        self._printed = done

    def update(self, n: int = 1) -> None:
        """Counts ``n`` units, and prints a line if the last one is old enough."""
        self.n += n
        if time.monotonic() - self._printed_at >= self._every:
            self._print()

    def set_description_str(self, desc: str) -> None:
        """The beginning of the next lines."""
        self._description = desc

    def set_postfix_str(self, s: str) -> None:
        """The end of the next lines."""
        self._postfix = s

    def write(self, s: str) -> None:
        """Prints a line to stdout, in order with those on stderr."""
        print(s, flush=True)

    def close(self) -> None:
        """Prints a last line unless the last one said the same."""
        if self.n != self._printed and math.isfinite(self._every):
            self._print()

    def _print(self) -> None:
        self._printed, self._printed_at = self.n, time.monotonic()
        done = f"{self._unit} {self.n} of {self.total}"
        parts = [self._description, done, self._postfix, self._time_left()]
        print(", ".join(part for part in parts if part), file=sys.stderr, flush=True)

    def _time_left(self) -> str:
        done, left = self.n - self._from, self.total - self.n
        if done <= 0 or left <= 0:
            return ""
        seconds = round((self._printed_at - self._began) / done * left)
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"
