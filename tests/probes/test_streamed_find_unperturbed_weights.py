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
    with pytest.raises(zoext.StreamedProbeError, match=r"out_proj\.weight.*probe='inplace'"):
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
    with pytest.raises(zoext.StreamedProbeError, match=r"layer\.weight"):
        optimizer.step(lambda: model(x).sum())
    assert torch.equal(before, model.layer.weight)


def test_it_is_found_in_time_when_the_same_modules_run() -> None:
    """Estimates 2, 4, 8, ... are watched again."""

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.reads = False

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return y @ self.layer.weight if self.reads else y

    model, x = Reads(), torch.randn(3, 4)
    optimizer = zoext.MeZO(model)
    for _ in range(5):
        optimizer.step(lambda: model(x).sum())
    model.reads = True
    for _ in range(2):
        optimizer.step(lambda: model(x).sum())
    with pytest.raises(zoext.StreamedProbeError, match=r"layer\.weight"):
        optimizer.step(lambda: model(x).sum())


class HidesAView(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.kept: list[Tensor] = []
        if how == "hook":
            self.layer.register_forward_hook(lambda module, *_: self.kept.append(module.weight.t()))
        elif how == "list":
            forward = self.layer.forward
            self.layer.forward = lambda x: self.kept.append(self.layer.weight[1:]) or forward(x)
        else:
            self.layer.forward = lambda x: type("Result", (), {"view": self.layer.weight.t(), "y": x})()

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        y = y if isinstance(y, Tensor) else y.y @ y.view
        return self.other(y) + sum(view.sum() for view in self.kept)


@pytest.mark.parametrize("how", ["hook", "list", "object"])
def test_a_view_that_outlives_its_module_is_named(how: str) -> None:
    model, x = HidesAView(how), torch.randn(3, 4)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(zoext.StreamedProbeError, match=r"a view of layer\.weight.* outlives .*inplace"):
        zoext.MeZO(model).step(lambda: model(x).sum())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_closures_with_gradients_are_no_error() -> None:
    """Autograd keeps views of weights for a backward pass that a probe never makes."""
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(3, 4)

    def closure() -> Tensor:
        with torch.enable_grad():
            return model(x).square().mean()

    assert zoext.MeZO(model).step(closure).isfinite()


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
        assert isinstance(optimizer.engine.probe, zoext.InplaceProbe)
        assert optimizer.estimate(lambda model=model: model(x).sum()).coefficients.abs() > 0
