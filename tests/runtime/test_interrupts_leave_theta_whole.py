"""Ctrl-C at any moment of a step leaves theta as it was before the step or as it is after it."""

from __future__ import annotations

import copy
import signal

import pytest
import torch
from torch import nn

import zoext
from support.interrupted_lines import is_interrupted, moments
from zoext._runtime import interrupts
from zoext.probes import _buffers as buffers
from zoext.probes import _swap as swap
from zoext.probes import inplace, streamed


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


def test_a_handler_sees_what_it_interrupts() -> None:
    seen = []

    def closure() -> None:
        signal.raise_signal(signal.SIGUSR1)

    previous = signal.signal(signal.SIGUSR1, lambda _, frame: seen.append(frame and frame.f_code.co_name))
    try:
        with interrupts.deferred() as signals, signals.allowed():
            closure()
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert seen == ["closure"]


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGALRM, signal.SIGUSR1])
def test_other_signals_with_handlers_wait_too(number: signal.Signals) -> None:
    order = []

    def handler(*_: object) -> None:
        order.append("handled")
        raise SystemExit

    def move() -> None:
        with interrupts.deferred():
            signal.raise_signal(number)
            order.append("moved")

    previous = signal.signal(number, handler)
    try:
        with pytest.raises(SystemExit):
            move()
    finally:
        signal.signal(number, previous)
    assert order == ["moved", "handled"]


def test_at_every_line_of_a_streamed_probe() -> None:
    """SIGINT before each line of the probes that an estimate runs: first, last and once between."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2)).train()
    x = torch.randn(4, 2)
    before = [(weight.detach().clone(), weight.data_ptr()) for weight in model.parameters()]
    old = [buffer.clone() for buffer in model.buffers()]
    files = {inplace.__file__, streamed.__file__, swap.__file__}

    def estimate(model: nn.Module = model) -> None:
        zoext.MeZO(model, mu=0.5).estimate(lambda: model(x).square().mean())

    estimate(twin := copy.deepcopy(model))
    new = list(twin.buffers())
    estimate()  # what is prepared once is prepared
    for buffer, value in zip(model.buffers(), old, strict=True):
        buffer.copy_(value)
    stops = moments(lambda: estimate(copy.deepcopy(model)), files)
    for stop_at in stops:
        assert is_interrupted(estimate, stop_at, files), stop_at
        for weight, (value, pointer) in zip(model.parameters(), before, strict=True):
            assert weight.data_ptr() == pointer, stop_at
            assert torch.equal(weight, value), stop_at
            assert type(weight) is nn.Parameter, stop_at
        assert any(all(map(torch.equal, model.buffers(), known)) for known in (old, new)), stop_at
        for buffer, value in zip(model.buffers(), old, strict=True):
            buffer.copy_(value)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model)
    assert len(stops) > 300


def test_a_handler_that_returns_changes_nothing() -> None:
    """At every line of a streamed probe: a signal that waits must not keep views of displaced weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2)).train()
    x = torch.randn(4, 2)
    files = {streamed.__file__, swap.__file__, buffers.__file__}

    def losses() -> list[float]:
        twin, seen = copy.deepcopy(model), []

        def loss() -> torch.Tensor:
            seen.append(twin(x).square().mean())
            return seen[-1]

        zoext.MeZO(twin, mu=0.5).estimate(loss)
        return torch.stack(seen).tolist()

    def rerun() -> None:
        assert losses() == expected

    expected, handled = losses(), []
    previous = signal.signal(signal.SIGINT, lambda *_: handled.append(1))
    try:
        stops = moments(losses, files)
        for stop_at in stops:
            assert not is_interrupted(rerun, stop_at, files)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert len(handled) == len(stops) > 100


class InterruptsItself(zoext.Gaussian):
    """Raises SIGINT right after a kernel ran, before anyone could note that it did."""

    def __init__(self, at: int) -> None:
        object.__setattr__(self, "left", [at])

    def axpy_(self, *args: object, **kwargs: object) -> None:
        super().axpy_(*args, **kwargs)  # type: ignore[arg-type]
        self.left[0] -= 1  # type: ignore[attr-defined]
        if self.left[0] == 0:  # type: ignore[attr-defined]
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("dtype", "at"),
    [(torch.float64, at) for at in range(1, 9)] + [(torch.float32, at) for at in range(1, 7)],
)
def test_between_any_two_kernels(dtype: torch.dtype, at: int) -> None:
    """Two groups: to +mu and to -mu are four kernels; then two restore and two update, or two do both."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(dtype)
    reference = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(dtype)
    reference.load_state_dict(model.state_dict())
    before = [parameter.detach().clone() for parameter in model.parameters()]

    def optimizer_of(module: nn.Module, direction: zoext.Direction) -> zoext.ZerothOrderOptimizer:
        groups = [{"params": list(layer.parameters())} for layer in module]  # type: ignore[attr-defined]
        return zoext.ZerothOrderOptimizer(groups, direction=direction, lr=0.1, mu=0.1)

    def loss_of(module: nn.Module) -> torch.Tensor:
        return module(torch.ones(4, dtype=dtype)).square().mean()

    optimizer_of(reference, zoext.Gaussian()).step(lambda: loss_of(reference))
    optimizer = optimizer_of(model, InterruptsItself(at))
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(lambda: loss_of(model))
    applied = at > (6 if dtype == torch.float64 else 4)
    assert optimizer.param_groups[0]["step"] == int(applied)
    expected = list(reference.parameters()) if applied else before
    for a, b in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-14 if dtype == torch.float64 else 1e-6)
