"""Dynamo traces the model that a closure has compiled, and none of the code that swaps its weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoext
from zoext.probes import _swap as swap

X = torch.ones(2, 4)


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # dynamo's own import
@pytest.mark.parametrize("first", [False, True], ids=["after eager steps", "first"])
def test_of_a_compiled_closure(first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[bool] = []
    called: list[str] = []

    def noting(name: str) -> None:
        real: Callable[..., Any] = getattr(swap.ModuleSwap, name)

        def note(*arguments: Any) -> Any:
            called.append(name)
            traced.append(torch.compiler.is_compiling())  # what Dynamo traces says so whenever it runs
            return real(*arguments)

        monkeypatch.setattr(swap.ModuleSwap, name, note)

    for name in ("_begin", "_after", "_restore"):
        noting(name)
    torch.compiler.reset()
    model = model_of()
    compiled = torch.compile(model, backend="eager")
    optimizer = zoext.MeZO(model, mu=1e-2, seed=3, lr=0.1)
    for _ in range(0 if first else 2):
        optimizer.step(lambda: model(X).square().mean())
    called.clear()
    losses = [float(optimizer.step(lambda: compiled(X).square().mean())) for _ in range(3)]
    assert set(called) == {"_begin", "_after", "_restore"}
    assert not any(traced)

    other = model_of()
    expected = zoext.MeZO(other, mu=1e-2, seed=3, lr=0.1)

    def eager() -> Tensor:
        return other(X).square().mean()

    for _ in range(0 if first else 2):
        expected.step(eager)
    assert losses == [float(expected.step(eager)) for _ in range(3)]
