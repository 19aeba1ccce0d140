"""The tables and the curves of ``tasks.py``, from the runs that are finished."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from task_methods import METHODS
from task_plan import Choice, Done, Plan, Record, Setting, Start

from zoext.cli._pictures import style

_HEAD = ("", "forwards per step", "lr", "schedule", "accuracy, %", "loss", "seeds")
_EDGE = "* The best learning rate is the lowest or the highest that was tried."
ZERO_SHOT = "zero-shot"


class Row:
    """A line of a table: a method, what its sweep chose, and the scores on the test half."""

    def __init__(
        self, name: str, tests: Sequence[Record], choice: Choice | None, at_edge: bool, diverged: int
    ) -> None:
        self.name, self.choice, self.at_edge, self.diverged = name, choice, at_edge, diverged
        self.accuracies = [100 * test["accuracy"] for test in tests]
        self.losses = [test["loss"] for test in tests]

    def cells(self) -> tuple[str, ...]:
        forwards = "" if self.name == ZERO_SHOT else str(METHODS[self.name].forwards)
        lr, schedule = ("", "") if self.choice is None else (f"{self.choice.lr:.2g}", self.choice.schedule)
        count = str(len(self.losses)) + (f", {self.diverged} diverged" if self.diverged else "")
        scores = (_spread(self.accuracies, 1), _spread(self.losses, 3))
        return (self.name, forwards, lr + "*" * self.at_edge, schedule, *scores, count)

    def as_json(self) -> dict[str, Any]:
        chosen = {} if self.choice is None else {**self.choice._asdict(), "at_edge": self.at_edge}
        return {
            "method": self.name,
            **chosen,
            "accuracies": self.accuracies,
            "losses": self.losses,
            "diverged": self.diverged,
        }


def rows(plan: Plan, setting: Setting, done: Done) -> list[Row]:
    """The model before any step, and each method that has finished or diverged runs."""
    starts = [done[start] for seed in plan.seeds if (start := Start(*setting, seed)) in done]
    found = [Row(ZERO_SHOT, [start["test"] for start in starts], None, False, 0)] if starts else []
    for method in plan.centres:
        sweep = plan.sweep(setting, method, done)
        if sweep.best is None:
            if sweep.all_diverged:
                found.append(Row(method, [], None, False, len(sweep.runs)))
            continue
        runs = [done[run] for run in plan.final(setting, method, sweep.best) if run in done]
        tests = [run["test"] for run in runs if not run["diverged"]]
        if runs:
            found.append(Row(method, tests, sweep.best, sweep.at_edge, len(runs) - len(tests)))
    return found


def table(plan: Plan, done: Done) -> str:
    """Markdown: a table for each setting, with means and standard deviations over seeds."""
    parts, has_edge = [], False
    for setting in plan.settings:
        found = rows(plan, setting, done)
        has_edge = has_edge or any(row.at_edge for row in found)
        lines = [_line(_HEAD), _line(["---"] * len(_HEAD)), *(_line(row.cells()) for row in found)]
        parts.append("\n".join([f"### {setting}, {plan.forwards} forwards", "", *lines]))
    return "\n\n".join([*parts, *([_EDGE] if has_edge else [])])


def write_json(path: Path, plan: Plan, done: Done, settings: Record, environment: Record) -> None:
    """The same, with the score of every seed."""
    document = {
        "settings": settings,
        "environment": environment,
        "forwards": plan.forwards,
        "seeds": list(plan.seeds),
        "tables": [
            {**setting._asdict(), "rows": [row.as_json() for row in rows(plan, setting, done)]}
            for setting in plan.settings
        ],
    }
    path.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def draw_curves(plan: Plan, done: Done, path: Path) -> None:
    """The mean validation loss and accuracy of the final runs, with a row of panels for each setting."""
    with style.new_figure(6.6, 2.4 * len(plan.settings) + 0.5) as figure:
        panels = figure.subplots(len(plan.settings), 2, squeeze=False)
        for (left, right), setting in zip(panels, plan.settings, strict=True):
            for position, method in enumerate(plan.centres):
                curve = _mean_curve(plan, setting, method, done)
                look = {
                    "color": style.COLOURS[position % len(style.COLOURS)],
                    "linestyle": style.STYLES[position // len(style.COLOURS)],
                    "label": method,
                }
                forwards = [point["forwards"] for point in curve]
                left.plot(forwards, [point["loss"] for point in curve], marker=".", **look)
                right.plot(forwards, [100 * point["accuracy"] for point in curve], marker=".", **look)
            left.set(title=str(setting), ylabel="validation loss")
            right.set(title=str(setting), ylabel="validation accuracy, %")
        for axes in panels[-1]:
            axes.set_xlabel("forward passes")
        figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        figure.savefig(path, dpi=200)


def _mean_curve(plan: Plan, setting: Setting, method: str, done: Done) -> list[Record]:
    """Means over the seeds that finished, from the scores before any step on."""
    best = plan.sweep(setting, method, done).best
    if best is None:
        return []
    runs = [run for run in plan.final(setting, method, best) if run in done and not done[run]["diverged"]]
    curves = [
        [
            {"forwards": 0, **done[Start(*setting, run.seed)]["validation"]},
            *done[run]["curve"],
        ]
        for run in runs
    ]
    return [
        {name: statistics.fmean(point[name] for point in points) for name in points[0]}
        for points in zip(*curves, strict=True)
    ]


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return "diverged"
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
