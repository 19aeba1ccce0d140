"""What a run leaves: the final model, the learning curve, and a few lines on what it learned."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoext._runtime import atomic
from zoext.cli._errors import writing
from zoext.cli._problem.evaluation import Evaluation
from zoext.cli._problem.models import quiet_transformers
from zoext.cli._problem.problem import Problem
from zoext.cli._runs.folder import RunFolder
from zoext.cli._runs.records import Record

_SMOOTHING = 0.98  # decay of the exponential mean of the training loss


def write_model(path: Path, problem: Problem) -> None:
    """Writes model and tokenizer into the folder ``path``, for from_pretrained of transformers."""
    # A finished run that was resumed with more steps replaces its model.
    with writing(path), quiet_transformers(), atomic.new_folder(path, replace=True) as temporary:
        problem.model.save_pretrained(temporary)
        problem.tokenizer.save_pretrained(temporary)


def report(records: Sequence[Record], folder: RunFolder) -> str:
    """Held-out loss and accuracy before and after, with standard errors over examples.

    If earlier metrics are lost, the first evaluation left stands for before.
    """
    evaluations = [record for record in records if "valid_loss" in record]
    before, after = (Evaluation.of_record(record) for record in (evaluations[0], evaluations[-1]))
    step = evaluations[0]["step"]
    begin = f"at step {step}" if step else "before"
    files = {"model": folder.model, "curve": folder.curve, "trajectory": folder.trajectory}
    return "\n".join(
        [
            f"held-out, {begin}: {before}\nheld-out, {'after:':<{len(begin) + 1}} {after}",
            *(f"{name}: {path}" for name, path in files.items() if path.exists()),
        ]
    )


def draw_curve(path: Path, records: Sequence[Record], title: str) -> None:
    """Plots training loss, held-out loss and held-out accuracy over forward passes, as a PNG."""
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
    _plot_evaluations(axes, evaluations, "valid_loss", "tab:blue", "held-out loss")
    axes.set(xlabel="forward passes", ylabel="loss", title=title)
    handles, labels = axes.get_legend_handles_labels()
    if evaluations and "valid_accuracy" in evaluations[0]:
        right = axes.twinx()
        _plot_evaluations(right, evaluations, "valid_accuracy", "tab:orange", "held-out accuracy")
        right.set_ylabel("accuracy")
        more = right.get_legend_handles_labels()
        handles, labels = handles + more[0], labels + more[1]
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="small")
    with writing(path):
        figure.savefig(path)


def _plot_evaluations(axes: Any, records: Sequence[Record], name: str, color: str, label: str) -> None:
    axes.errorbar(
        [record["forwards"] for record in records],
        [record[name] for record in records],
        yerr=[record[f"{name}_error"] for record in records],
        marker="o",
        linestyle=":",
        markersize=3,
        capsize=2,
        color=color,
        label=label,
    )


def smoothed(values: Sequence[float]) -> list[float]:
    """The bias-corrected exponential mean of the values so far."""
    means, total, mass = [], 0.0, 0.0
    for value in values:
        total = _SMOOTHING * total + (1 - _SMOOTHING) * value
        mass = _SMOOTHING * mass + (1 - _SMOOTHING)
        means.append(total / mass)
    return means
