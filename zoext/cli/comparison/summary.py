"""The final runs of each method as the figures of the table and the curves of the picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from zoext.cli.comparison import plan, records
from zoext.cli.comparison.plan import Sweep
from zoext.cli.comparison.records import Outcome
from zoext.cli.comparison.settings import ComparisonSettings
from zoext.cli.evaluation import Estimated
from zoext.cli.json_lines import Record

REFERENCE = "mezo"


@dataclass(frozen=True)
class Point:
    """A figure of all seeds after so many forwards."""

    forwards: int
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def estimated(self) -> Estimated:
        """The mean and its standard error over seeds, which one seed does not have."""
        n = len(self.values)
        return Estimated(self.mean, statistics.stdev(self.values) / math.sqrt(n) if n > 1 else math.nan)


@dataclass(frozen=True)
class Summary:
    """A method at the learning rate that its sweep chose; ``finished`` are the runs that did not diverge."""

    method: str
    sweep: Sweep
    cost: Record
    runs: tuple[Outcome, ...]

    @property
    def finished(self) -> tuple[Outcome, ...]:
        return tuple(run for run in self.runs if not run.diverged)

    def curve(self, name: str) -> list[Point]:
        """The figure ``name`` over the forwards of the runs that did not diverge."""
        # All seeds are evaluated after the same steps, of as many forwards each.
        together = zip(*(run.evaluations for run in self.finished), strict=True)
        return [
            Point(evaluations[0]["forwards"], tuple(evaluation[name] for evaluation in evaluations))
            for evaluations in together
            if name in evaluations[0]
        ]

    @property
    def seconds_per_forward(self) -> float | None:
        """Of the steps of all runs, evaluations left out; None if there are none."""
        forwards = sum(run.end["forwards"] for run in self.runs)
        return sum(run.end["seconds"] for run in self.runs) / forwards if forwards else None


def summarise(settings: ComparisonSettings, raw: Sequence[Record]) -> list[Summary]:
    """One summary for each method, in their order."""
    done, costs = records.outcomes(raw), records.costs(raw)
    summaries = []
    for method in settings.optimizers:
        sweep = plan.sweep(settings, method, done)
        runs = () if sweep.lr is None else plan.final(settings, method, sweep.lr)
        summaries.append(Summary(method, sweep, costs[method], tuple(done[run] for run in runs)))
    return summaries


def reference_loss(summaries: Sequence[Summary]) -> float | None:
    """MeZO's mean loss at the budget; None if it is not compared or always diverged."""
    curves = [summary.curve("report_loss") for summary in summaries if summary.method == REFERENCE]
    return curves[0][-1].mean if curves and curves[0] else None


def forwards_to_reach(loss: float, curve: Sequence[Point]) -> float | None:
    """Where the mean of the curve first is at ``loss`` or below, on straight lines between evaluations."""
    if curve and curve[0].mean <= loss:
        return float(curve[0].forwards)
    for before, after in pairwise(curve):
        if after.mean <= loss:
            share = (before.mean - loss) / (before.mean - after.mean)
            return before.forwards + share * (after.forwards - before.forwards)
    return None
