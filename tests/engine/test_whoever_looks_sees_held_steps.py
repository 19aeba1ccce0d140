"""``LowRank(defer=True)``: no code around a forward, a checkpoint or a copy sees weights that lack steps."""

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
from torch import Tensor, nn
from torch.nn import functional as F

import zoext

X = torch.linspace(-1, 1, 12).view(2, 6)
WARNS = pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")


class Plain(nn.Module):
    """Calls its children."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5, bias=False), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh())


class Multiplies(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.a.weight).tanh(), self.b.weight)


class MultipliesFirst(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.linear(x, self.a.weight).tanh())


class Normed(Plain):
    """The layer's own hook computes its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.utils.weight_norm(self.a)


class Owner(nn.Module):
    """Is the root, and owns a matrix itself, before and after a child."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, 6))
        self.b = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.linear(x, self.w).tanh())


KINDS = [Plain, Multiplies, MultipliesFirst, Normed, Owner]


def holding(kind: type[nn.Module] = Plain, steps: int = 3) -> tuple[nn.Module, zoext.ZerothOrderOptimizer]:
    torch.manual_seed(1)
    model = kind()
    optimizer = zoext.LOZO(model, lr=0.1, rank=1, refresh_interval=50, defer=True)
    for _ in range(steps):
        optimizer.step(lambda: model(X).square().mean())
    assert not optimizer.engine.deferral.is_empty
    return model, optimizer


def values(model: nn.Module) -> list[Tensor]:
    return [weight.detach().clone() for weight in model.parameters()]


def expected(kind: type[nn.Module] = Plain) -> list[Tensor]:
    model, optimizer = holding(kind)
    optimizer.merge()
    return values(model)


@WARNS
@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation(kind: type[nn.Module]) -> None:
    model, optimizer = holding(kind)
    with torch.no_grad():
        first = model(X)
        assert optimizer.engine.deferral.is_empty
        assert torch.equal(first, model(X))
    assert all(map(torch.equal, values(model), expected(kind)))


def test_hooks_of_the_user() -> None:
    """That were registered before, on the model and on a layer."""
    model, optimizer = holding(steps=1)
    optimizer.merge()
    seen: list[Tensor] = []

    def note(*_: Any) -> None:
        seen.append(model.a.weight.detach().clone())

    model.register_forward_pre_hook(note)
    model.a.register_forward_pre_hook(note, prepend=True)
    model.register_state_dict_pre_hook(note)
    model.register_load_state_dict_pre_hook(note)
    looks: list[Callable[[], object]] = [
        lambda: model(X),
        model.state_dict,
        lambda: model.load_state_dict({}, strict=False),
    ]
    for look in looks:
        optimizer.step(lambda: model(X).square().mean())
        stale = model.a.weight.detach().clone()
        seen.clear()
        look()
        assert seen
        assert all(torch.equal(each, model.a.weight) for each in seen)
        assert not torch.equal(stale, model.a.weight)


def test_hooks_of_the_user_that_come_later() -> None:
    """torch loops over its hooks: one of them may merge, and others may follow."""
    model, optimizer = holding()
    called = []
    model.register_state_dict_pre_hook(lambda *_: optimizer.merge())
    model.register_state_dict_pre_hook(lambda *_: called.append(1))
    model.a.register_state_dict_pre_hook(lambda *_: called.append(2))
    model.state_dict()
    optimizer.step(lambda: model(X).square().mean())
    model.a.state_dict()
    assert called == [1, 2, 2]
    assert optimizer.engine.deferral.is_empty


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "torch.save": saved,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "average": lambda model: torch.optim.swa_utils.AveragedModel(model).module,
    "of a list": lambda model: copy.deepcopy([model.b, model, model.b])[1],
}


@pytest.mark.parametrize(
    ("how", "kind"),
    [(how, kind) for how in COPIES for kind in (Plain, Owner) if (how, kind) != ("pickle", Owner)],
)
@pytest.mark.filterwarnings("ignore:pickle. a module was pickled")
def test_a_copy(how: str, kind: type[nn.Module]) -> None:
    """The copy has all steps and is free: it trains by itself."""
    model, optimizer = holding(kind)
    twin = COPIES[how](model)
    for each in (model, twin):
        assert all(map(torch.equal, values(each), expected(kind)))
    optimizer.step(lambda: model(X).square().mean())
    assert torch.equal(twin(X), COPIES[how](twin)(X))
    assert not optimizer.engine.deferral.is_empty
    twin.load_state_dict(twin.state_dict())
    other = zoext.LOZO(twin, lr=0.1, rank=1, defer=True)
    other.step(lambda: twin(X).square().mean())
    twin(X)
    assert other.engine.deferral.is_empty
    assert not optimizer.engine.deferral.is_empty


@pytest.mark.parametrize("model_first", [True, False])
def test_a_copy_together_with_its_optimizer(model_first: bool) -> None:
    pair = holding()
    if model_first:
        twin, other = copy.deepcopy(pair)
    else:
        other, twin = copy.deepcopy(pair[::-1])
    for model, optimizer in (pair, (twin, other)):
        assert all(map(torch.equal, values(model), expected()))
        optimizer.step(lambda model=model: model(X).square().mean())
        assert not optimizer.engine.deferral.is_empty
        model(X)
        assert optimizer.engine.deferral.is_empty
    assert all(map(torch.equal, values(pair[0]), values(twin)))


def test_a_pickle_that_may_lack_steps_is_told() -> None:
    """pickle writes the parameters of a module before it comes to hooks; torch.save does so afterwards."""
    model, _ = holding(Owner)
    with pytest.warns(UserWarning, match=r"owns one of w, b\.weight, .* call optimizer\.merge\(\) before"):
        pickle.dumps(model)
    assert all(map(torch.equal, values(model), expected(Owner)))


@pytest.mark.filterwarnings("ignore:pickle. a module was pickled")
def test_a_pickled_model_needs_no_zoext() -> None:
    model, _ = holding()
    model = nn.Sequential(model.a, model.b)  # is no class of this file
    for _ in range(2):  # while steps are held, and afterwards
        assert b"zoext" not in pickle.dumps(model)


def test_an_optimizer_that_is_gone() -> None:
    """Its steps are not; and a model does not keep one alive that holds nothing."""
    model, optimizer = holding()
    deferral = weakref.ref(optimizer.engine.deferral)
    del optimizer
    gc.collect()
    model(X)
    assert all(map(torch.equal, values(model), expected()))
    gc.collect()
    assert deferral() is None
