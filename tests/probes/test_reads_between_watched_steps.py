"""A weight that is read outside its module at any step is displaced there, whenever operators are watched."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import zoext

X = torch.randn(8, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def loss_of(model: nn.Module) -> Tensor:
    return model(X).square().mean()


PENALTIES: dict[str, Callable[[nn.Module], Tensor]] = {
    "parameters": lambda model: sum(p.square().sum() for p in model.parameters()),  # type: ignore[misc]
    "named": lambda model: dict(model.named_parameters())["2.weight"].square().sum(),
    "attribute": lambda model: model[2].weight.square().sum(),
    "get_parameter": lambda model: model.get_parameter("0.bias").square().sum(),
    "state_dict": lambda model: model.state_dict(keep_vars=True)["0.weight"].square().sum(),
    "vector": lambda model: nn.utils.parameters_to_vector(model.parameters()).square().sum(),
    "data": lambda model: sum(p.data.square().sum() for p in model.parameters()),  # type: ignore[misc]
    "functional_call": lambda model: (
        functional_call(model, {n: 2 * p for n, p in model.named_parameters()}, (X,)).square().mean()
    ),
}


@pytest.mark.parametrize("every", [3, 7])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_slopes_are_those_of_in_place_probes(penalty: str, every: int) -> None:
    """Steps 3, 6, 9, ... are never those that are watched for their number."""
    slopes: dict[str, list[float]] = {"inplace": [], "streamed": []}
    for probe, found in slopes.items():
        model = model_of()
        before = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer = zoext.MeZO(model, lr=0.0, mu=1e-3, seed=3, probe=probe)
        for step in range(1, 23):

            def closure(step: int = step, model: nn.Module = model) -> Tensor:
                loss = loss_of(model)
                return loss + PENALTIES[penalty](model) if step % every == 0 else loss

            optimizer.step(closure)
            assert optimizer.last_estimate is not None
            found.append(float(optimizer.last_estimate.coefficients))
            assert optimizer.last_estimate.forwards == 2
        if probe == "streamed":
            assert all(map(torch.equal, before, model.parameters()))
    assert slopes["streamed"] == pytest.approx(slopes["inplace"], rel=1e-7)


def test_asking_for_a_weight_without_reading_it_costs_no_forward() -> None:
    """As models of transformers do for their device and dtype."""
    model = model_of()
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        first = next(model.parameters())
        return loss_of(model).to(first.device, first.dtype)

    optimizer = zoext.MeZO(model)
    for _ in range(10):
        optimizer.step(closure)
    assert calls == 20
    assert "elsewhere" not in optimizer.probe.describe()


def test_probes_by_ask_are_those_of_steps() -> None:
    model = model_of()
    optimizer = zoext.MeZO(model, mu=1e-3, seed=3, lr=0.0)
    for _ in range(2):
        optimizer.step(lambda: loss_of(model))
    pending = optimizer.ask()
    losses = []
    for index in range(2):
        with pending.displaced(index):
            losses.append(loss_of(model) + PENALTIES["parameters"](model))
    optimizer.tell(losses)
    optimizer.step()
    other = model_of()
    expected = zoext.MeZO(other, mu=1e-3, seed=3, lr=0.0, probe="inplace")
    for penalty in (0, 0, 1):
        expected.step(lambda penalty=penalty: loss_of(other) + penalty * PENALTIES["parameters"](other))
    assert optimizer.last_estimate is not None
    assert expected.last_estimate is not None
    found, wanted = (float(each.last_estimate.coefficients) for each in (optimizer, expected))  # type: ignore[union-attr]
    assert found == pytest.approx(wanted, rel=1e-7)


def test_modules_are_left_as_they_were() -> None:
    model = model_of()
    own = [module._parameters for module in model.modules()]
    copies = []

    def closure() -> Tensor:
        copies.append(copy.deepcopy(model))
        model[1].register_parameter("late", nn.Parameter(torch.ones(2), requires_grad=False))
        return loss_of(model)

    zoext.MeZO(model).step(closure)
    assert all(a is b for a, b in zip(own, (module._parameters for module in model.modules()), strict=True))
    assert list(model[1]._parameters) == ["late"]
    assert all(type(module._parameters) is dict for each in (model, *copies) for module in each.modules())
    assert copies[0][2].weight.shape == (3, 4)
