"""Chunks of which every element is there take another loop than edges do: it gives the CPU's bits too.

A chunk has 8,192 elements or, of factored directions, half as many: these tensors begin and end with
edges and have whole chunks between them. `tests/csrc/test_chunks.cpp` shows which chunk takes which loop.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from support.cuda_comparison import COPY_ROUNDINGS, DTYPES, MARKS, assert_same_move, same_bits, weights
from zoext import ops
from zoext.ops import Distribution, Rounding

pytestmark = MARKS

COUNT, SPAN = 25_003, (2**34 + 56, 25_003, 0)
ROWS, COLUMNS = 157, 160
SEEDS = torch.tensor([12345, -(2**63) + 9, 2**62 + 77, 4, -1, 8])
#: Terms that are left out first, in the middle and last; and none at all.
COEFFICIENTS = {
    "one": [1.5e-3],
    "many": [0.0, -0.0, 0.25, 0.0, -3.0, 0.0],
    "zeros": [0.0, 0.0],
}

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_distribution = pytest.mark.parametrize("distribution", Distribution)
every_rounding = pytest.mark.parametrize("rounding", Rounding)
every_rounding_of_copies = pytest.mark.parametrize("rounding", COPY_ROUNDINGS)
every_combination = pytest.mark.parametrize("case", COEFFICIENTS)
every_decay = pytest.mark.parametrize("decay", [0.0, 0.013])


def combination(case: str) -> tuple[Tensor, Tensor]:
    coefficients = torch.tensor(COEFFICIENTS[case])
    return SEEDS[: len(coefficients)].clone(), coefficients


def factors(terms: int, *, columns: int = COLUMNS) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(columns)
    left = torch.randn(terms, 3, ROWS, generator=generator)
    return [left], [torch.randn(terms, 3, columns, generator=generator)]


@every_distribution
@every_dtype
def test_normal(dtype: torch.dtype, distribution: Distribution) -> None:
    out = [torch.empty(COUNT, dtype=dtype), torch.empty(COUNT, dtype=dtype, device="cuda")]
    for tensor in out:
        seed = SEEDS[1:2].to(tensor.device)
        ops.normal_([tensor], seed, [2**32 - 1], [SPAN], stream=3, distribution=distribution)
    assert same_bits(out[1], out[0])


@every_decay
@every_combination
@every_rounding
@every_distribution
@every_dtype
def test_axpy(
    dtype: torch.dtype, distribution: Distribution, rounding: Rounding, case: str, decay: float
) -> None:
    arguments = (*combination(case), torch.tensor(decay))
    options = {"distribution": distribution, "rounding": rounding}
    assert_same_move(ops.noise_axpy_, weights(COUNT, dtype), arguments, ([9], [SPAN]), **options)


@every_rounding
@every_distribution
@every_dtype
def test_steps(dtype: torch.dtype, distribution: Distribution, rounding: Rounding) -> None:
    """Two steps of three terms, of which the second leaves its first one out."""
    coefficients = torch.tensor([[1.5e-3, 0.0, -3.0], [0.0, 0.25, 1.0]])
    arguments = (SEEDS.view(2, 3), coefficients, torch.tensor([0.0, 0.013]))
    options = {"distribution": distribution, "rounding": rounding}
    assert_same_move(ops.noise_axpy_, weights(COUNT, dtype), arguments, ([9], [SPAN]), **options)


@every_combination
@every_rounding_of_copies
@every_distribution
@every_dtype
def test_copy(dtype: torch.dtype, distribution: Distribution, rounding: Rounding, case: str) -> None:
    theta = weights(COUNT, dtype)
    results = []
    for source in (theta, theta.cuda()):
        out = torch.full_like(source, float("nan"))
        given = [tensor.to(source.device) for tensor in combination(case)]
        ops.noise_copy_([out], [source], *given, [9], [SPAN], distribution=distribution, rounding=rounding)
        results.append(out)
        assert same_bits(source, theta)
    assert same_bits(results[1], results[0])


def window(decay: float) -> tuple[Tensor, ...]:
    """Three steps of two terms: a step of which one is left out, a step of none, a full one."""
    coefficients = torch.tensor([[0.0, 0.3], [0.0, -0.0], [-1.25, 2.0]])
    weights_of_moments = torch.tensor([0.07, 0.1, 0.2]), torch.tensor([0.06, 0.07, 0.3])
    sizes = torch.tensor(0.03), torch.tensor(1e-4), torch.tensor(decay)
    return SEEDS.view(3, 2), coefficients, *weights_of_moments, *sizes


def windows() -> tuple[Tensor, ...]:
    """Two steps, whose windows of two share a row of those above."""
    seeds, coefficients, *_, eps, _ = window(0.0)
    weights_of_moments = torch.tensor([[0.1, 0.2], [0.15, 0.25]]), torch.tensor([[0.07, 0.3], [0.06, 0.2]])
    return (
        seeds,
        coefficients,
        *weights_of_moments,
        torch.tensor([0.03, 0.02]),
        eps,
        torch.tensor([0.013, 0.0]),
    )


@every_decay
@every_rounding
@every_distribution
@every_dtype
def test_noise_window(
    dtype: torch.dtype, distribution: Distribution, rounding: Rounding, decay: float
) -> None:
    options = {"distribution": distribution, "rounding": rounding}
    assert_same_move(ops.noise_window_, weights(COUNT, dtype), window(decay), ([9], [SPAN]), **options)


@every_rounding
@every_distribution
@every_dtype
def test_noise_window_steps(dtype: torch.dtype, distribution: Distribution, rounding: Rounding) -> None:
    options = {"distribution": distribution, "rounding": rounding}
    assert_same_move(ops.noise_window_, weights(COUNT, dtype), windows(), ([9], [SPAN]), **options)


@pytest.mark.parametrize("columns", [COLUMNS, COLUMNS - 1])
@every_combination
@every_rounding
@every_dtype
def test_factored_axpy(dtype: torch.dtype, rounding: Rounding, case: str, columns: int) -> None:
    """Rows of whole accesses, and rows of which none begins like the one before."""
    seeds, coefficients = combination(case)
    theta, span = weights(ROWS * columns, dtype), (0, ROWS * columns, 0)
    arguments = (*factors(len(seeds), columns=columns), seeds, coefficients, torch.tensor(0.01))
    assert_same_move(ops.factored_axpy_, theta, arguments, ([9], [span]), rounding=rounding)


@every_rounding
@every_dtype
def test_factored_steps(dtype: torch.dtype, rounding: Rounding) -> None:
    coefficients = torch.tensor([[1.5e-3, -3.0], [0.0, 0.25], [0.0, 0.0]])
    arguments = (*factors(6), SEEDS.view(3, 2), coefficients, torch.tensor([0.0, 0.013, 0.01]))
    theta, span = weights(ROWS * COLUMNS, dtype), (0, ROWS * COLUMNS, 0)
    assert_same_move(ops.factored_axpy_, theta, arguments, ([9], [span]), rounding=rounding)


@pytest.mark.parametrize("base", [0, 2**34 + 64, 2**34 + 3])
@every_rounding
@every_dtype
def test_factored_window(dtype: torch.dtype, rounding: Rounding, base: int) -> None:
    theta, span = weights(ROWS * COLUMNS, dtype), (base, ROWS * COLUMNS, 0)
    for steps in (window(0.013), windows()):
        assert_same_move(ops.factored_window_, theta, (*factors(6), *steps), ([9], [span]), rounding=rounding)
