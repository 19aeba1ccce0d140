"""Draws the learning curves of several runs over forward passes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from zoext.cli._pictures import style
from zoext.cli._pictures.curves import Curve
from zoext.cli._runs.records import Record
from zoext.cli._runs.results import smoothed

_PANEL = 3.3
_HEIGHT = 2.7
_LINE = 0.18


def size(curves: Sequence[Curve]) -> tuple[float, float]:
    """The width and height of the figure in inches."""
    panels = 2 + _has_accuracy(curves)
    lines = math.ceil(len(curves) / _columns(curves))
    return _PANEL * panels, _HEIGHT + _LINE * lines


def _has_accuracy(curves: Sequence[Curve]) -> bool:
    return any("valid_accuracy" in record for curve in curves for record in curve.evaluations)


def _columns(curves: Sequence[Curve]) -> int:
    """How many labels fit side by side."""
    letters = 20 * (2 + _has_accuracy(curves)) * _PANEL
    return max(1, min(len(curves), int(letters * 0.8 / (8 + max(len(curve.label) for curve in curves)))))


def draw(figure: Any, curves: Sequence[Curve]) -> None:
    """Panels for the loss in training, the held-out loss, and the held-out accuracy if there is one."""
    has_accuracy = _has_accuracy(curves)
    figure.get_layout_engine().set(w_pad=0.08)
    panels = figure.subplots(1, 2 + has_accuracy)
    for position, curve in enumerate(curves):
        look = {
            "color": style.COLOURS[position % len(style.COLOURS)],
            "linestyle": style.STYLES[position // len(style.COLOURS) % len(style.STYLES)],
            "label": curve.label,
        }
        panels[0].plot(
            [record["forwards"] for record in curve.steps],
            smoothed([record["loss"] for record in curve.steps]),
            **look,
        )
        _draw_evaluations(panels[1], curve.evaluations, "valid_loss", look)
        if has_accuracy:
            _draw_evaluations(panels[2], curve.evaluations, "valid_accuracy", look)
    panels[0].set(title="training loss, smoothed", ylabel="loss")
    panels[1].set(title="held-out loss", ylabel="loss ± standard error")
    if has_accuracy:
        panels[2].set(title="held-out accuracy", ylabel="accuracy ± standard error")
    for axes in panels:
        axes.set_xlabel("forward passes")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=_columns(curves))


def _draw_evaluations(axes: Any, records: Sequence[Record], name: str, look: dict[str, Any]) -> None:
    known = [record for record in records if name in record]
    axes.errorbar(
        [record["forwards"] for record in known],
        [record[name] for record in known],
        yerr=[record[f"{name}_error"] for record in known],
        marker="o",
        markersize=2.5,
        capsize=1.5,
        elinewidth=0.7,
        **look,
    )
