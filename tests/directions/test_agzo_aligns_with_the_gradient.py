"""On the demo's model AGZO's estimates point along the true gradient at least 4 times better than MeZO's.

The cosine is taken over the weights of linear layers, with the gradient of one backward pass. The mean of
a cosine over 24 steps has a relative standard error of sqrt(pi / 2 - 1) / sqrt(24) = 15 %, the ratio of two
of them 22 %. The ratio measured is 8.6: 4 is three and a half of these errors below it, a false alarm in
4,000 cases, had the seeds not been fixed.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoext
from zoext.cli._problem import demo
from zoext.cli._problem.models import choose_trainable

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in (demo.MODEL_PACKAGE, demo.DATA_PACKAGE)),
    reason="needs the packages of the demo",
)

STEPS, BATCH = 24, 32


@pytest.fixture(scope="module")
def problem() -> Any:
    loaded = demo.load(demo.SETTINGS)
    choose_trainable(loaded.model, demo.SETTINGS.trainable)
    return loaded


def linear_weights(model: nn.Module) -> list[Tensor]:
    return [module.weight for module in model.modules() if isinstance(module, nn.Linear)]


def mean_cosine(problem: Any, recipe: Any) -> float:
    """Of minus the step with lr 1, each from the same weights and on the same batch."""
    model, objective = problem.model, problem.objective
    batch = objective.collate(problem.train[:BATCH], torch.device("cpu"))

    def loss() -> Tensor:
        return objective.scores(model, batch).mean_loss()

    model.zero_grad()
    loss().backward()
    weights = linear_weights(model)
    gradient = torch.cat([weight.grad.flatten() for weight in weights])
    model.zero_grad()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = recipe(model, lr=1.0, mu=1e-3, seed=11)
    before = torch.cat([weight.detach().flatten() for weight in weights])
    cosines = []
    for _ in range(STEPS):
        optimizer.step(loss)
        estimate = before - torch.cat([weight.detach().flatten() for weight in weights])
        cosines.append(torch.cosine_similarity(estimate.double(), gradient.double(), dim=0).item())
        model.load_state_dict(start)
    return sum(cosines) / STEPS


def test_cosine(problem: Any) -> None:
    mezo, agzo = (mean_cosine(problem, recipe) for recipe in (zoext.MeZO, zoext.AGZO))
    assert mezo > 0
    assert agzo >= 4 * mezo
