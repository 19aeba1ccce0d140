"""What a run leaves: the final model, the learning curve, and a few lines on what it learned."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoext._runtime import atomic
from zoext.cli._errors import writing
from zoext.cli._problem import models
from zoext.cli._problem.evaluation import Evaluation
from zoext.cli._runs.best import best_of
from zoext.cli._runs.folder import RunFolder
from zoext.cli._runs.records import Record

_SMOOTHING = 0.98  # decay of the exponential mean of the training loss


def write_model(path: Path, model: Any, tokenizer: Any) -> None:
    """Writes model and tokenizer into the folder ``path``, for from_pretrained of transformers or of PEFT."""
    # A finished run that was resumed with more steps replaces its model.
    with writing(path), models.quiet_transformers(), atomic.new_folder(path, replace=True) as temporary:
        models.save(model, tokenizer, temporary)


def report(records: Sequence[Record], folder: RunFolder, kept: int) -> str:
    """Held-out loss and accuracy before and after, with standard errors over examples, and the files.

    If earlier metrics are lost, the first evaluation left stands for before. ``kept`` is the step whose model
    was written.
    """
    evaluations = [record for record in records if "valid_loss" in record]
    first, last = evaluations[0], evaluations[-1]
    labels = [f"at step {first['step']}" if first["step"] else "before", "after"]
    shown = [first, last]
    notes = []
    if kept != last["step"]:
        labels.insert(1, f"at step {kept}")
        shown.insert(1, next(record for record in evaluations if record["step"] == kept))
        best = best_of(evaluations)
        which = (
            f"the best of {len(evaluations)} evaluations"
            if best is not None and best["step"] == kept
            else "the best one whose model can be had"
        )
        notes.append(
            f"step {kept} is {which}, and its model was kept; it was selected by its held-out loss, which is "
            "therefore biased low"
        )
    width = max(map(len, labels)) + 1
    lines = [
        f"held-out, {label + ':':<{width}} {Evaluation.of_record(record)}"
        for label, record in zip(labels, shown, strict=True)
    ]
    files = {
        "model": folder.model,
        "curve": folder.curve,
        "metrics": folder.csv,
        "trajectory": folder.trajectory,
    }
    present = (f"{name}: {path}{_size(path)}" for name, path in files.items() if path.exists())
    return "\n".join([*lines, *notes, *present])


def _size(path: Path) -> str:
    """How much a folder, such as that of a model, takes on the disk, if it is much."""
    size = sum(file.stat().st_size for file in path.rglob("*")) if path.is_dir() else 0
    return f" ({size / 1e6:.0f} MB)" if size >= 1e6 else ""


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
