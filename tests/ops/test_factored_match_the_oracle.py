"""``factored_axpy_``, ``factored_copy_`` and ``factored_window_`` give the oracle's bits, for every dtype,
shape and value."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from support import oracle
from support.extreme_values import weights, with_payloads
from zoext import ops
from zoext.ops import Rounding, Rule

SEEDS = [3, -1, 2**62 + 5, -(2**63), 12, 99]
COEFFICIENTS = [0.3, -0.02, 0.0, 1e-7, 3.0, -0.0]

every_dtype = pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
every_rounding = pytest.mark.parametrize("rounding", Rounding)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


def matrix(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Weights of all kinds, over and over."""
    some = weights(dtype)
    return some.repeat(-(-rows * columns // some.numel()))[: rows * columns].reshape(rows, columns)


def factors(theta: Tensor, terms: int, rank: int, *, shared: str = "") -> tuple[Tensor, Tensor]:
    """A factor of each side for each term, or one for all on the side called ``shared``."""
    left, right = (normal(terms, rank, length, seed=rank) for length in theta.shape)
    return (left[:1] if shared == "left" else left), (right[:1] if shared == "right" else right)


def axpy(
    theta: Tensor, left: Tensor, right: Tensor, coefficients: list[float], decay: float = 0.0, **options: Any
) -> Tensor:
    """theta after ``factored_axpy_``, as a whole parameter. A ``residual`` is overwritten."""
    moved = theta.clone()
    residuals = oracle.as_list(options.pop("residual", None))
    ops.factored_axpy_(
        [moved],
        [left],
        [right],
        torch.tensor(SEEDS[: len(coefficients)], dtype=torch.int64),
        torch.tensor(coefficients, dtype=torch.float32),
        torch.tensor(decay),
        [options.pop("key", 0)],
        [options.pop("span", ops.span_of(theta))],
        residuals=residuals,
        **options,
    )
    return moved


def expected_axpy(
    theta: Tensor, left: Tensor, right: Tensor, coefficients: list[float], decay: float = 0.0, **options: Any
) -> Tensor:
    return oracle.factored_combination(
        theta, left, right, SEEDS[: len(coefficients)], coefficients, decay, **options
    )


# The numbers of columns are one, below, at and above the lanes of every instruction set and several of
# their packs; the sizes are below, at and above those of a tile.
SHAPES = [(5, 1), (700, 2), (401, 3), (90, 7), (64, 16), (130, 17), (33, 64), (16, 67), (9, 131), (1, 3001)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_dtype
def test_shapes(dtype: torch.dtype, shape: tuple[int, int], instruction_set: str) -> None:
    theta = matrix(*shape, dtype)
    for terms, rank in ((1, 1), (3, 2)):
        arguments = (theta, *factors(theta, terms, rank), COEFFICIENTS[:terms], 0.01)
        oracle.assert_same_bits(axpy(*arguments), expected_axpy(*arguments), f"{terms} terms")


@pytest.mark.parametrize("shared", ["", "left", "right"])
@pytest.mark.parametrize(("terms", "rank"), [(0, 2), (1, 0), (1, 4), (6, 1), (6, 3)])
@every_rounding
@every_dtype
def test_axpy(
    dtype: torch.dtype, rounding: Rounding, terms: int, rank: int, shared: str, instruction_set: str
) -> None:
    theta = matrix(11, 23, dtype)
    options: dict[str, Any] = {"rounding": rounding, "key": 2**31 + 7, "span": (1001, 23, 90)}
    for decay in (0.0, 0.01):
        arguments = (theta, *factors(theta, terms or 1, rank, shared=shared), COEFFICIENTS[:terms], decay)
        residuals = oracle.equal_residuals(theta, rounding)
        oracle.assert_same_bits(
            axpy(*arguments, residual=residuals[0], **options),
            expected_axpy(*arguments, residual=residuals[1], **options),
        )
        oracle.assert_same_residuals(residuals)


@pytest.mark.parametrize("terms", [0, 1, 6])
@pytest.mark.parametrize("rounding", [Rounding.NEAREST, Rounding.STOCHASTIC])
@every_dtype
def test_copy(dtype: torch.dtype, rounding: Rounding, terms: int, instruction_set: str) -> None:
    """Of a list of matrices, one of them without elements."""
    theta = [matrix(*shape, dtype) for shape in ((11, 23), (0, 4), (40, 3))]
    before = [tensor.clone() for tensor in theta]
    out = [torch.full_like(tensor, 7) for tensor in theta]
    sides = [factors(tensor, terms or 1, rank) for tensor, rank in zip(theta, (2, 1, 3), strict=True)]
    keys, spans = [6, 2, 3], [(3, 253, 0), (0, 1, 0), (400, 3, 37)]
    seeds, coefficients = torch.tensor(SEEDS[:terms], dtype=torch.int64), torch.tensor(COEFFICIENTS[:terms])
    left, right = ([side[i] for side in sides] for i in (0, 1))
    ops.factored_copy_(out, theta, left, right, seeds, coefficients, keys, spans, rounding=rounding)
    for t, written in enumerate(out):
        place: dict[str, Any] = {"key": keys[t], "span": spans[t]}
        arguments = (before[t], *sides[t], COEFFICIENTS[:terms])
        oracle.assert_same_bits(written, expected_axpy(*arguments, rounding=rounding, **place))
        assert torch.equal(oracle.bits(theta[t]), oracle.bits(before[t])), "theta was written to"


@pytest.mark.parametrize("shared", ["", "left", "right"])
@pytest.mark.parametrize(("steps", "terms"), [(0, 0), (1, 1), (3, 1), (3, 2)])
@pytest.mark.parametrize("rule", Rule)
@every_rounding
@every_dtype
def test_window(
    dtype: torch.dtype,
    rounding: Rounding,
    rule: Rule,
    steps: int,
    terms: int,
    shared: str,
    instruction_set: str,
) -> None:
    """Also steps of which one term is left, or none."""
    theta = matrix(13, 37, dtype)
    coefficients = [[0.3, -2.0], [0.0, -0.0], [-0.7, 0.0]][:steps]
    coefficients = [step[:terms] for step in coefficients]
    seeds = [[3, -1], [2**62 + 5, 6], [12, 99]][:steps]
    seeds = [step[:terms] for step in seeds]
    window = oracle.Window(coefficients, [0.1, 0.2, 0.3][:steps], [0.2, 0.1, 0.4][:steps], 0.03, 1e-4, 0.01)
    left, right = factors(theta, steps * terms or 1, 2, shared=shared)
    options: dict[str, Any] = {"rounding": rounding, "key": 8, "span": (77, 37, 50)}
    residuals = oracle.equal_residuals(theta, rounding)
    expected = oracle.factored_window(
        theta, left, right, seeds, window, rule=rule, residual=residuals[1], **options
    )
    moved = theta.clone()
    ops.factored_window_(
        [moved],
        [left],
        [right],
        torch.tensor(seeds, dtype=torch.int64).reshape(steps, terms),
        torch.tensor(coefficients, dtype=torch.float32).reshape(steps, terms),
        *(torch.tensor(numbers, dtype=torch.float32) for numbers in window[1:]),
        [8],
        [(77, 37, 50)],
        rule=rule,
        rounding=rounding,
        residuals=oracle.as_list(residuals[0]),
    )
    oracle.assert_same_bits(moved, expected)
    oracle.assert_same_residuals(residuals)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_dtype
def test_window_shapes(dtype: torch.dtype, shape: tuple[int, int], instruction_set: str) -> None:
    theta = matrix(*shape, dtype)
    seeds, window = [[3], [4]], oracle.Window([[0.3], [-2.0]], [0.1, 0.2], [0.2, 0.1], 0.03, 1e-4)
    left, right = factors(theta, 2, 3)
    moved = theta.clone()
    numbers = [torch.tensor(number) for number in window]
    ops.factored_window_([moved], [left], [right], torch.tensor(seeds), *numbers, [1], [ops.span_of(theta)])
    oracle.assert_same_bits(moved, oracle.factored_window(theta, left, right, seeds, window, key=1))


@every_rounding
@every_dtype
def test_zero_coefficients_and_zero_lr_move_no_bit(
    dtype: torch.dtype, rounding: Rounding, instruction_set: str
) -> None:
    """Not of -0, nor of a NaN with a payload, whatever the factors hold: what estimates of losses that were
    not finite do."""
    theta = with_payloads(weights(dtype))[None]
    left, right = factors(theta, 3, 2)
    left[0, 0, 0], right[1, 1, 5] = float("nan"), float("inf")
    zero = [0.0, -0.0, 0.0]
    residuals = oracle.equal_residuals(theta, rounding)
    moved = axpy(theta, left, right, zero, rounding=rounding, residual=residuals[0])
    assert torch.equal(oracle.bits(moved), oracle.bits(theta))
    for coefficients, lr in ((zero, 0.1), ([1.0, 2.0, 3.0], 0.0)):
        moved = theta.clone()
        ops.factored_window_(
            [moved],
            [left],
            [right],
            torch.tensor([[1], [2], [3]]),
            torch.tensor(coefficients).reshape(3, 1),
            torch.ones(3),
            torch.ones(3),
            torch.tensor(lr),
            torch.tensor(0.0),
            torch.tensor(0.0),
            [0],
            [ops.span_of(theta)],
            rounding=rounding,
            residuals=oracle.as_list(residuals[0]),
        )
        assert torch.equal(oracle.bits(moved), oracle.bits(theta))
        oracle.assert_same_residuals(residuals)


@pytest.mark.parametrize("size", [1e-42, 3e38, float("inf"), float("nan")])
@every_dtype
def test_extreme_factors_and_coefficients(dtype: torch.dtype, size: float, instruction_set: str) -> None:
    theta = matrix(7, 41, dtype)
    left, right = factors(theta, 2, 3)
    extreme_left, extreme_right = left.clone(), right.clone()
    extreme_left[0, 1, ::3] = size
    extreme_right[1, 2, ::5] = -size
    for arguments in (
        (theta, extreme_left, right, [0.5, -2.0]),
        (theta, left, extreme_right, [0.5, -2.0]),
        (theta, left, right, [0.5, size]),
    ):
        oracle.assert_same_bits(axpy(*arguments), expected_axpy(*arguments))


def test_the_direction_is_the_product_of_the_factors() -> None:
    theta = torch.zeros(37, 53)
    left, right = factors(theta, 3, 4)
    coefficients = [0.5, -2.0, 0.125]
    product = torch.einsum(
        "k,kqi,kqj->ij", torch.tensor(coefficients).double(), left.double(), right.double()
    )
    torch.testing.assert_close(axpy(theta, left, right, coefficients).double(), product, rtol=0, atol=1e-5)


def test_nothing_beyond_the_tensors_is_used_or_written(instruction_set: str) -> None:
    """Guards on both sides of theta, and NaN on both sides of its factors, which would show in theta."""
    guard, nan = 33.0, float("nan")
    for dtype in oracle.DTYPES:
        for rows, columns in ((1, 1), (3, 2), (4, 7), (2, 33), (5, 129), (9, 300)):
            for start in (1, 2, 5):
                buffer = torch.full((start + rows * columns + 70,), guard, dtype=dtype)
                theta = buffer[start : start + rows * columns].view(rows, columns)
                sides = []
                for length in (rows, columns):
                    side = torch.full((start + 2 * length + 70,), nan)
                    side[start : start + 2 * length] = normal(2 * length).clamp(min=0.01)
                    sides.append(side[start : start + 2 * length].view(1, 2, length))
                place = [0], [(start, rows * columns, 0)]
                one = torch.tensor([5]), torch.tensor([1.0])
                ops.factored_axpy_([theta], [sides[0]], [sides[1]], *one, torch.tensor(0.5), *place)
                window = [torch.tensor(number) for number in ([0.5], [0.5], 0.1, 1e-8, 0.0)]
                numbers = (one[0][None], one[1][None], *window)
                ops.factored_window_([theta], [sides[0]], [sides[1]], *numbers, *place)
                assert (buffer[:start] == guard).all()
                assert (buffer[start + rows * columns :] == guard).all()
                assert not (theta == guard).any()
                assert theta.isfinite().all()
