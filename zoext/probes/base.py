"""What all probes share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import ClassVar

from torch import Tensor

from zoext._runtime.interrupts import Signals
from zoext.directions import Combination


class Session(ABC):
    """The probes of one estimate, during which signals are held back."""

    def __init__(self, signals: Signals) -> None:
        self._signals = signals

    @abstractmethod
    def displaced(self, combination: Combination) -> AbstractContextManager[None]:
        """The block in which the model runs at ``theta + combination``."""

    def interruptible(self) -> AbstractContextManager[None]:
        """The block within ``displaced`` in which signals take effect: that of the closure."""
        return self._signals.allowed()

    @property
    def is_displaced(self) -> bool:
        """Whether theta still is where the last probe moved it; the end of the session restores it."""
        return False

    def settle(self) -> None:
        """Takes note that the caller has moved the first group that is still displaced: it stays there."""
        raise RuntimeError("this session never leaves theta displaced")


class Probe(ABC):
    """Runs a model at displaced weights.

    All probes clear autocast's cache, which keeps casts of weights and sees neither kind of change.
    """

    #: Whether theta is restored bit for bit, so that a run can be replayed without its probes.
    is_exact: ClassVar[bool] = False

    @abstractmethod
    def session(self) -> AbstractContextManager[Session]:
        """The probes of one estimate. Theta is restored when the block ends, however it ends."""

    @property
    def is_to_watch(self) -> bool:
        """Whether the next session must be watched, because something new ran in the last one."""
        return False

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """Within the block sessions read nothing on the host, as watching does."""
        yield

    @contextmanager
    def captured(self) -> Iterator[list[Tensor]]:
        """The block in which a session is captured in a graph, so that nothing is read on the host.

        Yields the memory that replays will use, filled when the block ends.
        """
        yield []
