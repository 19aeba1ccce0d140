"""Draws the loss along random directions, its noise over batches, and the error of central differences."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from zoext.cli._pictures import style
from zoext.cli._pictures.slices import MULTIPLES, Accuracy, Slice

#: Labels side by side, and the height of a line of them in inches.
_COLUMNS, _LINE = 5, 0.18
#: A factor by which an interval of mu is drawn wider, so that one mu alone can be seen.
_MARGIN = 1.1


def size(measured: Slice) -> tuple[float, float]:
    """The width and height of the figure in inches."""
    labels = 2 * measured.plan.directions + 5
    return 10, 3.3 + _LINE * math.ceil(labels / _COLUMNS)


def draw(figure: Any, measured: Slice, found: Accuracy, title: str) -> None:
    """Three panels: the loss, its change along a direction, and errors of projected gradients over mu."""
    loss, change, errors = figure.subplots(1, 3)
    figure.suptitle(title, fontsize=9, wrap=True)
    figure.get_layout_engine().set(w_pad=0.08)
    centre = measured.losses[:, measured.plan.points // 2, None]
    _draw_directions(loss, measured, measured.losses)
    loss.set(title="(a) loss", ylabel="mean ± standard deviation over batches")
    _draw_directions(change, measured, measured.losses - centre)
    _draw_projected_gradients(change, measured)
    change.set(title="(b) change of the loss", ylabel=r"loss minus loss at $t = 0$")
    for axes in (loss, change):
        axes.set(xlabel=r"$t$, for weights $\theta + t z$")
        axes.ticklabel_format(axis="x", style="sci", scilimits=(-2, 2), useMathText=True)
    _draw_errors(errors, measured, found)
    handles, labels = change.get_legend_handles_labels()
    more = errors.get_legend_handles_labels()
    handles, labels = handles + more[0], labels + more[1]
    figure.legend(handles, labels, loc="outside lower center", ncols=_COLUMNS)


def numbers(measured: Slice, found: Accuracy) -> dict[str, Any]:
    """What the panels show, as plain data."""
    return {
        **dataclasses.asdict(measured.plan),
        "distances": measured.plan.distances,
        "losses": measured.losses.tolist(),
        "mus": measured.plan.mus,
        "projected_gradients": measured.slopes.tolist(),
        "reference": found.reference.tolist(),
        "reference_error": found.reference_error,
        "errors": found.errors,
        "batch_noise": found.batch_noise,
    }


def _colour(direction: int) -> str:
    return style.COLOURS[direction % len(style.COLOURS)]


def _draw_directions(axes: Any, measured: Slice, losses: Tensor) -> None:
    distances = measured.plan.distances
    for direction, values in enumerate(losses):
        mean = values.mean(1)
        label = f"direction {direction + 1}"
        axes.plot(distances, mean, color=_colour(direction), label=label)
        if values.shape[1] > 1:
            sd = values.std(1)
            axes.fill_between(
                distances, mean - sd, mean + sd, color=_colour(direction), alpha=0.15, linewidth=0
            )


def _draw_projected_gradients(axes: Any, measured: Slice) -> None:
    """The line of each central difference at mu, as far as the losses reach, and ±mu on the axis of t."""
    plan = measured.plan
    low, high = axes.get_ylim()
    slopes = measured.slopes[:, MULTIPLES.index(1)].mean(1).tolist()
    ends = (-plan.reach, plan.reach)
    for direction, slope in enumerate(slopes):
        axes.plot(
            ends,
            [slope * end for end in ends],
            color=_colour(direction),
            linestyle=style.STYLES[1],
            linewidth=0.9,
            label="projected gradient " + f"{slope:.3g}".replace("-", "\N{MINUS SIGN}"),
        )
    axes.set_ylim(low, high)
    axes.plot(
        [-plan.mu, plan.mu],
        [0, 0],
        color="black",
        linestyle="",
        marker="|",
        markersize=9,
        zorder=4,
        label=r"$t = \pm\mu$",
    )


def _draw_errors(axes: Any, measured: Slice, found: Accuracy) -> None:
    plan = measured.plan
    axes.loglog(plan.mus, found.errors, color="black", marker="o", markersize=3, label="error of an estimate")
    axes.axvline(plan.mu, color=style.GREY, linewidth=0.8)
    axes.annotate(
        rf"$\mu$ = {plan.mu:g}",
        (plan.mu, 1),
        xycoords=("data", "axes fraction"),
        xytext=(3, -9),
        textcoords="offset points",
    )
    if found.batch_noise > 0:  # false for nan
        axes.axhline(
            found.batch_noise, color=style.PURPLE, linestyle="--", label="standard deviation over batches"
        )
        label = "error at most a tenth of it"
        for mus in _intervals(plan.mus, found.good_mus(plan.mus)):
            axes.axvspan(
                mus[0] / _MARGIN, mus[-1] * _MARGIN, color=style.GREEN, alpha=0.12, linewidth=0, label=label
            )
            label = ""
    if 0 < found.reference_error < math.inf:
        axes.axhline(
            found.reference_error, color=style.GREY, linestyle=":", label="uncertainty of the reference"
        )
    axes.set(title="(c) projected gradient", xlabel=r"$\mu$")
    axes.set_ylabel("|estimate \N{MINUS SIGN} reference|, root mean square")


def _intervals(mus: Sequence[float], good: Sequence[float]) -> list[list[float]]:
    """The runs of consecutive ``mus`` that are ``good``."""
    found: list[list[float]] = []
    previous_is_good = False
    for mu in mus:
        if mu in good:
            if not previous_is_good:
                found.append([])
            found[-1].append(mu)
        previous_is_good = mu in good
    return found
