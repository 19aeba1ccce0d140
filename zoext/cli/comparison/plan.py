"""Which runs a comparison needs: a pure function of its settings and of the runs that are done.

So a comparison that was cut short goes on where it was, and one with more seeds or another optimizer
adds only what is missing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from zoext.cli.comparison.records import Outcomes, Run
from zoext.cli.comparison.settings import ComparisonSettings

SWEEP, FINAL = "sweep", "final"


@dataclass(frozen=True)
class Sweep:
    """How far the choice of a method's learning rate has come.

    ``missing`` are the runs that are known to be needed. Once there are none, ``losses`` has the mean
    loss of each lr, rising, infinite where a run diverged, and ``lr`` is the best of them, or None where
    all diverged. ``added`` is the lr by which the grid was extended, if it was.
    """

    missing: tuple[Run, ...] = ()
    losses: tuple[tuple[float, float], ...] = ()
    lr: float | None = None
    added: float | None = None

    @property
    def at_edge(self) -> bool:
        """Whether the best lr is the lowest or the highest tried, so that a better one may lie beyond."""
        tried = [lr for lr, _ in self.losses]
        return len(tried) > 1 and self.lr in (tried[0], tried[-1])


def sweep(settings: ComparisonSettings, method: str, done: Outcomes) -> Sweep:
    """The sweep over the method's grid, extended once where the best lr is at its edge."""
    grid = settings.grid(method)
    if len(grid) == 1:  # nothing to choose from
        return Sweep(lr=grid[0])

    def runs(lr: float) -> list[Run]:
        return [Run(method, lr, seed, settings.sweep_budget) for seed in range(settings.sweep_seeds)]

    def loss(lr: float) -> float:
        return sum(done[run].selection_loss for run in runs(lr)) / settings.sweep_seeds

    if missing := _missing((run for lr in grid for run in runs(lr)), done):
        return Sweep(missing)
    added = _beyond(grid, min(grid, key=loss))
    if added is not None:
        if missing := _missing(runs(added), done):
            return Sweep(missing, added=added)
        grid = tuple(sorted((*grid, added)))
    best = min(grid, key=loss)
    losses = tuple((lr, loss(lr)) for lr in grid)
    return Sweep((), losses, best if math.isfinite(loss(best)) else None, added)


def _beyond(grid: tuple[float, ...], best: float) -> float | None:
    """The next lr outside of the grid beside ``best``; None where that is inside."""
    if best == grid[0]:  # also where all diverged
        return grid[0] * grid[0] / grid[1]
    if best == grid[-1]:
        return grid[-1] * grid[-1] / grid[-2]
    return None


def final(settings: ComparisonSettings, method: str, lr: float) -> list[Run]:
    """The runs that the table reports."""
    return [Run(method, lr, seed, settings.forwards) for seed in range(settings.seeds)]


def next_run(settings: ComparisonSettings, done: Outcomes) -> tuple[str, Run] | None:
    """The phase and the run to do now, all sweeps before all final runs; None if there is none left."""
    sweeps = {method: sweep(settings, method, done) for method in settings.optimizers}
    for state in sweeps.values():
        if state.missing:
            return SWEEP, state.missing[0]
    for method, state in sweeps.items():
        if state.lr is not None and (missing := _missing(final(settings, method, state.lr), done)):
            return FINAL, missing[0]
    return None


def forwards_to_do(settings: ComparisonSettings, done: Outcomes) -> int:
    """The forward passes of all runs left, as far as they are known: a grid may yet be extended."""
    total = 0
    for method in settings.optimizers:
        state = sweep(settings, method, done)
        total += sum(run.budget for run in state.missing)
        if state.missing:
            reused = settings.sweep_seeds if settings.sweep_budget == settings.forwards else 0
            total += max(0, settings.seeds - reused) * settings.forwards
        elif state.lr is not None:
            total += sum(run.budget for run in _missing(final(settings, method, state.lr), done))
    return total


def _missing(runs: Iterable[Run], done: Outcomes) -> tuple[Run, ...]:
    return tuple(run for run in runs if run not in done)
