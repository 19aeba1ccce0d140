"""Guiding vectors and greedy pools on known losses: ranking, ties, losses that are not finite, forwards."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import zoext
from support.plain_optimizer import guiding_weights

MU = 0.25
SEEDS = torch.arange(100, 116)


class Table:
    """A probe that tells the candidates' losses from a table and notes every question."""

    def __init__(self, candidates: Sequence[float], plus: float, minus: float, dtype: torch.dtype) -> None:
        self.asked: list[tuple[list[int], list[float]]] = []
        self._candidates, self._sides, self._dtype = candidates, [plus, minus], dtype

    def __call__(self, seeds: Tensor, coefficients: Tensor) -> Tensor:
        assert coefficients.dtype == torch.float32
        self.asked.append((seeds.tolist(), coefficients.tolist()))
        if len(self.asked) <= len(self._candidates):
            assert self.asked[-1] == ([100 + len(self.asked) - 1], [1.0])
            value = self._candidates[len(self.asked) - 1]
        else:
            value = self._sides[len(self.asked) - len(self._candidates) - 1]
        return torch.tensor(value, dtype=self._dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("count", "ratio"), [(2, 0.5), (4, 0.25), (5, 0.5), (7, 0.9), (16, 0.0625)])
@pytest.mark.parametrize("weighting", ["ranked", "centered"])
def test_weights_of_the_guiding_vector(dtype: torch.dtype, count: int, ratio: float, weighting: str) -> None:
    candidates = [math.sin(5.0 * i) for i in range(count)]
    table = Table(candidates, 3.0, 1.0, dtype)
    estimator = zoext.GuidingVector(pool_size=count, elite_ratio=ratio, weighting=weighting)
    estimate = estimator.estimate(table, SEEDS[:count], MU)
    expected = torch.tensor(guiding_weights(candidates, ratio, weighting))
    for sign, (seeds, coefficients) in zip((1, -1), table.asked[count:], strict=True):
        assert seeds == SEEDS[:count].tolist()
        assert torch.allclose(torch.tensor(coefficients), sign * expected, rtol=1e-6)
    slope = (3.0 - 1.0) / (2 * MU)
    assert torch.allclose(estimate.coefficients, slope * expected, rtol=1e-6)
    assert estimate.coefficients.dtype == torch.float32
    assert estimate.forwards == count + 2
    losses = torch.tensor([*candidates, 3.0, 1.0])
    assert torch.allclose(estimate.loss, losses.mean())
    assert torch.allclose(estimate.loss_std, losses.std())
    assert estimate.finite


def test_equal_losses_keep_their_order() -> None:
    for weighting in ("ranked", "centered"):
        table = Table([2.0] * 4, 1.0, 0.0, torch.float32)
        guiding = zoext.GuidingVector(pool_size=4, weighting=weighting)
        assert guiding.estimate(table, SEEDS[:4], 0.5).coefficients.tolist() == [0.5, 0.5, -0.5, -0.5]
    table = Table([7.0, 2.0, 2.0], 1.0, 0.0, torch.float32)
    assert zoext.GreedyPool(pool_size=3).estimate(table, SEEDS[:3], MU).seeds.tolist() == [101]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("weighting", ["ranked", "centered"])
def test_a_candidate_that_is_not_finite_is_left_out(bad: float, weighting: str) -> None:
    table = Table([4.0, bad, 1.0, 3.0, 2.0], 1.0, 0.0, torch.float32)
    estimator = zoext.GuidingVector(pool_size=5, elite_ratio=0.4, weighting=weighting)
    estimate = estimator.estimate(table, SEEDS[:5], 0.5)
    assert estimate.finite
    if weighting == "ranked":  # top: 1 and 2; bottom: 3 and 4
        assert estimate.coefficients.tolist() == [-0.5, 0.0, 0.5, -0.5, 0.5]
    else:
        weights = torch.tensor([-1.5, 0.0, 1.5, -0.5, 0.5])
        assert torch.allclose(estimate.coefficients, weights / weights.norm(), rtol=1e-6)
    assert math.isfinite(estimate.loss)
    assert math.isfinite(estimate.loss_std)


@pytest.mark.parametrize("candidates", [[math.nan, math.inf], [math.nan, 1.0], [1.0, -math.inf]])
def test_a_side_without_a_finite_candidate_moves_nothing(candidates: list[float]) -> None:
    for weighting in ("ranked", "centered"):
        estimator = zoext.GuidingVector(pool_size=2, weighting=weighting)
        estimate = estimator.estimate(Table(candidates, 1.0, 0.0, torch.float32), SEEDS[:2], MU)
        assert not estimate.finite
        assert estimate.coefficients.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("sides", [(math.nan, 1.0), (1.0, math.inf)])
def test_a_side_of_the_difference_that_is_not_finite_moves_nothing(sides: tuple[float, float]) -> None:
    estimate = zoext.GuidingVector(pool_size=2).estimate(
        Table([1.0, 2.0], *sides, torch.float32), SEEDS[:2], MU
    )
    assert not estimate.finite
    assert estimate.coefficients.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_greedy_reuses_the_winners_loss(dtype: torch.dtype) -> None:
    candidates = [4.0, math.nan, 1.5, 3.0]
    table = Table(candidates, 0.5, math.nan, dtype)
    estimate = zoext.GreedyPool(pool_size=4).estimate(table, SEEDS[:4], MU)
    assert table.asked[4:] == [([102], [-1.0])]
    assert estimate.forwards == 5
    assert estimate.seeds.tolist() == [102]
    assert estimate.coefficients.tolist() == [(1.5 - 0.5) / (2 * MU)]
    assert estimate.finite
    table = Table(candidates, 1.25, 0.5, dtype)
    estimate = zoext.GreedyPool(pool_size=4, reuse=False).estimate(table, SEEDS[:4], MU)
    assert table.asked[4:] == [([102], [1.0]), ([102], [-1.0])]
    assert estimate.forwards == 6
    assert estimate.coefficients.tolist() == [(1.25 - 0.5) / (2 * MU)]


def test_greedy_without_a_finite_candidate_moves_nothing() -> None:
    estimate = zoext.GreedyPool(pool_size=2).estimate(
        Table([math.nan, math.inf], 1.0, 0.0, torch.float32), SEEDS[:2], MU
    )
    assert not estimate.finite
    assert estimate.coefficients.tolist() == [0.0]


@pytest.mark.parametrize("weighting", ["ranked", "centered"])
@pytest.mark.parametrize("size", [1e38, 1e20, 1e-20, 1e-38])
def test_no_finite_loss_gives_a_weight_that_is_not(weighting: str, size: float) -> None:
    """Sums and squares of such losses are beyond float32. A weight that is not a number could not be
    taken back by a probe in place."""
    estimator = zoext.GuidingVector(pool_size=4, weighting=weighting)
    for candidates in ([size, 2 * size, 3 * size, -size], [0.0, size, 0.0, 0.0]):
        table = Table(candidates, 1.0, 0.0, torch.float32)
        estimate = estimator.estimate(table, SEEDS[:4], 0.5)
        assert estimate.finite
        expected = guiding_weights(candidates, 0.5, weighting)
        assert torch.allclose(estimate.coefficients, torch.tensor(expected), rtol=1e-5)


@pytest.mark.parametrize("probe", ["streamed", "inplace"])
def test_a_step_whose_estimate_is_not_finite_moves_no_bit(probe: str) -> None:
    """The candidates are finite, the sides of the difference are not."""
    for recipe in (zoext.MeZOGV, zoext.MeZOGreedy):
        model = torch.nn.Linear(5, 3)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        calls = [0]

        def loss(model: torch.nn.Linear = model, calls: list[int] = calls) -> Tensor:
            calls[0] += 1
            return model(torch.ones(5)).sum() + (math.nan if calls[0] > 4 else 0.0)

        optimizer = recipe(model, lr=0.1, pool_size=4, probe=probe, nonfinite="skip", weight_decay=0.1)
        optimizer.step(loss)
        assert optimizer.nonfinite_steps == 1
        for parameter, old in zip(model.parameters(), before, strict=True):
            assert (parameter - old).abs().max() <= (1e-6 if probe == "inplace" else 0)
