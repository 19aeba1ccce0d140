"""``noise_axpy_``, ``noise_copy_`` and ``normal_`` give the oracle's bits, for every dtype and value."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from support import oracle
from support.extreme_values import weights, with_payloads
from zoext import ops
from zoext.ops import Distribution, Rounding, Stream

SEEDS = [3, -1, 2**62 + 5, -(2**63), 12, 99, 2**63 - 1, 4, 0]
COEFFICIENTS = [0.3, -0.02, 0.0, 1e-7, 3.0, -0.0, 5e-4, -1.25, 1e-42]

every_dtype = pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
every_distribution = pytest.mark.parametrize("distribution", Distribution)
every_rounding = pytest.mark.parametrize("rounding", Rounding)
ROUNDINGS_OF_COPIES = (Rounding.NEAREST, Rounding.STOCHASTIC)
every_16_bit_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def axpy(
    theta: Tensor, seeds: list[int], coefficients: list[float], decay: float = 0.0, **options: Any
) -> Tensor:
    """theta after ``noise_axpy_``, as a whole parameter. A ``residual`` is overwritten."""
    moved = theta.clone()
    residuals = oracle.as_list(options.pop("residual", None))
    ops.noise_axpy_(
        [moved],
        torch.tensor(seeds, dtype=torch.int64),
        torch.tensor(coefficients, dtype=torch.float32),
        torch.tensor(decay),
        [options.pop("key", 0)],
        [options.pop("span", ops.span_of(theta))],
        residuals=residuals,
        **options,
    )
    return moved


@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("terms", [0, 1, 3, 9])
@every_rounding
@every_distribution
@every_dtype
def test_axpy(
    dtype: torch.dtype,
    distribution: Distribution,
    rounding: Rounding,
    terms: int,
    decay: float,
    instruction_set: str,
) -> None:
    theta = weights(dtype)
    arguments = (theta, SEEDS[:terms], COEFFICIENTS[:terms], decay)
    place: dict[str, Any] = {"key": 2**31 + 7, "span": (1001, 37, 90)}
    options: dict[str, Any] = {"distribution": distribution, "rounding": rounding}
    residuals = oracle.equal_residuals(theta, rounding)
    oracle.assert_same_bits(
        axpy(*arguments, residual=residuals[0], **place, **options),
        oracle.combination(*arguments, residual=residuals[1], **place, **options),
    )
    oracle.assert_same_residuals(residuals)


@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1.0])
@every_16_bit_dtype
def test_weights_that_were_set_to_zero(dtype: torch.dtype, scale: float, instruction_set: str) -> None:
    """Their residuals may be anything, and never make a number of them that is none."""
    theta = torch.tensor([0.0, -0.0, 1.0], dtype=dtype).repeat(256)
    residuals = [torch.arange(-128, 128, dtype=torch.int8).repeat_interleave(3) for _ in range(2)]
    arguments = (theta, SEEDS[:1], [scale], 0.125)
    moved = axpy(*arguments, residual=residuals[0], rounding=Rounding.RESIDUAL)
    assert moved.isfinite().all()
    oracle.assert_same_bits(
        moved, oracle.combination(*arguments, residual=residuals[1], rounding=Rounding.RESIDUAL)
    )
    oracle.assert_same_residuals(residuals)


@pytest.mark.parametrize("terms", [0, 1, 3, 9])
@pytest.mark.parametrize("rounding", ROUNDINGS_OF_COPIES)
@every_distribution
@every_dtype
def test_copy(
    dtype: torch.dtype, distribution: Distribution, rounding: Rounding, terms: int, instruction_set: str
) -> None:
    theta = [weights(dtype), weights(dtype)[:50].reshape(5, 10)]
    before = [tensor.clone() for tensor in theta]
    out = [torch.full_like(tensor, 7) for tensor in theta]
    seeds, coefficients = SEEDS[:terms], COEFFICIENTS[:terms]
    keys, spans = [6, 2], [(3, 211, 0), (400, 10, 37)]
    options: dict[str, Any] = {"distribution": distribution, "rounding": rounding}
    numbers = torch.tensor(seeds, dtype=torch.int64), torch.tensor(coefficients)
    ops.noise_copy_(out, theta, *numbers, keys, spans, **options)
    for written, read, old, key, span in zip(out, theta, before, keys, spans, strict=True):
        expected = oracle.combination(old, seeds, coefficients, key=key, span=span, **options)
        oracle.assert_same_bits(written, expected)
        assert torch.equal(oracle.bits(read), oracle.bits(old)), "theta was written to"


@every_distribution
@every_dtype
def test_normal(dtype: torch.dtype, distribution: Distribution, instruction_set: str) -> None:
    is_sign = distribution == Distribution.SIGN
    field = oracle.signs if is_sign else oracle.normals
    out = [torch.empty(3, 71, dtype=dtype), torch.empty(0, dtype=dtype), torch.empty((), dtype=dtype)]
    keys, spans = [0, 1, 2**32 - 1], [(5, 71, 100), (0, 1, 0), (2**40 + 3, 1, 0)]
    for seed, stream in ((17, Stream.LEFT_FACTOR), (-17, Stream.RIGHT_FACTOR), (0, Stream.POWER_ITERATION)):
        ops.normal_(out, torch.tensor([seed]), keys, spans, stream=stream, distribution=distribution)
        for tensor, key, span in zip(out, keys, spans, strict=True):
            z = field(seed, key, oracle.indices(tensor.numel(), span), stream)
            oracle.assert_same_bits(tensor, oracle.round_to(z, dtype).reshape(tensor.shape))


@every_rounding
@every_dtype
def test_zero_coefficients_move_no_bit(dtype: torch.dtype, rounding: Rounding, instruction_set: str) -> None:
    """Not of -0, nor of a NaN with a payload: what an estimate of a loss that was not finite does."""
    theta = with_payloads(weights(dtype))
    for coefficients in ([], [0.0], [0.0, -0.0, 0.0]):
        residuals = oracle.equal_residuals(theta, rounding)
        options: dict[str, Any] = {"rounding": rounding, "residual": residuals[0]}
        moved = axpy(theta, SEEDS[: len(coefficients)], coefficients, **options)
        assert torch.equal(oracle.bits(moved), oracle.bits(theta))
        oracle.assert_same_residuals(residuals)


@every_rounding
@every_16_bit_dtype
def test_every_pattern_survives_a_zero_coefficient(
    dtype: torch.dtype, rounding: Rounding, instruction_set: str
) -> None:
    """Only signalling NaNs change: they become quiet, as in any arithmetic."""
    theta = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    residual, _ = oracle.equal_residuals(theta, rounding)
    moved = axpy(theta, [1], [0.0], rounding=rounding, residual=residual)
    is_number = ~theta.isnan()
    assert torch.equal(oracle.bits(moved)[is_number], oracle.bits(theta)[is_number])
    assert moved[~is_number].isnan().all()


@pytest.mark.parametrize("coefficient", [float("inf"), float("nan"), 3e38, 1e-45])
@every_rounding
@every_dtype
def test_extreme_coefficients(
    dtype: torch.dtype, rounding: Rounding, coefficient: float, instruction_set: str
) -> None:
    theta = weights(dtype)
    for decay in (0.0, 1.0, 3e38):
        arguments = (theta, [5, 6], [coefficient, 0.5], decay)
        residuals = oracle.equal_residuals(theta, rounding)
        oracle.assert_same_bits(
            axpy(*arguments, rounding=rounding, residual=residuals[0]),
            oracle.combination(*arguments, rounding=rounding, residual=residuals[1]),
        )
        oracle.assert_same_residuals(residuals)


@pytest.mark.parametrize("size", [1e-7, 1e-5, 1e-3, 1.0, 3e4])
@every_rounding
@every_16_bit_dtype
def test_every_pattern(dtype: torch.dtype, rounding: Rounding, size: float, instruction_set: str) -> None:
    """Moved by steps of all sizes, also into subnormal numbers and over the largest."""
    theta = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    residuals = oracle.equal_residuals(theta, rounding)
    options: dict[str, Any] = {"rounding": rounding, "key": 3}
    oracle.assert_same_bits(
        axpy(theta, [7], [size], residual=residuals[0], **options),
        oracle.combination(theta, [7], [size], residual=residuals[1], **options),
    )
    oracle.assert_same_residuals(residuals)


def test_terms_are_added_in_order() -> None:
    """Another order is another chain of roundings, and shows: the test above could not pass by chance."""
    theta, seeds, coefficients = torch.zeros(4096), SEEDS[:3], [0.3, -0.7, 11.0]
    moved = axpy(theta, seeds, coefficients)
    oracle.assert_same_bits(moved, oracle.combination(theta, seeds, coefficients))
    assert not torch.equal(moved, axpy(theta, seeds[::-1], coefficients[::-1]))


@every_16_bit_dtype
def test_stochastic_rounding_goes_to_a_neighbour(dtype: torch.dtype) -> None:
    theta = weights(dtype).repeat(50)
    theta = theta[theta.isfinite()]
    arguments = (theta.double(), [8], [1e-3])
    nearest, stochastic = (axpy(theta, [8], [1e-3], rounding=rounding) for rounding in ROUNDINGS_OF_COPIES)
    exact = axpy(*arguments)
    finite = stochastic.isfinite()
    patterns = [oracle.bits(t)[finite].int() for t in (nearest, stochastic)]
    assert ((patterns[0] - patterns[1]).abs() <= 1).all()
    assert (patterns[0] != patterns[1]).any()
    is_exact = exact[finite] == nearest[finite].double()
    assert torch.equal(patterns[0][is_exact], patterns[1][is_exact])


@pytest.mark.parametrize(
    "start", [1.0, -1.0, 0.3, 2e-5, -3e-6], ids=["one", "minus one", "third", "subnormal half", "tiny half"]
)
@every_16_bit_dtype
def test_stochastic_rounding_is_unbiased(dtype: torch.dtype, start: float) -> None:
    """The mean of 2**20 roundings of one value is the value, at non-representable points between two
    neighbours. Signs of one seed on elements that are equal give two values, each rounded often.

    False-alarm rate: below 1e-6 for each of the 10 cases (4.9 standard errors, two values each). The 16
    random bits shift a probability by less than 2**-16, a fiftieth of a standard error.
    """
    count = 2**20
    theta = torch.full((count,), start, dtype=dtype)
    next_up = (oracle.bits(theta[:1]) + 1).view(dtype)
    step = 0.2371 * abs(next_up - theta[0]).item()
    sign = torch.empty(count)
    ops.normal_(
        [sign], torch.tensor([77]), [0], [(0, count, 0)], stream=Stream.SIGN, distribution=Distribution.SIGN
    )
    moved = axpy(theta, [77], [step], distribution=Distribution.SIGN, rounding=Rounding.STOCHASTIC)
    for direction in (1.0, -1.0):
        rounded = moved[sign == direction].double()
        wanted = float(theta[0].float() + torch.tensor(step) * direction)
        assert len(rounded.unique()) == 2
        error = (rounded.mean() - wanted) / (rounded.std() / len(rounded) ** 0.5)
        assert abs(error) < 4.9 + 0.1


@every_16_bit_dtype
def test_stochastic_rounding_keeps_steps_that_rounding_to_nearest_loses(dtype: torch.dtype) -> None:
    """64 steps of 1/64 unit in the last place add up to one unit on average.

    False-alarm rate: 6e-7 (5 standard errors; the number of units moved is about Poisson with mean 1).
    """
    count, unit = 2**14, torch.finfo(dtype).eps
    sign = axpy(torch.zeros(count), [77], [1.0], distribution=Distribution.SIGN)
    theta = {rounding: torch.ones(count, dtype=dtype) for rounding in ROUNDINGS_OF_COPIES}
    for step in range(64):
        for rounding in theta:
            # The first seed only chooses the rounding bits: fresh ones in each step.
            change = ([step, 77], [0.0, unit / 64])
            theta[rounding] = axpy(
                theta[rounding], *change, distribution=Distribution.SIGN, rounding=rounding
            )
    assert (theta[Rounding.NEAREST] == 1).all()
    moved = (theta[Rounding.STOCHASTIC].float() - 1) * sign / unit
    assert abs(moved.mean() - 1) < 5 / count**0.5


@every_16_bit_dtype
def test_residuals_keep_steps_that_rounding_to_nearest_loses(dtype: torch.dtype) -> None:
    """64 steps of 1/64 unit in the last place are one unit, above one and, in units half as large, below."""
    count, unit = 2**10, torch.finfo(dtype).eps
    sign = axpy(torch.zeros(count), [77], [1.0], distribution=Distribution.SIGN)
    theta, residual = torch.ones(count, dtype=dtype), torch.zeros(count, dtype=torch.int8)
    options: dict[str, Any] = {"distribution": Distribution.SIGN, "rounding": Rounding.RESIDUAL}
    for _ in range(64):
        theta = axpy(theta, [77], [unit / 64], residual=residual, **options)
    assert torch.equal(theta.float(), 1 + sign * unit)
    assert (residual == 0).all()


@every_dtype
def test_nothing_beyond_the_tensor_is_touched(dtype: torch.dtype, instruction_set: str) -> None:
    """Guards on both sides of every output, at every alignment."""
    guard = 33.0
    for length in (0, 1, 7, 31, 64, 129, 1025):
        for start in (1, 2, 3, 5, 8, 17):
            for rounding in Rounding:
                buffer = torch.full((start + length + 70,), guard, dtype=dtype)
                out = buffer[start : start + length]
                theta = torch.zeros(length, dtype=dtype)
                numbers = torch.tensor([5]), torch.tensor([1.0])
                place = [0], [(start, max(length, 1), 0)]
                is_residual = rounding == Rounding.RESIDUAL
                residuals = torch.full((start + length + 70,), 33, dtype=torch.int8)
                held = residuals[start : start + (length if dtype in oracle.FORMATS else 0)]
                ops.noise_copy_(
                    [out], [theta], *numbers, *place, rounding=Rounding.NEAREST if is_residual else rounding
                )
                ops.noise_axpy_(
                    [out],
                    *numbers,
                    torch.tensor(0.5),
                    *place,
                    rounding=rounding,
                    residuals=[held] if is_residual else [],
                )
                assert (residuals[:start] == 33).all()
                assert (residuals[start + held.numel() :] == 33).all()
                ops.normal_([out], numbers[0], *place)
                assert (buffer[:start] == guard).all()
                assert (buffer[start + length :] == guard).all()
                assert not (out == guard).any()


def test_the_oracles_rounding_is_torchs() -> None:
    """On all float32 exponents, both signs, and the ties between 16-bit neighbours."""
    patterns = np.random.default_rng(5).integers(2**32, size=200_000, dtype=np.uint32)
    patterns[:65536] = np.arange(65536, dtype=np.uint32) << 16 | 0x8000
    patterns[65536:131072] = np.arange(65536, dtype=np.uint32) << 16 | 0x1000
    values = patterns.view(np.float32)
    for dtype in oracle.FORMATS:
        oracle.assert_same_bits(oracle.round_to(values, dtype), torch.from_numpy(values).to(dtype))


@every_16_bit_dtype
def test_the_oracles_floats_of_24_bits_are_the_nearest(dtype: torch.dtype) -> None:
    """Of ordinary numbers: no other float of 24 bits is nearer, in exact fractions, and the upper part is
    the nearest number of 16."""
    form = oracle.FORMATS[dtype]
    values = np.random.default_rng(7).normal(size=3000).astype(np.float32)
    values = values[np.abs(values) > 0.01]
    upper, residual = oracle.split(values, dtype)
    whole = oracle.join(upper, residual)
    is_no_tie = residual != -128
    assert torch.equal(upper[is_no_tie], torch.from_numpy(whole).to(dtype)[is_no_tie])
    for value, nearest in zip(values.tolist(), whole.tolist(), strict=True):
        unit = Fraction(2) ** (int(np.floor(np.log2(abs(value)))) - form.mantissa_bits - 8)
        assert abs(Fraction(value) - Fraction(nearest)) <= unit / 2
        assert (Fraction(nearest) / unit).denominator == 1


@pytest.mark.parametrize(("dtype", "size"), [(np.float32, 0), (np.float64, 0), (np.float64, -1025)])
def test_the_oracles_fused_multiply_add_rounds_once(dtype: type, size: int) -> None:
    """No neighbour is nearer to the exact rational, also where two roundings would go wrong: on numbers of
    the order of ``2**size``, which may be subnormal."""
    random, count = np.random.default_rng(6), 1500
    a, b = (random.standard_normal(count).astype(dtype) for _ in range(2))
    a *= dtype(2.0**size)
    # Addends of all relative sizes, and a third that cancels the product down to its rounding error.
    c = (a * b * 2.0 ** random.integers(-70, 70, size=count)).astype(dtype)
    c[::3] = -(a * b)[::3]
    fused = oracle.fused_multiply_add(a, b, c)
    assert fused.dtype == dtype
    assert (fused != a * b + c).any()
    exact = [
        Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c, strict=True)
    ]
    for candidate in (np.nextafter(fused, dtype(np.inf)), np.nextafter(fused, dtype(-np.inf))):
        for value, other, truth in zip(fused.tolist(), candidate.tolist(), exact, strict=True):
            assert abs(Fraction(value) - truth) <= abs(Fraction(other) - truth)


@pytest.mark.parametrize(
    ("a", "b", "c", "expected"),
    [
        (5e-324, 0.5, -0.0, 0.0),
        (-5e-324, 0.5, 0.0, -0.0),
        (-5e-324, 0.75, 0.0, -5e-324),
        (1e308, 10.0, -1e308, float("inf")),
        (0.0, -3.0, -0.0, -0.0),
        (0.0, -3.0, 0.0, 0.0),
        (2.0, 3.0, -6.0, 0.0),
        (float("inf"), 1.0, 5.0, float("inf")),
        (-1e308, 10.0, float("inf"), float("inf")),
        (1.5, 2.0**1023, -(2.0**1023), 2.0**1022),
    ],
)
def test_the_oracles_fused_multiply_add_at_the_borders(a: float, b: float, c: float, expected: float) -> None:
    fused = oracle.fused_multiply_add(a, b, np.array([c]))
    assert fused.tobytes() == np.array([expected]).tobytes()
