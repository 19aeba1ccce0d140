"""The results as a page of Markdown: two tables, and how to read them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from zoext._benchmarking.machine import environment
from zoext.cli.comparison import markdown, tables
from zoext.cli.comparison.settings import ComparisonSettings
from zoext.cli.comparison.start import Start
from zoext.cli.comparison.summary import REFERENCE, Summary


def render(settings: ComparisonSettings, start: Start, summaries: Sequence[Summary]) -> str:
    """The whole page."""
    parts = [
        f"# {start.problem.title}: {settings.forwards} forward passes a run",
        markdown.table(tables.results(settings, summaries)),
        "\n".join(f"- {note}" for note in _notes(settings, start, summaries)),
    ]
    if sweeps := tables.sweeps(settings, summaries):
        parts += [
            f"Held-out loss after {settings.sweep_budget} forwards, "
            f"{_count(settings.sweep_seeds, 'seed')}, on the examples that choose, at multiples of the "
            "usual lr; the best is bold:",
            markdown.table(sweeps),
        ]
    return "\n\n".join(parts) + "\n"


def _notes(settings: ComparisonSettings, start: Start, summaries: Sequence[Summary]) -> list[str]:
    notes = [
        "Loss and accuracy: at the start → at the budget, mean ± standard error over "
        f"{_count(settings.seeds, 'seed')}, on {len(start.report)} held-out examples; "
        f"{len(start.selection)} others chose the lr.",
        *_notes_on_the_choice(settings, summaries),
        f"Equal for all: mu {settings.mu:g}, batch {settings.batch_size}, weight decay "
        f"{settings.weight_decay:g}, {settings.dtype}; seed by seed the same batches in the same order. An "
        "optimizer with more forwards a step takes fewer steps and sees fewer batches.",
    ]
    if REFERENCE in settings.optimizers:
        notes.append(
            f"Forwards to {REFERENCE}'s loss: where the mean over seeds first is at {REFERENCE}'s at the "
            "budget or below, on straight lines between evaluations every "
            f"{settings.evaluation_interval} forwards; - where it never is."
        )
    machine = environment()
    where = _count(torch.get_num_threads(), "thread") if start.device.type == "cpu" else str(start.device)
    notes.append(
        f"Seconds: the steps of these runs, evaluations left out; {machine['processor']}, {where}, "
        f"torch {machine['torch']}. Extra MiB: the peak of memory of two steps beyond that of a forward."
    )
    return notes


def _notes_on_the_choice(settings: ComparisonSettings, summaries: Sequence[Summary]) -> list[str]:
    if len(settings.lr_factors) == 1:
        return ["The lr is the usual one; none was swept."]
    notes = []
    if settings.sweep_budget == settings.forwards:
        reused = min(settings.sweep_seeds, settings.seeds)
        notes.append(
            f"{_count(reused, 'seed')} of these took part in the choice, and may owe a little to luck, for "
            "every optimizer alike."
        )
    extended = [summary.method for summary in summaries if summary.sweep.added is not None]
    if extended:
        notes.append(
            f"The best lr was at the edge of the grid, so that one more was tried: {', '.join(extended)}."
        )
    if any(summary.sweep.at_edge for summary in summaries):
        notes.append("(edge): the best is the last that was tried; a better one may lie beyond.")
    return notes


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
