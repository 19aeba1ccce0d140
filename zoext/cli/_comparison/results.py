"""The results of a comparison: the final runs of each method, summarised, and as the rows of two tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from zoext._benchmarking.memory import MIB
from zoext.cli._comparison import plan, records
from zoext.cli._comparison.plan import Sweep
from zoext.cli._comparison.records import Choice, Outcome
from zoext.cli._comparison.settings import ComparisonSettings
from zoext.cli._problem.evaluation import Estimated
from zoext.cli._runs.records import Record
from zoext.cli._schedules import CONSTANT

_NONE = "-"
_DIVERGED = "diverged"

REFERENCE = "mezo"


@dataclass(frozen=True)
class Point:
    """The values of all seeds after ``forwards`` forward passes."""

    forwards: int
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def estimated(self) -> Estimated:
        """The mean and its standard error over seeds, NaN for a single seed."""
        n = len(self.values)
        return Estimated(self.mean, statistics.stdev(self.values) / math.sqrt(n) if n > 1 else math.nan)


@dataclass(frozen=True)
class Summary:
    """The final runs of a method at the learning rate that its sweep selected."""

    method: str
    sweep: Sweep
    cost: Record
    runs: tuple[Outcome, ...]

    @property
    def finished(self) -> tuple[Outcome, ...]:
        """The runs that did not diverge."""
        return tuple(run for run in self.runs if not run.diverged)

    def curve(self, name: str) -> list[Point]:
        """The values ``name`` over forward passes, of the runs that did not diverge."""
        # All seeds are evaluated after the same steps and forward passes.
        together = zip(*(run.evaluations for run in self.finished), strict=True)
        return [
            Point(evaluations[0]["forwards"], tuple(evaluation[name] for evaluation in evaluations))
            for evaluations in together
            if name in evaluations[0]
        ]

    @property
    def seconds_per_forward(self) -> float | None:
        """Over the steps of all runs, without evaluations; None if there are none."""
        forwards = sum(run.end["forwards"] for run in self.runs)
        return sum(run.end["seconds"] for run in self.runs) / forwards if forwards else None


def summarise(settings: ComparisonSettings, raw: Sequence[Record]) -> list[Summary]:
    """One summary per method, in their order."""
    done, costs = records.outcomes(raw), records.costs(raw)
    summaries = []
    for method in settings.optimizers:
        sweep = plan.sweep(settings, method, done)
        runs = () if sweep.best is None else plan.final(settings, method, sweep.best)
        summaries.append(Summary(method, sweep, costs[method], tuple(done[run] for run in runs)))
    return summaries


def record_of(summary: Summary) -> Record:
    """The figures of a method as plain data; the means over seeds are over those that did not diverge."""
    best = summary.sweep.best
    curves = {
        name.removeprefix("report_"): [
            {"forwards": point.forwards, "mean": point.mean, "values": point.values}
            for point in summary.curve(name)
        ]
        for name in ("report_loss", "report_accuracy")
        if summary.curve(name)
    }
    return {
        "optimizer": summary.method,
        "lr": best and best.lr,
        "schedule": best and best.schedule,
        "lr_at_edge": summary.sweep.at_edge,
        "forwards_a_step": summary.cost["forwards_a_step"],
        "seeds": len(summary.runs),
        "diverged": len(summary.runs) - len(summary.finished),
        "curves": curves,
    }


def reference_loss(summaries: Sequence[Summary]) -> float | None:
    """MeZO's mean loss at the end of the budget; None if it is not compared or always diverged."""
    curves = [summary.curve("report_loss") for summary in summaries if summary.method == REFERENCE]
    return curves[0][-1].mean if curves and curves[0] else None


def forwards_to_reach(loss: float, curve: Sequence[Point]) -> float | None:
    """Where the mean first reaches ``loss``, interpolated linearly between evaluations; None if never."""
    if curve and curve[0].mean <= loss:
        return float(curve[0].forwards)
    for before, after in pairwise(curve):
        if after.mean <= loss:
            share = (before.mean - loss) / (before.mean - after.mean)
            return before.forwards + share * (after.forwards - before.forwards)
    return None


def result_rows(settings: ComparisonSettings, summaries: Sequence[Summary]) -> list[list[str]]:
    """A header and a row per method."""
    target = reference_loss(summaries)
    columns: dict[str, list[str]] = {
        "optimizer": [summary.method for summary in summaries],
        "lr": [_lr(summary) for summary in summaries],
        **_of_schedules(
            settings, [best.schedule if (best := summary.sweep.best) else _NONE for summary in summaries]
        ),
        "forwards per step": [str(summary.cost["forwards_a_step"]) for summary in summaries],
        "held-out loss": [_change(summary, "report_loss") for summary in summaries],
    }
    if any(summary.curve("report_accuracy") for summary in summaries):
        columns["accuracy"] = [_change(summary, "report_accuracy") for summary in summaries]
    if target is not None:
        reached = [forwards_to_reach(target, summary.curve("report_loss")) for summary in summaries]
        columns[f"forwards to {REFERENCE}'s loss"] = [_number(at, ".0f") for at in reached]
        columns["of the budget"] = [_number(at and at / settings.forwards, ".0%") for at in reached]
    columns["s per 1000 forwards"] = [
        _number(summary.seconds_per_forward, ".3g", 1000) for summary in summaries
    ]
    columns["extra MiB"] = [_number(summary.cost["extra_bytes"], ".2f", 1 / MIB) for summary in summaries]
    return [list(columns), *map(list, zip(*columns.values(), strict=True))]


def sweep_rows(settings: ComparisonSettings, summaries: Sequence[Summary]) -> list[list[str]]:
    """A header and a row per method that was swept and schedule; a column per multiple of its default lr."""
    swept = [
        (
            summary,
            schedule,
            [(choice, loss) for choice, loss in summary.sweep.losses if choice.schedule == schedule],
        )
        for summary in summaries
        if summary.sweep.losses
        for schedule in settings.schedules
    ]
    cells = [
        {
            f"x{choice.lr / settings.default_lr(summary.method):.3g}": _swept(summary, choice, loss)
            for choice, loss in losses
        }
        for summary, _, losses in swept
    ]
    multiples = sorted({multiple for row in cells for multiple in row}, key=lambda name: float(name[1:]))
    columns = {
        "optimizer": [summary.method for summary, _, _ in swept],
        "default lr": [f"{settings.default_lr(summary.method):.3g}" for summary, _, _ in swept],
        **_of_schedules(settings, [schedule for _, schedule, _ in swept]),
        **{multiple: [row.get(multiple, "") for row in cells] for multiple in multiples},
    }
    return [list(columns), *map(list, zip(*columns.values(), strict=True))] if swept else []


def _of_schedules(settings: ComparisonSettings, column: list[str]) -> dict[str, list[str]]:
    """The column of schedules, where there is a choice or another one than the constant."""
    return {} if settings.schedules == (CONSTANT,) else {"schedule": column}


def _lr(summary: Summary) -> str:
    best = summary.sweep.best
    return _NONE if best is None else f"{best.lr:.3g}" + (" (edge)" if summary.sweep.at_edge else "")


def _change(summary: Summary, name: str) -> str:
    """The value at the start and at the end of the budget, and the number of diverged seeds."""
    curve = summary.curve(name)
    if not curve:
        return _DIVERGED
    diverged = len(summary.runs) - len(summary.finished)
    failures = f" ({diverged} of {len(summary.runs)} seeds {_DIVERGED})" if diverged else ""
    return f"{curve[0].mean:.4f} → {_with_error(curve[-1])}{failures}"


def _with_error(point: Point) -> str:
    estimated = point.estimated
    return f"{estimated.value:.4f}" if math.isnan(estimated.error) else str(estimated)


def _number(value: float | None, form: str, factor: float = 1) -> str:
    return _NONE if value is None else f"{value * factor:{form}}"


def _swept(summary: Summary, choice: Choice, loss: float) -> str:
    text = f"{loss:.4f}" if math.isfinite(loss) else _DIVERGED
    return f"**{text}**" if choice == summary.sweep.best else text
