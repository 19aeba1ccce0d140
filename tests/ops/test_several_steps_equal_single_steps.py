"""Several steps in one call of an operator are those steps one after the other, to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from support import oracle
from support.extreme_values import weights
from zoext import ops
from zoext.ops import Distribution, Rounding, Rule, Span

STEPS, HORIZON = 7, 3

every_dtype = pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
every_distribution = pytest.mark.parametrize("distribution", Distribution)
every_rounding = pytest.mark.parametrize("rounding", Rounding)
every_rule = pytest.mark.parametrize("rule", Rule)
every_number_of_terms = pytest.mark.parametrize("terms", [0, 1, 2, 3])


class Weights(NamedTuple):
    """Tensors with their places and, for some roundings, residuals."""

    theta: list[Tensor]
    residuals: list[Tensor]
    spans: list[Span]
    rounding: Rounding

    @property
    def place(self) -> tuple[list[int], list[Span]]:
        return list(range(len(self.theta))), self.spans

    @property
    def options(self) -> dict[str, Any]:
        return {"rounding": self.rounding, "residuals": self.residuals}


def some_weights(dtype: torch.dtype, rounding: Rounding, sizes: Sequence[tuple[int, int]]) -> Weights:
    """Matrices of extreme and ordinary weights, as blocks of wider ones."""
    values = weights(dtype)
    theta = [
        values.repeat(-(-rows * columns // values.numel()))[: rows * columns].reshape(rows, columns).clone()
        for rows, columns in sizes
    ]
    residuals = [oracle.some_residuals(t) for t in theta] if rounding == Rounding.RESIDUAL else []
    spans = [(31 * t, max(columns, 1), columns + 13) for t, (_, columns) in enumerate(sizes)]
    return Weights(theta, residuals, spans, rounding)


def assert_same(actual: Weights, expected: Weights) -> None:
    for a, e in zip(actual.theta, expected.theta, strict=True):
        oracle.assert_same_bits(a, e)
    for a, e in zip(actual.residuals, expected.residuals, strict=True):
        assert torch.equal(a, e)


# Odd sizes, more than one tile, rows that end within a vector, and nothing.
SIZES = [(1, 1), (3, 700), (0, 5), (41, 3), (1, 67)]


def seeds(rows: int, terms: int) -> Tensor:
    return (torch.arange(rows * terms) * 2**55 - 3).reshape(rows, terms)


def coefficients(rows: int, terms: int) -> Tensor:
    """Rows of all kinds: the second is zero, some others in part."""
    values = torch.randn(rows, terms, generator=torch.Generator().manual_seed(rows + terms)) * 0.01
    values[1] = 0
    values[3:5, :1] = 0
    return values


def decays(steps: int) -> Tensor:
    """Some of them zero, also where nothing else moves theta."""
    return torch.tensor([0.01, 0.0, 0.1, 0.02, 0.0, 0.0, 1e-9])[:steps]


def factors(sizes: Sequence[tuple[int, int]], terms: int, shared: str) -> tuple[list[Tensor], list[Tensor]]:
    """Of rank 2, for each term, or one for all on the side called ``shared``."""
    generator = torch.Generator().manual_seed(5)
    sides = []
    for side, name in enumerate(("left", "right")):
        count = 1 if name == shared or terms == 0 else terms
        sides.append([torch.randn(count, 2, size[side], generator=generator) for size in sizes])
    return sides[0], sides[1]


def of_terms(factors: Sequence[Tensor], begin: int, end: int) -> list[Tensor]:
    return [factor if len(factor) == 1 else factor[begin:end].contiguous() for factor in factors]


@every_number_of_terms
@every_rounding
@every_distribution
@every_dtype
def test_noise_axpy(
    dtype: torch.dtype, distribution: Distribution, rounding: Rounding, terms: int, instruction_set: str
) -> None:
    at_once, singly = (some_weights(dtype, rounding, SIZES) for _ in range(2))
    steps = seeds(STEPS, terms), coefficients(STEPS, terms), decays(STEPS)
    ops.noise_axpy_(at_once.theta, *steps, *at_once.place, distribution=distribution, **at_once.options)
    for numbers in zip(*steps, strict=True):
        ops.noise_axpy_(singly.theta, *numbers, *singly.place, distribution=distribution, **singly.options)
    assert_same(at_once, singly)


@pytest.mark.parametrize("shared", ["", "left", "right"])
@every_number_of_terms
@every_rounding
@every_dtype
def test_factored_axpy(
    dtype: torch.dtype, rounding: Rounding, terms: int, shared: str, instruction_set: str
) -> None:
    at_once, singly = (some_weights(dtype, rounding, SIZES) for _ in range(2))
    steps = seeds(STEPS, terms), coefficients(STEPS, terms), decays(STEPS)
    left, right = factors(SIZES, STEPS * terms, shared)
    ops.factored_axpy_(at_once.theta, left, right, *steps, *at_once.place, **at_once.options)
    for s, numbers in enumerate(zip(*steps, strict=True)):
        sides = [of_terms(side, s * terms, (s + 1) * terms) for side in (left, right)]
        ops.factored_axpy_(singly.theta, *sides, *numbers, *singly.place, **singly.options)
    assert_same(at_once, singly)


class Windows(NamedTuple):
    """Windows over a history of more rows than there are steps."""

    seeds: Tensor
    coefficients: Tensor
    first_weights: Tensor
    second_weights: Tensor
    lr: Tensor
    eps: Tensor
    decay: Tensor

    @classmethod
    def of(cls, terms: int, steps: int = STEPS, horizon: int = HORIZON) -> Windows:
        rows = steps + horizon - 1
        generator = torch.Generator().manual_seed(9)
        first, second = (torch.rand(steps, horizon, generator=generator) for _ in range(2))
        first[2, 1] = first[4, 0] = 0  # which some rules leave out of one window, but not of the next
        lr = torch.tensor([0.02, 0.0, 0.01, 0.0, 0.0, 0.05, 0.02])[:steps]
        return cls(
            seeds(rows, terms),
            coefficients(rows, terms),
            first,
            second,
            lr,
            torch.tensor(1e-6),
            decays(steps),
        )

    def step(self, s: int) -> Windows:
        horizon = self.first_weights.shape[1]
        return Windows(
            self.seeds[s : s + horizon],
            self.coefficients[s : s + horizon],
            self.first_weights[s],
            self.second_weights[s],
            self.lr[s],
            self.eps,
            self.decay[s],
        )


@every_number_of_terms
@every_rule
@every_rounding
@every_distribution
@every_dtype
def test_noise_window(
    dtype: torch.dtype,
    distribution: Distribution,
    rounding: Rounding,
    rule: Rule,
    terms: int,
    instruction_set: str,
) -> None:
    at_once, singly = (some_weights(dtype, rounding, SIZES) for _ in range(2))
    windows = Windows.of(terms)
    how = {"distribution": distribution, "rule": rule}
    ops.noise_window_(at_once.theta, *windows, *at_once.place, **how, **at_once.options)
    for s in range(STEPS):
        ops.noise_window_(singly.theta, *windows.step(s), *singly.place, **how, **singly.options)
    assert_same(at_once, singly)


@pytest.mark.parametrize("shared", ["", "left", "right"])
@every_number_of_terms
@every_rule
@every_rounding
@every_dtype
def test_factored_window(
    dtype: torch.dtype, rounding: Rounding, rule: Rule, terms: int, shared: str, instruction_set: str
) -> None:
    at_once, singly = (some_weights(dtype, rounding, SIZES) for _ in range(2))
    windows = Windows.of(terms)
    left, right = factors(SIZES, len(windows.seeds) * terms, shared)
    ops.factored_window_(at_once.theta, left, right, *windows, *at_once.place, rule=rule, **at_once.options)
    for s in range(STEPS):
        sides = [of_terms(side, s * terms, (s + HORIZON) * terms) for side in (left, right)]
        ops.factored_window_(
            singly.theta, *sides, *windows.step(s), *singly.place, rule=rule, **singly.options
        )
    assert_same(at_once, singly)


@every_rounding
@every_dtype
def test_a_history_that_begins_with_a_run(dtype: torch.dtype, rounding: Rounding) -> None:
    """Windows shorter than the horizon: rows before the first step have coefficients of zero, whatever their
    weights. They are as if they were not there."""
    at_once, singly = (some_weights(dtype, rounding, SIZES) for _ in range(2))
    windows = Windows.of(2)._replace(lr=torch.full((STEPS,), 0.02))
    windows.coefficients[: HORIZON - 1] = 0
    windows.coefficients[HORIZON - 1 :] = 0.3
    ops.noise_window_(at_once.theta, *windows, *at_once.place, **at_once.options)
    for s in range(STEPS):
        step, absent = windows.step(s), max(HORIZON - 1 - s, 0)
        present = (numbers[absent:].contiguous() for numbers in step[:4])
        ops.noise_window_(singly.theta, *present, *step[4:], *singly.place, **singly.options)
    assert_same(at_once, singly)
    assert not torch.equal(at_once.theta[1], some_weights(dtype, rounding, SIZES).theta[1])


@pytest.mark.parametrize(("steps", "horizon"), [(0, 3), (1, 3), (3, 0), (2, 1), (1, 1), (2, 40)])
@every_rounding
def test_few_steps_and_short_and_long_windows(rounding: Rounding, steps: int, horizon: int) -> None:
    """Also none, windows of no rows, and a history longer than what fits into a cache."""
    for dtype in oracle.DTYPES:
        at_once, singly = (some_weights(dtype, rounding, SIZES) for _ in range(2))
        rows = max(steps + horizon - 1, 0)
        first = torch.linspace(0.1, 1, steps * horizon).reshape(steps, horizon)
        history = torch.arange(rows)[:, None], torch.linspace(0.1, 1, rows)[:, None]
        lr = torch.full((steps,), 0.01)
        windows = Windows(*history, first, first / 2, lr, torch.tensor(1e-6), decays(steps))
        ops.noise_window_(at_once.theta, *windows, *at_once.place, **at_once.options)
        for s in range(steps):
            ops.noise_window_(singly.theta, *windows.step(s), *singly.place, **singly.options)
        assert_same(at_once, singly)


@every_dtype
def test_no_steps_move_nothing(dtype: torch.dtype) -> None:
    moved, before = (some_weights(dtype, Rounding.STOCHASTIC, SIZES) for _ in range(2))
    none = torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2), torch.empty(0)
    ops.noise_axpy_(moved.theta, *none, *moved.place, **moved.options)
    left, right = factors(SIZES, 0, "left")
    ops.factored_axpy_(moved.theta, left, right, *none, *moved.place, **moved.options)
    assert_same(moved, before)


def test_steps_do_not_commute() -> None:
    """Another order rounds otherwise, so that the tests above could not pass by chance."""
    theta, backwards = (torch.ones(1000, dtype=torch.bfloat16) for _ in range(2))
    steps = seeds(STEPS, 1), coefficients(STEPS, 1), decays(STEPS)
    place = [0], [ops.span_of(theta)]
    ops.noise_axpy_([theta], *steps, *place)
    ops.noise_axpy_([backwards], *(numbers.flip(0) for numbers in steps), *place)
    assert not torch.equal(theta, backwards)
