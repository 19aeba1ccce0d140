"""``probe="auto"`` follows how a graph reads its weights: exported ones in place, traced ones streamed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import zoext

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec:FutureWarning"),
]

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 3))
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x))) * self.scale


def raw() -> nn.Module:
    torch.manual_seed(0)
    return Model().double()


def exported() -> nn.Module:
    return torch.export.export(raw(), (X,)).module()


def below() -> nn.Module:
    return nn.Sequential(exported(), nn.Linear(3, 3).double().requires_grad_(False))


def frozen_below() -> nn.Module:
    return nn.Sequential(exported().requires_grad_(False), nn.Linear(3, 3).double())


GRAPHS: dict[str, tuple[Callable[[], nn.Module], type[zoext.Probe]]] = {
    "symbolically traced": (lambda: torch.fx.symbolic_trace(raw()), zoext.StreamedProbe),
    "exported": (exported, zoext.InplaceProbe),
    "exported, as a part": (below, zoext.InplaceProbe),
    "exported and frozen": (frozen_below, zoext.StreamedProbe),
    "exported, of one module": (
        lambda: torch.export.export(nn.Linear(4, 3).double(), (X,)).module(),
        zoext.StreamedProbe,
    ),
    "unflattened": (
        lambda: torch.export.unflatten(torch.export.export(raw(), (X,))),
        zoext.StreamedProbe,
    ),
    "traced by jit": (lambda: torch.jit.trace(raw(), (X,)), zoext.InplaceProbe),
}


@pytest.mark.parametrize("kind", GRAPHS)
def test_auto(kind: str) -> None:
    build, probe = GRAPHS[kind]
    model = build()
    optimizer = zoext.MeZO(model, lr=0.0, mu=1e-3)
    assert type(optimizer.probe) is probe
    optimizer.step(lambda: model(X).square().mean())
    if probe is zoext.StreamedProbe:
        assert "elsewhere" not in optimizer.probe.describe()


@pytest.mark.parametrize("kind", [*GRAPHS])
def test_slopes_are_right_with_either(kind: str) -> None:
    slopes = []
    for probe in ("streamed", "inplace"):
        torch.manual_seed(1)
        model = GRAPHS[kind][0]()
        before = [weight.detach().clone() for weight in model.parameters()]
        optimizer = zoext.MeZO(model, lr=0.0, mu=1e-3, probe=probe)
        for _ in range(3):
            optimizer.step(lambda model=model: model(X).square().mean())
        assert optimizer.last_estimate is not None
        slopes.append(float(optimizer.last_estimate.coefficients))
        if probe == "streamed":
            assert all(map(torch.equal, model.parameters(), before))
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-6)
    assert slopes[0] != 0


@pytest.mark.parametrize("how", ["whole", "a part"])
def test_scripted_models_cannot_be_streamed(how: str) -> None:
    scripted = torch.jit.script(raw())
    model = scripted if how == "whole" else nn.ModuleDict({"part": scripted, "other": nn.Linear(3, 3)})
    name = "the module" if how == "whole" else "part"
    with pytest.raises(TypeError, match=f"streamed probe: {name} is compiled by torch.jit.*probe='inplace'"):
        zoext.MeZO(model, probe="streamed")
    assert isinstance(zoext.MeZO(model).probe, zoext.InplaceProbe)


def test_scripted_parts_without_tensors_are_streamed() -> None:
    model = nn.Sequential(nn.Linear(4, 3), torch.jit.script(nn.ReLU())).double()
    slopes = []
    for probe in ("streamed", "inplace"):
        optimizer = zoext.MeZO(model, probe=probe, seed=3)
        slopes.append(float(optimizer.estimate(lambda: model(X).square().mean()).coefficients))
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-6)
