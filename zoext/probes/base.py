"""What all probes share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

from torch import Tensor

from zoext.directions import Combination

Closure = Callable[[], Any]
Evaluate = Callable[[Combination, Closure], Any]


class Probe(ABC):
    """Evaluates closures at displaced weights.

    Both probes clear autocast's cache, which keeps casts of weights and sees neither kind of change.
    """

    #: Whether theta is restored bit for bit, so that a run can be replayed without its probes.
    is_exact: ClassVar[bool] = False

    @abstractmethod
    def session(self) -> AbstractContextManager[Evaluate]:
        """The probes of one estimate: yields ``evaluate(combination, closure)``.

        ``evaluate`` returns ``closure()`` at ``theta + combination``. Theta is back when the block ends,
        however it ends.
        """

    @property
    def is_to_watch(self) -> bool:
        """Whether the next session must be watched, because something new ran in the last one."""
        return False

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """Within the block sessions read nothing on the host, as watching does."""
        yield

    @contextmanager
    def recorded(self) -> Iterator[list[Tensor]]:
        """Within the block a session is recorded to be replayed, so nothing is read on the host.

        Yields the memory that replays will use, to be filled when the block ends.
        """
        yield []
