"""Draws optimizers on functions of two variables: their paths, and the value over forward passes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from zoext.cli._pictures import style
from zoext.cli._pictures.descent import GRADIENT_FORWARDS, METHODS, Descent
from zoext.cli._pictures.functions import FUNCTIONS, Function

#: The first-order methods are grey and black, the others coloured.
_LOOKS: dict[str, dict[str, Any]] = {
    "gradient-descent": {"color": "0.0", "linestyle": "-"},
    "adam": {"color": "0.0", "linestyle": (0, (4, 1.5))},
    "mezo": {"color": style.BLUE, "linestyle": "-"},
    "mezo-momentum": {"color": style.SKY, "linestyle": "-"},
    "adamezo": {"color": style.VERMILION, "linestyle": "-"},
    "mezo-gv": {"color": style.GREEN, "linestyle": "-"},
    "mezo-greedy": {"color": style.PURPLE, "linestyle": "-"},
    "fzoo": {"color": style.ORANGE, "linestyle": "-"},
}
_START: dict[str, Any] = {"marker": "o", "markersize": 5, "color": "white", "markeredgecolor": "black"}
_MINIMUM: dict[str, Any] = {**_START, "marker": "*", "markersize": 9, "markeredgewidth": 0.7}
#: Lines of equal value, three to a decade.
_LEVELS = [10 ** (k / 3) for k in range(-6, 13)]
_GRID = 300
#: Values below this are drawn on the lower edge: an exact minimum has no logarithm.
_LOWEST = 1e-12
#: Values above the start's by this factor are off the panel: they are those of a run that has diverged.
_HEADROOM = 10.0


def draw(figure: Any, descents: Mapping[str, Mapping[str, Descent]]) -> None:
    """A column for each function: paths over contour lines above, values below."""
    from matplotlib.lines import Line2D

    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06)
    panels = figure.subplots(2, len(descents), squeeze=False, height_ratios=(1.15, 1))
    for column, (name, paths) in enumerate(descents.items()):
        _draw_paths(panels[0, column], FUNCTIONS[name], paths)
        _draw_values(panels[1, column], paths)
    panels[0, 0].set_ylabel("y")
    panels[1, 0].set_ylabel("value above the minimum")
    first = next(iter(descents.values()))
    handles = [Line2D([], [], label=METHODS[name].label, **_LOOKS[name]) for name in first]
    for label, look in (("start", _START), ("minimum", _MINIMUM)):
        handles.append(Line2D([], [], linestyle="", label=label, **look))
    figure.legend(handles=handles, loc="outside lower center", ncols=5)


def _draw_paths(axes: Any, function: Function, paths: Mapping[str, Descent]) -> None:
    (left, right), (bottom, top) = function.window
    x = torch.linspace(left, right, _GRID, dtype=torch.float64)
    y = torch.linspace(bottom, top, _GRID, dtype=torch.float64)
    values = function.of(x[None, :], y[:, None]).numpy()
    axes.contour(x, y, values, levels=_LEVELS, colors="0.72", linewidths=0.5)
    for name, path in paths.items():
        xs, ys = zip(*path.points, strict=True)
        axes.plot(xs, ys, linewidth=1, alpha=0.85, **_LOOKS[name])
    axes.plot(*function.start, zorder=5, linestyle="", **_START)
    axes.plot(*zip(*function.minima, strict=True), zorder=5, linestyle="", **_MINIMUM)
    axes.set(title=function.title, xlabel="x", xlim=(left, right), ylim=(bottom, top))
    axes.grid(visible=False)


def _draw_values(axes: Any, paths: Mapping[str, Descent]) -> None:
    # The start is drawn at one forward pass, since 0 has no logarithm.
    for name, path in paths.items():
        values = [max(_LOWEST, value) for value in path.values]
        axes.plot([1, *path.forwards[1:]], values, drawstyle="steps-post", **_LOOKS[name])
    axes.set(xscale="log", yscale="log", xlabel=f"forward passes (a gradient counts as {GRADIENT_FORWARDS})")
    start = max(path.values[0] for path in paths.values())
    axes.set_ylim(top=min(axes.get_ylim()[1], _HEADROOM * start))
