"""The loss at ``theta + combination``, with theta exactly as it was afterwards."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from zoext import interrupts
from zoext.directions import Combination
from zoext.parameters import Parameters
from zoext.swap import ModuleSwap
from zoext.unperturbed import UnperturbedReads

Closure = Callable[[], Any]


class Probe(ABC):
    """Evaluates a closure at displaced weights."""

    @abstractmethod
    def evaluate(self, combination: Combination, closure: Closure) -> Any:
        """``closure()`` at ``theta + combination``; theta is back when it returns or raises."""


class InplaceProbe(Probe):
    """Adds the combination to theta, runs the closure, subtracts it again.

    Needs no memory and nothing but the parameters. Restores theta to rounding only: in 16 bits the
    error grows with every step, so prefer ``StreamedProbe`` where there is a module.
    """

    def evaluate(self, combination: Combination, closure: Closure) -> Any:
        moved: list[tuple[Parameters, Tensor]] = []
        with interrupts.deferred() as signals:
            try:
                for parameters, coefficients in combination.terms:
                    combination.direction.axpy_(parameters, combination.seeds, coefficients)
                    moved.append((parameters, coefficients))
                with signals.allowed():
                    return closure()
            finally:
                for parameters, coefficients in moved:
                    combination.direction.axpy_(parameters, combination.seeds, -coefficients)


class StreamedProbe(Probe):
    """Swaps each module's own weights for displaced ones while that module runs.

    Theta is only ever read, so it is restored bit for bit whatever the closure does. Buffers that a
    module writes to (running statistics) are put back as well. The displaced weights live in a
    scratch buffer as large as the largest module's weights.

    A module must read its weights inside its own ``forward``. Whether that is so is watched, operator
    by operator, at the first probe and again whenever other modules run than before; a weight that is
    read elsewhere raises a RuntimeError that names it, before anything was moved.
    """

    def __init__(self, module: nn.Module) -> None:
        self._swap = ModuleSwap(module)
        self._watched: set[tuple[frozenset[int], tuple[bool, ...]]] = set()
        self._watch_next = True

    def evaluate(self, combination: Combination, closure: Closure) -> Any:
        training = self._swap.training_flags()
        watch = self._watch_next or all(training != flags for _, flags in self._watched)
        watching = self._watching(combination) if watch and len(combination) else nullcontext()
        with (
            interrupts.deferred() as signals,
            self._swap.installed(combination, find_written_buffers=watch) as visited,
            watching,
            signals.allowed(),
        ):
            loss = closure()
        if len(combination):
            route = (frozenset(visited), training)
            if watch:
                self._watched.add(route)
            # A route not seen before ran unwatched: watch it at the next probe.
            self._watch_next = route not in self._watched
        return loss

    @contextmanager
    def _watching(self, combination: Combination) -> Iterator[None]:
        reads = UnperturbedReads(parameters for parameters, _ in combination.terms)
        with reads:
            yield
        if reads.names:
            names = ", ".join(sorted(reads.names))
            raise RuntimeError(
                f"streamed probe: {names} was read while the module that owns it was not "
                "running, so the probe would not have moved it. Pass probe='inplace', or have the model "
                "call that module instead of reading its weights."
            )


def is_compiled(module: nn.Module) -> bool:
    """Whether any part is compiled or scripted, so that its code may not see swapped weights."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # importing it takes seconds
    kinds = (torch.jit.ScriptModule, *((dynamo.OptimizedModule,) if dynamo else ()))
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
