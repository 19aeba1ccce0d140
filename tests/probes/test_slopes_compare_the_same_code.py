"""The losses of a slope come from compiled code, or from code as it is written, and never from both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import zoext

X = torch.randn(8, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def slopes_of(model: nn.Module, closure: Callable[[], Any], probe: str) -> list[float]:
    optimizer = zoext.MeZO(model, lr=1e-3, mu=1e-3, seed=3, probe=probe)
    found = []
    for _ in range(4):  # operators are watched in steps 1, 2 and 4, for which code runs as it is written
        optimizer.step(closure)
        assert optimizer.last_estimate is not None
        found.append(float(optimizer.last_estimate.coefficients))
    return found


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def test_where_operators_are_watched() -> None:
    """With a backend that adds 1 to losses, as other roundings do in small."""
    torch.compiler.reset()

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        return lambda *arguments: tuple(out if out.dim() else out + 1 for out in graph.forward(*arguments))

    plain, model = model_of(), model_of()
    expected = slopes_of(plain, lambda: plain(X).square().mean(), "inplace")
    closure = torch.compile(lambda: model(X).square().mean(), backend=backend)
    assert slopes_of(model, closure, "streamed") == pytest.approx(expected, rel=1e-6)
