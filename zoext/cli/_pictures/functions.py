"""Functions of two variables on which optimizers can be watched. The minimum of each is 0."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Point = tuple[float, float]


@dataclass(frozen=True)
class Function:
    """``of(x, y)`` takes numbers or grids of them.

    Attributes:
        start: where every optimizer begins.
        minima: all points of value 0.
        window: the part of the plane that is drawn: the ranges of x and of y.
    """

    title: str
    of: Callable[[Tensor, Tensor], Tensor]
    start: Point
    minima: tuple[Point, ...]
    window: tuple[Point, Point]


def _beale(x: Tensor, y: Tensor) -> Tensor:
    return (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2


def _rosenbrock(x: Tensor, y: Tensor) -> Tensor:
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def _himmelblau(x: Tensor, y: Tensor) -> Tensor:
    return (x**2 + y - 11) ** 2 + (x + y**2 - 7) ** 2


def _double_well(x: Tensor, y: Tensor) -> Tensor:
    return (x**2 - 1) ** 2 / 4 + y**2


FUNCTIONS: dict[str, Function] = {
    "beale": Function("Beale", _beale, (1.0, 1.5), ((3.0, 0.5),), ((-0.5, 4.5), (-1.5, 2.0))),
    "rosenbrock": Function("Rosenbrock", _rosenbrock, (-1.2, 1.0), ((1.0, 1.0),), ((-1.8, 1.8), (-0.8, 2.2))),
    "himmelblau": Function(
        "Himmelblau",
        _himmelblau,
        (0.0, 0.0),
        (
            (3.0, 2.0),
            (-2.805118086952745, 3.131312518250573),
            (-3.779310253377747, -3.283185991286170),
            (3.584428340330492, -1.848126526964404),
        ),
        ((-5.0, 5.0), (-5.0, 5.0)),
    ),
    # It begins beside the saddle at (0, 0), whose value is 1/4.
    "double-well": Function(
        "Double well", _double_well, (0.01, 1.5), ((1.0, 0.0), (-1.0, 0.0)), ((-1.7, 1.7), (-1.2, 1.9))
    ),
}
