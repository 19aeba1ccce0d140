"""All probes of a step see the same random numbers; afterwards the generators stand as the closure alone
would have left them."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

import zoext


def draw() -> tuple[float, float, float]:
    return torch.rand(()).item(), random.random(), float(np.random.rand())


@pytest.mark.parametrize("probe", ["streamed", "inplace"])
@pytest.mark.parametrize(
    "estimator", [zoext.CentralDifference(samples=2), zoext.ForwardDifference(samples=3)]
)
def test_same_numbers_in_every_probe(estimator: zoext.Estimator, probe: str) -> None:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = nn.Linear(3, 2)
    seen = []
    optimizer = zoext.ZerothOrderOptimizer(model, estimator=estimator, probe=probe)

    def closure() -> torch.Tensor:
        seen.append(draw())
        return model(torch.ones(3)).sum()

    for _ in range(2):
        seen.clear()
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()
        optimizer.step(closure)
        assert len(seen) == 4
        assert len(set(seen)) == 1
        after = draw()
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])
        assert draw() == seen[0]
        assert draw() == after


def test_dropout_does_not_blur_the_estimate() -> None:
    """With one mask per step the slope is that of a deterministic loss; a second mask would add noise of
    order 1 / mu."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(200, 1)).train()
    x = torch.randn(200)
    optimizer = zoext.MeZO(model, mu=1e-3, seed=3)
    state = torch.get_rng_state()
    slope = optimizer.estimate(lambda: model(x).sum()).coefficients.item()
    torch.set_rng_state(state)
    masked = nn.functional.dropout(x, 0.5)
    seed = zoext.noise.step_seed(3, 0)
    weight, bias = zoext.noise.normal((1, 200), seed=seed, key=0), zoext.noise.normal(1, seed=seed, key=1)
    assert slope == pytest.approx((weight @ masked + bias).item(), rel=1e-2)


def test_a_closure_without_randomness_leaves_the_generators_alone() -> None:
    model = nn.Linear(3, 2)
    optimizer = zoext.MeZO(model)
    state = torch.get_rng_state(), random.getstate()
    optimizer.step(lambda: model(torch.ones(3)).sum())
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1] == random.getstate()
