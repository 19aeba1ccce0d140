"""The report of a comparison: a page of Markdown with two tables and notes, and a figure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from zoext._benchmarking.machine import environment
from zoext.cli._comparison.results import REFERENCE, Summary, reference_loss, result_rows, sweep_rows
from zoext.cli._comparison.settings import ComparisonSettings
from zoext.cli._comparison.start import Start
from zoext.cli._errors import writing
from zoext.cli._pictures.style import COLOURS, STYLES
from zoext.cli._schedules import CONSTANT


def page(settings: ComparisonSettings, start: Start, summaries: Sequence[Summary]) -> str:
    """The page ``table.md``."""
    parts = [
        f"# {start.problem.title}: {settings.forwards} forward passes per run",
        _table(result_rows(settings, summaries)),
        "\n".join(f"- {note}" for note in _notes(settings, start, summaries)),
    ]
    if sweeps := sweep_rows(settings, summaries):
        parts += [
            f"Held-out loss after {settings.sweep_budget} forward passes, "
            f"{_count(settings.sweep_seeds, 'seed')}, on the examples that select the lr, at multiples of "
            "the default lr; the best is bold:",
            _table(sweeps),
        ]
    return "\n\n".join(parts) + "\n"


def _notes(settings: ComparisonSettings, start: Start, summaries: Sequence[Summary]) -> list[str]:
    notes = [
        "Loss and accuracy: at the start → at the end of the budget, mean ± standard error over "
        f"{_count(settings.seeds, 'seed')}, on {len(start.report)} held-out examples; "
        f"{len(start.selection)} others selected the lr.",
        *_notes_on_the_choice(settings, summaries),
        f"Equal for all: mu {_mu(settings)}, {_warmup(settings)}batch {settings.batch_size}, weight decay "
        f"{settings.weight_decay:g}, {settings.dtype}; runs with the same seed see the same batches in the "
        "same order. An optimizer with more forward passes per step takes fewer steps on fewer batches.",
    ]
    if REFERENCE in settings.optimizers:
        notes.append(
            f"Forwards to {REFERENCE}'s loss: where the mean over seeds first reaches {REFERENCE}'s at the "
            "end of the budget, interpolated linearly between evaluations every "
            f"{settings.evaluation_interval} forward passes; - if it never does."
        )
    machine = environment()
    where = _count(torch.get_num_threads(), "thread") if start.device.type == "cpu" else str(start.device)
    notes.append(
        f"Seconds: the steps of these runs without evaluations; {machine['processor']}, {where}, "
        f"torch {machine['torch']}. Extra MiB: the peak memory of two steps minus that of a forward pass."
    )
    return notes


def _notes_on_the_choice(settings: ComparisonSettings, summaries: Sequence[Summary]) -> list[str]:
    if len(settings.lr_factors) * len(settings.schedules) == 1:
        return ["The lr is the default; no sweep was done."]
    notes = []
    if settings.sweep_budget == settings.forwards:
        reused = min(settings.sweep_seeds, settings.seeds)
        notes.append(
            f"{_count(reused, 'seed')} of these took part in the selection, which biases the results "
            "slightly, for every optimizer alike."
        )
    extended = [summary.method for summary in summaries if summary.sweep.added is not None]
    if extended:
        notes.append(
            f"The best lr was at the edge of the grid, and one more was tried: {', '.join(extended)}."
        )
    if any(summary.sweep.at_edge for summary in summaries):
        notes.append("(edge): the best lr is the last one that was tried; a better one may lie beyond.")
    return notes


def _mu(settings: ComparisonSettings) -> str:
    if settings.mu_schedule == CONSTANT:
        return f"{settings.mu:g}"
    return f"{settings.mu:g} to {settings.mu * settings.mu_end:g} ({settings.mu_schedule})"


def _warmup(settings: ComparisonSettings) -> str:
    return f"warm-up {settings.warmup} forward passes, " if settings.warmup else ""


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def draw_curves(path: Path, summaries: Sequence[Summary], title: str) -> None:
    """Plots held-out loss, and accuracy if reported: means over seeds, and bands from minimum to maximum."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {"report_loss": "held-out loss", "report_accuracy": "held-out accuracy"}
    shown = [name for name in panels if any(summary.curve(name) for summary in summaries)]
    figure = Figure(figsize=(1 + 5 * max(1, len(shown)), 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for position, name in enumerate(shown, 1):
        axes = figure.add_subplot(1, len(shown), position)
        _curves(axes, summaries, name)
        axes.set(xlabel="forward passes", ylabel=panels[name])
        if name == "report_loss" and (target := reference_loss(summaries)) is not None:
            axes.axhline(target, color="0.6", linewidth=0.8, zorder=0)
    figure.suptitle(title, wrap=True)
    if shown:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2 * len(shown), fontsize="small")
    with writing(path):
        figure.savefig(path)


def _curves(axes: Any, summaries: Sequence[Summary], name: str) -> None:
    looks = ((colour, style) for style in STYLES for colour in COLOURS)
    for summary, (colour, style) in zip(summaries, cycle(looks), strict=False):
        curve = summary.curve(name)
        if not curve:
            continue
        forwards = [point.forwards for point in curve]
        best = summary.sweep.best
        label = summary.method if best is None else f"{summary.method}, lr {best.lr:.3g}"
        if best is not None and best.schedule != CONSTANT:
            label += f", {best.schedule}"
        if len(summary.finished) < len(summary.runs):
            label += f" ({len(summary.finished)} of {len(summary.runs)} seeds)"
        axes.plot(forwards, [point.mean for point in curve], color=colour, linestyle=style, label=label)
        lows, highs = ([extreme(point.values) for point in curve] for extreme in (min, max))
        axes.fill_between(forwards, lows, highs, color=colour, alpha=0.15, linewidth=0)


def _table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of ``rows``, header first, padded so that it also reads well as plain text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])
