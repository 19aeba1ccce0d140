"""An update that raises in the middle is never taken for a step, and never built upon."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import zoext
from zoext.directions import Direction
from zoext.parameters import Parameters
from zoext.updates import Move, State

Closure = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Failing(zoext.SGD):
    """Runs out of memory at the given group of parameters, by their number, of step ``step``."""

    step: int = 2
    size: int = 1

    def apply(
        self, direction: Direction, parameters: Parameters, moves: Sequence[Move], state: State
    ) -> State:
        count = state.get("count", 0) + 1
        if count == self.step and len(parameters) == self.size:
            raise torch.OutOfMemoryError
        super().apply(direction, parameters, moves, {})
        return {"count": count}


def setup(size: int) -> tuple[nn.Module, zoext.ZerothOrderOptimizer]:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2)).to(torch.bfloat16)
    first, *others = model.parameters()
    groups = [{"params": [first]}, {"params": others}]
    probe = zoext.StreamedProbe(model)
    return model, zoext.ZerothOrderOptimizer(groups, update=Failing(size=size), lr=0.1, probe=probe)


def torn(size: int) -> tuple[nn.Module, zoext.ZerothOrderOptimizer, Closure, State, State]:
    """A run whose second step has failed: its parts, and the weights and the state before that step."""
    model, optimizer = setup(size)

    def loss() -> torch.Tensor:
        return model(torch.ones(5, dtype=torch.bfloat16)).float().square().sum()

    optimizer.step(loss)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step(loss)
    assert optimizer.state_dict() == state
    return model, optimizer, loss, weights, state


def test_between_two_groups() -> None:
    model, optimizer, loss, weights, state = torn(size=3)
    for again in (optimizer.step, optimizer.estimate):
        with pytest.raises(RuntimeError, match="theta is between two steps; load the weights"):
            again(loss)
    model.load_state_dict(weights)
    optimizer.load_state_dict(dict(state))
    assert optimizer.estimate(loss).finite


def test_before_anything_moved() -> None:
    model, optimizer, loss, weights, _ = torn(size=1)
    assert all(model.state_dict()[name].equal(weight) for name, weight in weights.items())
    assert optimizer.estimate(loss).finite


def test_within_one_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a second launch for which there is no memory any more, after a first one that moved some."""
    torch.manual_seed(4)
    model = nn.Linear(5, 3)
    optimizer = zoext.MeZO(model, lr=0.1)
    step = optimizer.step
    real = torch.ops.zoext.noise_axpy_

    def half(theta: list[torch.Tensor], residuals: list[torch.Tensor], *rest: object) -> None:
        real(theta[:1], residuals[:1], *rest[:3], rest[3][:1], rest[4][:3], *rest[5:])
        raise torch.OutOfMemoryError

    def loss() -> torch.Tensor:
        return model(torch.ones(5)).square().sum()

    with monkeypatch.context() as patch:
        patch.setattr(torch.ops.zoext, "noise_axpy_", half)
        with pytest.raises(torch.OutOfMemoryError):
            step(loss)
    with pytest.raises(RuntimeError, match="theta is between two steps"):
        step(loss)
