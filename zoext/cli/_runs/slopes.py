"""Tells of steps without a slope: probes with equal losses move nothing, whatever the learning rate."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from zoext.cli._settings import Settings

_STEPS = 20  # in a row
#: How the library begins to tell of them, in terms of a program.
_IN_PYTHON = "the losses of each of the last"


class SlopeWatch:
    """Counts steps in a row whose losses were equal, out of the ``steps`` that a run is to take.

    The losses come in blocks, since reading one waits for the device.
    """

    def __init__(self, settings: Settings, steps: int) -> None:
        self._settings = settings
        self._enough = min(_STEPS, steps)
        self._flat = 0
        self._was_told = False

    @property
    def finding(self) -> str | None:
        """What to say of a run that has no slope now; None if it has."""
        if not self._flat or self._flat < self._enough:
            return None
        mu, dtype = self._settings.mu, self._settings.dtype
        wide = "" if dtype == "float32" else ", --dtype float32"
        return (
            f"the losses of each of the last {self._flat} steps were bit-identical, so there is no slope to "
            f"follow: try a larger --mu than {mu:g}{wide} or a larger --batch-size; put a smooth loss in "
            "place of one that counts, as an accuracy does, and train parameters that the loss depends on"
        )

    def note(self, are_flat: Sequence[bool]) -> str | None:
        """Counts the next steps; what is to be told now, once in a run."""
        told = None
        for is_flat in are_flat:
            self._flat = self._flat + 1 if is_flat else 0
            if self._flat == self._enough and not self._was_told:
                told, self._was_told = self.finding, True
        return told


@contextmanager
def told_by_the_command() -> Iterator[None]:
    """Leaves out what the library says of equal losses."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_IN_PYTHON)
        yield
