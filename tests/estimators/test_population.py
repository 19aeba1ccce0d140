"""Populations on known losses: shapings, ties, and losses that are equal, not finite or missing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoext
from support.plain_optimizer import population_weights

MU = 0.25
SHAPINGS = ("centered", "zscore", "rank")
LOSSES = [math.sin(5.0 * i) for i in range(9)]


def estimate_of(
    losses: Sequence[float], dtype: torch.dtype = torch.float64, **options: Any
) -> zoext.Estimate:
    """The estimate of a population with these losses, which are asked for once, and for nothing else."""
    estimator = zoext.Population(len(losses), **options)
    seeds = torch.arange(100, 100 + estimator.draws)
    rounds = estimator.rounds(seeds, MU)
    pending = next(rounds)
    signs = (1.0, -1.0) if estimator.antithetic else (1.0,)
    expected = [([seed], [sign]) for seed in seeds.tolist() for sign in signs]
    assert [(its.tolist(), c.tolist()) for its, c in pending.probes()] == expected
    with pytest.raises(StopIteration) as done:
        rounds.send(torch.tensor(losses, dtype=dtype))
    estimate: zoext.Estimate = done.value.value
    assert torch.equal(estimate.seeds, seeds)
    assert estimate.coefficients.dtype == torch.float32
    assert estimate.forwards == len(losses)
    return estimate


def expected(losses: Sequence[float], shaping: str, antithetic: bool) -> Tensor:
    if antithetic and shaping == "centered":
        plus, minus = losses[::2], losses[1::2]
        return torch.tensor([(a - b) / (MU * len(losses)) for a, b in zip(plus, minus, strict=True)])
    weights = torch.tensor(population_weights(list(losses), shaping, MU))
    return weights[::2] - weights[1::2] if antithetic else weights


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("shaping", SHAPINGS)
def test_coefficients_are_those_of_the_formula(shaping: str, antithetic: bool) -> None:
    ties = [3.0, 1.0, 3.0, -2.0, 1.0, 3.0, 0.0, -0.0]
    for losses in (LOSSES[:2], LOSSES[:6], ties, *([] if antithetic else [LOSSES[:3], LOSSES])):
        for dtype in (torch.float32, torch.float64):
            estimate = estimate_of(losses, dtype, shaping=shaping, antithetic=antithetic)
            torch.testing.assert_close(estimate.coefficients, expected(losses, shaping, antithetic))
            torch.testing.assert_close(estimate.loss, torch.tensor(losses).mean())
            torch.testing.assert_close(estimate.loss_std, torch.tensor(losses).std())
            assert estimate.finite


def test_pairs_are_central_differences() -> None:
    pairs = estimate_of(LOSSES[:8], antithetic=True)
    losses = iter(torch.tensor(LOSSES, dtype=torch.float64))
    central = zoext.CentralDifference(samples=4).estimate(lambda *_: next(losses), pairs.seeds, MU)
    torch.testing.assert_close(pairs.coefficients, central.coefficients)
    torch.testing.assert_close(pairs.loss_std, central.loss_std)


def test_ranks_see_the_order_alone() -> None:
    for antithetic in (False, True):
        options = {"shaping": "rank", "antithetic": antithetic}
        losses = torch.tensor(LOSSES[:8])
        plain = estimate_of(losses.tolist(), **options).coefficients
        for mapped in (losses.exp(), losses**3 * 1e6 - 7, 1e-30 * losses):
            assert torch.equal(estimate_of(mapped.tolist(), **options).coefficients, plain)
        outlier = torch.where(losses == losses.max(), 1e30, losses)
        assert torch.equal(estimate_of(outlier.tolist(), **options).coefficients, plain)


@pytest.mark.parametrize("shaping", SHAPINGS)
@pytest.mark.parametrize(("scale", "offset"), [(2.0**40, 0.0), (3.0, -17.0), (1e-9, 0.125)])
def test_scale_and_offset_of_the_losses(shaping: str, scale: float, offset: float) -> None:
    """No shaping depends on the offset, "zscore" and "rank" on no scale either."""
    for antithetic in (False, True):
        options = {"shaping": shaping, "antithetic": antithetic}
        plain = estimate_of(LOSSES[:8], **options).coefficients
        mapped = estimate_of([scale * loss + offset for loss in LOSSES[:8]], **options).coefficients
        factor = scale if shaping == "centered" else 1.0
        torch.testing.assert_close(mapped, factor * plain, rtol=1e-5, atol=0)


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("shaping", SHAPINGS)
def test_equal_losses_move_nothing(shaping: str, antithetic: bool) -> None:
    """Exactly, where the mean of equal losses is rounded to another number."""
    for loss in (0.1, -0.7045, 0.0, 1e30, -1e-30):
        for size in (2, 4, 6, 14, 100) if antithetic else (2, 3, 7, 33, 100):
            estimate = estimate_of([loss] * size, shaping=shaping, antithetic=antithetic)
            assert not estimate.coefficients.any()
            assert estimate.loss_std == 0
            assert estimate.finite


@pytest.mark.parametrize("probe", ["streamed", "inplace"])
@pytest.mark.parametrize("shaping", SHAPINGS)
def test_a_step_of_equal_rewards_only_decays(shaping: str, probe: str) -> None:
    model = nn.Linear(5, 3).double()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    estimator = zoext.Population(3, shaping=shaping)
    optimizer = zoext.ZerothOrderOptimizer(model, estimator=estimator, lr=0.5, weight_decay=0.2, probe=probe)
    optimizer.step(lambda: -0.1 + 0 * model(torch.ones(5).double()).sum())
    for parameter, old in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter, 0.9 * old, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("shaping", SHAPINGS)
def test_a_loss_that_is_not_finite_is_left_out(shaping: str, antithetic: bool, bad: float) -> None:
    """The others are weighted as a smaller population; the partner goes too."""
    losses = [*LOSSES[:3], bad, *LOSSES[4:8]]
    estimate = estimate_of(losses, shaping=shaping, antithetic=antithetic)
    gone = range(2, 4) if antithetic else range(3, 4)
    others = expected([loss for i, loss in enumerate(losses) if i not in gone], shaping, antithetic).tolist()
    left_out = 1 if antithetic else 3
    others.insert(left_out, 0.0)
    torch.testing.assert_close(estimate.coefficients, torch.tensor(others))
    finite = torch.tensor([loss for loss in losses if math.isfinite(loss)])
    torch.testing.assert_close(estimate.loss, finite.mean())
    assert estimate.finite
    assert math.isfinite(estimate.loss_std)


@pytest.mark.parametrize("shaping", SHAPINGS)
def test_too_few_finite_losses_move_nothing(shaping: str) -> None:
    for losses in ([math.nan] * 4, [1.0, math.nan, math.inf, math.nan]):
        for antithetic in (False, True):
            estimate = estimate_of(losses, shaping=shaping, antithetic=antithetic)
            assert not estimate.finite
            assert estimate.coefficients.tolist() == [0.0] * (2 if antithetic else 4)
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1, "nonfinite": "skip"}
    optimizer = zoext.ZerothOrderOptimizer(model, estimator=zoext.Population(3, shaping=shaping), **options)
    rewards = iter([1.0, math.nan, math.nan])
    optimizer.step(lambda: model(torch.ones(3)).sum() + next(rewards))
    assert optimizer.nonfinite_steps == 1
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("shaping", SHAPINGS)
@pytest.mark.parametrize(("size", "dtype"), [(1e38, torch.float32), (1e-38, torch.float32)])
def test_no_finite_loss_gives_a_weight_that_is_not(shaping: str, size: float, dtype: torch.dtype) -> None:
    for antithetic in (False, True):
        losses = [size, 2 * size, 3 * size, -size]
        estimate = estimate_of(losses, dtype, shaping=shaping, antithetic=antithetic)
        assert estimate.coefficients.isfinite().all()
        if shaping != "centered":
            torch.testing.assert_close(estimate.coefficients, expected(losses, shaping, antithetic))
    widest = torch.finfo(torch.float64).max
    estimate = estimate_of([widest, -widest, 0.0], shaping=shaping)
    assert estimate.coefficients.isfinite().all()
    assert bool(estimate.finite) == (shaping != "centered")  # whose coefficients no float32 holds


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("shaping", SHAPINGS)
def test_no_value_is_read_on_the_host(shaping: str, antithetic: bool) -> None:
    """A tensor on the meta device has none, and raises where one is read."""
    estimator = zoext.Population(6, shaping=shaping, antithetic=antithetic)
    rounds = estimator.rounds(torch.arange(estimator.draws, device="meta"), MU)
    next(rounds)
    with pytest.raises(StopIteration) as done:
        rounds.send(torch.empty(6, device="meta"))
    assert done.value.value.coefficients.shape == (estimator.draws,)


SETTINGS: dict[str, Any] = {"lr": 0.1, "mu": 1e-2, "seed": 5, "process_group": None}


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("shaping", SHAPINGS)
def test_a_missing_loss_is_left_out(shaping: str, antithetic: bool) -> None:
    net = nn.Linear(4, 2)
    estimator = zoext.Population(6, shaping=shaping, antithetic=antithetic)
    optimizer = zoext.ZerothOrderOptimizer(net, estimator=estimator, **SETTINGS)
    optimizer.ask()
    assert optimizer.tell([None if i == 2 else loss for i, loss in enumerate(LOSSES[:6])]) is None
    optimizer.step()
    estimate = optimizer.last_estimate
    without = [math.nan if i == 2 else loss for i, loss in enumerate(LOSSES[:6])]
    plain = estimate_of(without, shaping=shaping, antithetic=antithetic)
    scale = MU / 1e-2 if shaping == "centered" else 1.0
    torch.testing.assert_close(estimate.coefficients, scale * plain.coefficients)
    assert (estimate.missing, estimate.forwards, bool(estimate.finite)) == (1, 5, True)


@pytest.mark.parametrize(("antithetic", "missing"), [(False, (0, 1, 2)), (True, (0, 3))])
def test_too_few_losses_begin_the_estimate_again(antithetic: bool, missing: tuple[int, ...]) -> None:
    net = nn.Linear(4, 2)
    estimator = zoext.Population(4, antithetic=antithetic)
    optimizer = zoext.ZerothOrderOptimizer(net, estimator=estimator, **SETTINGS)
    pending = optimizer.ask()
    again = optimizer.tell([None if i in missing else 1.0 for i in range(4)])
    assert torch.equal(again.coefficients, pending.coefficients)
    assert optimizer.tell(LOSSES[:4]) is None
    optimizer.step()
    assert optimizer.last_estimate.missing == 0


def test_scalar_adam_needs_pairs() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"ScalarAdam divides by the sum .* which is zero for Population"):
        zoext.ZerothOrderOptimizer(model, estimator=zoext.Population(4), update=zoext.ScalarAdam())
    for shaping in SHAPINGS:
        pairs = zoext.Population(4, shaping=shaping, antithetic=True)
        zoext.ZerothOrderOptimizer(model, estimator=pairs, update=zoext.ScalarAdam())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 1}, r"size must be an integer of at least 2, not 1; it counts candidates"),
        ({"size": 4.0}, r"size must be an integer of at least 2, not 4\.0"),
        ({"size": True}, r"size must be an integer of at least 2, not True"),
        ({"shaping": "z-score"}, r"shaping must be 'centered', 'zscore' or 'rank', not 'z-score'"),
        ({"shaping": ["rank"]}, r"shaping must be 'centered', 'zscore' or 'rank', not \['rank'\]"),
        ({"antithetic": 1}, r"antithetic must be True or False, not 1"),
        ({"size": 5, "antithetic": True}, r"size must be even with antithetic=True, not 5"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        zoext.Population(**arguments)
