"""Every update rule gives the bits of the CPU on CUDA, for one window and several, with weights of zero."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from support.cuda_comparison import DTYPES, MARKS, device, residuals_of, same_bits, weights
from zoext import ops
from zoext.ops import Distribution, Rounding, Rule

pytestmark = MARKS

COUNT, TERMS, HORIZON = 1027, 2, 3


def windows(count: int) -> list[Tensor]:
    """Of ``count`` steps, or of one where that is None; an estimate of weight zero, and one of zeros."""
    rows = count + HORIZON - 1
    generator = torch.Generator().manual_seed(count)
    coefficients = torch.randn(rows, TERMS, generator=generator)
    coefficients[1] = 0
    first, second = (torch.rand(count, HORIZON, generator=generator) for _ in range(2))
    first[0, 0] = 0
    numbers = [
        first,
        second,
        torch.linspace(0.01, 0.03, count),
        torch.tensor(1e-3),
        torch.full((count,), 0.01),
    ]
    if count == 1:
        numbers = [number.reshape(number.shape[1:]) if number.dim() else number for number in numbers]
    return [torch.arange(rows * TERMS).reshape(rows, TERMS) - 2, coefficients, *numbers]


def moved(on: Any, operator: Any, theta: Tensor, residuals: list[Tensor], *rest: Any, **options: Any) -> Any:
    tensors = list(on(theta, *residuals))
    numbers = [on(*part) if isinstance(part, list) else on(part)[0] for part in rest]
    operator(tensors[:1], *numbers, [9], [(2**34 + 3, COUNT, 0)], residuals=tensors[1:], **options)
    return [tensor.cpu() for tensor in tensors]


def copies(*tensors: Tensor) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


@pytest.mark.parametrize("rounding", Rounding)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("rule", Rule)
def test_dense(rule: Rule, count: int, dtype: torch.dtype, rounding: Rounding) -> None:
    theta = weights(COUNT, dtype)
    for distribution in Distribution:
        options = {"rule": rule, "rounding": rounding, "distribution": distribution}
        arguments = (ops.noise_window_, theta, residuals_of([theta], rounding), *windows(count))
        pairs = zip(moved(device, *arguments, **options), moved(copies, *arguments, **options), strict=True)
        assert all(same_bits(gpu, cpu) for gpu, cpu in pairs), distribution


@pytest.mark.parametrize("rounding", Rounding)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("rule", Rule)
def test_factored(rule: Rule, count: int, dtype: torch.dtype, rounding: Rounding) -> None:
    theta = weights(COUNT, dtype)
    generator = torch.Generator().manual_seed(4)
    terms = (count + HORIZON - 1) * TERMS
    left, right = (torch.randn(terms, 2, length, generator=generator) for length in (13, 79))
    options = {"rule": rule, "rounding": rounding}
    arguments = (ops.factored_window_, theta, residuals_of([theta], rounding), [left], [right])
    arguments = (*arguments, *windows(count))
    pairs = zip(moved(device, *arguments, **options), moved(copies, *arguments, **options), strict=True)
    assert all(same_bits(gpu, cpu) for gpu, cpu in pairs)
