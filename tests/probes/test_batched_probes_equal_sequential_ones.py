"""The losses of a batched round are those of the same probes one after the other, on models of many kinds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import zoext
from support.batched_models import CAUSAL, PLAIN, Problem, plain, problem
from support.oracle import bits
from zoext.probes._batched import displacements

pytest.importorskip("transformers")

DIRECTIONS = {
    "gaussian": zoext.Gaussian(),
    "rademacher": zoext.Rademacher(),
    "lozo": zoext.LowRank(rank=2),
    "agzo": zoext.ActivationSubspace(rank=2, balance="matched"),
}
SETTINGS: dict[str, Any] = {"lr": 1e-3, "mu": 2e-2, "seed": 5}


def sequential(given: Problem, direction: str, estimator: zoext.Estimator, steps: int = 3) -> list[Tensor]:
    """The losses of each probe with a streamed probe."""
    found: list[Tensor] = []

    def closure() -> Tensor:
        found.append(given.losses(1)[0])
        return found[-1]

    optimizer = zoext.ZerothOrderOptimizer(
        given.model, direction=DIRECTIONS[direction], estimator=estimator, **SETTINGS
    )
    torch.manual_seed(1)
    for _ in range(steps):
        found.clear()  # the first probe of a run may be repeated
        optimizer.estimate(closure)
    return found


def batched(
    given: Problem, direction: str, estimator: zoext.Estimator, steps: int = 3, **options: Any
) -> list[Tensor]:
    found: list[Tensor] = []

    def closure(copies: int) -> Tensor:
        losses = given.losses(copies)
        found.extend(losses)
        return losses

    optimizer = zoext.ZerothOrderOptimizer(
        given.model,
        direction=DIRECTIONS[direction],
        estimator=estimator,
        probe=zoext.BatchedProbe(given.model, **options),
        **SETTINGS,
    )
    torch.manual_seed(1)
    for _ in range(steps):
        found.clear()
        optimizer.estimate(closure)
    return found


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", [*PLAIN, *CAUSAL])
def test_in_float64(name: str, direction: str) -> None:
    """To what float32 factors leave: a streamed weight sums their products in float32."""
    given = problem(name)
    before = {key: value.clone() for key, value in given.model.state_dict().items()}
    if name == "positions first":
        given.model.train()
    estimator = zoext.CentralDifference(samples=2)
    expected = sequential(given, direction, estimator)
    found = batched(given, direction, estimator)
    assert len(found) == len(expected)
    tolerance = 1e-12 if direction in {"gaussian", "rademacher"} else 1e-8
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=tolerance, atol=0)
    assert len({float(loss) for loss in found}) > 1
    after = given.model.state_dict()
    assert all(torch.equal(bits(before[key]), bits(after[key])) for key in before)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_in_the_precision_of_the_model(direction: str, dtype: torch.dtype, tolerance: float) -> None:
    given = problem("Llama", dtype)
    estimator = zoext.ForwardDifference(samples=3)
    expected = sequential(given, direction, estimator)
    found = batched(given, direction, estimator)
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=tolerance, atol=0)


@pytest.mark.parametrize("size", [1, 1000, 5000])
@pytest.mark.parametrize("direction", ["gaussian", "rademacher"])
@pytest.mark.parametrize("name", [*PLAIN, "Llama", "GPT2"])
def test_weights_made_in_pieces(
    name: str, direction: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of one row, and of numbers of rows that do not divide all; weights are tied in some models."""
    monkeypatch.setitem(displacements.PIECE, "cpu", size)
    given = problem(name)
    estimator = zoext.ForwardDifference(samples=2)
    expected = sequential(given, direction, estimator)
    found = batched(given, direction, estimator)
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-12, atol=0)


@pytest.mark.parametrize("estimator", [zoext.GuidingVector(pool_size=5), zoext.GreedyPool(pool_size=3)])
@pytest.mark.parametrize("direction", ["gaussian", "lozo"])
@pytest.mark.parametrize("most", [None, 1, 2])
def test_pools_in_portions(estimator: zoext.Estimator, direction: str, most: int | None) -> None:
    given = plain(PLAIN["mixed"])
    expected = sequential(given, direction, estimator)
    found = batched(given, direction, estimator, max_copies=most)
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-8, atol=0)


def test_factors_against_weights_made_in_float64() -> None:
    given = plain(PLAIN["mixed"], train=False)
    model, losses = given
    for name, parameter in model.named_parameters():  # ask has factors for matrices alone
        parameter.requires_grad_(parameter.dim() == 2 and "convolution" not in name)
    found: list[Tensor] = []
    optimizer = zoext.LOZO(
        model, rank=3, estimator=zoext.CentralDifference(samples=2), probe="batched", lr=1e-3, mu=2**-6
    )
    asked = optimizer.ask()
    adapters = [asked.adapter(index) for index in range(len(asked))]
    optimizer.cancel()
    optimizer.estimate(lambda copies: found.append(losses(copies)) or losses(copies))  # type: ignore[func-returns-value]
    weights = dict(model.named_parameters())
    for index, adapter in enumerate(adapters):
        theta = {name: weights[name].detach().clone() for name in adapter}
        for name, factors in adapter.items():
            delta = factors.B.double() @ factors.A.double()
            is_transposed = delta.shape != weights[name].shape
            weights[name].data += delta.mT if is_transposed else delta
        expected = losses(1)[0].detach()
        for name, values in theta.items():
            weights[name].data.copy_(values)
        assert abs(float(found[-1][index] - expected)) < 1e-10 * abs(float(expected))
