"""``noise_copies_`` and ``factored_linear_`` on CUDA give the bits of the CPU, and make no host wait."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from support.cuda_comparison import (
    COPY_ROUNDINGS,
    DTYPES,
    MARKS,
    SPANS,
    device,
    launches,
    nothing_waits,
    same_bits,
    surroundings_are_untouched,
    unaligned,
    weights,
)
from zoext import ops
from zoext.ops import Distribution, Rounding, Span

pytestmark = MARKS

SEEDS = torch.tensor([12345, -(2**63) + 9, 2**62 + 77])
#: Terms that all, some and none of the copies have; a copy without any; more than a kernel makes at once.
COEFFICIENTS = torch.tensor(
    [[1.5e-3, 0.0, -2.25], [-1.5e-3, 0.0, 0.0], [0.0, 0.0, -0.0], [3.0, 0.0, 0.75], [0.5, 0.0, 1.0]]
)

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def assert_same_copies(
    theta: Tensor, seeds: Tensor, coefficients: Tensor, span: Span, **options: Any
) -> None:
    """At addresses that are aligned and at such that are not."""
    shape = len(coefficients), *theta.shape
    expected = torch.full(shape, float("nan")).to(theta.dtype)
    ops.noise_copies_([expected], [theta], seeds, coefficients, [9], [span], **options)
    out, shifted = (
        torch.full_like(expected, float("nan")).cuda(),
        unaligned(torch.zeros_like(expected).flatten()),
    )
    source, arguments = theta.cuda(), device(seeds, coefficients)
    for to in (out, shifted.view(shape)):
        with nothing_waits(), launches(1):
            ops.noise_copies_([to], [source], *arguments, [9], [span], **options)
        assert same_bits(to, expected)
    assert same_bits(source, theta)
    assert surroundings_are_untouched(shifted)


@pytest.mark.parametrize(("copies", "terms"), [(1, 1), (2, 1), (5, 1), (2, 0), (5, 3)])
@pytest.mark.parametrize("rounding", COPY_ROUNDINGS)
@pytest.mark.parametrize("distribution", Distribution)
@every_dtype
def test_copies(
    dtype: torch.dtype, distribution: Distribution, rounding: Rounding, copies: int, terms: int
) -> None:
    """Of edges only, and of a chunk that is all there whose copies begin at wide addresses, or do not."""
    coefficients = COEFFICIENTS[:copies, :terms].contiguous()
    options: dict[str, Any] = {"distribution": distribution, "rounding": rounding}
    for count in (1003,) if copies != 2 else (1003, 16_392, 16_391):
        theta = weights(count, dtype)
        assert_same_copies(theta, SEEDS[:terms], coefficients, (2**34 + 8, count, 0), **options)


@pytest.mark.parametrize(("count", "span"), SPANS)
@pytest.mark.parametrize("distribution", Distribution)
@every_dtype
def test_spans_of_copies(dtype: torch.dtype, distribution: Distribution, count: int, span: Span) -> None:
    options: dict[str, Any] = {"distribution": distribution, "rounding": Rounding.STOCHASTIC}
    assert_same_copies(weights(count, dtype), SEEDS[:1], COEFFICIENTS[:2, :1].contiguous(), span, **options)


def test_lists_of_copies() -> None:
    """Of all dtypes, with empty tensors, and longer than a table has room for."""
    theta = [weights(t % 13, DTYPES[t % 4], seed=t) for t in range(80)]
    keys, spans = list(range(80)), [ops.span_of(tensor) for tensor in theta]
    arguments = SEEDS[:2], COEFFICIENTS[:3, :2].contiguous()
    expected = [tensor.new_empty((3, *tensor.shape)) for tensor in theta]
    out = [tensor.cuda() for tensor in expected]
    ops.noise_copies_(expected, theta, *arguments, keys, spans)
    ops.noise_copies_(out, device(*theta), *device(*arguments), keys, spans)
    assert all(same_bits(gpu, cpu) for gpu, cpu in zip(out, expected, strict=True))


def linear(
    dtype: torch.dtype,
    *,
    rows: int = 5,
    features: int = 37,
    outputs: int = 29,
    rank: int = 2,
    shared: str = "",
) -> list[Tensor]:
    """The arguments of three copies, of which one has no term, and another one lacks some."""
    generator = torch.Generator().manual_seed(rows + features + outputs)
    shapes = [
        (3, rows, outputs),
        (3, rows, features),
        (1 if "left" in shared else 3, rank, outputs),
        (1 if "right" in shared else 3, rank, features),
    ]
    out, input, left, right = (torch.randn(shape, generator=generator) for shape in shapes)
    coefficients = torch.tensor([[0.3, 0.0, -2.0], [0.0, -0.0, 0.0], [1.5, 1e-3, 0.0]])
    return [out.to(dtype), input.to(dtype), left, right, coefficients]


def assert_same_linear(arguments: list[Tensor]) -> None:
    on_device = [unaligned(tensor.flatten()).view(tensor.shape) for tensor in arguments]
    expected = arguments[0].clone()
    ops.factored_linear_(expected, *arguments[1:])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with launches(2):
            ops.factored_linear_(*on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert same_bits(on_device[0], expected)
    for gpu, cpu in zip(on_device[1:], arguments[1:], strict=True):
        assert same_bits(gpu, cpu)


@pytest.mark.parametrize("shared", ["", "left", "right", "left right"])
@every_dtype
def test_linears(dtype: torch.dtype, shared: str) -> None:
    for rows, features, outputs, rank in ((1, 1, 1, 1), (17, 16, 33, 3), (9, 70, 300, 2), (5, 131, 16, 5)):
        sizes = {"rows": rows, "features": features, "outputs": outputs, "rank": rank}
        assert_same_linear(linear(dtype, **sizes, shared=shared))


def test_values_that_are_not_finite() -> None:
    """Where they do not contribute they do not show."""
    for dtype in DTYPES:
        arguments = linear(dtype)
        arguments[1][:, 0, 3], arguments[0][1, 2, 5] = float("nan"), float("inf")
        arguments[2][1, 0, 2], arguments[3][2, 1, 7] = float("inf"), float("nan")
        arguments[4][2, 1] = 0.0
        assert_same_linear(arguments)


def test_no_rows_and_no_terms() -> None:
    out, input, left, right, coefficients = device(*linear(torch.float32))
    ops.factored_linear_(out[:, :0].contiguous(), input[:, :0].contiguous(), left, right, coefficients)
    before = out.clone()
    ops.factored_linear_(out, input, left[:0].contiguous(), right[:1], coefficients[:, :0].contiguous())
    assert torch.equal(out, before)


def test_factors_elsewhere_are_refused() -> None:
    arguments = linear(torch.float32)
    on_device = device(*arguments)
    for place, name in ((2, "left"), (3, "right")):
        given = [*on_device[:place], arguments[place], *on_device[place + 1 :]]
        with pytest.raises(RuntimeError, match=f"{name} must be on the device of out"):
            ops.factored_linear_(*given)


@pytest.mark.parametrize("operator", ["noise_copies_", "factored_linear_"])
def test_opcheck(operator: str) -> None:
    theta, out = torch.ones(130, device="cuda"), torch.empty(2, 130, device="cuda")
    terms = device(SEEDS, COEFFICIENTS[:2])
    arguments = {
        "noise_copies_": ([out], [theta], *terms, [3], [0, 130, 0], 1, 1),
        "factored_linear_": tuple(device(*linear(torch.float32))),
    }
    torch.library.opcheck(getattr(torch.ops.zoext, operator).default, arguments[operator])
