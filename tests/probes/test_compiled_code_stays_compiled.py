"""Watching operators costs no compilation: models, closures and other code run compiled afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoext
from support.compiled_code import counting
from zoext._runtime.compiled import uncompiled

X = torch.randn(8, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
STEPS = 7  # watched: 1, 2 and 4


@pytest.fixture
def calls() -> list[int]:
    return [0]


@pytest.fixture
def compiled(calls: list[int]) -> Callable[[Any], Any]:
    return counting(calls)


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def slopes_of(
    model: nn.Module, closure: Callable[[], Tensor], probe: str, calls: list[int] | None
) -> list[float]:
    optimizer = zoext.MeZO(model, lr=1e-3, mu=1e-3, seed=3, probe=probe)
    found = []
    for step in range(1, STEPS + 1):
        before = calls[0] if calls else 0
        optimizer.step(closure)
        assert optimizer.last_estimate is not None
        found.append(float(optimizer.last_estimate.coefficients))
        if calls and step in (3, 5, 6, 7):
            assert calls[0] > before, f"step {step} ran nothing compiled"
    return found


@pytest.mark.parametrize("ran_before", [False, True])
@pytest.mark.parametrize("what", ["model", "closure"])
def test_of_what_is_probed(
    what: str, ran_before: bool, compiled: Callable[[Any], Any], calls: list[int]
) -> None:
    expected_model = model_of()
    expected = slopes_of(expected_model, lambda: expected_model(X).square().mean(), "inplace", None)

    model = model_of()
    if what == "model":
        fast = compiled(model)

        def closure() -> Tensor:
            return fast(X).square().mean()
    else:
        closure = compiled(lambda: model(X).square().mean())
    if ran_before:
        with torch.no_grad():
            closure()
    found = slopes_of(model, closure, "streamed", calls)
    assert found == pytest.approx(expected, rel=1e-6)


def test_buffers_of_a_model_that_is_probed_in_place(compiled: Callable[[Any], Any], calls: list[int]) -> None:
    """Iterations of spectral normalization: all forwards of a step begin with the same buffers."""
    models = []
    for _ in range(2):
        model = model_of()
        nn.utils.parametrizations.spectral_norm(model[0])
        models.append(model)
    fast = compiled(models[0])
    found = slopes_of(fast, lambda: fast(X).square().mean(), "auto", calls)
    expected = slopes_of(models[1], lambda: models[1](X).square().mean(), "streamed", None)
    assert found == pytest.approx(expected, rel=1e-5)


def test_of_other_code(compiled: Callable[[Any], Any], calls: list[int]) -> None:
    model, other = model_of(), compiled(lambda x: torch.tanh(x) + 1)

    def closure() -> Tensor:
        return model(other(X)).square().mean()

    slopes_of(model, closure, "streamed", calls)
    before = calls[0]
    other(X)
    assert calls[0] == before + 1


def test_after_watches_of_threads_that_overlap(compiled: Callable[[Any], Any], calls: list[int]) -> None:
    """As those of members of a group that run in one process."""
    other = compiled(lambda x: torch.tanh(x) + 1)
    first, second = uncompiled(), uncompiled()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    other(X)
    assert calls[0] == 0
    second.__exit__(None, None, None)
    other(X)
    assert calls[0] == 1


def test_layers_of_a_kind_share_their_code() -> None:
    """However many there are: the watch for accesses adds no guard of its own to a module."""
    torch.compiler.reset()
    graphs = [0]

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs[0] += 1
        return graph.forward

    model = nn.Sequential(*(nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5)) for _ in range(12))).double()
    fast = torch.compile(model, backend=backend)
    optimizer = zoext.MeZO(model, probe="streamed")
    for _ in range(STEPS):
        optimizer.step(lambda: fast(X).square().mean())
    assert 0 < graphs[0] <= 4
