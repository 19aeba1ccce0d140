"""The learning rates of the optimizers on functions of two variables: the best of grids of equal size."""

from __future__ import annotations

import math
from collections.abc import Iterator

from zoext.cli._pictures.descent import METHODS, Method, descend
from zoext.cli._pictures.functions import FUNCTIONS, Function

#: Learning rates in a grid, which is geometric with three to a decade.
GRID_SIZE = 15
#: The seeds that choose a learning rate, among them the one that the picture shows unless told otherwise.
SEEDS = (0, 1, 2, 3, 4)
#: The budget of the picture, and of the sweep that ``CHOSEN`` comes from.
FORWARDS = 600

#: Learning rates by function and method.
Rates = dict[str, dict[str, float]]

#: What ``swept(FORWARDS)`` finds.
CHOSEN: Rates = {
    "beale": {
        "gradient-descent": 0.022,
        "adam": 0.46,
        "mezo": 0.003,
        "mezo-momentum": 0.0014,
        "adamezo": 0.022,
        "mezo-gv": 0.003,
        "mezo-greedy": 0.003,
        "fzoo": 0.0001,
    },
    "rosenbrock": {
        "gradient-descent": 0.0046,
        "adam": 1.0,
        "mezo": 0.00065,
        "mezo-momentum": 3e-05,
        "adamezo": 0.1,
        "mezo-gv": 3e-05,
        "mezo-greedy": 1.4e-05,
        "fzoo": 2.2e-05,
    },
    "himmelblau": {
        "gradient-descent": 0.022,
        "adam": 1.0,
        "mezo": 0.003,
        "mezo-momentum": 0.0065,
        "adamezo": 0.022,
        "mezo-gv": 0.0065,
        "mezo-greedy": 0.0065,
        "fzoo": 0.0001,
    },
    "double-well": {
        "gradient-descent": 0.46,
        "adam": 0.46,
        "mezo": 0.065,
        "mezo-momentum": 0.14,
        "adamezo": 0.022,
        "mezo-gv": 0.14,
        "mezo-greedy": 0.14,
        "fzoo": 1e-05,
    },
}


def grid(method: Method) -> tuple[float, ...]:
    """The learning rates that are tried, from the largest down."""
    return tuple(float(f"{method.largest_lr * 10 ** (-k / 3):.2g}") for k in range(GRID_SIZE))


def best_lr(function: Function, method: Method, forwards: int) -> float:
    """The learning rate whose highest value after ``forwards``, over ``SEEDS``, is the lowest.

    The mean would favour rates at which some seeds diverge.
    """
    seeds = SEEDS if method.depends_on_seed else SEEDS[:1]
    best, lowest = method.largest_lr, math.inf
    for lr in grid(method):
        worst = 0.0
        for seed in seeds:
            end = descend(function, method, lr, forwards, seed).values[-1]
            worst = max(worst, end if math.isfinite(end) else math.inf)
            if worst >= lowest:  # whatever the other seeds give
                break
        else:
            best, lowest = lr, worst
    return best


def swept(forwards: int) -> Iterator[tuple[str, str, float]]:
    """The best learning rate of each method on each function, one after the other."""
    for name, function in FUNCTIONS.items():
        for method in METHODS:
            yield name, method, best_lr(function, METHODS[method], forwards)
