"""An update that raises in the middle is never taken for a step, and never built upon."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zoext
from zoext._parameters.parameters import Parameters
from zoext.directions import Direction
from zoext.updates import GroupStep, State

Closure = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Failing(zoext.SGD):
    """Runs out of memory at the given group of parameters, by their number, of step ``step``."""

    step: int = 2
    size: int = 1

    def apply(
        self, direction: Direction, parameters: Parameters, moves: Sequence[GroupStep], state: State
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
    return model, optimizer, loss, weights, state


def failing_after(count: int) -> Callable[..., None]:
    """The operator, which runs out of memory when it has moved so many tensors."""
    real = torch.ops.zoext.noise_axpy_

    def fails(theta: list[torch.Tensor], residuals: list[torch.Tensor], *rest: Any) -> None:
        seeds, coefficients, decay, keys, spans, *others = rest
        if count:
            some = keys[:count], spans[: 3 * count]
            real(theta[:count], residuals[:count], seeds, coefficients, decay, *some, *others)
        raise torch.OutOfMemoryError

    return fails


def test_between_two_groups() -> None:
    model, optimizer, loss, weights, state = torn(size=3)
    for again in (optimizer.step, optimizer.estimate):
        with pytest.raises(RuntimeError, match=r"only partly applied\. Load the weights"):
            again(loss)
    with pytest.raises(RuntimeError, match="only partly applied"):  # loading it would hide that
        optimizer.state_dict()
    model.load_state_dict(weights)
    optimizer.load_state_dict(dict(state))
    assert optimizer.estimate(loss).finite


def test_before_anything_moved() -> None:
    model, optimizer, loss, weights, state = torn(size=1)
    assert optimizer.state_dict() == state
    assert all(model.state_dict()[name].equal(weight) for name, weight in weights.items())
    assert optimizer.estimate(loss).finite


def test_within_one_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a second launch for which there is no memory any more, after a first one that moved some."""
    torch.manual_seed(4)
    model = nn.Linear(5, 3)
    optimizer = zoext.MeZO(model, lr=0.1)
    step = optimizer.step

    def loss() -> torch.Tensor:
        return model(torch.ones(5)).square().sum()

    with monkeypatch.context() as patch:
        patch.setattr(torch.ops.zoext, "noise_axpy_", failing_after(1))
        with pytest.raises(torch.OutOfMemoryError):
            step(loss)
    with pytest.raises(RuntimeError, match="only partly applied"):
        step(loss)


def recorded(path: Path) -> nn.Module:
    """The model that a run began with, of which ``path`` has three steps."""
    torch.manual_seed(4)
    model = nn.Linear(5, 3)
    base = copy.deepcopy(model)
    optimizer = zoext.MeZO(model, lr=0.1)
    with zoext.Trajectory(path, optimizer):
        for _ in range(3):
            optimizer.step(lambda: model(torch.ones(5)).square().sum())
    return base


@pytest.mark.parametrize("count", [1, 2])
def test_within_a_replay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    base = recorded(tmp_path / "run.jsonl")
    monkeypatch.setattr(torch.ops.zoext, "noise_axpy_", failing_after(count))
    with pytest.raises(torch.OutOfMemoryError) as raised:
        zoext.replay(base, tmp_path / "run.jsonl")
    (note,) = raised.value.__notes__
    assert note.endswith(
        "the weights are now between step 0 and a later one; load the weights that the run began with"
    )


def test_before_a_replay_moved_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = recorded(tmp_path / "run.jsonl")

    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(zoext.SGD, "apply", fails)
    with pytest.raises(torch.OutOfMemoryError) as raised:
        zoext.replay(base, tmp_path / "run.jsonl")
    (note,) = raised.value.__notes__
    assert note.endswith("the weights are now those of step 0, before the end of the replay")
