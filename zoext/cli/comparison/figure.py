"""The curves of a comparison as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from zoext.cli.comparison.summary import Summary, reference_loss
from zoext.cli.errors import writing

#: Told apart by all kinds of colour vision (Okabe and Ito, 2008), without the yellow, too pale for a line.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7")
STYLES = ("-", "--", ":", "-.")


def draw(path: Path, summaries: Sequence[Summary], title: str) -> None:
    """Held-out loss, and accuracy where there is one, over forwards: means, and bands from the lowest
    to the highest seed."""
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
        label = f"{summary.method}, lr {summary.sweep.lr:.3g}"
        if len(summary.finished) < len(summary.runs):
            label += f" ({len(summary.finished)} of {len(summary.runs)} seeds)"
        axes.plot(forwards, [point.mean for point in curve], color=colour, linestyle=style, label=label)
        lows, highs = ([extreme(point.values) for point in curve] for extreme in (min, max))
        axes.fill_between(forwards, lows, highs, color=colour, alpha=0.15, linewidth=0)
