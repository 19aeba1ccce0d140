"""``noise_copies_`` gives each copy the bits of ``noise_copy_`` with its row of coefficients, whatever the
dtype, the place, the instruction set and the number of threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from support import oracle
from support.extreme_values import weights, with_payloads
from zoext import ops
from zoext.ops import Distribution, Rounding, Span

SEEDS = torch.tensor([3, -1, 2**62 + 5, -(2**63)])
# Terms that no copy has, that one has, and that all have; a copy without any.
COEFFICIENTS = torch.tensor(
    [
        [0.3, 0.0, -2.0, 0.0],
        [-0.3, 0.0, 0.0, 1e-7],
        [0.0, 0.0, -0.0, 0.0],
        [7.0, 0.0, 0.5, 0.0],
        [3e-3] + [0.0] * 3,
    ]
)
KEYS = [6, 2**31 + 7, 3, 0]
SPANS = [(3, 11 * 23, 0), (1001, 37, 90), (2**35 - 50, 41, 60), (0, 1, 0)]

every_dtype = pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
roundings = pytest.mark.parametrize("rounding", [Rounding.NEAREST, Rounding.STOCHASTIC])


def some_theta(dtype: torch.dtype) -> list[Tensor]:
    """Weights of all kinds, in several runs, more than a tile, and none."""
    some = with_payloads(weights(dtype))
    many = some.repeat(11)
    return [many[: 11 * 23].reshape(11, 23), some, many[:2009].reshape(7, 7, 41), some[:0].reshape(0, 5)]


def copies(
    theta: Sequence[Tensor],
    seeds: Tensor,
    coefficients: Tensor,
    keys: Sequence[int] = KEYS,
    spans: Sequence[Span] = SPANS,
    **options: Any,
) -> list[Tensor]:
    out = [torch.full((len(coefficients), *t.shape), 7.0, dtype=t.dtype) for t in theta]
    ops.noise_copies_(out, theta, seeds, coefficients, keys, spans, **options)
    return out


def assert_single_copies(
    out: Sequence[Tensor],
    theta: Sequence[Tensor],
    seeds: Tensor,
    coefficients: Tensor,
    keys: Sequence[int] = KEYS,
    spans: Sequence[Span] = SPANS,
    **options: Any,
) -> None:
    for c, row in enumerate(coefficients):
        expected = [torch.empty_like(t) for t in theta]
        ops.noise_copy_(expected, theta, seeds, row, keys, spans, **options)
        for t, single in enumerate(expected):
            oracle.assert_same_bits(out[t][c], single, f"copy {c} of tensor {t}")


@pytest.mark.parametrize("distribution", Distribution)
@roundings
@every_dtype
def test_copies(
    dtype: torch.dtype, rounding: Rounding, distribution: Distribution, instruction_set: str
) -> None:
    theta = some_theta(dtype)
    before = [tensor.clone() for tensor in theta]
    options: dict[str, Any] = {"distribution": distribution, "rounding": rounding}
    for count, terms in ((1, 1), (2, 1), (3, 3), (5, 4), (2, 0)):
        arguments = theta, SEEDS[:terms], COEFFICIENTS[:count, :terms].contiguous()
        assert_single_copies(copies(*arguments, **options), *arguments, **options)
    for tensor, same in zip(theta, before, strict=True):
        oracle.assert_same_bits(tensor, same)


def test_more_copies_than_the_cache_holds(instruction_set: str) -> None:
    """From theta of all dtypes in one call."""
    theta = [weights(dtype)[:257] for dtype in oracle.DTYPES]
    coefficients = torch.linspace(-1, 1, 21)[:, None] * torch.tensor([1.0, -0.5])
    arguments = theta, SEEDS[:2], coefficients, [1, 2, 3, 4], [(255 + t, 257, 0) for t in range(4)]
    assert_single_copies(copies(*arguments), *arguments)


@every_dtype
def test_threads_and_shards(dtype: torch.dtype, set_threads: Callable[[int], None]) -> None:
    """Blocks of a matrix have the bits of the whole, from any number of threads."""
    rows, columns = 70, 600
    theta = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    terms = SEEDS[:2], COEFFICIENTS[:2, :2].contiguous()
    options: dict[str, Any] = {"rounding": Rounding.STOCHASTIC}
    set_threads(1)
    (whole,) = copies([theta], *terms, [5], [(0, theta.numel(), 0)], **options)
    for threads in (2, 7):
        set_threads(threads)
        (again,) = copies([theta], *terms, [5], [(0, theta.numel(), 0)], **options)
        oracle.assert_same_bits(again, whole, f"{threads} threads")
    grid = [
        (slice(a, b), slice(c, d)) for a, b in ((0, 1), (1, 70)) for c, d in ((0, 3), (3, 517), (517, 600))
    ]
    blocks = [theta[block].contiguous() for block in grid]
    spans = [(r.start * columns + c.start, c.stop - c.start, columns) for r, c in grid]
    for out, (r, c) in zip(copies(blocks, *terms, [5] * 6, spans, **options), grid, strict=True):
        oracle.assert_same_bits(out, whole[:, r, c].contiguous(), f"rows {r}, columns {c}")


def test_nothing_beyond_the_copies_is_written(instruction_set: str) -> None:
    for dtype in oracle.DTYPES:
        for size, start in ((1, 1), (17, 3), (300, 5)):
            buffer = torch.full((start + 3 * size + 70,), 33.0, dtype=dtype)
            out = buffer[start : start + 3 * size].view(3, size)
            arguments = SEEDS[:1], torch.tensor([[1.0], [0.5], [-1.0]]), [0], [(start, size, 0)]
            ops.noise_copies_([out], [torch.ones(size, dtype=dtype)], *arguments)
            assert (buffer[:start] == 33).all()
            assert (buffer[start + 3 * size :] == 33).all()
            assert not (out == 33).any()


def test_no_copies_and_no_tensors() -> None:
    theta = [torch.ones(5)]
    ops.noise_copies_([torch.empty(0, 5)], theta, SEEDS, torch.empty(0, 4), [0], [(0, 5, 0)])
    ops.noise_copies_([], [], SEEDS, torch.ones(2, 4), [], [])
