"""A weight that is read while its module is not running is displaced then as well, or named in an error."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoext


def attention() -> tuple[nn.Module, object]:
    model = nn.MultiheadAttention(16, 2, batch_first=True)
    x = torch.randn(3, 5, 16)

    def closure() -> Tensor:
        own = x.to(model.out_proj.weight.dtype)
        return model(own, own, own)[0].square().mean()

    return model, closure


def encoder_layer() -> tuple[nn.Module, object]:
    model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    x = torch.randn(3, 5, 16)
    return model, lambda: model(x.to(model.linear1.weight.dtype)).square().mean()


def functional_read() -> tuple[nn.Module, object]:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out_proj = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.linear(x, self.out_proj.weight.t(), self.out_proj.bias)

    model, x = Reads(), torch.randn(3, 16)
    return model, lambda: model(x.to(model.out_proj.weight.dtype)).square().mean()


def containers() -> tuple[nn.Module, object]:
    """Adapters in containers, which never run, and a head that the closure multiplies itself."""

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.head = nn.Linear(16, 16), nn.Linear(16, 4)
            self.down = nn.ParameterDict({"default": nn.Parameter(torch.randn(16, 2))})
            self.up = nn.ParameterList([nn.Parameter(torch.randn(2, 16))])

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + x @ self.down["default"] @ self.up[0]

    model, x = Adapted(), torch.randn(3, 16)
    return model, lambda: (model(x.to(model.base.weight.dtype)) @ model.head.weight.t()).square().mean()


def inside_and_outside() -> tuple[nn.Module, object]:
    """A tied head, and a penalty on all weights, before and after the modules run."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.inner = nn.Embedding(300, 16), nn.Linear(16, 16)

        def forward(self, index: Tensor) -> Tensor:
            return torch.tanh(self.inner(self.table(index))) @ self.table.weight.t()

    model, index = Tied(), torch.tensor([3, 7])

    def closure() -> Tensor:
        before = model.inner.weight.square().sum()
        return model(index).square().mean() + before + sum(p.square().sum() for p in model.parameters())

    return model, closure


CASES = [attention, encoder_layer, functional_read, containers, inside_and_outside]


@pytest.mark.parametrize("recipe", [zoext.MeZO, zoext.LOZO, zoext.MeZOGreedy], ids=["mezo", "lozo", "greedy"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_it_is_displaced_until_the_closure_ends(case: object, training: bool, recipe: object) -> None:
    slopes = []
    for probe in ("inplace", "streamed"):
        torch.manual_seed(0)
        model, closure = case()  # type: ignore[operator]
        model.double().train(training)
        optimizer = recipe(model, mu=1e-3, seed=4, probe=probe)  # type: ignore[operator]
        before = [parameter.detach().clone() for parameter in model.parameters()]
        found = [float(optimizer.estimate(closure).coefficients) for _ in range(3)]  # watched, and not
        assert found[0] == pytest.approx(found[2], rel=1e-9)
        slopes.append(found[0])
        if probe == "streamed":
            assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
            assert "weight" in optimizer.probe.describe().split("read elsewhere: ")[1]
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-9)
    assert abs(slopes[0]) > 1e-9


def test_it_is_held_from_then_on() -> None:
    model, closure = attention()
    optimizer = zoext.MeZO(model)
    assert optimizer.probe.describe().endswith("restored bit for bit")
    optimizer.step(closure)  # type: ignore[arg-type]
    assert optimizer.probe.describe().endswith("read elsewhere: out_proj.bias, out_proj.weight")
    assert "inplace" in zoext.MeZO(list(model.parameters())).probe.describe()


def test_an_alias_from_outside_the_closure_is_named() -> None:
    model, x = nn.Linear(4, 4), torch.randn(3, 4)
    alias = model.weight.detach().t()
    before = model.weight.detach().clone()
    with pytest.raises(zoext.StreamedProbeError, match=r"alias of weight, made before .* probe='inplace'"):
        zoext.MeZO(model).step(lambda: (model(x) @ alias).sum())
    assert torch.equal(before, model.weight)


class Forks(nn.Module):
    """Reads a weight without its module once it is told to."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)
        self.reads = False
        self.calls = True

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x) if self.calls else x
        return y @ self.layer.weight if self.reads else y


@pytest.mark.parametrize("calls", [True, False])
def test_it_is_found_when_another_route_is_taken_later(calls: bool) -> None:
    """At the next probe if other modules run, else at estimates 2, 4, 8, ..."""
    model, x = Forks(), torch.randn(3, 4)
    optimizer = zoext.MeZO(model)
    for _ in range(5):
        optimizer.estimate(lambda: model(x).square().sum())
    model.reads, model.calls = True, calls
    for _ in range(3):
        optimizer.estimate(lambda: model(x).square().sum())
    assert optimizer.probe.describe().endswith("read elsewhere: layer.weight")


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


def test_a_view_that_another_thread_lets_go_of_is_no_error() -> None:
    """As those of torch.distributed do a moment after a collective."""
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(3, 4)
    kept: list[Tensor] = []
    threads: list[threading.Timer] = []

    def keep(module: nn.Module, *_: Any) -> None:
        kept.append(module.weight.view(-1))
        threads.append(threading.Timer(0.05, kept.clear))
        threads[-1].start()

    model[0].register_forward_hook(keep)
    optimizer = zoext.MeZO(model)
    for _ in range(3):
        optimizer.step(lambda: model(x).square().mean())
    for thread in threads:
        thread.join()
    assert len(threads) >= 6


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
    expected, slopes = copy.deepcopy(model), []
    for each, probe in ((model, "streamed"), (expected, "inplace")):
        optimizer = zoext.MeZO(each, probe=probe)
        slopes.append(float(optimizer.estimate(lambda each=each: each["used"](x).sum()).coefficients))
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-3)


def test_compiled_and_scripted_modules_are_probed_in_place() -> None:
    x = torch.randn(2, 3)
    compiled = torch.compile(nn.Linear(3, 3), backend="eager")
    itself = nn.Sequential(nn.Linear(3, 3))
    itself[0].compile(backend="eager")
    for model in (compiled, itself):
        optimizer = zoext.MeZO(model, mu=0.5)
        assert isinstance(optimizer.engine.probe, zoext.InplaceProbe)
        assert optimizer.estimate(lambda model=model: model(x).sum()).coefficients.abs() > 0
