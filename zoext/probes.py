"""The loss at ``theta + combination``, with theta exactly as it was afterwards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from zoext import interrupts, wrappers
from zoext.directions import Combination, Direction, Terms
from zoext.parameters import Parameters
from zoext.profiling import Phase, record
from zoext.swap import ModuleSwap, StreamedProbeError
from zoext.unperturbed import UnperturbedReads

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


class InplaceProbe(Probe):
    """Adds the combination to theta, runs the closure, and at the end subtracts it again.

    From one probe to the next along the same direction theta moves at once, from ``+mu`` to ``-mu``.
    Needs no memory and nothing but the parameters. Restores theta to rounding only: in 16 bits the
    error grows with every step, so prefer ``StreamedProbe`` where there is a module.
    """

    @contextmanager
    def session(self) -> Iterator[Evaluate]:
        displaced: list[_Displaced] = []

        def evaluate(combination: Combination, closure: Closure) -> Any:
            _move(displaced, combination)
            torch.clear_autocast_cache()
            with record(Phase.FORWARD), signals.allowed():
                return closure()

        with interrupts.deferred() as signals:
            try:
                yield evaluate
            finally:
                _restore(displaced)
                torch.clear_autocast_cache()


class _Displaced(NamedTuple):
    """One group of parameters away from theta."""

    direction: Direction
    parameters: Parameters
    terms: Terms


def _move(displaced: list[_Displaced], combination: Combination) -> None:
    """Moves theta from where it is to the combination; ``displaced`` is true after each kernel."""
    if displaced and displaced[0].terms.seeds is not combination.seeds:
        _restore(displaced)
    with record(Phase.PERTURB):
        for position, (parameters, terms) in enumerate(combination.terms):
            change = terms
            if position < len(displaced):
                step = terms.coefficients - displaced[position].terms.coefficients
                change = Terms(terms.seeds, step, terms.frame)
            combination.direction.axpy_(parameters, [change])
            displaced[position : position + 1] = [_Displaced(combination.direction, parameters, terms)]


def _restore(displaced: list[_Displaced]) -> None:
    with record(Phase.RESTORE):
        while displaced:
            direction, parameters, terms = displaced[-1]
            direction.axpy_(parameters, [Terms(terms.seeds, -terms.coefficients, terms.frame)])
            displaced.pop()


class StreamedProbe(Probe):
    """Swaps each module's own weights for displaced ones while that module runs.

    Theta is only ever read, so it is restored bit for bit whatever the closure does. Buffers that a
    module writes to (running statistics) are put back as well. The displaced weights live in a
    scratch buffer as large as the largest module's weights.

    A module must read its weights inside its own ``forward``. Whether that is so is watched, operator
    by operator, at the first probe and again whenever other modules run than before; a weight that is
    read elsewhere raises a RuntimeError that names it, before anything was moved.
    """

    is_exact = True

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._swap = ModuleSwap(module)
        self._watched: set[tuple[frozenset[int], tuple[tuple[int, bool], ...]]] = set()
        self._watch_next = True
        self._sessions = 0
        self._unwatched = False

    def __getstate__(self) -> dict[str, Any]:
        """The module alone: all else is found again."""
        return {"module": self.module}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["module"])  # type: ignore[misc]

    @property
    def is_to_watch(self) -> bool:
        return self._watch_next

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        self._unwatched = True
        try:
            yield
        finally:
            self._unwatched = False

    @contextmanager
    def recorded(self) -> Iterator[list[Tensor]]:
        memory: list[Tensor] = []
        self._watch_next = False
        with self.unwatched():
            yield memory
        if self._watch_next:
            raise StreamedProbeError(
                "streamed probe: other modules ran while the step was recorded than in the steps before, so "
                "nobody has looked whether they read weights that are not displaced. Run the same modules "
                "at every step, or pass probe='inplace'"
            )
        memory.append(self._swap.memory)

    @contextmanager
    def session(self) -> Iterator[Evaluate]:
        if not self._unwatched:
            self._sessions += 1
            if self._sessions & (self._sessions - 1) == 0 or self._sessions % 100 == 0:
                self._watch_next = True

        def evaluate(combination: Combination, closure: Closure) -> Any:
            modes = self._swap.modes()
            unknown = self._watch_next or all(modes != known for _, known in self._watched)
            watch = unknown and not self._unwatched
            watching = _watching(combination) if watch and len(combination) else nullcontext()
            with (
                self._swap.displaced(combination, find_written_buffers=watch) as visited,
                watching,
                record(Phase.FORWARD),
                signals.allowed(),
            ):
                torch.clear_autocast_cache()
                loss = closure()
            if len(combination):
                route = (frozenset(visited), modes)
                if watch:
                    self._watched.add(route)
                # A route not seen before ran unwatched: watch it at the next probe.
                unwatched = route not in self._watched
                self._watch_next = unwatched or (self._unwatched and self._watch_next)
            return loss

        with interrupts.deferred() as signals, self._swap.hooked(signals):
            try:
                yield evaluate
            finally:
                torch.clear_autocast_cache()


@contextmanager
def _watching(combination: Combination) -> Iterator[None]:
    reads = UnperturbedReads(parameters for parameters, _ in combination.terms)
    with reads:
        yield
    if reads.names:
        names = ", ".join(sorted(reads.names))
        raise StreamedProbeError(
            f"streamed probe: {names} was read while the module that owns it was not "
            "running, so the probe would not have moved it. Pass probe='inplace', or have the model "
            "call that module instead of reading its weights."
        )


def is_compiled(module: nn.Module) -> bool:
    """Whether any part is compiled or scripted, so that its code may not see swapped weights."""
    kinds: tuple[type, ...] = (torch.jit.ScriptModule, *wrappers.compiled())
    return any(
        isinstance(part, kinds) or getattr(part, "_compiled_call_impl", None) is not None
        for part in module.modules()
    )


def choose(probe: str | Probe, module: nn.Module | None, groups: list[Parameters]) -> Probe:
    """The probe for ``probe=``: "auto", "inplace", "streamed" or a ``Probe``."""
    if isinstance(probe, Probe):
        return probe
    if probe not in {"auto", "inplace", "streamed"}:
        raise ValueError(f"probe must be 'auto', 'inplace', 'streamed' or a Probe, not {probe!r}")
    if probe == "streamed" and module is None:
        raise ValueError(
            "probe='streamed' needs the nn.Module whose forward is streamed: pass the module as params, or "
            "probe=zoext.StreamedProbe(module) with parameter groups"
        )
    if probe == "inplace" or module is None or (probe == "auto" and is_compiled(module)):
        return InplaceProbe()
    return StreamedProbe(module)
