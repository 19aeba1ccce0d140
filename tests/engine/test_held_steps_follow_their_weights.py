"""``LowRank(defer=True)``: weights that were changed within an interval get their steps, or it is told."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import zoext

X = torch.linspace(-1, 1, 12, dtype=torch.float64).view(2, 6)


def holding(
    dtype: torch.dtype = torch.float64, precision: str = "stochastic", steps: int = 3
) -> tuple[nn.Sequential, zoext.ZerothOrderOptimizer]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    optimizer = zoext.LOZO(
        model, lr=0.1, mu=1e-2, rank=1, refresh_interval=50, defer=True, precision=precision
    )
    take(model, optimizer, steps)
    return model, optimizer


def take(model: nn.Module, optimizer: zoext.ZerothOrderOptimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.step(lambda: loss(model))


def loss(model: nn.Module) -> Tensor:
    return model(X.to(next(model.parameters()).dtype)).double().square().mean()


def values(model: nn.Module) -> list[Tensor]:
    return [weight.detach().double() for weight in model.parameters()]


LOOKS: dict[str, Callable[[nn.Module, zoext.ZerothOrderOptimizer], object]] = {
    "forward": lambda model, optimizer: loss(model),
    "merge": lambda model, optimizer: optimizer.merge(),
    "state_dict": lambda model, optimizer: optimizer.state_dict(),
    "step": lambda model, optimizer: take(model, optimizer, 1),
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("precision", ["stochastic", "residual"])
@pytest.mark.parametrize(
    ("dtype", "to"), [(torch.float64, torch.float32), (torch.bfloat16, torch.float64)], ids=str
)
def test_a_cast(dtype: torch.dtype, to: torch.dtype, precision: str, look: str) -> None:
    """To other memory, with the values. The steps are added there, which no rounding to 16 bits precedes."""
    (model, optimizer), (exact, other) = holding(dtype, precision), holding(dtype, precision)
    with torch.no_grad():
        sums = [
            held.sum.double().mT @ held.right[0].double() for held in other.engine.deferral._held.values()
        ]
        wanted = [exact[at].weight.double() + change for at, change in zip((0, 2), sums, strict=True)]
    model.to(to)
    if look == "step":
        optimizer.param_groups[0]["lr"] = 0.0
    LOOKS[look](model, optimizer)
    optimizer.merge()
    for at, value in zip((0, 2), wanted, strict=True):
        torch.testing.assert_close(model[at].weight.double(), value, rtol=0, atol=1e-6)
    take(model, optimizer, 2)


def test_a_copy_of_the_memory_has_the_same_bits() -> None:
    runs = []
    for moves in (False, True):
        model, optimizer = holding(torch.bfloat16, "residual")
        if moves:
            model[0].weight.data = model[0].weight.data.clone()
            model[2].weight.data = model[2].weight.data.mT.contiguous().mT
        optimizer.merge()
        runs.append([*values(model), *(optimizer.state[each]["residual"] for each in model.parameters())])
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("order", ["model", "optimizer"])
def test_a_checkpoint_gets_a_cast_model_out(order: str) -> None:
    model, optimizer = holding(steps=2)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    take(model, optimizer, 2)
    model.float()
    model[0].weight.data = torch.zeros(7, 7)
    model[0].weight.data = torch.zeros(5, 6)
    for each in ("model", "optimizer") if order == "model" else ("optimizer", "model"):
        model.load_state_dict(weights) if each == "model" else optimizer.load_state_dict(state)
    for value, wanted in zip(values(model), weights.values(), strict=True):
        assert torch.equal(value, wanted.float().double())
    take(model, optimizer, 2)


@pytest.mark.parametrize("loads", ["model", "optimizer"])
def test_steps_that_nothing_can_take_are_told_once(loads: str) -> None:
    (model, optimizer), (exact, other) = holding(), holding()
    other.merge()
    for each in (model, exact):
        each[0].weight.data = torch.zeros(5, 7, dtype=torch.float64)
    with pytest.raises(
        RuntimeError, match=r"have another shape or no values .*: 0\.weight\. .* load a checkpoint"
    ):
        optimizer.merge()
    optimizer.merge()
    assert all(map(torch.equal, values(model), values(exact)))  # the others have theirs
    model, optimizer = holding()
    state = copy.deepcopy(holding()[1].state_dict())
    model[0].weight.data = torch.zeros(5, 7, dtype=torch.float64)
    load = {
        "model": lambda: model.load_state_dict({}, strict=False),
        "optimizer": lambda: optimizer.load_state_dict(state),
    }[loads]
    with pytest.warns(UserWarning, match=r"another shape or no values .*: 0\.weight\. "):
        load()
    assert optimizer.engine.deferral.is_empty


def test_a_rollback_by_hand() -> None:
    """What somebody wrote stands; the matrices that nobody wrote to get their steps."""
    model, optimizer = holding()
    saved = torch.full_like(model[0].weight, 0.25)
    (_, other) = holding()
    other.merge()
    wanted = other.param_groups[0]["params"][2]
    with torch.no_grad():
        model[0].weight.copy_(saved)
    with pytest.warns(
        UserWarning, match=r": 0\.weight\. They stay .* Call optimizer\.merge\(\) before you write"
    ):
        loss(model)
    assert torch.equal(model[0].weight, saved)
    assert torch.equal(model[2].weight, wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        take(model, optimizer, 2)
        optimizer.merge()


def by_estimate(model: nn.Module, optimizer: zoext.ZerothOrderOptimizer) -> None:
    optimizer.estimate(lambda: loss(model))
    optimizer.step()


def by_asking(model: nn.Module, optimizer: zoext.ZerothOrderOptimizer) -> None:
    pending, losses = optimizer.ask(), []
    for index in range(len(pending)):
        with pending.displaced(index):
            losses.append(loss(model))
    optimizer.tell(losses)
    optimizer.step()


def test_a_rollback_by_hand_before_a_step() -> None:
    """No matter if the step is whole, in parts, or of losses from elsewhere: probes see what was written."""
    runs = []
    for step in (lambda *both: take(*both, 1), by_estimate, by_asking):
        model, optimizer = holding()
        with torch.no_grad():
            model[0].weight.fill_(0.25)
        with pytest.warns(UserWarning, match=r"written to while .*: 0\.weight\. "):
            step(model, optimizer)
        optimizer.merge()
        runs.append(values(model))
    plain, other = holding(steps=0)
    plain.load_state_dict(holding()[0].state_dict())
    with torch.no_grad():
        plain[0].weight.fill_(0.25)
    other.param_groups[0]["step"] = 3
    take(plain, other, 1)
    other.merge()
    for run in runs:
        assert all(map(torch.equal, run, values(plain)))


def test_probes_are_no_writes() -> None:
    """Autograd is told that they are."""
    model, optimizer = holding()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.estimate(lambda: loss(model))
        optimizer.step()
        with optimizer.displaced([5], [1.0]):
            loss(model)
        pending = optimizer.ask()
        with pending.displaced(1):
            loss(model)
        optimizer.cancel()
        with pytest.raises(ZeroDivisionError):
            optimizer.estimate(lambda: 1 / 0)
        optimizer.merge()


def test_a_replaced_weight_is_told() -> None:
    (model, _), (_, other) = holding(), holding()
    other.merge()
    before = model[0].weight
    model[0].weight = nn.Parameter(before.detach().clone())
    with pytest.warns(UserWarning, match=r"no parameters of the model any more .*: 0\.weight\. "):
        loss(model)
    assert torch.equal(before, other.param_groups[0]["params"][0])
