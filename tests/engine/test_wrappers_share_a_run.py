"""Wrappers of an optimizer, which copy its ``__dict__`` or hold it, share what a run changes."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoext

Wrap = Callable[[zoext.ZerothOrderOptimizer], Any]


class Copying:
    """As the optimizers of Lightning and Fabric: takes over ``__dict__`` and becomes a subclass."""

    def __init__(self, optimizer: zoext.ZerothOrderOptimizer) -> None:
        kept = {name: value for name, value in vars(optimizer).items() if name not in ("step", "state_dict")}
        self.__dict__ = kept
        self.__class__ = type("Copying", (type(self), type(optimizer)), {})
        self._inner = optimizer

    def step(self, closure: Any = None) -> Tensor:
        return self._inner.step(closure)


class Holding(torch.optim.Optimizer):
    """As the optimizer of Accelerate: holds ours and forwards some methods."""

    def __init__(self, optimizer: zoext.ZerothOrderOptimizer) -> None:
        self.optimizer = optimizer

    def step(self, closure: Any = None) -> Tensor:
        return self.optimizer.step(closure)


class Forwarding:
    def __init__(self, optimizer: zoext.ZerothOrderOptimizer) -> None:
        self.optimizer = optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)


def accelerated(optimizer: zoext.ZerothOrderOptimizer) -> Any:
    accelerate = pytest.importorskip("accelerate", reason="needs Accelerate")
    return accelerate.Accelerator(cpu=True).prepare(optimizer)


def lightning(optimizer: zoext.ZerothOrderOptimizer) -> Any:
    module = pytest.importorskip("lightning.pytorch.core.optimizer", reason="needs Lightning")
    return module.LightningOptimizer(optimizer)


def fabric(optimizer: zoext.ZerothOrderOptimizer) -> Any:
    module = pytest.importorskip("lightning.fabric", reason="needs Lightning")
    return module.Fabric(accelerator="cpu").setup_optimizers(optimizer)


WRAPPERS: dict[str, Wrap] = {
    "copying": Copying,
    "holding": Holding,
    "forwarding": Forwarding,
    "nested": lambda optimizer: Holding(Copying(optimizer)),  # type: ignore[arg-type]
    "accelerate": accelerated,
    "lightning": lightning,
    "fabric": fabric,
}
with_all = pytest.mark.parametrize("wrapper", WRAPPERS)
with_methods = pytest.mark.parametrize("wrapper", ["copying", "forwarding", "lightning", "fabric"])


def stepping(wrapped: Any) -> Any:
    """What has a ``step``: that of Lightning's needs a Trainer."""
    return zoext.unwrap(wrapped) if "Lightning" in type(wrapped).__name__ else wrapped


def model_of() -> nn.Module:
    torch.manual_seed(6)
    return nn.Linear(4, 3)


def loss_of(model: nn.Module) -> Tensor:
    return model(torch.ones(2, 4)).square().mean()


@with_all
def test_unwrapped(wrapper: str) -> None:
    optimizer = zoext.MeZO(model_of())
    assert zoext.unwrap(WRAPPERS[wrapper](optimizer)) is optimizer
    assert zoext.unwrap(optimizer) is optimizer


@pytest.mark.parametrize("other", [torch.optim.SGD(nn.Linear(2, 2).parameters()), None, "adam"])
def test_what_holds_none_of_ours(other: object) -> None:
    with pytest.raises(TypeError, match="optimizer must be a ZerothOrderOptimizer or wrap one"):
        zoext.unwrap(other)


@with_all
def test_a_recorded_run_replays(wrapper: str, tmp_path: Path) -> None:
    model = model_of()
    base, optimizer = copy.deepcopy(model), zoext.MeZO(model, lr=0.1, mu=0.1)
    wrapped = WRAPPERS[wrapper](optimizer)
    with zoext.Trajectory(tmp_path / "run.jsonl", wrapped):
        for _ in range(3):
            zoext.unwrap(wrapped).step(lambda: loss_of(model))
        stepping(wrapped).step(lambda: loss_of(model))
    assert len((tmp_path / "run.jsonl").read_text().splitlines()) == 5
    assert zoext.replay(base, tmp_path / "run.jsonl").param_groups[0]["step"] == 4
    assert all(map(torch.equal, base.parameters(), model.parameters()))


@with_methods
def test_estimates_through_the_wrapper(wrapper: str) -> None:
    ends = []
    for wrap in (WRAPPERS[wrapper], lambda optimizer: optimizer):
        model = model_of()
        optimizer = zoext.AdaMeZO(model, lr=0.1, mu=0.1)
        wrapped = wrap(optimizer)
        for number in range(3):
            wrapped.estimate(lambda model=model: loss_of(model))
            (optimizer if number % 2 else stepping(wrapped)).step()
            round = wrapped.ask()
            wrapped.tell([loss_of(model) * (index + 1) for index in range(len(round))])
            (stepping(wrapped) if number % 2 else optimizer).step()
        assert wrapped.last_estimate is optimizer.last_estimate
        assert wrapped.nonfinite_steps == 0
        ends.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
    assert torch.equal(*ends)


@with_methods
def test_after_a_state_was_loaded(wrapper: str) -> None:
    """torch gives the optimizer new lists of groups then; the wrapper still has the old ones."""
    ends = []
    for through in (True, False):
        model = model_of()
        optimizer = zoext.MeZO(model, lr=0.1, mu=0.1)
        wrapped = WRAPPERS[wrapper](optimizer)
        optimizer.step(lambda model=model: loss_of(model))
        optimizer.load_state_dict(optimizer.state_dict())
        (wrapped if through else optimizer).estimate(lambda model=model: loss_of(model))
        optimizer.step()
        assert optimizer.param_groups[0]["step"] == 2
        ends.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
    assert torch.equal(*ends)


@pytest.mark.parametrize("recipe", [zoext.MeZO, zoext.AGZO])
def test_a_closure_that_returns_nothing_applies_what_is_pending(recipe: Any) -> None:
    """As the one that Lightning passes for ``step()``."""
    ends = []
    for closure in (lambda: None, None):
        model = model_of()
        optimizer = recipe(model, lr=0.1, mu=0.1)
        optimizer.estimate(lambda model=model: loss_of(model))
        optimizer.step(closure)
        with pytest.raises(TypeError, match="not None; did it forget to return the loss"):
            optimizer.step(lambda: None)
        ends.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
    assert torch.equal(*ends)


def test_a_recorder_that_is_set_through_a_wrapper() -> None:
    optimizer = zoext.MeZO(model_of())
    wrapped = Copying(optimizer)
    wrapped.recorder = marker = object()  # type: ignore[attr-defined]
    assert optimizer.recorder is marker


def test_copies_have_runs_of_their_own() -> None:
    model = model_of()
    optimizer = zoext.MeZO(model, lr=0.1)
    optimizer.step(lambda: loss_of(model))
    optimizer.estimate(lambda: loss_of(model))
    other_model, other = copy.deepcopy((model, optimizer))
    assert other.engine is not optimizer.engine
    assert other.engine.owner is other
    with pytest.raises(RuntimeError, match="nothing to apply"):
        other.step()
    shallow = copy.copy(optimizer)
    shallow.step(lambda: loss_of(model))
    del shallow
    assert optimizer.engine.owner is optimizer
    other.step(lambda: loss_of(other_model))
    assert other.param_groups[0]["step"] == 2
    assert optimizer.param_groups[0]["step"] == 2  # of the shallow copy, which shares the groups


def test_an_optimizer_is_freed_at_once() -> None:
    """Without a cycle, so that the memory of model and probe does not wait for the garbage collector."""
    model = model_of()
    optimizer = zoext.MeZO(model)
    optimizer.step(lambda: loss_of(model))
    gone = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert gone() is None
    finally:
        gc.enable()
