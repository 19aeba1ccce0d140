"""A step of ``LowRank(defer=True)`` that raises is taken whole, not at all, or reported as torn."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoext
from zoext.directions import LowRank, Terms

X = torch.linspace(-1, 1, 12).view(2, 6)


def setup(bias: bool, groups: bool = False) -> tuple[nn.Module, zoext.ZerothOrderOptimizer]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 5, bias=bias), nn.Tanh(), nn.Linear(5, 3, bias=bias))
    params: Any = [{"params": list(model[at].parameters())} for at in (0, 2)] if groups else model
    return model, zoext.ZerothOrderOptimizer(
        params,
        direction=LowRank(rank=2, refresh_interval=50, defer=True),
        lr=0.1,
        mu=1e-3,
        probe=zoext.StreamedProbe(model),
    )


def loss(model: nn.Module) -> Callable[[], Tensor]:
    return lambda: model(X).square().mean()


def merged(model: nn.Module, optimizer: zoext.ZerothOrderOptimizer) -> list[Tensor]:
    optimizer.merge()
    return [weight.detach().clone() for weight in model.parameters()]


def fail_at(monkeypatch: pytest.MonkeyPatch, name: str, call: int) -> None:
    """Memory runs out in the given call of a function of torch that takes memory for sums."""
    real, calls = getattr(torch, name), [0]

    def fails(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise torch.OutOfMemoryError
        return real(*args, **options)

    monkeypatch.setattr(torch, name, fails)


@pytest.mark.parametrize("before", [0, 2], ids=["the first step", "a later step"])
@pytest.mark.parametrize("bias", [False, True])
def test_out_of_memory_before_anything_moved(
    before: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the second matrix. The step is retried, with the bits of a run that did not fail."""
    (model, optimizer), (twin, other) = setup(bias), setup(bias)
    for _ in range(before):
        optimizer.step(loss(model))
        other.step(loss(twin))
    if before:
        optimizer.merge()
        merged(twin, other)
        optimizer.engine.deferral._buffers.clear()  # what else would need no memory again
    with monkeypatch.context() as patch:
        fail_at(patch, "empty_like", 2)
        with pytest.raises(torch.OutOfMemoryError):
            optimizer.step(loss(model))
    assert optimizer.engine.deferral.is_empty
    assert optimizer.param_groups[0]["step"] == before
    optimizer.step(loss(model))
    other.step(loss(twin))
    assert all(map(torch.equal, merged(model, optimizer), merged(twin, other)))


@pytest.mark.parametrize("bias", [False, True])
def test_between_two_groups_is_torn(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One group has the step in its sums; without biases, no weight tells that."""
    model, optimizer = setup(bias, groups=True)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    real = LowRank.factors

    def fails(self: LowRank, parameters: Any, terms: Terms) -> Any:
        if parameters.blocks[0].shape == (3, 5):
            raise torch.OutOfMemoryError
        return real(self, parameters, terms)

    with monkeypatch.context() as patch:
        patch.setattr(LowRank, "factors", fails)
        with pytest.raises(torch.OutOfMemoryError):
            optimizer.step(loss(model))
    for again in (optimizer.step, optimizer.estimate):
        with pytest.raises(RuntimeError, match=r"only partly applied\. Load the weights"):
            again(loss(model))
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    twin, other = setup(bias, groups=True)
    optimizer.step(loss(model))
    other.step(loss(twin))
    assert all(map(torch.equal, merged(model, optimizer), merged(twin, other)))


def test_every_group_has_hooks() -> None:
    """Not only the modules of the group that is moved first."""
    model, optimizer = setup(False, groups=True)
    optimizer.step(loss(model))
    stale = model[2].weight.detach().clone()
    assert not torch.equal(model[2].state_dict()["weight"], stale)
