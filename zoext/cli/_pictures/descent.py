"""Optimizers of zoext and of torch on a function of two variables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from zoext import ZerothOrderOptimizer
from zoext.cli._pictures.functions import Function, Point
from zoext.cli._problem.optimizers import OPTIMIZERS

#: What a gradient by backpropagation counts as: its forward, and a backward of twice the work.
GRADIENT_FORWARDS = 3
#: Of every zeroth-order optimizer here, as in the AdaMeZO study.
MU = 1e-3
#: A run ends once its value is this multiple of the one at the start: it has diverged.
_DIVERGED = 1e4


@dataclass(frozen=True)
class Method:
    """An optimizer, called as ``make(parameters, lr, seed)``, and the largest learning rate of its grid."""

    label: str
    make: Callable[[Sequence[nn.Parameter], float, int], torch.optim.Optimizer]
    largest_lr: float
    depends_on_seed: bool = True


def _zeroth_order(
    name: str, parameters: Sequence[nn.Parameter], lr: float, seed: int
) -> ZerothOrderOptimizer:
    return OPTIMIZERS[name].make(parameters, lr=lr, mu=MU, seed=seed, process_group=None)


def _gradient_descent(parameters: Sequence[nn.Parameter], lr: float, seed: int) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr)


def _adam(parameters: Sequence[nn.Parameter], lr: float, seed: int) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=lr)


#: The grids are of equal size and end at a multiple that suits the length of a method's steps: Adam's do not
#: depend on the slope, and FZOO divides the slope by a standard deviation of losses, which has a factor mu.
METHODS: dict[str, Method] = {
    "gradient-descent": Method("gradient descent", _gradient_descent, 1.0, depends_on_seed=False),
    "adam": Method("Adam", _adam, 10.0, depends_on_seed=False),
    "mezo": Method("MeZO", partial(_zeroth_order, "mezo"), 0.3),
    "mezo-momentum": Method("MeZO, momentum", partial(_zeroth_order, "mezo-momentum"), 0.3),
    "adamezo": Method("AdaMeZO", partial(_zeroth_order, "adamezo"), 1.0),
    "mezo-gv": Method("MeZO-GV", partial(_zeroth_order, "mezo-gv"), 0.3),
    "mezo-greedy": Method("MeZO-Greedy", partial(_zeroth_order, "mezo-greedy"), 0.3),
    "fzoo": Method("FZOO", partial(_zeroth_order, "fzoo"), 1e-3),
}


@dataclass(frozen=True)
class Descent:
    """Where an optimizer was, the value there, and the forward passes until then; it begins at the start."""

    points: tuple[Point, ...]
    values: tuple[float, ...]
    forwards: tuple[int, ...]


def descend(function: Function, method: Method, lr: float, forwards: int, seed: int) -> Descent:
    """Takes all steps within the budget of ``forwards``, or those until it has diverged.

    The values are evaluated beside the steps and count as no forward.
    """
    at = nn.Parameter(torch.tensor(function.start, dtype=torch.float64))
    optimizer = method.make([at], lr, seed)
    take = partial(_step, optimizer, lambda: function.of(at[0], at[1]))
    points, values, used = [_place(at)], [_value(function, at)], [0]
    cost = 1
    while used[-1] + cost <= forwards and values[-1] < _DIVERGED * values[0]:  # false for nan
        cost = take()
        points.append(_place(at))
        values.append(_value(function, at))
        used.append(used[-1] + cost)
    within = sum(count <= forwards for count in used)  # the first step may cost more than the budget
    return Descent(tuple(points[:within]), tuple(values[:within]), tuple(used[:within]))


def _step(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> int:
    """Takes a step and returns the forward passes that it counts as."""
    if isinstance(optimizer, ZerothOrderOptimizer):
        optimizer.step(loss)
        estimate = optimizer.last_estimate
        return 0 if estimate is None else estimate.forwards
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()
    return GRADIENT_FORWARDS


def _place(at: Tensor) -> Point:
    x, y = at.tolist()
    return x, y


@torch.no_grad()
def _value(function: Function, at: Tensor) -> float:
    return function.of(at[0], at[1]).item()
