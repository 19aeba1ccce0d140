"""The runs that a comparison needs: a pure function of its settings and of the finished runs.

Therefore an interrupted comparison continues where it stopped, and one with more seeds or another optimizer
adds only the missing runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from zoext.cli._comparison.records import Outcomes, Run
from zoext.cli._comparison.settings import ComparisonSettings

SWEEP, FINAL = "sweep", "final"


@dataclass(frozen=True)
class Sweep:
    """The state of a method's learning rate sweep.

    Attributes:
        missing: the runs that are known to be needed.
        losses: the mean loss of each lr, by ascending lr, infinite if a run diverged; empty while runs are
            missing.
        lr: the best lr; None while runs are missing, or if all diverged.
        added: the lr that the grid was extended by, if any.
    """

    missing: tuple[Run, ...] = ()
    losses: tuple[tuple[float, float], ...] = ()
    lr: float | None = None
    added: float | None = None

    @property
    def at_edge(self) -> bool:
        """Whether the best lr is the lowest or the highest that was tried: a better one may lie beyond."""
        tried = [lr for lr, _ in self.losses]
        return len(tried) > 1 and self.lr in (tried[0], tried[-1])


def sweep(settings: ComparisonSettings, method: str, done: Outcomes) -> Sweep:
    """The sweep over the method's grid, extended once if the best lr is at its edge."""
    grid = settings.grid(method)
    if len(grid) == 1:  # no choice
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
    """The next lr beyond the edge of the grid that ``best`` is at; None if it is inside."""
    if best == grid[0]:  # also if all diverged
        return grid[0] * grid[0] / grid[1]
    if best == grid[-1]:
        return grid[-1] * grid[-1] / grid[-2]
    return None


def final(settings: ComparisonSettings, method: str, lr: float) -> list[Run]:
    """The runs that the table reports."""
    return [Run(method, lr, seed, settings.forwards) for seed in range(settings.seeds)]


def next_run(settings: ComparisonSettings, done: Outcomes) -> tuple[str, Run] | None:
    """The next phase and run, all sweeps before all final runs; None if none is left."""
    sweeps = {method: sweep(settings, method, done) for method in settings.optimizers}
    for state in sweeps.values():
        if state.missing:
            return SWEEP, state.missing[0]
    for method, state in sweeps.items():
        if state.lr is not None and (missing := _missing(final(settings, method, state.lr), done)):
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
        elif state.lr is not None:
            total += sum(run.budget for run in _missing(final(settings, method, state.lr), done))
    return total


def _missing(runs: Iterable[Run], done: Outcomes) -> tuple[Run, ...]:
    return tuple(run for run in runs if run not in done)
