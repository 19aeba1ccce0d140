"""A batched probe only reads theta, and leaves model and generators as a streamed one does."""

from __future__ import annotations

import signal

import pytest
import torch
from torch import Tensor, nn

import zoext
from support.batched_models import PLAIN, plain
from support.oracle import bits


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("raises", [False, True])
def test_whatever_the_closure_does(dtype: torch.dtype, raises: bool) -> None:
    model, losses = plain(PLAIN["mixed"], dtype)
    before = {key: bits(value) for key, value in model.state_dict().items()}
    versions = {key: value._version for key, value in model.named_parameters()}
    calls: list[int] = []

    def closure(copies: int) -> Tensor:
        calls.append(copies)
        found = losses(copies)
        if raises and len(calls) > 2:
            raise KeyError("of the closure")
        return found.float()

    optimizer = zoext.MeZO(model, probe="batched", mu=1e-2)
    if raises:
        with pytest.raises(KeyError):
            optimizer.estimate(closure)
    else:
        optimizer.estimate(closure)
    assert calls[:3] == [2, 2, 2]  # two that check, and the probes
    assert all(torch.equal(before[key], bits(value)) for key, value in model.state_dict().items())
    assert all(value._version == versions[key] for key, value in model.named_parameters())
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_random_numbers_are_those_of_one_call() -> None:
    """All copies have the dropout masks of a single batch, and the generator moves as in a single call."""
    model, losses = plain(PLAIN["mixed"])
    torch.manual_seed(9)
    losses(1)
    after = torch.get_rng_state()
    optimizer = zoext.MeZO(model, samples=3, probe="batched")
    for _ in range(2):
        torch.manual_seed(9)
        optimizer.estimate(lambda copies: losses(copies))
        assert torch.equal(torch.get_rng_state(), after)


def test_forwards_that_others_replaced_stay() -> None:
    """As Accelerate replaces them."""
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 1))
    layer = model[0]
    original, calls = layer.forward, []

    def forward(x: Tensor) -> Tensor:
        calls.append(len(x))
        return original(x)

    layer.forward = forward  # type: ignore[method-assign]
    x = torch.randn(3, 5)
    optimizer = zoext.LOZO(model, probe="batched")
    optimizer.estimate(lambda copies: zoext.mean_per_copy(model(x.repeat(copies, 1)).square(), copies))
    assert layer.forward is forward
    assert calls == [6, 6, 3, 3]  # what it computes is unknown, so that it runs copy by copy


def test_describe_names_what_runs_copy_by_copy() -> None:
    model, losses = plain(PLAIN["mixed"])
    optimizer = zoext.MeZO(model, probe="batched")
    assert "copy by copy" not in optimizer.probe.describe()
    optimizer.estimate(losses)
    assert optimizer.probe.describe().endswith("copy by copy: convolution")


class Interrupted(nn.Module):
    """A module that runs copy by copy, during whose third call from now on Ctrl-C is pressed."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(5))
        self.calls: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.calls is not None:
            self.calls += 1
            if self.calls == 3:
                signal.raise_signal(signal.SIGINT)
        return x * self.scale


def test_an_interrupt_while_weights_are_others() -> None:
    model = nn.Sequential(nn.Linear(5, 5), Interrupted(), nn.Linear(5, 1))
    x = torch.randn(3, 5)
    before = {key: bits(value) for key, value in model.state_dict().items()}
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    optimizer = zoext.MeZO(model, samples=2, mu=0.1, probe="batched")

    def closure(copies: int) -> Tensor:
        return zoext.mean_per_copy(model(x.repeat(copies, 1)).square(), copies)

    for _ in range(2):  # sessions with a check
        optimizer.estimate(closure)
    model[1].calls = 0
    with pytest.raises(KeyboardInterrupt):
        optimizer.estimate(closure)
    assert model[1].calls == 4  # the module was run to its end
    assert all(torch.equal(before[key], bits(value)) for key, value in model.state_dict().items())
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses
    assert not any("forward" in module.__dict__ for module in model.modules())
