"""``step(closure)`` with probes in place moves theta from the last probe to where the step ends, at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoext
from support.graphed_runs import Run
from support.recorded_graph import RecordedGraph
from zoext.graphs import graphed_step
from zoext.updates import GroupStep

Optimizer = Callable[..., zoext.ZerothOrderOptimizer]


@dataclass(frozen=True)
class Scaled(zoext.LinearUpdate):
    """A linear update of one's own."""

    def terms(self, step: GroupStep) -> Any:
        return zoext.SGD(normalized=True).terms(step)


RECIPES: dict[str, Optimizer] = {
    "mezo": zoext.MeZO,
    "mezo of 3": lambda params, **options: zoext.MeZO(params, samples=3, **options),
    "one-sided": lambda params, **options: zoext.ZerothOrderOptimizer(
        params, estimator=zoext.ForwardDifference(samples=2), **options
    ),
    "gv": lambda params, **options: zoext.MeZOGV(params, pool_size=3, elite_ratio=0.4, **options),
    "greedy": zoext.MeZOGreedy,
    "lozo": lambda params, **options: zoext.LOZO(params, rank=3, **options),
    "agzo": lambda params, **options: zoext.AGZO(params, rank=2, **options),
    "fzoo": lambda params, **options: zoext.ZerothOrderOptimizer(
        params,
        direction=zoext.Rademacher(),
        estimator=zoext.ForwardDifference(samples=2),
        update=zoext.SGD(normalized=True),
        **options,
    ),
    "scaled": lambda params, **options: zoext.ZerothOrderOptimizer(params, update=Scaled(), **options),
}


def model_of(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def optimizer_of(recipe: str, model: nn.Module, **options: Any) -> zoext.ZerothOrderOptimizer:
    first, *others = model
    groups = [
        {"params": list(first.parameters())},
        {"params": [p for layer in others for p in layer.parameters()], "mu": 0.03, "lr": 0.01},
    ]
    options = {"lr": 0.02, "mu": 0.05, "weight_decay": 0.3, "seed": 9, "precision": "nearest", **options}
    module: Any = model if recipe == "agzo" else groups  # which watches the module's forward
    return RECIPES[recipe](module, **options)


def loss_of(model: nn.Module) -> Tensor:
    dtype = next(model.parameters()).dtype
    return model(torch.linspace(-1, 1, 20).view(4, 5).to(dtype)).double().square().mean()


class Moves:
    """The elements that the operators have moved or displaced, and the layouts of what they were given."""

    def __init__(self) -> None:
        self.elements = 0
        self.given: list[tuple[str, list[tuple[torch.Size, tuple[int, ...], torch.device]]]] = []

    def count(self, name: str, tensors: list[Tensor]) -> None:
        self.elements += sum(tensor.numel() for tensor in tensors)
        self.given.append((name, [(each.shape, each.stride(), each.device) for each in tensors]))

    def passes(self, model: nn.Module) -> float:
        """A pass may take several calls, as for tensors on several devices."""
        return self.elements / sum(parameter.numel() for parameter in model.parameters())


def count_passes(monkeypatch: pytest.MonkeyPatch) -> Moves:
    moves = Moves()
    for name in ("noise_axpy_", "noise_copy_", "factored_axpy_", "factored_copy_"):
        real = getattr(torch.ops.zoext, name)
        monkeypatch.setattr(
            torch.ops.zoext,
            name,
            lambda *given, name=name, real=real: (moves.count(name, given[0]), real(*given))[1],
        )
    return moves


@pytest.mark.parametrize("recipe", RECIPES)
def test_theta_of_separate_passes(recipe: str) -> None:
    """Within the roundings of float32 of the few passes of a step: weights and displacements are below 2."""
    ends = []
    for at_once in (True, False):
        model = model_of(torch.float32)
        optimizer = optimizer_of(recipe, model, probe="inplace")
        if at_once:
            optimizer.step(lambda model=model: loss_of(model))
        else:
            optimizer.estimate(lambda model=model: loss_of(model))
            optimizer.step()
        ends.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
    assert torch.allclose(*ends, rtol=0, atol=5e-7)
    assert (ends[0] - ends[1]).abs().mean() < 5e-8


@pytest.mark.parametrize("recipe", ["mezo", "one-sided", "lozo", "fzoo"])
def test_as_near_to_the_formula(recipe: str) -> None:
    """theta - lr g D - decay theta in float64, from the losses of the probes in place.

    One rounding less, but restoring first rounds back what displacing rounded: on the mean a sixth more.
    """
    errors = {}
    for at_once in (True, False):
        model, exact = model_of(torch.float32), model_of(torch.float32).double()
        optimizer = optimizer_of(recipe, model, probe="inplace")
        losses: list[float] = []

        def closure(model: nn.Module = model, losses: list[float] = losses) -> Tensor:
            losses.append(float(loss_of(model)))
            return loss_of(model)

        if at_once:
            optimizer.step(closure)
        else:
            optimizer.estimate(closure)
            optimizer.step()
        again = iter(losses)
        optimizer_of(recipe, exact).step(lambda again=again: next(again))
        pairs = zip(model.parameters(), exact.parameters(), strict=True)
        errors[at_once] = torch.cat([(a.double() - b).abs().flatten() for a, b in pairs]).mean().item()
    assert errors[True] <= errors[False] * 1.25


@pytest.mark.parametrize(
    ("recipe", "passes"), [("mezo", 3), ("one-sided", 4), ("gv", 9), ("greedy", 10), ("fzoo", 4)]
)
def test_passes_over_theta(recipe: str, passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To +mu, to -mu, and to the end: three for a central difference, two for a one-sided one."""
    model = nn.Linear(4, 3)
    options = {"lr": 0.1, "weight_decay": 0.1}
    optimizer = RECIPES[recipe](list(model.parameters()), **options)
    moves = count_passes(monkeypatch)
    optimizer.step(lambda: model(torch.ones(4)).square().mean())
    # Each direction costs its way there and back, except the last one, from which the update starts.
    assert moves.passes(model) == passes, moves.given


def test_one_sided_in_two_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(4, 3)
    optimizer = zoext.ZerothOrderOptimizer(list(model.parameters()), estimator=zoext.ForwardDifference())
    moves = count_passes(monkeypatch)
    optimizer.step(lambda: model(torch.ones(4)).square().mean())
    assert moves.passes(model) == 2, moves.given


OTHERS: dict[str, Any] = {
    "an update that is not linear": (torch.float32, {"update": zoext.AdamReplay(horizon=2)}),
    "bfloat16": (torch.bfloat16, {}),
    "residuals": (torch.bfloat16, {"precision": "residual"}),
    "float64": (torch.float64, {}),
}


@pytest.mark.parametrize("case", OTHERS)
def test_others_restore_first(case: str) -> None:
    (dtype, options), ends = OTHERS[case], []
    for at_once in (True, False):
        model = model_of(dtype)
        optimizer = zoext.ZerothOrderOptimizer(list(model.parameters()), lr=0.1, mu=0.1, **options)
        if at_once:
            optimizer.step(lambda model=model: loss_of(model))
        else:
            optimizer.estimate(lambda model=model: loss_of(model))
            optimizer.step()
        ends.append(list(model.parameters()))
    assert all(map(torch.equal, *ends))


def test_an_update_of_ones_own_that_overrides_apply() -> None:
    @dataclass(frozen=True)
    class Doubled(zoext.SGD):
        def apply(self, direction: Any, parameters: Any, moves: Any, state: Any) -> Any:
            super().apply(direction, parameters, moves, state)
            return super().apply(direction, parameters, moves, state)

    ends = []
    for probe in ("inplace", "streamed"):
        model = model_of(torch.float32)
        zoext.ZerothOrderOptimizer(model, update=Doubled(), lr=0.1, mu=1e-3, probe=probe).step(
            lambda model=model: loss_of(model)
        )
        ends.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
    assert torch.allclose(*ends, atol=1e-4)


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_losses_that_are_not_finite_restore_theta(policy: str) -> None:
    model = model_of(torch.float32)
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer = optimizer_of("mezo", model, probe="inplace", nonfinite=policy)
    if policy == "raise":
        with pytest.raises(FloatingPointError):
            optimizer.step(lambda: float("nan"))
    else:
        optimizer.step(lambda: float("nan"))
    for parameter, base in zip(model.parameters(), before, strict=True):
        assert torch.allclose(parameter, base, rtol=0, atol=2e-7)


@pytest.mark.parametrize("group", [0, 1])
def test_an_update_that_raises(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups that it has not reached are restored; one that moved before is told."""
    model = model_of(torch.float32)
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer = optimizer_of("mezo", model, probe="inplace")
    moves = count_passes(monkeypatch)
    counted = torch.ops.zoext.noise_axpy_
    first = sum(parameter.numel() for parameter in model[0].parameters())
    failed: list[bool] = []

    def fails(*given: Any) -> None:
        if moves.elements == 2 * sum(map(torch.numel, before)) + group * first and not failed:
            failed.append(True)
            raise torch.OutOfMemoryError
        counted(*given)

    monkeypatch.setattr(torch.ops.zoext, "noise_axpy_", fails)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step(lambda: loss_of(model))
    untouched = list(zip(model.parameters(), before, strict=True))[2 * group :]
    assert all(torch.allclose(parameter, base, rtol=0, atol=2e-7) for parameter, base in untouched)
    with pytest.raises(RuntimeError, match="only partly applied"):
        optimizer.step(lambda: loss_of(model))


def test_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    class Graph(RecordedGraph):
        pass

    monkeypatch.setattr(graphed_step, "CudaGraph", Graph)
    ends = []
    for graphed in (False, True):
        run = Run("mezo", graphed=graphed, probe="inplace").steps(range(7))
        ends.append(list(run.model.parameters()))
    assert all(map(torch.equal, *ends))
