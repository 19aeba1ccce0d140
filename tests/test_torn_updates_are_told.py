"""An update that raises in the middle is never taken for a step, and never built upon."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import zoext
from zoext.directions import Direction
from zoext.parameters import Parameters
from zoext.updates import Move, State


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


def test_between_two_groups() -> None:
    model, optimizer = setup(size=3)
    loss = lambda: model(torch.ones(5, dtype=torch.bfloat16)).float().square().sum()  # noqa: E731
    optimizer.step(loss)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step(loss)
    assert optimizer.state_dict() == state
    for again in (lambda: optimizer.step(loss), lambda: optimizer.estimate(loss)):
        with pytest.raises(RuntimeError, match="theta is between two steps; load the weights"):
            again()
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    assert optimizer.estimate(loss).finite


def test_before_anything_moved() -> None:
    model, optimizer = setup(size=1)
    loss = lambda: model(torch.ones(5, dtype=torch.bfloat16)).float().square().sum()  # noqa: E731
    optimizer.step(loss)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step(loss)
    assert optimizer.state_dict() == state
    assert all(model.state_dict()[name].equal(weight) for name, weight in weights.items())
    assert optimizer.estimate(loss).finite
