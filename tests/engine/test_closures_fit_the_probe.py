"""A closure that does not take what its probe passes is refused before it runs, with the remedy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoext

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))


def loss(model: nn.Module, copies: int) -> Tensor:
    return zoext.mean_per_copy(model(zoext.repeat(X, copies)).square().mean(1), copies)


def optimizer(probe: str) -> tuple[nn.Module, zoext.ZerothOrderOptimizer]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
    return model, zoext.MeZO(model, lr=1e-2, probe=probe)


Make = Callable[[nn.Module], Callable[..., Any]]

BATCHED: dict[str, tuple[Make, str]] = {
    "a batch by default": (
        lambda model: lambda batch=X: model(batch).square().mean(),
        r"^closure\(batch=\.\.\.\): a .* would replace the default of 'batch'; take it first: lambda",
    ),
    "copies second": (
        lambda model: lambda batch=X, copies=2: loss(model, copies),
        "would replace the default of 'batch'",
    ),
    "no copies": (lambda model: lambda: model(X).mean(), r"a batched probe calls closure\(copies\)"),
    "copies by name only": (lambda model: lambda *, copies: loss(model, copies), r"calls closure\(copies\)"),
}
OTHERS: dict[str, tuple[Make, str]] = {
    "copies": (
        lambda model: lambda copies: loss(model, copies),
        r"closure\(copies\): this closure takes copies, and only a batched probe.*pass probe='batched'",
    ),
    "a batch": (
        lambda model: lambda batch: model(batch).mean(),
        r"closure\(batch\): the closure is called without arguments; pass step\(lambda: loss_of",
    ),
}


def refused(probe: str, make: Make, match: str) -> None:
    model, own = optimizer(probe)
    for call in (own.step, own.estimate):
        with pytest.raises(TypeError, match=match):
            call(make(model))
    assert own.param_groups[0]["step"] == 0
    own.step((lambda copies: loss(model, copies)) if probe == "batched" else lambda: loss(model, 1).mean())


@pytest.mark.parametrize("case", BATCHED)
def test_batched_probes_pass_copies(case: str) -> None:
    refused("batched", *BATCHED[case])


@pytest.mark.parametrize("probe", ["streamed", "inplace"])
@pytest.mark.parametrize("case", OTHERS)
def test_other_probes_pass_nothing(case: str, probe: str) -> None:
    refused(probe, *OTHERS[case])


@pytest.mark.parametrize(
    "closure",
    [
        lambda model: lambda copies, batch=X: loss(model, copies),
        lambda model: lambda copies=None: loss(model, copies),
        lambda model: lambda *arguments: loss(model, *arguments),
        lambda model: partial(loss, model),
    ],
    ids=["a default after copies", "copies by default", "any arguments", "partial"],
)
def test_right_closures_run(closure: Make) -> None:
    losses = []
    for make in (lambda model: lambda n: loss(model, n), closure):
        model, own = optimizer("batched")
        losses.append(own.step(make(model)))
    assert torch.equal(*losses)


def test_defaults_belong_to_closures_of_other_probes() -> None:
    model, own = optimizer("streamed")
    own.step(lambda batch=X: model(batch).square().mean())
    own.step(lambda copies=None: model(X).square().mean())
