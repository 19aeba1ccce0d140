"""Base classes of probes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import ClassVar

from torch import Tensor

from zoext._runtime.interrupts import Signals
from zoext.directions import Combination


class Session(ABC):
    """The probes of one estimate, during which signals are deferred."""

    def __init__(self, signals: Signals) -> None:
        self._signals = signals

    @abstractmethod
    def displaced(self, combination: Combination, keep_buffers: bool = False) -> AbstractContextManager[None]:
        """Displaces the model to ``theta + combination`` within the block.

        With ``keep_buffers``, the values that modules write to buffers in the block, such as running
        statistics, are kept for ``take_buffers``.
        """

    def interruptible(self) -> AbstractContextManager[None]:
        """Lets signals take effect within the block, which runs the closure inside ``displaced``."""
        return self._signals.allowed()

    def is_to_repeat(self) -> bool:
        """Whether the last probe must be evaluated again, since weights may have been read as they were."""
        return False

    def take_buffers(self) -> Callable[[Tensor], None]:
        """Hands over the buffers that were kept.

        Returns a function that writes them if its argument (bool []) holds, also after the session.
        """
        return lambda condition: None

    @property
    def is_displaced(self) -> bool:
        """Whether theta is still at the last probe. The end of the session restores it."""
        return False

    def settle(self) -> None:
        """Marks the first displaced group as moved by the caller, so that it is not restored."""
        raise RuntimeError("this session never leaves theta displaced")


class Probe(ABC):
    """Runs a model at displaced weights.

    All probes clear autocast's cache, because its casts of weights do not follow changes of the weights.
    """

    #: Whether theta is restored bit for bit, so that a run can be replayed without its probes.
    is_exact: ClassVar[bool] = False
    #: Whether a combination is displaced from what theta will be with ``Terms.held``.
    displaces_held: ClassVar[bool] = False
    _unwatched = False

    @abstractmethod
    def session(self) -> AbstractContextManager[Session]:
        """The probes of one estimate. Theta is restored when the block ends, even if it raises."""

    @abstractmethod
    def describe(self) -> str:
        """What is displaced and how, as far as the probes until now have shown."""

    @property
    def is_to_watch(self) -> bool:
        """Whether the next session must be watched, because something new ran in the last one."""
        return False

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """Disables watching within the block, so that sessions read nothing on the host."""
        self._unwatched = True
        try:
            yield
        finally:
            self._unwatched = False

    @contextmanager
    def captured(self) -> Iterator[list[Tensor]]:
        """The block in which a graph captures a session, so that nothing may be read on the host.

        Yields a list that holds the memory used by replays once the block has ended.
        """
        with self.unwatched():
            yield []


def is_watched_session(session: int) -> bool:
    """Whether session number ``session``, from 1, is one to watch: 1, 2, 4, 8, ..., and every 100th."""
    return session & (session - 1) == 0 or session % 100 == 0
