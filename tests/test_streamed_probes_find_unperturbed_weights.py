"""A weight that is read while its module is not running is named, never silently left alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import zoext


def attention() -> tuple[nn.Module, object]:
    model = nn.MultiheadAttention(16, 2, batch_first=True)
    x = torch.randn(3, 5, 16)
    return model, lambda: model(x, x, x)[0].square().mean()


def encoder_layer() -> tuple[nn.Module, object]:
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    x = torch.randn(3, 5, 16)
    return model, lambda: model(x).square().mean()


def functional_read() -> tuple[nn.Module, object]:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out_proj = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.linear(x, self.out_proj.weight.t(), self.out_proj.bias)

    model, x = Reads(), torch.randn(3, 16)
    return model, lambda: model(x).square().mean()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", [attention, encoder_layer, functional_read])
def test_it_is_named_at_the_first_probe(case: object, training: bool) -> None:
    torch.manual_seed(0)
    model, closure = case()  # type: ignore[operator]
    model.train(training)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = zoext.MeZO(model)
    with pytest.raises(RuntimeError, match=r"out_proj\.weight.*probe='inplace'"):
        optimizer.step(closure)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    inplace = zoext.MeZO(model, mu=1e-2, probe="inplace")  # the remedy works
    assert inplace.estimate(closure).coefficients.abs() > 0


def test_it_is_found_when_another_route_is_taken_later() -> None:
    class Forks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.called = True

        def forward(self, x: Tensor) -> Tensor:
            if self.called:
                return self.layer(x)
            return x @ self.layer.weight

    model, x = Forks(), torch.randn(3, 4)
    optimizer = zoext.MeZO(model)
    optimizer.step(lambda: model(x).sum())
    model.called = False
    before = model.layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"layer\.weight"):
        optimizer.step(lambda: model(x).sum())
    assert torch.equal(before, model.layer.weight)


def test_weights_that_no_one_reads_are_no_error() -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 3), "unused": nn.Linear(3, 3)})
    x = torch.randn(2, 3)
    zoext.MeZO(model, probe="streamed").step(lambda: model["used"](x).sum())


def test_compiled_and_scripted_modules_are_probed_in_place() -> None:
    x = torch.randn(2, 3)
    compiled = torch.compile(nn.Linear(3, 3), backend="eager")
    itself = nn.Sequential(nn.Linear(3, 3))
    itself[0].compile(backend="eager")
    for model in (compiled, itself):
        optimizer = zoext.MeZO(model, mu=0.5)
        assert isinstance(optimizer._probe, zoext.InplaceProbe)
        assert optimizer.estimate(lambda model=model: model(x).sum()).coefficients.abs() > 0
