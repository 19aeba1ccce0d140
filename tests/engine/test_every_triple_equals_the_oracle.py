"""Any direction with any estimator and any update: steps, checkpoints, and the plain oracle's path.

Weights are float64, so that what differs is the rounding of coefficients, weights and factors to float32:
a relative 6e-8 each, which later steps amplify. The tolerance is 1e-5 of the distance moved.
"""

from __future__ import annotations

import copy
import io
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoext
from support.plain_optimizer import PlainOptimizer

DIRECTIONS = [
    zoext.Gaussian(),
    zoext.Rademacher(),
    zoext.LowRank(rank=3, refresh_interval=2),
    zoext.LowRank(rank=2, refresh_interval=3, scale="code"),
    zoext.ActivationSubspace(rank=2, power_iterations=2),
    zoext.ActivationSubspace(rank=3, power_iterations=1, balance="matched"),
    zoext.ActivationSubspace(rank=1, balance="freeze"),
]
ESTIMATORS = [
    zoext.CentralDifference(samples=2),
    zoext.ForwardDifference(samples=3),
    zoext.GuidingVector(pool_size=5, elite_ratio=0.4),
    zoext.GuidingVector(pool_size=4, weighting="centered"),
    zoext.GreedyPool(pool_size=3),
    zoext.GreedyPool(pool_size=2, reuse=False),
    zoext.Population(size=3),
    zoext.Population(size=4, shaping="zscore", antithetic=True),
    zoext.Population(size=5, shaping="rank"),
]
#: Each with an lr at which nothing diverges: on a path that does, any rounding grows.
UPDATES = [
    (zoext.SGD(), 1e-3),
    (zoext.SGD(normalized=True), 1e-5),
    (zoext.AdamReplay(betas=(0.6, 0.8), horizon=3, eps=1e-3), 3e-3),
    (zoext.AdamReplay(betas=(0.9, 0.95), horizon=2, eps=1e-4, bias_correction=False), 3e-3),
    (zoext.AdamReplay(betas=(0.8, 0.0), horizon=4), 1e-3),
    (zoext.SignReplay(beta=0.7, horizon=3), 1e-4),
    (zoext.ScalarAdam(betas=(0.3, 0.8), horizon=3, eps=1e-3), 1e-4),
]
STEPS = 5


class Model(nn.Module):
    """A table, two linear layers (one without bias), a norm, and a head tied to the table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.wide = nn.Linear(6, 9)
        self.norm = nn.LayerNorm(9)
        nn.init.normal_(self.norm.bias)
        self.narrow = nn.Linear(9, 6, bias=False)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.narrow(self.norm(torch.tanh(self.wide(self.table(tokens))))))


def problem() -> tuple[Model, Any]:
    torch.manual_seed(4)
    model = Model().double()
    tokens = torch.randint(11, (STEPS, 3, 4))
    targets = torch.randn(STEPS, 3, 4, 11, dtype=torch.float64)

    def loss_of(step: int, model: nn.Module) -> Tensor:
        return (model(tokens[step]) - targets[step]).square().mean()

    return model, loss_of


OPTIONS = {"mu": 0.02, "weight_decay": 0.3, "seed": 2**63 + 5}


def is_defined(direction: Any, estimator: Any, update: tuple[Any, float]) -> bool:
    """Not where rounding decides: the coefficients of some estimators sum to zero. So do the projected
    gradients that ``ScalarAdam`` divides by, and the sums of signs whose sign ``SignReplay`` takes."""
    if not estimator.coefficients_cancel:
        return True
    is_sign_of_signs = isinstance(direction, zoext.Rademacher) and isinstance(update[0], zoext.SignReplay)
    return not is_sign_of_signs and not isinstance(update[0], zoext.ScalarAdam)


@pytest.mark.parametrize(
    ("direction", "estimator", "update"),
    [triple for triple in itertools.product(DIRECTIONS, ESTIMATORS, UPDATES) if is_defined(*triple)],
    ids=lambda member: repr(member).replace(" ", ""),
)
def test_triple(direction: Any, estimator: Any, update: tuple[Any, float]) -> None:
    axes = {"direction": direction, "estimator": estimator, "update": update[0]}
    model, loss_of = problem()
    plain = PlainOptimizer(copy.deepcopy(model), *axes.values(), lr=update[1], **OPTIONS)
    start = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = zoext.ZerothOrderOptimizer(model, **axes, lr=update[1], **OPTIONS)
    for step in range(STEPS):
        if step == 3:
            model, optimizer = reloaded(model, optimizer, axes)
        optimizer.step(lambda step=step, model=model: loss_of(step, model))
        forwards = plain.step(lambda model, step=step: loss_of(step, model))
        assert optimizer.last_estimate is not None
        assert optimizer.last_estimate.forwards == forwards
    rows = zip(start, model.parameters(), plain.model.parameters(), strict=True)
    for key, (first, actual, expected) in enumerate(rows):
        if plain.leaves_still(key):
            assert torch.equal(actual, first)
            continue
        moved = (expected - first).abs().max()
        assert moved > 1e-7
        assert (actual - expected).abs().max() <= 1e-5 * moved


def reloaded(model: Model, optimizer: Any, axes: dict[str, Any]) -> tuple[Model, Any]:
    """Both out of a checkpoint that holds plain data and tensors only, into new objects."""
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    fresh = Model().double()
    fresh.load_state_dict(saved["model"])
    other = zoext.ZerothOrderOptimizer(fresh, **axes)
    other.load_state_dict(saved["optimizer"])
    return fresh, other
