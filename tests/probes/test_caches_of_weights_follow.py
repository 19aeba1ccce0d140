"""What modules keep of their weights, with the versions these had, is made again for displaced ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import zoext

X = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))


class Cached(nn.Module):
    """Keeps a product of its weights until one of them changes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(3, 5))
        self.versions: tuple[int, int] | None = None
        self.product = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        if self.versions != (versions := (self.up._version, self.down._version)):
            self.product, self.versions = (self.up @ self.down).detach(), versions
        return x @ self.product


RECIPES: dict[str, Callable[..., zoext.ZerothOrderOptimizer]] = {
    "two-sided": zoext.MeZO,
    "one-sided": partial(zoext.ZerothOrderOptimizer, estimator=zoext.ForwardDifference(samples=2)),
    "pool": zoext.MeZOGreedy,
    "agzo": zoext.AGZO,
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("steps", [True, False])
def test_losses_are_those_without_a_cache(steps: bool, recipe: str) -> None:
    model = nn.Sequential(Cached(), nn.Tanh(), nn.Linear(5, 2))
    other = copy.deepcopy(model)
    optimizer, expected = (
        RECIPES[recipe](each, probe="streamed", lr=1e-2, mu=1e-2, seed=3) for each in (model, other)
    )

    def without_cache() -> Tensor:
        other[0].versions = None
        return other(X).square().mean()

    for _ in range(4):
        for one, closure in ((optimizer, lambda: model(X).square().mean()), (expected, without_cache)):
            one.estimate(closure)
            if steps:
                one.step()
        with torch.no_grad():
            assert torch.equal(model(X).square().mean(), without_cache())
    for one, its in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, its)
