"""AGZO sees the activations of compiled models, and its probes run compiled; scripted ones are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoext
from support.compiled_code import counting

X = torch.randn(8, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def calls() -> list[int]:
    return [0]


@pytest.fixture
def compiled(calls: list[int]) -> Callable[[Any], Any]:
    return counting(calls, shift=1.0)


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def path(model: nn.Module, closure: Callable[[], Any], params: Any = None, **options: Any) -> list[Any]:
    """The slopes and numbers of forwards of some steps, and the weights at the end."""
    optimizer = zoext.AGZO(model if params is None else params, lr=1e-2, mu=1e-3, seed=3, **options)
    rows = []
    for _ in range(3):
        optimizer.step(closure)
        assert optimizer.last_estimate is not None
        rows.append((float(optimizer.last_estimate.coefficients), optimizer.last_estimate.forwards))
    return [rows, [parameter.detach().clone() for parameter in model.parameters()]]


@pytest.mark.parametrize(
    ("what", "ran_before", "probe"),
    [
        ("module", False, "streamed"),
        ("loss", True, "streamed"),
        ("module", True, "inplace"),
        ("in place", False, "inplace"),
        ("part", False, "inplace"),
    ],
)
def test_slopes_are_those_of_the_model_as_it_is_written(
    what: str, ran_before: bool, probe: str, compiled: Callable[[Any], Any], calls: list[int]
) -> None:
    """Although the compiled code gives other losses: all probes of a slope run the same code."""
    plain = model_of()
    (expected, ends) = path(plain, lambda: plain(X).square().mean(), probe=probe)
    model = model_of()
    run: Any = model
    if what == "loss":
        run = compiled(lambda x: model(x).square().mean())
    elif what == "module":
        run = compiled(Scored(model))
    elif what == "in place":
        run = Scored(model)
        run.forward = compiled(run.forward)
    else:
        model[0] = compiled(model[0])
    if ran_before:
        with torch.no_grad():
            run(X)
    closure = (lambda: run(X).square().mean()) if what == "part" else (lambda: run(X))
    (found, weights) = path(model, closure, probe=probe)
    assert calls[0] > 0
    for (slope, forwards), (right, fewer) in zip(found, expected, strict=True):
        assert slope == pytest.approx(right, rel=1e-5)
        assert forwards >= fewer + 1
    for actual, end in zip(weights, ends, strict=True):
        torch.testing.assert_close(actual, end, rtol=1e-6, atol=1e-9)


class Scored(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).square().mean()


def test_a_compiled_module_as_params(compiled: Callable[[Any], Any], calls: list[int]) -> None:
    model = model_of()
    (expected, _) = path(model, lambda: model(X).square().mean(), probe="inplace")
    wrapped = compiled(Scored(model_of()))
    (found, _) = path(wrapped, lambda: wrapped(X))
    assert [slope for slope, _ in found] == pytest.approx([slope for slope, _ in expected], rel=1e-5)
    assert calls[0] == 6  # two of the three forwards of a step


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(5, 3).double()

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.layer(x)[:, :4].square().mean()


@pytest.mark.parametrize("called", ["wrapper", "module"])
def test_padding_does_not_count(called: str, compiled: Callable[[Any], Any]) -> None:
    x = torch.cat((X[:4], 100 * X[4:]))[None]
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0]])
    plain = Padded()
    (expected, _) = path(plain, lambda: plain(x, mask), probe="inplace")
    model = Padded()
    wrapped = compiled(model)
    run = wrapped if called == "wrapper" else model
    (found, _) = path(wrapped, lambda: run(x, mask))
    assert [slope for slope, _ in found] == pytest.approx([slope for slope, _ in expected], rel=1e-5)
    with pytest.raises(ValueError, match="mask must be an argument of the module's forward, not 'padding'"):
        zoext.AGZO(wrapped, mask="padding")


def test_ask_and_tell_evaluate_the_first_probe_again(compiled: Callable[[Any], Any]) -> None:
    model = model_of()
    run = compiled(Scored(model))
    optimizer = zoext.AGZO(model, probe="inplace")
    pending = optimizer.ask()
    message = r"compiled code ran as it is written.*evaluate this probe again"
    with pytest.raises(RuntimeError, match=message), pending.displaced(0):
        run(X)
    while pending is not None:
        losses = []
        for index in range(len(pending)):
            with pending.displaced(index):
                losses.append(run(X))
        pending = optimizer.tell(losses)
    optimizer.step()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_scripted_layers_are_refused_by_name() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(5, 5)
            self.head = torch.jit.script(nn.Sequential(nn.Linear(5, 3), nn.ReLU()))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x))

    model = Model()
    with pytest.raises(ValueError, match=r"head\.0, which torch\.jit has compiled: train the module"):
        zoext.AGZO(model)
    for parameter in model.head.parameters():
        parameter.requires_grad_(False)
    optimizer = zoext.AGZO(model, probe="inplace")
    before = model.body.weight.detach().clone()
    optimizer.step(lambda: model(X.float()).square().mean())
    assert not torch.equal(before, model.body.weight)
