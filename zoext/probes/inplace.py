"""A probe that moves theta and moves it back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from zoext._parameters import gathering
from zoext._parameters.parameters import Parameters
from zoext._parameters.wrappers import is_compiled
from zoext._runtime import interrupts
from zoext._runtime.profiling import Phase, record
from zoext.directions import Combination, Direction, Terms
from zoext.probes._buffers import BufferRestore
from zoext.probes._writes import refused
from zoext.probes.base import Probe, Session, is_watched_session


class InplaceProbe(Probe):
    """Adds the combination to theta, runs the closure, and finally subtracts the combination.

    Between probes along the same direction, theta moves in a single pass, from ``+mu`` to ``-mu``. After the
    last probe of ``step(closure)``, a linear update (``SGD``) of float32 weights moves theta to the end of
    the step in a single pass. A step then takes three passes over theta for a central difference and two for
    a one-sided one. The coefficient of the last pass is the float32 nearest to ``mu - lr g``, an error of up
    to ``2**-24 mu`` along the direction.

    Needs only the parameters and no extra memory. Restores theta only up to rounding: in 16 bits the error
    grows with every step, so prefer ``StreamedProbe`` if the model is an ``nn.Module``.

    Args:
        module: the model. If it is given, buffers that it writes, such as running statistics, change once an
            estimate, and not in every forward. The first probe raises before the closure writes to a weight
            of it, as merging an adapter does, unless the model is compiled.
    """

    def __init__(self, module: nn.Module | None = None) -> None:
        self.module = module
        self._buffers = BufferRestore(module)
        self._sessions = 0
        self._is_first = True

    def describe(self) -> str:
        return "inplace: all weights are displaced while the closure runs, and restored up to rounding"

    @contextmanager
    def session(self) -> Iterator[Session]:
        self._sessions += not self._unwatched
        with interrupts.deferred() as signals:
            self._buffers.forget()  # those of a session that raised
            session = _InplaceSession(signals, self.module, self._guarded, self._buffers.take)
            try:
                yield session
            finally:
                session.restore()
                torch.clear_autocast_cache()

    @contextmanager
    def _guarded(self, keep_buffers: bool) -> Iterator[None]:
        """A block after which buffers are restored; in the first probe, every operator is looked at."""
        is_first, self._is_first = self._is_first and not self._unwatched, False
        find_written = is_watched_session(self._sessions) and not self._unwatched
        # Under the watch, compiled code would run as it is written.
        is_seen = is_first and self.module is not None and not is_compiled(self.module)
        guard = refused(self.module) if is_seen and self.module is not None else nullcontext()
        with self._buffers.restored(find_written, keep_buffers), guard:
            yield


class _Displaced(NamedTuple):
    """A parameter group that is displaced from theta."""

    direction: Direction
    parameters: Parameters
    terms: Terms


class _InplaceSession(Session):
    def __init__(
        self,
        signals: interrupts.Signals,
        module: nn.Module | None,
        guarded: Callable[[bool], AbstractContextManager[None]],
        take_buffers: Callable[[], Callable[[Tensor], None]],
    ) -> None:
        super().__init__(signals)
        self._module = module
        self._guarded = guarded
        self._take_buffers = take_buffers
        self._displaced: list[_Displaced] = []

    @contextmanager
    def displaced(self, combination: Combination, keep_buffers: bool = False) -> Iterator[None]:
        self._move(combination)
        self._reshard()
        torch.clear_autocast_cache()
        with self._guarded(keep_buffers), record(Phase.FORWARD):
            yield

    def take_buffers(self) -> Callable[[Tensor], None]:
        return self._take_buffers()

    @property
    def is_displaced(self) -> bool:
        return bool(self._displaced)

    def settle(self) -> None:
        del self._displaced[0]

    def _reshard(self) -> None:
        """Has FSDP2 gather weights again, which does not see that the parts have moved."""
        if self._module is not None:
            gathering.reshard(self._module)

    def _move(self, combination: Combination) -> None:
        """Moves theta from its current place to the combination; updates ``_displaced`` after each kernel."""
        displaced = self._displaced
        if displaced and displaced[0].terms.seeds is not combination.seeds:
            self.restore()
        if not len(combination):
            return
        with record(Phase.PERTURB):
            for position, (parameters, terms) in enumerate(combination.terms):
                change = terms
                if position < len(displaced):
                    step = terms.coefficients - displaced[position].terms.coefficients
                    change = Terms(terms.seeds, step, terms.frame)
                combination.direction.axpy_(parameters, [change])
                displaced[position : position + 1] = [_Displaced(combination.direction, parameters, terms)]

    def restore(self) -> None:
        if not self._displaced:
            return
        with record(Phase.RESTORE):
            while self._displaced:
                direction, parameters, terms = self._displaced[-1]
                direction.axpy_(parameters, [Terms(terms.seeds, -terms.coefficients, terms.frame)])
                self._displaced.pop()
        self._reshard()
