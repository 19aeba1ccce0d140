"""The runs that a comparison needs: a pure function of its settings and of the finished runs.

Therefore an interrupted comparison continues where it stopped, and one with more seeds or another optimizer
adds only the missing runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from zoext.cli._comparison.records import Choice, Outcomes, Run
from zoext.cli._comparison.settings import ComparisonSettings

SWEEP, FINAL = "sweep", "final"


@dataclass(frozen=True)
class Sweep:
    """The state of a method's sweep over learning rates and their schedules.

    Attributes:
        missing: the runs that are known to be needed.
        losses: the mean loss of each choice, by schedule and ascending lr, infinite if a run diverged; empty
            while runs are missing.
        best: the best choice; None while runs are missing, or if all diverged.
        added: the choice that the grid was extended by, if any.
    """

    missing: tuple[Run, ...] = ()
    losses: tuple[tuple[Choice, float], ...] = ()
    best: Choice | None = None
    added: Choice | None = None

    @property
    def at_edge(self) -> bool:
        """Whether the best lr is the lowest or the highest that was tried: a better one may lie beyond."""
        if self.best is None:
            return False
        tried = [choice.lr for choice, _ in self.losses if choice.schedule == self.best.schedule]
        return len(tried) > 1 and self.best.lr in (tried[0], tried[-1])


def sweep(settings: ComparisonSettings, method: str, done: Outcomes) -> Sweep:
    """The sweep over the method's grid, extended once if the best lr is at its edge."""
    lrs = settings.grid(method)
    grid = [Choice(lr, schedule) for schedule in settings.schedules for lr in lrs]
    if len(grid) == 1:  # no choice
        return Sweep(best=grid[0])

    def runs(choice: Choice) -> list[Run]:
        budget = settings.sweep_budget
        return [Run(method, *choice, seed, budget) for seed in range(settings.sweep_seeds)]

    def loss(choice: Choice) -> float:
        return sum(done[run].selection_loss for run in runs(choice)) / settings.sweep_seeds

    if missing := _missing((run for choice in grid for run in runs(choice)), done):
        return Sweep(missing)
    added = _beyond(lrs, min(grid, key=loss))
    if added is not None:
        if missing := _missing(runs(added), done):
            return Sweep(missing, added=added)
        grid.append(added)
        grid.sort(key=lambda choice: (settings.schedules.index(choice.schedule), choice.lr))
    best = min(grid, key=loss)
    losses = tuple((choice, loss(choice)) for choice in grid)
    return Sweep((), losses, best if math.isfinite(loss(best)) else None, added)


def _beyond(lrs: tuple[float, ...], best: Choice) -> Choice | None:
    """The next choice beyond the edge of the grid of ``lrs`` that ``best`` is at; None if it is inside."""
    if len(lrs) == 1:
        return None
    if best.lr == lrs[0]:  # also if all diverged
        return best._replace(lr=lrs[0] * lrs[0] / lrs[1])
    if best.lr == lrs[-1]:
        return best._replace(lr=lrs[-1] * lrs[-1] / lrs[-2])
    return None


def final(settings: ComparisonSettings, method: str, choice: Choice) -> list[Run]:
    """The runs that the table reports."""
    return [Run(method, *choice, seed, settings.forwards) for seed in range(settings.seeds)]


def next_run(settings: ComparisonSettings, done: Outcomes) -> tuple[str, Run] | None:
    """The next phase and run, all sweeps before all final runs; None if none is left."""
    sweeps = {method: sweep(settings, method, done) for method in settings.optimizers}
    for state in sweeps.values():
        if state.missing:
            return SWEEP, state.missing[0]
    for method, state in sweeps.items():
        if state.best is not None and (missing := _missing(final(settings, method, state.best), done)):
            return FINAL, missing[0]
    return None


def forwards_to_do(settings: ComparisonSettings, done: Outcomes) -> int:
    """The forward passes of all remaining runs, before any extension of a grid."""
    total = 0
    for method in settings.optimizers:
        state = sweep(settings, method, done)
        total += sum(run.budget for run in state.missing)
        if state.missing:
            reused = settings.sweep_seeds if settings.sweep_budget == settings.forwards else 0
            total += max(0, settings.seeds - reused) * settings.forwards
        elif state.best is not None:
            total += sum(run.budget for run in _missing(final(settings, method, state.best), done))
    return total


def _missing(runs: Iterable[Run], done: Outcomes) -> tuple[Run, ...]:
    return tuple(run for run in runs if run not in done)
