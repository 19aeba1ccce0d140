"""No bit depends on threads, instruction sets, grouping into lists, or on how a parameter is cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from support import oracle
from zoext import _C, ops
from zoext.ops import Distribution, Rounding, Span, Stream


class Combination(NamedTuple):
    """Everything of a call of ``noise_axpy_`` but the tensors."""

    terms: int
    decay: float
    distribution: Distribution
    rounding: Rounding

    @property
    def seeds(self) -> list[int]:
        return [2**62 + 11, -5, 7][: self.terms]

    @property
    def coefficients(self) -> list[float]:
        return [0.25, -1.5, 3e-3][: self.terms]

    def move_(
        self,
        theta: Sequence[Tensor],
        residuals: Sequence[Tensor],
        keys: Sequence[int],
        spans: Sequence[Span],
    ) -> None:
        ops.noise_axpy_(
            theta,
            torch.tensor(self.seeds, dtype=torch.int64),
            torch.tensor(self.coefficients),
            torch.tensor(self.decay),
            keys,
            spans,
            distribution=self.distribution,
            rounding=self.rounding,
            residuals=residuals,
        )

    def expected(self, theta: Tensor, residual: Tensor | None, key: int, span: Span) -> Tensor:
        return oracle.combination(
            theta,
            self.seeds,
            self.coefficients,
            self.decay,
            key=key,
            span=span,
            distribution=self.distribution,
            rounding=self.rounding,
            residual=residual,
        )


class Combinations(NamedTuple):
    """Everything of a call of ``noise_axpy_`` over three steps but the tensors: the second does nothing."""

    distribution: Distribution
    rounding: Rounding

    seeds = ((2**62 + 11, -5), (6, 5), (7, 2**40))
    coefficients = ((0.25, -1.5), (0.0, 0.0), (3e-3, 0.0))
    decay = (0.03, 0.0, 0.0)

    def move_(
        self,
        theta: Sequence[Tensor],
        residuals: Sequence[Tensor],
        keys: Sequence[int],
        spans: Sequence[Span],
    ) -> None:
        ops.noise_axpy_(
            theta,
            *(torch.tensor(numbers) for numbers in (self.seeds, self.coefficients, self.decay)),
            keys,
            spans,
            distribution=self.distribution,
            rounding=self.rounding,
            residuals=residuals,
        )

    def expected(self, theta: Tensor, residual: Tensor | None, key: int, span: Span) -> Tensor:
        for numbers in zip(self.seeds, self.coefficients, self.decay, strict=True):
            theta = oracle.combination(
                theta,
                *numbers,
                key=key,
                span=span,
                distribution=self.distribution,
                rounding=self.rounding,
                residual=residual,
            )
        return theta


class AdamStep(NamedTuple):
    """Everything of a call of ``noise_window_`` but the tensors, over a window of three steps."""

    terms: int
    distribution: Distribution
    rounding: Rounding

    @property
    def seeds(self) -> list[list[int]]:
        return [[2**62 + 11, 4], [-5, 2**40], [7, -1]] if self.terms == 2 else [[2**62 + 11], [-5], [7]]

    @property
    def window(self) -> oracle.Window:
        coefficients = [[0.25, 3.0][: self.terms], [-1.5, 0.0][: self.terms], [3e-3, -0.4][: self.terms]]
        return oracle.Window(coefficients, [0.1, 0.2, 0.4], [0.3, 0.1, 0.2], lr=0.02, eps=1e-3, decay=0.03)

    def move_(
        self,
        theta: Sequence[Tensor],
        residuals: Sequence[Tensor],
        keys: Sequence[int],
        spans: Sequence[Span],
    ) -> None:
        ops.noise_window_(
            theta,
            torch.tensor(self.seeds),
            *(torch.tensor(numbers) for numbers in self.window),
            keys,
            spans,
            distribution=self.distribution,
            rounding=self.rounding,
            residuals=residuals,
        )

    def expected(self, theta: Tensor, residual: Tensor | None, key: int, span: Span) -> Tensor:
        return oracle.noise_window(
            theta,
            self.seeds,
            self.window,
            key=key,
            span=span,
            distribution=self.distribution,
            rounding=self.rounding,
            residual=residual,
        )


class AdamSteps(NamedTuple):
    """Everything of a call of ``noise_window_`` over three windows of two steps but the tensors."""

    distribution: Distribution
    rounding: Rounding

    seeds = ((2**62 + 11, 4), (-5, 2**40), (7, -1), (8, 9))
    coefficients = ((0.25, 3.0), (-1.5, 0.0), (3e-3, -0.4), (1.0, -2.0))
    first_weights, second_weights = ((0.1, 0.2), (0.4, 0.3), (0.2, 0.5)), ((0.3, 0.1), (0.2, 0.2), (0.5, 0.6))
    lr, eps, decay = (0.02, 0.0, 0.01), 1e-3, (0.03, 0.01, 0.0)

    def windows(self) -> Iterator[tuple[Sequence[Sequence[int]], oracle.Window]]:
        for s in range(3):
            weights = self.first_weights[s], self.second_weights[s]
            rates = self.lr[s], self.eps, self.decay[s]
            yield self.seeds[s : s + 2], oracle.Window(self.coefficients[s : s + 2], *weights, *rates)

    def move_(
        self,
        theta: Sequence[Tensor],
        residuals: Sequence[Tensor],
        keys: Sequence[int],
        spans: Sequence[Span],
    ) -> None:
        weights = self.first_weights, self.second_weights
        numbers = self.seeds, self.coefficients, *weights, self.lr, self.eps, self.decay
        ops.noise_window_(
            theta,
            *(torch.tensor(some) for some in numbers),
            keys,
            spans,
            distribution=self.distribution,
            rounding=self.rounding,
            residuals=residuals,
        )

    def expected(self, theta: Tensor, residual: Tensor | None, key: int, span: Span) -> Tensor:
        for seeds, window in self.windows():
            theta = oracle.noise_window(
                theta,
                seeds,
                window,
                key=key,
                span=span,
                distribution=self.distribution,
                rounding=self.rounding,
                residual=residual,
            )
        return theta


Change = Combination | Combinations | AdamStep | AdamSteps


def apply(
    change: Change, theta: Sequence[Tensor], keys: Sequence[int], spans: Sequence[Span]
) -> list[Tensor]:
    """Moved copies of theta, with their residuals where there are some."""
    moved = [tensor.clone() for tensor in theta]
    if change.rounding != Rounding.RESIDUAL:
        change.move_(moved, [], keys, spans)
        return moved
    residuals = [oracle.some_residuals(tensor) for tensor in theta]
    change.move_(moved, residuals, keys, spans)
    return [oracle.with_residual(*parts) for parts in zip(moved, residuals, strict=True)]


ADAM_STEPS: list[Change] = [
    AdamStep(1, Distribution.NORMAL, Rounding.STOCHASTIC),
    AdamStep(1, Distribution.SIGN, Rounding.NEAREST),
    AdamStep(2, Distribution.NORMAL, Rounding.NEAREST),
    AdamStep(2, Distribution.SIGN, Rounding.STOCHASTIC),
    AdamStep(2, Distribution.NORMAL, Rounding.RESIDUAL),
]
SEVERAL_STEPS: list[Change] = [
    Combinations(Distribution.NORMAL, Rounding.STOCHASTIC),
    Combinations(Distribution.SIGN, Rounding.RESIDUAL),
    AdamSteps(Distribution.NORMAL, Rounding.RESIDUAL),
    AdamSteps(Distribution.SIGN, Rounding.STOCHASTIC),
]
# No terms, one and several, each with both distributions and every rounding.
NO_TERMS, ONE_TERM, THREE_TERMS = (
    [
        Combination(terms, decay, distribution, rounding)
        for distribution in Distribution
        for rounding in Rounding
    ]
    for terms, decay in ((0, 0.03), (1, 0.0), (3, 0.03))
)
CHANGES: list[Change] = [*NO_TERMS, *ONE_TERM, *THREE_TERMS, *ADAM_STEPS, *SEVERAL_STEPS]
MARGIN = 1200
every_dtype = pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)


def weights(*shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def assert_all_same(actual: Sequence[Tensor], expected: Sequence[Tensor], what: object) -> None:
    for number, (a, e) in enumerate(zip(actual, expected, strict=True)):
        oracle.assert_same_bits(a, e, f"{what}, tensor {number}")


@every_dtype
def test_threads(dtype: torch.dtype, set_threads: Callable[[int], None]) -> None:
    """On sizes that give seven threads work, of which some begin within a tensor."""
    theta = [weights(size, dtype=dtype) for size in (5, 260_003, 1, 0, 70_001)]
    keys, spans = [4, 3, 2, 1, 0], [(i, max(t.numel(), 1), 0) for i, t in enumerate(theta)]
    for change in CHANGES:
        set_threads(1)
        alone = apply(change, theta, keys, spans)
        for threads in (2, 7):
            set_threads(threads)
            assert_all_same(apply(change, theta, keys, spans), alone, (change, threads))


@every_dtype
def test_instruction_sets(dtype: torch.dtype, instruction_set: str) -> None:
    theta = [weights(size, dtype=dtype) for size in (3001, 17, 1, 1024, 0, 129)]
    keys, spans = list(range(6)), [(31 * i, max(t.numel(), 1), 0) for i, t in enumerate(theta)]
    for change in CHANGES:
        _C.use_instruction_set(instruction_set)
        actual = apply(change, theta, keys, spans)
        _C.use_instruction_set("scalar")
        assert_all_same(actual, apply(change, theta, keys, spans), change)


@pytest.mark.parametrize("distribution", Distribution)
@every_dtype
def test_instruction_sets_write_the_same_field(
    dtype: torch.dtype, distribution: Distribution, instruction_set: str
) -> None:
    """``normal_`` against the core, element by element."""
    start, count, key, stream = 2**34 - 517, 1203, 2**32 - 1, 2**32 - 2
    out = torch.empty(count, dtype=dtype)
    span = (start, count, 0)
    ops.normal_([out], torch.tensor([-3]), [key], [span], stream=stream, distribution=distribution)
    core = _C.signs if distribution == Distribution.SIGN else _C.normals
    field = core(2**64 - 3, key=key, stream=stream, start=start, count=count)
    oracle.assert_same_bits(out, oracle.round_to(field, dtype))


@every_dtype
def test_lists_and_single_calls(dtype: torch.dtype) -> None:
    theta = [weights(*shape, dtype=dtype) for shape in ((7, 5), (20_000,), (), (3, 0), (1030, 3), (64,))]
    keys = [9, 2**32 - 1, 0, 5, 5, 1]
    spans = [(3 * i, max(t.numel(), 1), 0) for i, t in enumerate(theta)]
    for change in CHANGES:
        singly = [apply(change, [t], [k], [s])[0] for t, k, s in zip(theta, keys, spans, strict=True)]
        assert_all_same(apply(change, theta, keys, spans), singly, change)


def test_lists_may_mix_dtypes() -> None:
    theta = [weights(777, dtype=dtype) for dtype in oracle.DTYPES]
    keys, spans = [0, 1, 2, 3], [ops.span_of(t) for t in theta]
    for change in CHANGES:
        singly = [apply(change, [t], [k], [s])[0] for t, k, s in zip(theta, keys, spans, strict=True)]
        assert_all_same(apply(change, theta, keys, spans), singly, change)


@every_dtype
def test_one_dimensional_shards(dtype: torch.dtype, instruction_set: str) -> None:
    """Any cut, also into empty shards and single elements."""
    whole = weights(5003, dtype=dtype)
    cuts = [0, 0, 1, 2, 5, 63, 64, 190, 1024, 1025, 2049, 4999, 5003, 5003]
    shards = list(pairwise(cuts))
    parts = [whole[begin:end] for begin, end in shards]
    spans = [(begin, max(end - begin, 1), 0) for begin, end in shards]
    for change in CHANGES:
        expected = apply(change, [whole], [6], [ops.span_of(whole)])[0]
        moved = apply(change, parts, [6] * len(parts), spans)
        oracle.assert_same_bits(torch.cat(moved), expected, str(change))


@every_dtype
def test_two_dimensional_blocks(dtype: torch.dtype, instruction_set: str) -> None:
    """Rows and columns cut anywhere: a run per row, the width of the whole as stride."""
    rows, columns = 23, 150
    whole = weights(rows, columns, dtype=dtype)
    grid = [
        (slice(top, bottom), slice(left, right))
        for top, bottom in ((0, 1), (1, 8), (8, 23))
        for left, right in ((0, 1), (1, 4), (4, 67), (67, 131), (131, 150))
    ]
    blocks = [whole[block].contiguous() for block in grid]
    spans = [(r.start * columns + c.start, c.stop - c.start, columns) for r, c in grid]
    for change in CHANGES:
        expected = apply(change, [whole], [6], [ops.span_of(whole)])[0]
        moved = apply(change, blocks, [6] * len(blocks), spans)
        assert_all_same(moved, [expected[block] for block in grid], change)


@cache
def expected_about(border: int, dtype: torch.dtype, change: Change) -> tuple[Tensor, Tensor]:
    """Weights about an index far out, and what the oracle makes of them."""
    theta = weights(2 * MARGIN, dtype=dtype)
    residual, _ = oracle.equal_residuals(theta, change.rounding)
    moved = change.expected(theta, residual, key=8, span=(border - MARGIN, 2 * MARGIN, 0))
    return theta, oracle.with_residual(moved, residual)


@pytest.mark.parametrize("border", [32, 34, 35, 39, 62], ids=lambda border: f"2^{border}")
@every_dtype
def test_far_elements(dtype: torch.dtype, border: int, instruction_set: str) -> None:
    """Across the indices where 32 bits end and where the block counter carries: at 2**34 for normals, at
    2**35 for rounding bits, at 2**39 for signs. A tile that fills its buffer may start anywhere."""
    for change in (*THREE_TERMS, *ADAM_STEPS, *SEVERAL_STEPS):
        theta, expected = expected_about(2**border, dtype, change)
        for start in (0, 1, MARGIN - 581, MARGIN - 448, MARGIN - 192, MARGIN - 64, MARGIN - 3, MARGIN):
            span = (2**border - MARGIN + start, theta.numel(), 0)
            moved = apply(change, [theta[start:]], [8], [span])[0]
            oracle.assert_same_bits(moved, expected[start:], f"{change}, start {start}")


@every_dtype
def test_far_blocks(dtype: torch.dtype) -> None:
    """Rows of a matrix with more than 2**34 elements, one run on each side of the carry and of 2**40."""
    theta = weights(3, 41, dtype=dtype)
    for base, stride in ((2**34 - 50, 41), (2**34 - 50, 60), (2**33 + 1, 2**39)):
        span = (base, 41, stride)
        expected_at = [(base + row * stride, 41, 0) for row in range(3)]
        for change in (*THREE_TERMS, *ADAM_STEPS, *SEVERAL_STEPS):
            rows = torch.stack(apply(change, list(theta), [8] * 3, expected_at))
            oracle.assert_same_bits(apply(change, [theta], [8], [span])[0], rows, str(change))


@every_dtype
def test_every_start_and_length(dtype: torch.dtype, instruction_set: str) -> None:
    """Starts 0 to 67 and lengths 0 to 67, also at addresses that no vector is aligned to."""
    whole = weights(160, dtype=dtype)
    lengths = list(range(68))
    packed = torch.empty(sum(lengths), dtype=dtype)
    combinations = ONE_TERM if dtype in oracle.FORMATS else ONE_TERM[::3]  # only 16 bits are rounded
    for change in (*combinations, *ADAM_STEPS, *SEVERAL_STEPS):
        expected = apply(change, [whole], [2], [ops.span_of(whole)])[0]
        for start in range(68):
            torch.cat([whole[start : start + length] for length in lengths], out=packed)
            spans = [(start, max(length, 1), 0) for length in lengths]
            residual, _ = oracle.equal_residuals(packed, change.rounding)
            residuals: Sequence[Tensor] = []
            if residual is not None:
                residuals = residual.split(lengths) if residual.numel() else [residual] * len(lengths)
            change.move_(packed.split(lengths), residuals, [2] * len(lengths), spans)
            wanted = torch.cat([expected[start : start + length] for length in lengths])
            moved = oracle.with_residual(packed, residual)
            oracle.assert_same_bits(moved, wanted, f"{change}, start {start}")


def test_streams_keep_their_numbers() -> None:
    """Streams are part of the file format of recorded runs: their numbers never change."""
    assert [(stream.name, stream.value) for stream in Stream] == [
        ("DENSE", 0),
        ("LEFT_FACTOR", 1),
        ("RIGHT_FACTOR", 2),
        ("ROUNDING", 3),
        ("POWER_ITERATION", 4),
        ("SEED", 5),
        ("SIGN", 6),
    ]


@every_dtype
def test_flushing_subnormals_to_zero(dtype: torch.dtype, instruction_set: str) -> None:
    theta = [(weights(333, dtype=torch.float64) * torch.finfo(dtype).tiny).to(dtype)]
    for change in CHANGES:
        expected = apply(change, theta, [3], [(0, 333, 0)])
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor cannot flush subnormals to zero")
        try:
            actual = apply(change, theta, [3], [(0, 333, 0)])
        finally:
            torch.set_flush_denormal(False)
        assert_all_same(actual, expected, change)
