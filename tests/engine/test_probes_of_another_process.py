"""``optimizer.displaced(seeds, coefficients)`` is the probe that another optimizer asks for, to the bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoext
from support.graphed_runs import RECIPES

BATCH = torch.randn(6, 5, generator=torch.Generator().manual_seed(2))


def model_of(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(8)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def loss_of(model: nn.Module) -> Tensor:
    return model(BATCH.to(next(model.parameters()).dtype)).float().square().mean()


@pytest.mark.parametrize(
    ("recipe", "dtype"),
    [(name, torch.float32) for name in ("mezo", "lozo", "gv", "greedy", "fzoo")] + [("lozo", torch.bfloat16)],
)
def test_losses_of_every_round(recipe: str, dtype: torch.dtype) -> None:
    """At the third step, after which the other optimizer has the same weights."""
    options: dict[str, Any] = {"lr": 1e-2, "mu": 3e-2, "seed": 2**63 + 5}
    here = model_of(dtype)
    optimizer = RECIPES[recipe](here, **options)
    there = copy.deepcopy(here)
    elsewhere = RECIPES[recipe](there, **options)
    for _ in range(2):
        optimizer.step(lambda: loss_of(here))
        elsewhere.step(lambda: loss_of(there))
    before = copy.deepcopy(there.state_dict())
    round: zoext.OpenRound | None = optimizer.ask()
    found = set()
    while round is not None:
        losses = []
        for index in range(len(round)):
            with round.displaced(index):
                losses.append(loss_of(here))
            row = round.coefficients[index].tolist()
            pairs = [(seed % 2**64, c) for seed, c in zip(round.seeds.tolist(), row, strict=True) if c]
            with elsewhere.displaced([seed for seed, _ in pairs], [c for _, c in pairs]):
                assert torch.equal(loss_of(there), losses[-1])
            with elsewhere.displaced(round.seeds, round.coefficients[index]):
                assert torch.equal(loss_of(there), losses[-1])
            found.add(losses[-1].item())
        round = optimizer.tell(losses)
    assert len(found) > 1
    after = there.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)  # buffers as well


class Distance(nn.Module):
    """Returns a number and a tensor that no example of the batch has a part of."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (x * self.weight).square().mean(), self.weight.sin()


@pytest.mark.parametrize("direction", [zoext.Gaussian(), zoext.LowRank(rank=2)])
def test_a_single_copy_may_return_anything(direction: zoext.Direction) -> None:
    found = []
    for probe in ("streamed", "batched"):
        model = Distance()
        optimizer = zoext.ZerothOrderOptimizer(model, direction=direction, mu=0.5, seed=3, probe=probe)
        with optimizer.displaced([7], [0.3]):
            found.append(model(BATCH))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][1], model.weight.sin())


def test_mu_is_that_of_the_optimizer() -> None:
    model = model_of(torch.float32)
    optimizer = zoext.MeZO(model, mu=0.5)
    with optimizer.displaced([7], [1.0]):
        displaced = loss_of(model)
    optimizer.param_groups[0]["mu"] = 0.25
    with optimizer.displaced([7], [2.0]):
        assert torch.equal(loss_of(model), displaced)
    with optimizer.displaced([7], [1.0]):
        assert not torch.equal(loss_of(model), displaced)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (([1, 2], [1.0]), r"coefficients must be \[2\]"),
        (([1], [float("nan")]), "coefficients must be finite"),
        (([2**64], [1.0]), "seed must fit into 64 bits"),
        ((torch.zeros(2, 1), [1.0]), r"seeds must be int64 \[K\]"),
    ],
)
def test_bad_pairs(pairs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message), zoext.MeZO(model_of(torch.float32)).displaced(*pairs):
        pass


def test_when_it_is_refused() -> None:
    model = model_of(torch.float32)
    optimizer = zoext.MeZO(model)
    optimizer.ask()
    with pytest.raises(RuntimeError, match="a round is open"), optimizer.displaced([1], [1.0]):
        pass
    optimizer.cancel()
    with optimizer.displaced([1], [1.0]):
        loss_of(model)
        with pytest.raises(RuntimeError, match="within displaced"), optimizer.displaced([1], [1.0]):
            pass
    watching = zoext.AGZO(model)
    with (
        pytest.raises(RuntimeError, match="displaced: ActivationSubspace finds its basis"),
        watching.displaced([1], [1.0]),
    ):
        pass
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyError), optimizer.displaced([1], [1.0]):
        raise KeyError
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
