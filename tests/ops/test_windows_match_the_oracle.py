"""``noise_window_`` gives the oracle's bits, for every rule, dtype and value, and Adam's steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from support import oracle
from support.extreme_values import weights, with_payloads
from zoext import _C, ops
from zoext.ops import Distribution, Rounding, Rule

SEEDS = [[3, -1, 5], [2**62 + 5, -(2**63), 6], [12, 99, 7], [2**63 - 1, 4, 0], [1, 2, 8]]
COEFFICIENTS = [[0.3, -0.02, 1.0], [1e-7, 3.0, 0.0], [0.0, -0.0, 0.0], [5e-4, -1.25, 2.0], [-0.7, 0.0, 0.0]]
FIRST_WEIGHTS, SECOND_WEIGHTS = [0.07, 0.1, 0.15, 0.2, 0.3], [0.06, 0.07, 0.08, 0.09, 0.1]

every_dtype = pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
every_distribution = pytest.mark.parametrize("distribution", Distribution)
every_rounding = pytest.mark.parametrize("rounding", Rounding)
every_rule = pytest.mark.parametrize("rule", Rule)


def window(steps: int, terms: int, lr: float = 0.03, eps: float = 1e-4, decay: float = 0.0) -> oracle.Window:
    """The newest steps of the window above, with the first terms of each."""
    first, last = len(SEEDS) - steps, len(SEEDS)
    coefficients = [step[:terms] for step in COEFFICIENTS[first:last]]
    return oracle.Window(coefficients, FIRST_WEIGHTS[first:], SECOND_WEIGHTS[first:], lr, eps, decay)


def seeds_of(window: oracle.Window) -> list[list[int]]:
    first = len(SEEDS) - len(window.coefficients)
    return [seeds[: len(c)] for seeds, c in zip(SEEDS[first:], window.coefficients, strict=True)]


def matrix(rows: list[list], dtype: torch.dtype) -> Tensor:
    return torch.tensor(rows, dtype=dtype).reshape(len(rows), len(rows[0]) if rows else 0)


def step(theta: Tensor, window: oracle.Window, **options: Any) -> Tensor:
    """theta after ``noise_window_``, as a whole parameter. A ``residual`` is overwritten."""
    moved = theta.clone()
    residuals = oracle.as_list(options.pop("residual", None))
    ops.noise_window_(
        [moved],
        matrix(seeds_of(window), torch.int64),
        matrix(list(window.coefficients), torch.float32),
        *(torch.tensor(numbers, dtype=torch.float32) for numbers in window[1:]),
        [options.pop("key", 0)],
        [options.pop("span", ops.span_of(theta))],
        residuals=residuals,
        **options,
    )
    return moved


@pytest.mark.parametrize(("steps", "terms"), [(0, 0), (2, 0), (1, 1), (5, 1), (5, 3)])
@every_rule
@every_rounding
@every_distribution
@every_dtype
def test_steps(
    dtype: torch.dtype,
    distribution: Distribution,
    rounding: Rounding,
    rule: Rule,
    steps: int,
    terms: int,
    instruction_set: str,
) -> None:
    """Also steps of which one term is left, or none; of weights, spans and decay of every kind."""
    theta = weights(dtype)
    options: dict[str, Any] = {"distribution": distribution, "rounding": rounding, "rule": rule}
    options |= {"key": 2**31 + 7, "span": (1001, 37, 90)}
    adam = window(steps, terms, decay=0.01)
    residuals = oracle.equal_residuals(theta, rounding)
    expected = oracle.noise_window(theta, seeds_of(adam), adam, residual=residuals[1], **options)
    oracle.assert_same_bits(step(theta, adam, residual=residuals[0], **options), expected)
    oracle.assert_same_residuals(residuals)


@pytest.mark.parametrize("terms", [1, 3])
@pytest.mark.parametrize("size", [1e-30, 1e-42, 1e19, 3e38, float("inf"), float("nan")])
@every_rule
@every_dtype
def test_extreme_estimates(
    dtype: torch.dtype, rule: Rule, size: float, terms: int, instruction_set: str
) -> None:
    """Squares that vanish and that overflow, with and without eps, and sums of 0 / 0."""
    theta = weights(dtype)
    for eps in (0.0, 1e-8):
        adam = window(2, terms, eps=eps)._replace(coefficients=[[size] * terms, [-size, 1.0, 0.5][:terms]])
        expected = oracle.noise_window(theta, seeds_of(adam), adam, rule=rule)
        oracle.assert_same_bits(step(theta, adam, rule=rule), expected, f"eps {eps}")


@pytest.mark.parametrize("lr", [0.0, -0.0, 1e-45, 3e38])
@every_rule
@every_dtype
def test_extreme_steps(dtype: torch.dtype, rule: Rule, lr: float, instruction_set: str) -> None:
    theta = weights(dtype)
    for decay in (0.0, 1.0, 3e38):
        adam = window(3, 1, lr=lr, decay=decay)
        expected = oracle.noise_window(theta, seeds_of(adam), adam, rule=rule)
        oracle.assert_same_bits(step(theta, adam, rule=rule), expected, f"decay {decay}")


@pytest.mark.parametrize("terms", [1, 3])
@every_rule
@every_rounding
@every_dtype
def test_zero_coefficients_and_zero_lr_move_no_bit(
    dtype: torch.dtype, rounding: Rounding, rule: Rule, terms: int, instruction_set: str
) -> None:
    """Not of -0, nor of a NaN with a payload: what estimates of losses that were not finite do. With eps
    zero as well, where 0 / sqrt(0) would make every weight no number."""
    theta = with_payloads(weights(dtype))
    zero = [[0.0, -0.0, 0.0][:terms]] * 3
    for adam in (
        window(3, terms, eps=0.0)._replace(coefficients=zero),
        window(3, terms, eps=0.0, lr=0.0),
    ):
        residuals = oracle.equal_residuals(theta, rounding)
        moved = step(theta, adam, rule=rule, rounding=rounding, residual=residuals[0])
        assert torch.equal(oracle.bits(moved), oracle.bits(theta))
        oracle.assert_same_residuals(residuals)


@every_dtype
def test_a_step_of_zeros_is_as_if_it_had_not_been(dtype: torch.dtype) -> None:
    theta = weights(dtype)
    left_out = [[3.0], [0.0], [-0.5], [-0.0], [0.25]]
    adam = window(5, 1)._replace(coefficients=left_out)
    moved = theta.clone()
    ops.noise_window_(
        [moved],
        torch.tensor([[SEEDS[h][0]] for h in (0, 2, 4)]),
        torch.tensor([left_out[h] for h in (0, 2, 4)]),
        torch.tensor([FIRST_WEIGHTS[h] for h in (0, 2, 4)]),
        torch.tensor([SECOND_WEIGHTS[h] for h in (0, 2, 4)]),
        *(torch.tensor(number) for number in adam[3:]),
        [0],
        [ops.span_of(theta)],
    )
    oracle.assert_same_bits(step(theta, adam), moved)


def test_steps_are_taken_in_order() -> None:
    """Another order is another chain of roundings, and shows: the tests above could not pass by chance."""
    theta, adam = torch.zeros(4096), window(5, 3)
    backwards = oracle.Window(*(numbers[::-1] for numbers in adam[:3]), *adam[3:])
    seeds = seeds_of(adam)
    expected = oracle.noise_window(theta, seeds[::-1], backwards)
    assert not torch.equal(step(theta, adam), expected)
    torch.testing.assert_close(step(theta, adam), expected)


def test_steps_are_torchs_adams() -> None:
    """A window of all steps so far, with the corrections for the bias in its weights."""
    beta1, beta2, lr = 0.7, 0.9, 0.01
    steps, count = 5, 1000
    theta = torch.linspace(-1, 1, count, dtype=torch.float64).requires_grad_()
    adam = torch.optim.Adam([theta], lr=lr, betas=(beta1, beta2), eps=1e-30)
    coefficients = [0.5, -2.0, 1.0, 3.0, -0.1]
    for seed, coefficient in enumerate(coefficients):
        z = torch.empty(count, dtype=torch.float64)
        ops.normal_([z], torch.tensor([seed]), [4], [ops.span_of(z)])
        theta.grad = coefficient * z
        before = theta.detach().clone()
        adam.step()
    lags = range(steps - 1, -1, -1)
    first, second = ([(1 - b) * b**lag / (1 - b**steps) for lag in lags] for b in (beta1, beta2))
    ops.noise_window_(
        [before],
        torch.arange(steps).reshape(steps, 1),
        torch.tensor(coefficients).reshape(steps, 1),
        *(torch.tensor(number) for number in (first, second, lr, 0.0, 0.0)),
        [4],
        [ops.span_of(before)],
    )
    torch.testing.assert_close(before, theta.detach(), rtol=0, atol=1e-8)  # the weights are float32


@pytest.mark.parametrize("steps", [2, 5])
@every_distribution
@every_dtype
def test_steps_without_weight_are_not_drawn(
    dtype: torch.dtype, distribution: Distribution, steps: int, instruction_set: str
) -> None:
    """Where only m needs them, as with b1 = 0; they still count in the second moment of scalar Adam."""
    theta = weights(dtype)
    first = [0.0] * (steps - 1) + [1.0]
    some = window(steps, 3)._replace(first_weights=first)
    for rule in (Rule.SIGN, Rule.SCALAR_ADAM):
        options: dict[str, Any] = {"rule": rule, "distribution": distribution}
        expected = oracle.noise_window(theta, seeds_of(some), some, **options)
        oracle.assert_same_bits(step(theta, some, **options), expected, rule.name)
        newest = some._replace(second_weights=[0.0] * (steps - 1) + list(some.second_weights[-1:]))
        alone = window(1, 3)._replace(first_weights=[1.0])
        are_equal = torch.equal(
            oracle.bits(step(theta, newest, **options)), oracle.bits(step(theta, alone, **options))
        )
        assert are_equal


def test_sign_moves_by_lr_and_not_where_m_is_zero() -> None:
    """Known answers: two estimates of signs that cancel where the signs differ."""
    theta = torch.zeros(1000)
    first, second = (torch.empty(1000) for _ in range(2))
    for z, seed in ((first, 1), (second, 2)):
        ops.normal_([z], torch.tensor([seed]), [0], [(0, 1000, 0)], stream=6, distribution=Distribution.SIGN)
    two = torch.tensor([[1], [2]]), torch.ones(2, 1), torch.ones(2), torch.zeros(2)
    rates = torch.tensor(0.5), torch.tensor(0.0), torch.tensor(0.0)
    place = [0], [(0, 1000, 0)]
    ops.noise_window_([theta], *two, *rates, *place, rule=Rule.SIGN, distribution=Distribution.SIGN)
    assert torch.equal(theta, -0.5 * torch.sign(first + second))
    assert (theta == 0).any()


def test_scalar_adam_divides_by_the_projected_gradient() -> None:
    """Known answers: p is 3 and then -1, v = 3^2 / 4 + 3 / 4 = 3, and the step is -lr m / (sqrt(3) + eps)."""
    theta = torch.zeros(1000, dtype=torch.float64)
    z = torch.empty(1000, dtype=torch.float64)
    ops.normal_([z], torch.tensor([7]), [0], [(0, 1000, 0)])
    seeds, coefficients = torch.tensor([[5, 6], [7, 8]]), torch.tensor([[4.0, -1.0], [-1.0, 0.0]])
    weights = torch.tensor([0.0, 1.0]), torch.tensor([0.25, 0.75])
    rates = torch.tensor(2.0), torch.tensor(0.5), torch.tensor(0.0)
    ops.noise_window_(
        [theta], seeds, coefficients, *weights, *rates, [0], [(0, 1000, 0)], rule=Rule.SCALAR_ADAM
    )
    torch.testing.assert_close(theta, 2 * z / (3**0.5 + 0.5), rtol=1e-12, atol=0)


def test_rules_are_numbered_alike_in_python_and_in_the_core() -> None:
    assert [rule.name.lower() for rule in Rule] == _C.rules()
    assert [int(rule) for rule in Rule] == list(range(len(Rule)))


@every_dtype
def test_nothing_beyond_the_tensor_is_touched(dtype: torch.dtype, instruction_set: str) -> None:
    """Guards on both sides of theta, at every alignment."""
    guard, adam = 33.0, window(1, 1)
    for length in (0, 1, 7, 31, 64, 129, 1025):
        for start in (1, 2, 3, 5, 8, 17):
            for rounding in Rounding:
                buffer = torch.full((start + length + 70,), guard, dtype=dtype)
                theta = buffer[start : start + length]
                residuals = torch.full((start + length + 70,), 33, dtype=torch.int8)
                held = residuals[start : start + (length if dtype in oracle.FORMATS else 0)]
                ops.noise_window_(
                    [theta],
                    torch.tensor(seeds_of(adam)),
                    *(torch.tensor(numbers) for numbers in adam._replace(lr=10.0, decay=0.5)),
                    [0],
                    [(start, max(length, 1), 0)],
                    rounding=rounding,
                    residuals=[held] if rounding == Rounding.RESIDUAL else [],
                )
                assert (residuals[:start] == 33).all()
                assert (residuals[start + held.numel() :] == 33).all()
                assert (buffer[:start] == guard).all()
                assert (buffer[start + length :] == guard).all()
                assert not (theta == guard).any()
