"""No bit of a factored operator depends on threads, instruction sets, grouping into lists, or on how a
matrix is cut, when its factors are cut alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from support import oracle
from zoext import _C, ops
from zoext.ops import Rounding, Span

every_dtype = pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)


class Matrix(NamedTuple):
    """A matrix and the factors of four terms: float32 [4, rank, rows] and [1, rank, columns]."""

    theta: Tensor
    left: Tensor
    right: Tensor

    def block(self, rows: slice, columns: slice) -> Matrix:
        return Matrix(
            self.theta[rows, columns].contiguous(),
            self.left[..., rows].contiguous(),
            self.right[..., columns].contiguous(),
        )


def matrix(rows: int, columns: int, dtype: torch.dtype, *, rank: int = 2) -> Matrix:
    generator = torch.Generator().manual_seed(rows + columns)
    theta, left, right = (
        torch.randn(shape, generator=generator)
        for shape in ((rows, columns), (4, rank, rows), (1, rank, columns))
    )
    return Matrix(theta.to(dtype), left, right)


class Change(NamedTuple):
    """Everything of a call of ``factored_axpy_``, or of ``factored_window_`` over two steps of two terms,
    but the tensors: of one step, or of two with half as many terms."""

    adam: bool
    steps: int
    rounding: Rounding

    def apply(
        self, matrices: Sequence[Matrix], keys: Sequence[int], spans: Sequence[Span] | None = None
    ) -> list[Tensor]:
        """Moved copies of the matrices, with their residuals where there are some."""
        moved = [m.theta.clone() for m in matrices]
        left, right = [m.left for m in matrices], [m.right for m in matrices]
        spans = [ops.span_of(tensor) for tensor in moved] if spans is None else spans
        seeds, coefficients = torch.tensor([-5, 2**62, 7, 8]), torch.tensor([0.25, -1.5, 0.0, 3e-3])
        decay, lr = torch.tensor([0.03, 0.01]), torch.tensor([0.02, 0.05])
        weights = [
            torch.tensor([[0.3, 0.2, 0.4], [0.5, 0.1, 0.2]]),
            torch.tensor([[0.1, 0.4, 0.6], [0.2] * 3]),
        ]
        is_residual = self.rounding == Rounding.RESIDUAL
        residuals = [oracle.some_residuals(t) for t in moved] if is_residual else []
        options: dict[str, Any] = {"rounding": self.rounding, "residuals": residuals}
        if self.adam and self.steps == 2:  # two windows of three rows of one term
            seeds, coefficients = seeds.reshape(4, 1), coefficients.reshape(4, 1)
        elif self.adam:
            seeds, coefficients = seeds.reshape(2, 2), coefficients.reshape(2, 2)
            weights = [weight[0, :2] for weight in weights]
        elif self.steps == 2:
            seeds, coefficients = seeds.reshape(2, 2), coefficients.reshape(2, 2)
        if self.steps == 1:
            decay, lr = decay[0], lr[0]
        numbers = [seeds, coefficients]
        if self.adam:
            numbers += [*weights, lr, torch.tensor(1e-3)]
        operator: Callable = ops.factored_window_ if self.adam else ops.factored_axpy_
        operator(moved, left, right, *numbers, decay, keys, spans, **options)
        if is_residual:
            return [oracle.with_residual(*parts) for parts in zip(moved, residuals, strict=True)]
        return moved


CHANGES = [
    Change(adam, steps, rounding) for adam in (False, True) for steps in (1, 2) for rounding in Rounding
]


def assert_all_same(actual: Sequence[Tensor], expected: Sequence[Tensor], what: object) -> None:
    for number, (a, e) in enumerate(zip(actual, expected, strict=True)):
        oracle.assert_same_bits(a, e, f"{what}, tensor {number}")


@every_dtype
def test_threads(dtype: torch.dtype, set_threads: Callable[[int], None]) -> None:
    """On sizes that give seven threads work, of which some begin within a matrix and within a row."""
    matrices = [matrix(*shape, dtype) for shape in ((3, 5), (401, 650), (0, 4), (30_001, 3), (1, 70_001))]
    for change in CHANGES:
        set_threads(1)
        alone = change.apply(matrices, range(5))
        for threads in (2, 7):
            set_threads(threads)
            assert_all_same(change.apply(matrices, range(5)), alone, (change, threads))


@every_dtype
def test_instruction_sets(dtype: torch.dtype, instruction_set: str) -> None:
    shapes = ((3, 5), (7, 300), (0, 4), (401, 3), (1, 2001), (2001, 1), (90, 17), (33, 64))
    matrices = [matrix(*shape, dtype, rank=3) for shape in shapes]
    for change in CHANGES:
        _C.use_instruction_set(instruction_set)
        actual = change.apply(matrices, range(8))
        _C.use_instruction_set("scalar")
        assert_all_same(actual, change.apply(matrices, range(8)), change)


@every_dtype
def test_lists_and_single_calls(dtype: torch.dtype) -> None:
    """Also of several ranks."""
    matrices = [
        matrix(7, 5, dtype),
        matrix(20, 1000, dtype, rank=1),
        matrix(3, 0, dtype),
        matrix(1030, 3, dtype),
    ]
    keys = [9, 2**32 - 1, 0, 5]
    for change in CHANGES:
        singly = [change.apply([m], [key])[0] for m, key in zip(matrices, keys, strict=True)]
        assert_all_same(change.apply(matrices, keys), singly, change)


def test_lists_may_mix_dtypes() -> None:
    matrices = [matrix(21, 37, dtype) for dtype in oracle.DTYPES]
    for change in CHANGES:
        singly = [change.apply([m], [key])[0] for key, m in enumerate(matrices)]
        assert_all_same(change.apply(matrices, range(4)), singly, change)


@every_dtype
def test_blocks_of_a_matrix(dtype: torch.dtype, instruction_set: str) -> None:
    """Rows and columns cut anywhere: with the factors cut alike, and a span that finds the rounding bits."""
    rows, columns = 23, 150
    whole = matrix(rows, columns, dtype)
    grid = [
        (slice(top, bottom), slice(left, right))
        for top, bottom in ((0, 1), (1, 8), (8, 23))
        for left, right in ((0, 1), (1, 4), (4, 67), (67, 131), (131, 150))
    ]
    spans = [(r.start * columns + c.start, c.stop - c.start, columns) for r, c in grid]
    for change in CHANGES:
        expected = change.apply([whole], [6])[0]
        moved = change.apply([whole.block(*block) for block in grid], [6] * len(grid), spans)
        assert_all_same(moved, [expected[block] for block in grid], change)


@every_dtype
def test_far_blocks(dtype: torch.dtype) -> None:
    """Rows of a matrix with more than 2**35 elements, on each side of the carry of the rounding bits'
    counter: only those bits depend on the place."""
    whole = matrix(3, 41, dtype)
    for base, stride in ((2**35 - 50, 41), (2**35 - 50, 60), (2**33 + 1, 2**39)):
        rows = [whole.block(slice(row, row + 1), slice(None)) for row in range(3)]
        spans = [(base + row * stride, 41, 0) for row in range(3)]
        for change in CHANGES:
            singly = torch.cat(change.apply(rows, [8] * 3, spans))
            oracle.assert_same_bits(change.apply([whole], [8], [(base, 41, stride)])[0], singly, str(change))
    near, far = (CHANGES[0].apply([whole], [8], [(base, 123, 0)])[0] for base in (0, 2**40))
    oracle.assert_same_bits(near, far)


@every_dtype
def test_flushing_subnormals_to_zero(dtype: torch.dtype, instruction_set: str) -> None:
    """Of weights, factors and their products."""
    theta, left, right = matrix(9, 37, dtype)
    small = (theta.double() * torch.finfo(dtype).tiny).to(dtype)
    matrices = [Matrix(small, left * 1e-20, right * 1e-20), Matrix(small, left * 1e-39, right)]
    for change in CHANGES:
        expected = change.apply(matrices, [3, 4])
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor cannot flush subnormals to zero")
        try:
            actual = change.apply(matrices, [3, 4])
        finally:
            torch.set_flush_denormal(False)
        assert_all_same(actual, expected, change)
