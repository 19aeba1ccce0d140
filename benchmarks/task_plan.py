"""The runs that ``tasks.py`` needs: a pure function of its options and of the runs that are finished."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

SWEEP, FINAL = "sweep", "final"

Record = dict[str, Any]


class Setting(NamedTuple):
    """What a table is about."""

    task: str
    prompted: bool

    def __str__(self) -> str:
        return f"{self.task}, {'with' if self.prompted else 'without'} prompt"


class Choice(NamedTuple):
    """What a sweep chooses."""

    lr: float
    schedule: str


class Run(NamedTuple):
    """The identity of a run. Only final runs are tested."""

    task: str
    prompted: bool
    phase: str
    method: str
    lr: float
    schedule: str
    seed: int
    forwards: int


class Start(NamedTuple):
    """The identity of an evaluation before any step."""

    task: str
    prompted: bool
    seed: int


Done = Mapping[Run | Start, Record]


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Attributes:
        centres: the middle of the sweep over lr, by method.
        factors: the sweep, as multiples of that.
        sweep_forwards: the forward passes of a run of a sweep, which takes the first seed.
        forwards: those of a run that is reported.
    """

    settings: tuple[Setting, ...]
    centres: Mapping[str, float]
    factors: tuple[float, ...]
    schedules: tuple[str, ...]
    seeds: tuple[int, ...]
    sweep_forwards: int
    forwards: int

    def next(self, done: Done) -> Run | Start | None:
        """The first that is missing; None if nothing is."""
        return next((each for each in self._all(done) if each not in done), None)

    def _all(self, done: Done) -> Iterator[Run | Start]:
        for setting in self.settings:
            yield from (Start(*setting, seed) for seed in self.seeds)
            for method in self.centres:
                sweep = self.sweep(setting, method, done)
                yield from sweep.runs
                if sweep.best is not None:
                    yield from self.final(setting, method, sweep.best)

    def final(self, setting: Setting, method: str, choice: Choice) -> list[Run]:
        """The runs that the table reports."""
        return [Run(*setting, FINAL, method, *choice, seed, self.forwards) for seed in self.seeds]

    def sweep(self, setting: Setting, method: str, done: Done) -> Sweep:
        """The sweep of a method. Where the best lr is at its edge, one more lr lies beyond it."""
        lrs = [self.centres[method] * factor for factor in sorted(self.factors)]
        grid = [Choice(lr, schedule) for schedule in self.schedules for lr in lrs]

        def run_of(choice: Choice) -> Run:
            return Run(*setting, SWEEP, method, *choice, self.seeds[0], self.sweep_forwards)

        if len(grid) == 1:
            return Sweep((), grid[0], False)
        if all(run_of(choice) in done for choice in grid):
            beyond = _beyond(lrs, min(grid, key=lambda choice: validation_loss(done[run_of(choice)])))
            grid += [] if beyond is None else [beyond]
        runs = tuple(run_of(choice) for choice in grid)
        if any(run not in done for run in runs):
            return Sweep(runs, None, False)
        best = min(runs, key=lambda run: validation_loss(done[run]))
        if math.isinf(validation_loss(done[best])):
            return Sweep(runs, None, False, all_diverged=True)
        tried = [choice.lr for choice in grid if choice.schedule == best.schedule]
        return Sweep(
            runs, Choice(best.lr, best.schedule), len(tried) > 1 and best.lr in (min(tried), max(tried))
        )


@dataclass(frozen=True)
class Sweep:
    """Attributes:
    runs: what it takes.
    best: the lowest validation loss; None while runs are missing, or if all diverged.
    at_edge: whether a better lr may lie beyond those that were tried.
    """

    runs: tuple[Run, ...]
    best: Choice | None
    at_edge: bool
    all_diverged: bool = False


def validation_loss(record: Record) -> float:
    """At the end of a run; infinite if it diverged."""
    return math.inf if record["diverged"] else float(record["curve"][-1]["loss"])


def _beyond(lrs: list[float], best: Choice) -> Choice | None:
    if len(lrs) == 1 or best.lr not in (lrs[0], lrs[-1]):
        return None
    edge, inner = (lrs[0], lrs[1]) if best.lr == lrs[0] else (lrs[-1], lrs[-2])
    return best._replace(lr=edge * edge / inner)
