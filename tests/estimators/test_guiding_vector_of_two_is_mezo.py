"""MeZO-GV with two candidates is MeZO at twice the lr and sqrt(2) mu, along (z1 - z2) / sqrt(2).

From ``v -> -v`` leaving ``g v`` alone: the ranking, and so the candidates' losses, have no effect.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import zoext

LR, MU, SEED = 0.02, 0.03, 77


@pytest.mark.parametrize("weighting", ["ranked", "centered"])
def test_identity(weighting: str) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 3)).double()
    x = torch.randn(9, 7, dtype=torch.float64)

    def loss() -> torch.Tensor:
        return model(x).square().mean()

    optimizer = zoext.MeZOGV(model, lr=LR, mu=MU, seed=SEED, pool_size=2, weighting=weighting)
    for step in range(4):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        seeds = [zoext.noise.step_seed(SEED, step, draw) for draw in range(2)]
        w = [
            (z(seeds[0], key, p) - z(seeds[1], key, p)) / math.sqrt(2)
            for key, p in enumerate(model.parameters())
        ]
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                for parameter, old, direction in zip(model.parameters(), before, w, strict=True):
                    parameter.copy_(old + sign * math.sqrt(2) * MU * direction)
                sides.append(loss().item())
        slope = (sides[0] - sides[1]) / (2 * math.sqrt(2) * MU)
        with torch.no_grad():
            for parameter, old in zip(model.parameters(), before, strict=True):
                parameter.copy_(old)
        optimizer.step(loss)
        for parameter, old, direction in zip(model.parameters(), before, w, strict=True):
            expected = -2 * LR * slope * direction
            assert (parameter - old - expected).abs().max() <= 1e-6 * expected.abs().max()


def z(seed: int, key: int, parameter: torch.Tensor) -> torch.Tensor:
    return zoext.noise.normal(parameter.shape, seed=seed, key=key).double()
