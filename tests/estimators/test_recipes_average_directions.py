"""``samples`` of a recipe averages over directions, as the estimator that its formula has does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoext

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(2))
RECIPES = {
    "MeZO": (zoext.MeZO, zoext.Gaussian(), zoext.CentralDifference, 6),
    "AdaMeZO": (
        lambda model, **options: zoext.AdaMeZO(model, horizon=2, **options),
        zoext.Gaussian(),
        zoext.CentralDifference,
        6,
    ),
    "LOZO": (zoext.LOZO, zoext.LowRank(), zoext.CentralDifference, 6),
    "AGZO": (zoext.AGZO, zoext.ActivationSubspace(), zoext.ForwardDifference, 4),
}
UPDATES = {"AdaMeZO": zoext.AdamReplay(betas=(0.7, 0.9), horizon=2)}


def weights_after(make: Any, **options: Any) -> tuple[Tensor, Any]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))
    optimizer = make(model, lr=1e-2, mu=1e-2, seed=4, **options)
    for _ in range(3):
        optimizer.step(lambda: model(X).square().mean())
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]), optimizer


@pytest.mark.parametrize("name", RECIPES)
def test_it_is_the_estimator_with_as_many(name: str) -> None:
    recipe, direction, estimator, forwards = RECIPES[name]
    got, optimizer = weights_after(recipe, samples=3)
    want, _ = weights_after(
        zoext.ZerothOrderOptimizer,
        direction=direction,
        estimator=estimator(samples=3),
        update=UPDATES.get(name),
    )
    assert torch.equal(got, want)
    assert optimizer.last_estimate.forwards == forwards
    assert not torch.equal(got, weights_after(recipe)[0])


@pytest.mark.parametrize("recipe", [zoext.LOZO, zoext.AGZO])
def test_another_estimator_has_its_own(recipe: Any) -> None:
    _, optimizer = weights_after(recipe, estimator=zoext.GreedyPool(pool_size=3))
    assert optimizer.last_estimate.forwards == (5 if recipe is zoext.AGZO else 4)
    with pytest.raises(ValueError, match=r"samples=2 belongs to the \w+Difference that estimator=Greedy"):
        weights_after(recipe, samples=2, estimator=zoext.GreedyPool(pool_size=3))
    with pytest.raises(ValueError, match="samples must be an integer of at least 1, not 0"):
        weights_after(recipe, samples=0)
