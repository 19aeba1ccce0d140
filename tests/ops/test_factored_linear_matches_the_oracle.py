"""``factored_linear_`` gives the oracle's bits, for every dtype, shape and value, whatever the number of
threads and the rows and copies beside a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from support import oracle
from support.extreme_values import extreme_values
from zoext import ops

LANES = 16

every_dtype = pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)


class Call(NamedTuple):
    """The arguments; ``out`` is not written to."""

    out: Tensor
    input: Tensor
    left: Tensor
    right: Tensor
    coefficients: Tensor

    def run(self) -> Tensor:
        out = self.out.clone()
        ops.factored_linear_(out, *self[1:])
        return out


def call(
    dtype: torch.dtype,
    *,
    copies: int = 2,
    rows: int = 5,
    features: int = 37,
    outputs: int = 29,
    rank: int = 2,
    coefficients: Tensor | None = None,
    shared: str = "",
) -> Call:
    """``shared`` names the sides that have one factor for all terms."""
    generator = torch.Generator().manual_seed(features + outputs)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if coefficients is None:
        coefficients = torch.tensor([[0.3, -2.0, 0.5], [0.0, 1.5, -0.25]])[:copies]
    terms = coefficients.shape[1]
    return Call(
        normal(copies, rows, outputs).to(dtype),
        normal(copies, rows, features).to(dtype),
        normal(1 if "left" in shared else terms, rank, outputs),
        normal(1 if "right" in shared else terms, rank, features),
        coefficients,
    )


def product(row: NDArray, vector: NDArray) -> NDArray:
    """Lane l adds the products l, l + 16, ... by fused multiply-adds, then lanes are added by halves."""
    padding = -len(row) % LANES
    a, b = (np.pad(side, (0, padding)).reshape(-1, LANES) for side in (row, vector))
    lanes = np.zeros(LANES, row.dtype)
    for some, others in zip(a, b, strict=True):
        lanes = oracle.fused_multiply_add(some, others, lanes)
    while len(lanes) > 1:
        lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
    return lanes[0]


def expected(given: Call) -> Tensor:
    """The formula, a row at a time, in the order of ``csrc/core/factored_linear.h``."""
    out, dtype = given.out.clone(), given.out.dtype
    number = np.float64 if dtype == torch.float64 else np.float32
    left, right = (side.numpy().astype(number) for side in (given.left, given.right))
    for copy, coefficients in zip(range(len(out)), given.coefficients.numpy(), strict=True):
        contributing = [k for k, c in enumerate(coefficients) if c != 0]
        if not contributing:
            continue

        def weight(terms: list[int], q: int, own: NDArray = coefficients) -> NDArray:
            total = np.full(left.shape[2], -0.0, number)
            for k in terms:
                total = oracle.fused_multiply_add(number(own[k]), left[k % len(left), q], total)
            return total

        ranks = range(left.shape[1])
        if len(right) == 1:
            vectors = [(right[0, q], weight(contributing, q)) for q in ranks]
        else:
            vectors = [(right[k, q], weight([k], q)) for k in contributing for q in ranks]
        for t in range(out.shape[1]):
            row = oracle.numbers(given.input[copy, t])
            change = np.full(out.shape[2], -0.0, number)
            with np.errstate(all="ignore"):
                for vector, own_weight in vectors:
                    change = oracle.fused_multiply_add(product(row, vector), own_weight, change)
                total = oracle.numbers(out[copy, t]) + change
            out[copy, t] = torch.from_numpy(total).to(dtype)
    return out


# Features and outputs below, at and above the lanes and packs of every instruction set.
SHAPES = [(1, 1), (3, 70), (15, 16), (16, 8), (17, 33), (64, 31), (100, 300), (131, 5)]


@pytest.mark.parametrize("shared", ["", "left", "right", "left right"])
@every_dtype
def test_shapes(dtype: torch.dtype, shared: str, instruction_set: str) -> None:
    for number, (features, outputs) in enumerate(SHAPES):
        if dtype == torch.float64 and outputs > 50:
            continue  # the oracle's arithmetic is in fractions
        rows, rank = 1 + number, 1 + number % 3
        given = call(dtype, rows=rows, features=features, outputs=outputs, rank=rank, shared=shared)
        oracle.assert_same_bits(given.run(), expected(given), f"{features} features, {outputs} outputs")


@every_dtype
def test_one_term_and_one_copy(dtype: torch.dtype, instruction_set: str) -> None:
    for copies, rows in ((1, 1), (1, 31), (3, 2)):
        coefficients = torch.tensor([[0.7], [-0.7], [1e-3]])[:copies]
        given = call(dtype, copies=copies, rows=rows, coefficients=coefficients)
        oracle.assert_same_bits(given.run(), expected(given))


@pytest.mark.parametrize("shared", ["", "right"])
@every_dtype
def test_zero_coefficients_leave_terms_and_copies_out(dtype: torch.dtype, shared: str) -> None:
    """Also where input and factors are not finite, and out holds a NaN with a payload."""
    coefficients = torch.tensor([[0.0, -0.0, 0.0], [0.0, 0.5, 0.0], [0.5, 0.0, 0.0]])
    given = call(dtype, copies=3, coefficients=coefficients, shared=shared)
    given.input[0, 1, 2] = float("nan")
    given.left[2, 1, 3] = float("inf")
    if not shared:
        given.right[2, 0, 5] = float("nan")
    oracle.bits(given.out)[0, 2, :7] = oracle.bits(torch.tensor(float("nan")).to(dtype)) + 1
    out = given.run()
    assert torch.equal(oracle.bits(out[0]), oracle.bits(given.out[0]))
    assert out[1:].isfinite().all()
    right = given.right if shared else given.right[1:2]
    alone = Call(given.out[1:2], given.input[1:2], given.left[1:2], right, torch.tensor([[0.5]]))
    oracle.assert_same_bits(out[1:2], alone.run())


@every_dtype
def test_extreme_values(dtype: torch.dtype, instruction_set: str) -> None:
    extreme = extreme_values(dtype)
    given = call(dtype, copies=1, rows=len(extreme), features=19, outputs=21)
    given.input[0, :, 4], given.out[0, :, 3] = extreme, extreme
    oracle.assert_same_bits(given.run(), expected(given))
    for size in (1e-42, 3e38, float("inf")):
        given.left[1, 1, ::5], given.right[2, 0, ::7] = size, -size
        oracle.assert_same_bits(given.run(), expected(given))


@every_dtype
def test_threads_rows_and_copies(dtype: torch.dtype, set_threads: Callable[[int], None]) -> None:
    for shared in ("", "right"):
        given = call(dtype, copies=2, rows=131, features=150, outputs=530, shared=shared)
        set_threads(1)
        whole = given.run()
        for threads in (2, 7):
            set_threads(threads)
            oracle.assert_same_bits(given.run(), whole, f"{threads} threads")
        for copy, begin, end in ((0, 0, 1), (1, 7, 12), (1, 130, 131), (0, 3, 40)):
            some = (slice(copy, copy + 1), slice(begin, end))
            out, input = (side[some].contiguous() for side in given[:2])
            alone = Call(out, input, *given[2:4], given.coefficients[copy : copy + 1]).run()
            oracle.assert_same_bits(alone, whole[some], f"copy {copy}, rows {begin} to {end}")


def test_it_is_the_layer_of_the_displaced_weight() -> None:
    given = call(torch.float64, rows=17, features=50, outputs=40, rank=3)
    weight = torch.einsum("ck,kri,krj->cij", *(side.double() for side in (given[4], given[2], given[3])))
    added = given.run() - given.out
    torch.testing.assert_close(
        added, torch.einsum("ctj,cij->cti", given.input, weight), rtol=1e-12, atol=1e-12
    )


def test_nothing_beyond_the_tensors_is_used_or_written(instruction_set: str) -> None:
    """Guards on both sides of out, and NaN on both sides of what is read, which would show in out."""

    def within(tensor: Tensor, start: int, around: float) -> tuple[Tensor, Tensor]:
        buffer = torch.full((start + tensor.numel() + 70,), around, dtype=tensor.dtype)
        inside = buffer[start : start + tensor.numel()].view(tensor.shape)
        inside.copy_(tensor)
        return buffer, inside

    for dtype in oracle.DTYPES:
        for features, outputs, start in ((1, 1, 1), (5, 3, 2), (33, 17, 5), (40, 300, 1)):
            given = call(dtype, features=features, outputs=outputs, rows=3)
            buffer, out = within(given.out, start, 33.0)
            ops.factored_linear_(
                out, *(within(side, start, float("nan"))[1] for side in given[1:4]), given[4]
            )
            oracle.assert_same_bits(out, given.run())
            assert (buffer[:start] == 33).all()
            assert (buffer[start + out.numel() :] == 33).all()


@every_dtype
def test_flushing_subnormals_to_zero(dtype: torch.dtype, instruction_set: str) -> None:
    given = call(dtype, features=33, outputs=19)
    given = given._replace(left=given.left * 1e-30, right=given.right * 1e-12, out=given.out * 0)
    before = given.run()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals to zero")
    try:
        actual = given.run()
    finally:
        torch.set_flush_denormal(False)
    oracle.assert_same_bits(actual, before)
