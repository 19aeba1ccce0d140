"""What a closure keeps, saves or builds of a model while AGZO observes a forward is as without AGZO."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoext

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


class Model(nn.Module):
    """A layer that is called, one that is multiplied elsewhere, a stack, and one that is unused."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.called, self.multiplied, self.unused = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.stack = nn.Parameter(torch.randn(2, 3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(self.called(x), self.multiplied.weight)), self.stack[1])


def loss_of(model: nn.Module) -> Tensor:
    return model(X).square().mean()


def saved(model: nn.Module) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


KEPT: dict[str, Callable[[nn.Module], dict[str, Tensor]]] = {
    "state_dict": lambda model: model.state_dict(),
    "clones": lambda model: {name: weight.clone() for name, weight in model.state_dict().items()},
    "parameters": lambda model: dict(model.named_parameters()),
    "torch.save": saved,
    "pickle": lambda model: pickle.loads(pickle.dumps(model.state_dict())),
    "pickled parameters": lambda model: pickle.loads(pickle.dumps(dict(model.named_parameters()))),
    "deepcopy": lambda model: dict(copy.deepcopy(model).named_parameters()),
    "deepcopied parameters": lambda model: copy.deepcopy(dict(model.named_parameters())),
    "views": lambda model: {
        name: weight.t() for name, weight in model.named_parameters() if weight.dim() == 2
    },
}


def ends(keep: Callable[[nn.Module], Any], probe: str, steps: int = 2) -> dict[str, Tensor]:
    model = Model()
    optimizer = zoext.AGZO(model, lr=1e-2, mu=1e-2, seed=3, probe=probe, weight_decay=0.1)

    def closure() -> Tensor:
        keep(model)
        return loss_of(model)

    for _ in range(steps):
        optimizer.step(closure)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor], but_unused: bool = False) -> None:
    """``but_unused``: a copy of the weight that the model does not use counts as a use."""
    for name, parameter in found.items():
        assert torch.equal(parameter, expected[name]) != (but_unused and name == "unused.weight"), name


@pytest.mark.parametrize("probe", ["streamed", "inplace"])
@pytest.mark.parametrize("how", KEPT)
def test_what_a_closure_keeps(how: str, probe: str) -> None:
    """Plain tensors with the values of theta, which change nothing of the step."""
    kept: list[dict[str, Tensor]] = []
    found = ends(lambda model: kept.append(KEPT[how](model)), probe)
    for name, expected in KEPT[how](Model()).items():
        assert type(kept[0][name]) is type(expected), name
        if how not in {"state_dict", "parameters", "views"}:  # whose values follow the model
            assert torch.equal(kept[0][name], expected), name
    same(found, ends(lambda model: None, probe), but_unused="deepcop" in how or how == "clones")


def test_a_copy_of_the_model_is_another_model() -> None:
    """Its layers are not those whose activations the step observes."""
    copies: list[nn.Module] = []

    def keep(model: nn.Module) -> None:
        copies.append(copy.deepcopy(model))
        copies[-1](X.flip(1) * 7)

    same(ends(keep, "inplace"), ends(lambda model: None, "inplace"), but_unused=True)


@pytest.mark.parametrize("probe", ["streamed", "inplace"])
@pytest.mark.parametrize("recipe", [zoext.AGZO, zoext.MeZO])
def test_another_optimizer_within_the_closure(
    recipe: Callable[..., zoext.ZerothOrderOptimizer], probe: str
) -> None:
    """It runs another model as it does outside."""
    slopes = []

    def keep(model: nn.Module) -> None:
        inner = Model()
        optimizer = recipe(inner, mu=1e-2, seed=5, probe=probe)
        optimizer.step(lambda: loss_of(inner))
        slopes.append(optimizer.last_estimate.coefficients)  # type: ignore[union-attr]

    found = ends(keep, probe)
    inner = Model()
    optimizer = recipe(inner, mu=1e-2, seed=5, probe=probe)
    optimizer.step(lambda: loss_of(inner))
    assert optimizer.last_estimate is not None
    assert all(torch.equal(slope, optimizer.last_estimate.coefficients) for slope in slopes)
    same(found, ends(lambda model: None, probe))


@pytest.mark.parametrize("probe", ["streamed", "inplace"])
def test_another_optimizer_of_the_model_within_the_closure(probe: str) -> None:
    built: list[zoext.ZerothOrderOptimizer] = []
    ends(lambda model: built.append(zoext.AGZO(model, probe=probe)), probe)
    assert len(built) == 4


def test_nothing_of_the_watch_remains() -> None:
    model = Model()
    optimizer = zoext.AGZO(model)
    views: list[Any] = []

    def closure() -> Tensor:
        views.append(weakref.ref(model.multiplied.weight.t().clone()))
        return loss_of(model)

    optimizer.step(closure)
    gc.collect()
    assert all(view() is None for view in views)
    assert not torch.overrides._get_current_function_mode_stack()
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_an_interrupted_closure() -> None:
    model = Model()
    optimizer = zoext.AGZO(model)

    def closure() -> Tensor:
        loss_of(model)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert not torch.overrides._get_current_function_mode_stack()
    assert {type(parameter) for parameter in model.parameters()} == {nn.Parameter}


@pytest.mark.parametrize("change", ["lost", "left"])
def test_an_interrupt_while_torch_changes_its_stack_of_modes(change: str) -> None:
    """torch takes the top mode off the stack to call it, or to enter one of its own."""

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    model, mode = Model(), Mode()
    optimizer = zoext.AGZO(model)

    def closure() -> Tensor:
        loss_of(model)
        if change == "lost":
            torch._C._pop_torch_function_stack()
        else:
            Mode().__enter__()
        raise KeyboardInterrupt

    with mode:
        with pytest.raises(KeyboardInterrupt):
            optimizer.step(closure)
        assert torch.overrides._get_current_function_mode_stack() == [mode]
        optimizer.step(lambda: loss_of(model))
    assert not torch.overrides._get_current_function_mode_stack()
