"""A probe that moves theta and moves it back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from zoext._parameters.parameters import Parameters
from zoext._runtime import interrupts
from zoext._runtime.profiling import Phase, record
from zoext.directions import Combination, Direction, Terms
from zoext.probes.base import Closure, Evaluate, Probe


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
