"""The learning curve as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from zoext.cli.errors import writing
from zoext.cli.json_lines import Record

SMOOTHING = 0.98  # of the training loss, an exponential mean without bias


def smoothed(values: Sequence[float]) -> list[float]:
    """The exponential mean of the values so far, each divided by the weights it holds."""
    means, total, mass = [], 0.0, 0.0
    for value in values:
        total = SMOOTHING * total + (1 - SMOOTHING) * value
        mass = SMOOTHING * mass + (1 - SMOOTHING)
        means.append(total / mass)
    return means


def draw(path: Path, records: Sequence[Record], title: str) -> None:
    """Training loss, held-out loss and held-out accuracy over the forwards spent, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = [record for record in records if "loss" in record]
    evaluations = [record for record in records if "valid_loss" in record]
    axes.plot(
        [record["forwards"] for record in steps],
        smoothed([record["loss"] for record in steps]),
        color="tab:gray",
        label="training loss, smoothed",
    )
    forwards = [record["forwards"] for record in evaluations]
    _points(axes, forwards, evaluations, "valid_loss", "tab:blue", "held-out loss")
    axes.set(xlabel="forward passes", ylabel="loss", title=title)
    handles, labels = axes.get_legend_handles_labels()
    if evaluations and "valid_accuracy" in evaluations[0]:
        right = axes.twinx()
        _points(right, forwards, evaluations, "valid_accuracy", "tab:orange", "held-out accuracy")
        right.set_ylabel("accuracy")
        more = right.get_legend_handles_labels()
        handles, labels = handles + more[0], labels + more[1]
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="small")
    with writing(path):
        figure.savefig(path)


def _points(
    axes: object, forwards: list[int], records: list[Record], name: str, color: str, label: str
) -> None:
    axes.errorbar(  # type: ignore[attr-defined]
        forwards,
        [record[name] for record in records],
        yerr=[record[f"{name}_error"] for record in records],
        marker="o",
        linestyle=":",
        markersize=3,
        capsize=2,
        color=color,
        label=label,
    )
