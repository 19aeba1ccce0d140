"""The rows of the two tables: the results, and the sweeps over learning rates."""

from __future__ import annotations

import math
from collections.abc import Sequence

from zoext._benchmarking.memory import MIB
from zoext.cli.comparison.settings import ComparisonSettings
from zoext.cli.comparison.summary import REFERENCE, Point, Summary, forwards_to_reach, reference_loss

NONE = "-"
DIVERGED = "diverged"


def results(settings: ComparisonSettings, summaries: Sequence[Summary]) -> list[list[str]]:
    """A row for each method, below the head."""
    target = reference_loss(summaries)
    columns: dict[str, list[str]] = {
        "optimizer": [summary.method for summary in summaries],
        "lr": [_lr(summary) for summary in summaries],
        "forwards a step": [str(summary.cost["forwards_a_step"]) for summary in summaries],
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


def sweeps(settings: ComparisonSettings, summaries: Sequence[Summary]) -> list[list[str]]:
    """A row for each method with a choice, below the head; a column for each multiple of its usual lr."""
    swept = [summary for summary in summaries if summary.sweep.losses]
    cells = [
        {
            f"x{lr / settings.usual_lr(summary.method):.3g}": _swept(summary, lr, loss)
            for lr, loss in summary.sweep.losses
        }
        for summary in swept
    ]
    multiples = sorted({multiple for row in cells for multiple in row}, key=lambda name: float(name[1:]))
    rows = [
        [
            summary.method,
            f"{settings.usual_lr(summary.method):.3g}",
            *(row.get(name, "") for name in multiples),
        ]
        for summary, row in zip(swept, cells, strict=True)
    ]
    return [["optimizer", "usual lr", *multiples], *rows] if rows else []


def _lr(summary: Summary) -> str:
    return _number(summary.sweep.lr, ".3g") + (" (edge)" if summary.sweep.at_edge else "")


def _change(summary: Summary, name: str) -> str:
    """From the start to the budget, and how many seeds are missing there."""
    curve = summary.curve(name)
    if not curve:
        return DIVERGED
    diverged = len(summary.runs) - len(summary.finished)
    failures = f" ({diverged} of {len(summary.runs)} seeds {DIVERGED})" if diverged else ""
    return f"{curve[0].mean:.4f} → {_with_error(curve[-1])}{failures}"


def _with_error(point: Point) -> str:
    estimated = point.estimated
    return f"{estimated.value:.4f}" if math.isnan(estimated.error) else str(estimated)


def _number(value: float | None, form: str, factor: float = 1) -> str:
    return NONE if value is None else f"{value * factor:{form}}"


def _swept(summary: Summary, lr: float, loss: float) -> str:
    text = f"{loss:.4f}" if math.isfinite(loss) else DIVERGED
    return f"**{text}**" if lr == summary.sweep.lr else text
