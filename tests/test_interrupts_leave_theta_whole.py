"""Ctrl-C at any moment of a step leaves theta as it was before the step or as it is after it."""

from __future__ import annotations

import signal

import pytest
import torch
from torch import nn

import zoext
from zoext import interrupts


def test_a_signal_inside_the_block_waits_for_its_end() -> None:
    order = []

    def move() -> None:
        with interrupts.deferred():
            signal.raise_signal(signal.SIGINT)
            order.append("moved")

    with pytest.raises(KeyboardInterrupt):
        move()
    assert order == ["moved"]


def test_a_signal_inside_an_allowed_part_does_not_wait() -> None:
    order = []

    def move() -> None:
        with interrupts.deferred() as signals:
            try:
                with signals.allowed():
                    signal.raise_signal(signal.SIGINT)
                    order.append("not reached")
            finally:
                order.append("restored")

    with pytest.raises(KeyboardInterrupt):
        move()
    assert order == ["restored"]


def test_the_handler_is_put_back() -> None:
    seen = []
    previous = signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    try:
        mine = signal.getsignal(signal.SIGINT)
        with interrupts.deferred():
            signal.raise_signal(signal.SIGINT)
            assert not seen
        assert seen == [1]
        assert signal.getsignal(signal.SIGINT) is mine
    finally:
        signal.signal(signal.SIGINT, previous)


class InterruptsItself(zoext.Gaussian):
    """Raises SIGINT right after a kernel ran, before anyone could note that it did."""

    def __init__(self, at: int) -> None:
        object.__setattr__(self, "left", [at])

    def axpy_(self, *args: object, **kwargs: object) -> None:
        super().axpy_(*args, **kwargs)  # type: ignore[arg-type]
        self.left[0] -= 1  # type: ignore[attr-defined]
        if self.left[0] == 0:  # type: ignore[attr-defined]
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("at", range(1, 9))
def test_between_any_two_kernels(at: int) -> None:
    """Two groups: to +mu, to -mu and back are six kernels, then there are two updates."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
    reference = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
    reference.load_state_dict(model.state_dict())
    before = [parameter.detach().clone() for parameter in model.parameters()]

    def optimizer_of(module: nn.Module, direction: zoext.Direction) -> zoext.ZerothOrderOptimizer:
        groups = [{"params": list(layer.parameters())} for layer in module]  # type: ignore[attr-defined]
        return zoext.ZerothOrderOptimizer(groups, direction=direction, lr=0.1, mu=0.1)

    def loss_of(module: nn.Module) -> torch.Tensor:
        return module(torch.ones(4, dtype=torch.float64)).square().mean()

    optimizer_of(reference, zoext.Gaussian()).step(lambda: loss_of(reference))
    optimizer = optimizer_of(model, InterruptsItself(at))
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(lambda: loss_of(model))
    applied = at > 6
    assert optimizer.param_groups[0]["step"] == int(applied)
    expected = list(reference.parameters()) if applied else before
    for a, b in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-14)
