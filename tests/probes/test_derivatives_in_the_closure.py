"""Losses made of derivatives of the model have the slope that in-place probes find, or are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

import zoext

X = torch.randn(7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Model(nn.Module):
    """Layers of which one runs twice, one is shared, and one keeps statistics."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.middle, self.norm = nn.Linear(5, 6), nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.again = nn.Linear(6, 6)
        self.again.weight = self.middle.weight
        self.head = nn.Linear(6, 1)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.middle(torch.tanh(self.inner(x)))))
        return self.head(torch.tanh(self.again(self.middle(x))))


def gradient_penalty(model: nn.Module) -> Tensor:
    with torch.enable_grad():
        x = X.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x)
    return slope.square().mean() + model(X).square().mean()


def second_derivatives(model: nn.Module) -> Tensor:
    with torch.enable_grad():
        x = X.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), x)
    return (curvature.sum(1) - 1).square().mean()


def recomputed(model: nn.Module) -> Tensor:
    with torch.enable_grad():
        x = X.clone().requires_grad_()
        (slope,) = torch.autograd.grad(checkpoint(model, x, use_reentrant=False).sum(), x)
    return slope.square().mean()


def backward(model: nn.Module) -> Tensor:
    with torch.enable_grad():
        x = X.clone().requires_grad_()
        model(x).sum().backward(inputs=[x])
    assert x.grad is not None
    return x.grad.square().mean()


CLOSURES = {f.__name__: f for f in (gradient_penalty, second_derivatives, recomputed, backward)}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("closure", CLOSURES)
@pytest.mark.parametrize("recipe", [zoext.MeZO, zoext.LOZO], ids=["dense", "low rank"])
def test_slopes_are_those_of_in_place_probes(recipe: Callable[..., Any], closure: str, train: bool) -> None:
    slopes = {}
    for probe in ("inplace", "streamed"):
        model = Model().train(train)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        optimizer = recipe(model, mu=1e-3, seed=5, probe=probe)
        for _ in range(2):  # with the watch, and without it
            estimate = optimizer.estimate(lambda model=model: CLOSURES[closure](model))
            slopes[probe] = float(estimate.coefficients), float(estimate.loss)
            if probe == "inplace":
                model.load_state_dict(before)
        if probe == "streamed":
            assert all(torch.equal(before[name], tensor) for name, tensor in model.named_parameters())
    assert slopes["streamed"] == pytest.approx(slopes["inplace"], rel=1e-9)
    assert abs(slopes["inplace"][0]) > 1e-6


def test_theta_is_restored_after_an_error_between_forward_and_derivative() -> None:
    model = Model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def closure() -> Tensor:
        with torch.enable_grad():
            model(X.clone().requires_grad_())
            raise ValueError("after the forward")

    optimizer = zoext.MeZO(model, probe="streamed")
    for _ in range(2):
        with pytest.raises(ValueError, match="after the forward"):
            optimizer.step(closure)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_table_of_an_embedding_is_displaced_for_derivatives() -> None:
    """Not only the rows that are read: their displacement would not be in the graph."""
    table = nn.Embedding(200, 3).double()
    head = nn.Linear(3, 1).double()
    model = nn.Sequential(table, head)
    index = torch.tensor([3, 9])

    def closure() -> Tensor:
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(model(index).square().sum(), head.weight)
        return slope.square().sum()

    found = [
        float(zoext.MeZO(model, mu=1e-3, seed=5, probe=probe).estimate(closure).coefficients)
        for probe in ("inplace", "streamed")
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-9)


TRANSFORMS: dict[str, Callable[[nn.Module], Any]] = {
    "grad": lambda model: grad(lambda x: model(x).sum())(X).square().mean(),
    "vmap of grad": lambda model: vmap(grad(lambda x: model(x[None]).sum()))(X).square().mean(),
    "jacrev": lambda model: jacrev(lambda x: model(x).sum(0))(X).square().mean(),
    "jacfwd": lambda model: jacfwd(lambda x: model(x).sum(0))(X).square().mean(),
    "jvp": lambda model: jvp(lambda x: model(x).sum(), (X,), (torch.ones_like(X),))[1],
    "vjp": lambda model: vjp(lambda x: model(x).sum(), X)[1](X.new_ones(()))[0].square().mean(),
    "vmap": lambda model: vmap(lambda x: model(x[None]).square().sum())(X).mean(),
    "functional_call": lambda model: sum(
        slope.square().mean()
        for slope in grad(lambda own: functional_call(model, own, (X,)).mean())(
            {name: parameter.detach() for name, parameter in model.named_parameters()}
        ).values()
    ),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # by torch.func itself
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_functions_are_refused_or_right(transform: str) -> None:
    model = Model().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    closure = TRANSFORMS[transform]
    optimizer = zoext.MeZO(model, probe="streamed")
    with pytest.raises(zoext.StreamedProbeError, match=r"torch\.func .* Pass probe='inplace'"):
        optimizer.step(lambda: closure(model))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    estimate = zoext.MeZO(model, probe="inplace").estimate(lambda: closure(model))
    assert estimate.coefficients.abs() > 1e-9
