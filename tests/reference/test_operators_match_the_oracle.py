"""With signs and powers of two only the stored result is rounded: the reference gives the oracle's bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from support import oracle
from support.extreme_values import weights, with_payloads
from zoext import ops
from zoext.ops import Distribution, Rounding, Rule

pytestmark = pytest.mark.usefixtures("backend")

every_dtype = pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
every_rounding = pytest.mark.parametrize("rounding", Rounding)
SEEDS = [3, -(2**63), 2**62 + 5]
COEFFICIENTS = [2.0**-9, 0.0, -(2.0**-12)]
PLACE: dict[str, Any] = {"key": 2**31 + 7, "span": (1001, 37, 90)}


def axpy(theta: Tensor, seeds: Tensor, coefficients: Tensor, decay: Tensor, **options: Any) -> Tensor:
    moved = theta.clone()
    residuals = oracle.as_list(options.pop("residual", None))
    place = [options.pop("key")], [options.pop("span")]
    ops.noise_axpy_([moved], seeds, coefficients, decay, *place, residuals=residuals, **options)
    return moved


@pytest.mark.parametrize("decay", [0.0, 2.0**-10])
@every_rounding
@every_dtype
def test_axpy(dtype: torch.dtype, rounding: Rounding, decay: float) -> None:
    """Weights, residuals and spans of every kind."""
    theta = weights(dtype)
    options: dict[str, Any] = {"distribution": Distribution.SIGN, "rounding": rounding, **PLACE}
    residuals = oracle.equal_residuals(theta, rounding)
    given = torch.tensor(SEEDS), torch.tensor(COEFFICIENTS), torch.tensor(decay)
    moved = axpy(theta, *given, residual=residuals[0], **options)
    expected = oracle.combination(theta, SEEDS, COEFFICIENTS, decay, residual=residuals[1], **options)
    oracle.assert_same_bits(moved, expected)
    oracle.assert_same_residuals(residuals)


@every_rounding
@every_dtype
def test_several_steps_are_steps_one_after_the_other(dtype: torch.dtype, rounding: Rounding) -> None:
    theta = weights(dtype)
    options: dict[str, Any] = {"distribution": Distribution.NORMAL, "rounding": rounding, **PLACE}
    residuals = oracle.equal_residuals(theta, rounding)
    seeds = torch.tensor([SEEDS, SEEDS[::-1], SEEDS])
    coefficients = torch.tensor([COEFFICIENTS, [0.0] * 3, [0.3, 0.1, -0.2]])
    decay = torch.tensor([0.1, 0.0, 0.0])
    at_once = axpy(theta, seeds, coefficients, decay, residual=residuals[0], **options)
    for s in range(3):
        theta = axpy(theta, seeds[s], coefficients[s], decay[s], residual=residuals[1], **options)
    oracle.assert_same_bits(at_once, theta)
    oracle.assert_same_residuals(residuals)


@pytest.mark.parametrize("rounding", [Rounding.NEAREST, Rounding.STOCHASTIC])
@every_dtype
def test_copy(dtype: torch.dtype, rounding: Rounding) -> None:
    theta = weights(dtype)
    options: dict[str, Any] = {"distribution": Distribution.SIGN, "rounding": rounding}
    out, before = torch.full_like(theta, 7), theta.clone()
    numbers = torch.tensor(SEEDS), torch.tensor(COEFFICIENTS)
    ops.noise_copy_([out], [theta], *numbers, [PLACE["key"]], [PLACE["span"]], **options)
    oracle.assert_same_bits(out, oracle.combination(theta, SEEDS, COEFFICIENTS, **options, **PLACE))
    oracle.assert_same_bits(theta, before)


@pytest.mark.parametrize("rounding", [Rounding.NEAREST, Rounding.STOCHASTIC])
@every_dtype
def test_copies(dtype: torch.dtype, rounding: Rounding) -> None:
    theta = weights(dtype)
    options: dict[str, Any] = {"distribution": Distribution.SIGN, "rounding": rounding}
    rows = [COEFFICIENTS, [0.0, 0.0, 0.0], COEFFICIENTS[::-1]]
    out = torch.full((3, *theta.shape), 7).to(dtype)
    numbers = torch.tensor(SEEDS), torch.tensor(rows)
    ops.noise_copies_([out], [theta], *numbers, [PLACE["key"]], [PLACE["span"]], **options)
    for copy, row in zip(out, rows, strict=True):
        oracle.assert_same_bits(copy, oracle.combination(theta, SEEDS, row, **options, **PLACE))


@pytest.mark.parametrize("columns", [1, 5, 133])
@every_rounding
@every_dtype
def test_factored_axpy(dtype: torch.dtype, rounding: Rounding, columns: int) -> None:
    theta = weights(dtype)[:133]
    rows = 133 // columns
    theta = theta[: rows * columns]
    options: dict[str, Any] = {"rounding": rounding, **PLACE}
    residuals = oracle.equal_residuals(theta, rounding)
    generator = torch.Generator().manual_seed(1)
    left, right = (
        2.0 ** torch.randint(-3, 3, (terms, 2, length), generator=generator).float()
        for terms, length in ((3, rows), (1, columns))
    )
    expected = oracle.factored_combination(
        theta, left, right, SEEDS, COEFFICIENTS, 2.0**-10, residual=residuals[1], **options
    )
    moved = theta.clone()
    numbers = torch.tensor(SEEDS), torch.tensor(COEFFICIENTS), torch.tensor(2.0**-10)
    ops.factored_axpy_(
        [moved],
        [left],
        [right],
        *numbers,
        [PLACE["key"]],
        [PLACE["span"]],
        rounding=rounding,
        residuals=oracle.as_list(residuals[0]),
    )
    oracle.assert_same_bits(moved, expected)
    oracle.assert_same_residuals(residuals)


@every_rounding
@every_dtype
def test_a_step_without_coefficients_moves_no_bit(dtype: torch.dtype, rounding: Rounding) -> None:
    """Not of -0 or of a NaN with a payload, nor beside factors that are not finite."""
    theta = with_payloads(weights(dtype))
    seeds, none, decay = torch.tensor([1, 2]), torch.tensor([0.0, -0.0]), torch.tensor(0.0)
    place = [0], [ops.span_of(theta)]
    bad = [torch.full((1, 1, size), float("nan")) for size in (1, theta.numel())]
    window = seeds[:, None], none[:, None], torch.ones(2), torch.ones(2)
    numbers = torch.tensor(0.1), torch.tensor(1e-8), decay
    calls: list[Any] = [
        lambda moved, how: ops.noise_axpy_([moved], seeds, none, decay, *place, **how),
        lambda moved, how: ops.factored_axpy_(
            [moved], *([f] for f in bad), seeds, none, decay, *place, **how
        ),
    ]
    for rule in Rule:
        calls += [
            lambda moved, how, rule=rule: ops.noise_window_(
                [moved], *window, *numbers, *place, rule=rule, **how
            ),
            lambda moved, how, rule=rule: ops.factored_window_(
                [moved], *([f] for f in bad), *window, *numbers, *place, rule=rule, **how
            ),
        ]
    for call in calls:
        moved = theta.clone()
        residuals = oracle.equal_residuals(theta, rounding)
        call(moved, {"rounding": rounding, "residuals": oracle.as_list(residuals[0])})
        assert torch.equal(oracle.bits(moved), oracle.bits(theta))
        oracle.assert_same_residuals(residuals)
