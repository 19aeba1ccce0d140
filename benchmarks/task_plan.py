"""The runs that ``tasks.py`` needs: a pure function of its options and of the runs that are finished."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

SWEEP, FINAL = "sweep", "final"

#: How many learning rates a sweep may add.
_EXTENSIONS = 3

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
        """The sweep of a method. Where the best lr is at its edge, further ones lie beyond it."""
        lrs = [self.centres[method] * factor for factor in sorted(self.factors)]
        grid = [Choice(lr, schedule) for schedule in self.schedules for lr in lrs]
        if len(grid) == 1:
            return Sweep((), grid[0], False)

        def run_of(choice: Choice) -> Run:
            return Run(*setting, SWEEP, method, *choice, self.seeds[0], self.sweep_forwards)

        def rank(choice: Choice) -> tuple[float, float]:
            return validation_loss(done[run_of(choice)]), choice.lr  # the lower lr, if all diverged

        for extension in range(_EXTENSIONS + 1):
            runs = tuple(map(run_of, grid))
            if any(run not in done for run in runs):
                return Sweep(runs, None, False)
            best = min(grid, key=rank)
            beyond = _beyond(grid, best)
            if beyond is None or extension == _EXTENSIONS:
                break
            grid.append(beyond)
        if math.isinf(rank(best)[0]):
            return Sweep(runs, None, False, all_diverged=True)
        return Sweep(runs, best, beyond is not None)


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


def _beyond(grid: Sequence[Choice], best: Choice) -> Choice | None:
    """The next choice beyond the edge that ``best`` is at; None if others with its schedule surround it."""
    lrs = sorted(choice.lr for choice in grid if choice.schedule == best.schedule)
    if len(lrs) == 1 or best.lr not in (lrs[0], lrs[-1]):
        return None
    edge, inner = (lrs[0], lrs[1]) if best.lr == lrs[0] else (lrs[-1], lrs[-2])
    return best._replace(lr=edge * edge / inner)
