"""On a linear loss the mean estimate is the gradient, for every direction, estimator and mu of a group.

False-alarm rate: 8 cases of 12 coordinates, each a z-score with threshold 5.5 (two-sided 4e-8): 4e-6.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import zoext

STEPS = 700


@pytest.mark.parametrize("direction", [zoext.Gaussian(), zoext.Rademacher()])
@pytest.mark.parametrize(
    "estimator", [zoext.CentralDifference(samples=3), zoext.ForwardDifference(samples=3)]
)
@pytest.mark.parametrize("mu", [1e-2, 4e-2])
def test_mean(direction: zoext.Direction, estimator: zoext.Estimator, mu: float) -> None:
    gradient = torch.linspace(-2, 3, 12, dtype=torch.float64)
    weights = [
        nn.Parameter(torch.zeros(5, dtype=torch.float64)),
        nn.Parameter(torch.zeros(7, dtype=torch.float64)),
    ]
    groups = [{"params": weights[:1]}, {"params": weights[1:], "mu": mu}]
    optimizer = zoext.ZerothOrderOptimizer(
        groups, direction=direction, estimator=estimator, lr=1.0, mu=1e-2, seed=8
    )
    moves = []
    for _ in range(STEPS):
        for weight in weights:
            weight.data.zero_()
        optimizer.step(lambda: torch.cat([*weights]) @ gradient)
        moves.append(-torch.cat([weight.detach() for weight in weights]))
    sample = torch.stack(moves)
    error = (sample.mean(0) - gradient) / (sample.std(0) / STEPS**0.5)
    assert error.abs().max() < 5.5
