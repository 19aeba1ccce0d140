"""The plain NumPy oracle of the noise field and of the dense operators.

Written from the papers and from the contract, not from ``csrc``: slow, obvious, and exact where the
operators promise bits. Only the normals of given words come from ``zoext._C``; how near those are to
Box-Muller is the subject of ``tests/noise/test_normals_are_curands.py``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from zoext import _C
from zoext.ops import Distribution, Rounding, Rule, Span, Stream

Words = NDArray[np.uint32]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# --- Random words -----------------------------------------------------------------------------------

LOW = np.uint64(0xFFFFFFFF)


def philox4x32(counter: Sequence[ArrayLike], key: tuple[int, int], rounds: int = 10) -> Words:
    """Salmon et al., SC 2011, section 4.1: four counter words (arrays) and two key words, [..., 4]."""
    c = [np.asarray(word, dtype=np.uint64) for word in counter]
    k = list(key)
    for _ in range(rounds):
        product0, product1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (product1 >> np.uint64(32)) ^ c[1] ^ np.uint64(k[0]),
            product1 & LOW,
            (product0 >> np.uint64(32)) ^ c[3] ^ np.uint64(k[1]),
            product0 & LOW,
        ]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return np.stack(np.broadcast_arrays(*c), axis=-1).astype(np.uint32)


def words(seed: int, key: int, stream: int, blocks: ArrayLike, rounds: int = 10) -> Words:
    """The words of the blocks with the given numbers: uint32 [*blocks, 4]."""
    block = np.asarray(blocks, dtype=np.uint64)
    seed %= 2**64
    counter = (block & LOW, block >> np.uint64(32), key, stream)
    return philox4x32(counter, (seed % 2**32, seed >> 32), rounds)


# --- Normals and signs ------------------------------------------------------------------------------


def curand_normal4(block_words: Words) -> NDArray[np.float32]:
    """cuRAND's ``curand_normal4`` on the host (``curand_normal.h``), in float32, on words [..., 4]."""
    x, y = block_words[..., 0::2].astype(np.float32), block_words[..., 1::2].astype(np.float32)
    unit = np.float32(2.3283064e-10)
    turn = np.float32(unit * np.float32(6.2831855))
    u, v = x * unit + unit / np.float32(2), y * turn + turn / np.float32(2)
    s = np.sqrt(np.float32(-2) * np.log(u))
    return np.stack((s * np.sin(v), s * np.cos(v)), axis=-1).reshape(block_words.shape)


def exact_box_muller(pair_words: Words) -> NDArray[np.float64]:
    """Box and Muller (1958) on words [..., even count], in float64, sine first."""
    u, v = ((pair_words[..., i::2].astype(np.float64) + 0.5) / 2.0**32 for i in (0, 1))
    s = np.sqrt(-2 * np.log(u))
    return np.stack((s * np.sin(2 * np.pi * v), s * np.cos(2 * np.pi * v)), axis=-1).reshape(pair_words.shape)


def indices(count: int, span: Span) -> NDArray[np.uint64]:
    """The place of each local element in the unsharded parameter."""
    base, run, stride = span
    return np.array([base + i // run * stride + i % run for i in range(count)], dtype=np.uint64)


def normals(seed: int, key: int, at: NDArray[np.uint64], stream: int = Stream.DENSE) -> NDArray[np.float32]:
    """``z(seed, key, index)``: block ``index // 4``, lane ``index % 4``."""
    z = _C.normals_of_words(words(seed, key, stream, at // np.uint64(4))).reshape(-1, 4)
    return z[np.arange(len(at)), at % np.uint64(4)]


def signs(seed: int, key: int, at: NDArray[np.uint64], stream: int = Stream.SIGN) -> NDArray[np.float32]:
    """One bit an element, 128 elements a block, low bits first; a set bit is minus one."""
    block_words = words(seed, key, stream, at // np.uint64(128))
    word = block_words[np.arange(len(at)), at // np.uint64(32) % np.uint64(4)]
    return np.where(word >> (at % np.uint64(32)).astype(np.uint32) & np.uint32(1), -1, 1).astype(np.float32)


def rounding_bits(seed: int, key: int, at: NDArray[np.uint64]) -> NDArray[np.uint32]:
    """16 bits an element, 16 elements a block of stream 3, of seven rounds: the low half of a word first, and
    after eight elements the same words again, rotated by a byte."""
    block_words = words(seed, key, Stream.ROUNDING, at // np.uint64(16), rounds=7)
    word = block_words[np.arange(len(at)), at // np.uint64(2) % np.uint64(4)]
    turned = np.where(at // np.uint64(8) % np.uint64(2), word << np.uint32(8) | word >> np.uint32(24), word)
    return np.where(at % np.uint64(2), turned >> np.uint32(16), turned & np.uint32(0xFFFF)).astype(np.uint32)


# --- Arithmetic -------------------------------------------------------------------------------------


def fused_multiply_add(a: ArrayLike, b: ArrayLike, c: NDArray) -> NDArray:
    """``a * b + c`` rounded once, in the dtype of ``c`` (float32 or float64)."""
    return _fma32(a, b, c) if c.dtype == np.float32 else _fma64(a, b, c)


def _fma32(a: ArrayLike, b: ArrayLike, c: NDArray[np.float32]) -> NDArray[np.float32]:
    """The product is exact in float64. The sum is rounded there to odd (an inexact one ends in a set
    bit), which the second rounding cannot mistake for a tie: Boldo and Melquiond, IEEE TC 57 (2008)."""
    with np.errstate(all="ignore"):
        product = np.asarray(a, dtype=np.float64) * np.asarray(b, dtype=np.float64)
        addend = c.astype(np.float64)
        total = np.asarray(product + addend)
        from_addend = total - product
        error = (product - (total - from_addend)) + (addend - from_addend)
        is_even = total.view(np.int64) % 2 == 0
        neighbour = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
        to_odd = np.isfinite(total) & (error != 0) & is_even
        return np.where(to_odd, neighbour, total).astype(np.float32)


#: That of C99, which is exact but for one rounding; ``tests/ops/test_dense_match_the_oracle.py`` compares it
#: with rational numbers.
_c_fma = ctypes.CDLL(None).fma
_c_fma.restype, _c_fma.argtypes = ctypes.c_double, [ctypes.c_double] * 3
_one_fma64 = np.frompyfunc(_c_fma, 3, 1)


def _fma64(a: ArrayLike, b: ArrayLike, c: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(all="ignore"):
        total = _one_fma64(np.asarray(a, np.float64), np.asarray(b, np.float64), c)
    return np.asarray(total, dtype=np.float64)


# --- Rounding to 16 bits ----------------------------------------------------------------------------


class Format(NamedTuple):
    """A 16-bit floating-point format."""

    mantissa_bits: int
    exponent_bias: int

    @property
    def infinity(self) -> int:
        return 0x7FFF >> self.mantissa_bits << self.mantissa_bits


@cache
def magnitudes(form: Format) -> NDArray[np.float64]:
    """The value of each pattern without its sign, up to that of infinity, which stands here for the power of
    two that would come next."""
    pattern = np.arange(form.infinity + 1)
    exponent, mantissa = pattern >> form.mantissa_bits, pattern % 2**form.mantissa_bits
    significand = np.where(exponent > 0, mantissa + 2**form.mantissa_bits, mantissa)
    scale = np.maximum(exponent, 1) - form.exponent_bias - form.mantissa_bits
    return np.ldexp(significand.astype(np.float64), scale)


FORMATS = {torch.bfloat16: Format(7, 127), torch.float16: Format(10, 15)}


class Neighbours(NamedTuple):
    """The pattern below each magnitude, and how far that lies towards the next one, in 0 .. 1."""

    lower: NDArray
    fraction: NDArray


def neighbours(finite: NDArray, form: Format) -> Neighbours:
    """Of magnitudes below infinity's."""
    table = magnitudes(form)
    lower = np.searchsorted(table, finite, side="right") - 1
    return Neighbours(lower, (finite - table[lower]) / (table[lower + 1] - table[lower]))


def kept_fraction(fraction: NDArray, dtype: torch.dtype) -> NDArray:
    """float32 has 13 bits more than a float16 that is normal; below, a fraction is rounded to as many."""
    return np.rint(fraction * 2**13) / 2**13 if dtype == torch.float16 else fraction


def magnitudes_of(values: NDArray, form: Format) -> tuple[NDArray, NDArray]:
    """Which have a pattern below them and one above, and the magnitudes, zero for the others."""
    with np.errstate(invalid="ignore"):  # signalling NaN
        magnitude = np.abs(values.astype(np.float64))
    is_inside = magnitude < magnitudes(form)[-1]
    return is_inside, np.where(is_inside, magnitude, 0)


def of_patterns(pattern: NDArray, values: NDArray, dtype: torch.dtype) -> Tensor:
    """Patterns with the signs of the values, or that of a NaN where these are none."""
    form = FORMATS[dtype]
    pattern = np.where(np.isnan(values), form.infinity | 1 << (form.mantissa_bits - 1), pattern)
    bits = np.where(np.signbit(values), pattern | 0x8000, pattern).astype(np.uint16)
    return torch.from_numpy(bits.view(np.int16)).view(dtype)


def round_to(values: NDArray, dtype: torch.dtype, random: NDArray[np.uint32] | None = None) -> Tensor:
    """Rounds to the two neighbours in ``dtype``: to the nearest (ties to the even pattern), or, with
    16 random bits an element, away from zero when fraction + random / 2**16 reaches 1.

    Values that have no finite neighbour on both sides are rounded to nearest in either case.
    """
    if dtype not in FORMATS:
        return torch.from_numpy(np.array(values)).to(dtype)
    form = FORMATS[dtype]
    is_inside, finite = magnitudes_of(values, form)
    lower, fraction = neighbours(finite, form)
    up = (fraction > 0.5) | ((fraction == 0.5) & (lower % 2 == 1))
    if random is not None:
        bounded = lower + 1 < form.infinity
        up = np.where(bounded, np.floor(kept_fraction(fraction, dtype) * 2**16) + random >= 2**16, up)
    return of_patterns(np.where(is_inside, lower + up, form.infinity), values, dtype)


# --- Floats of 24 bits: a pattern of 16, and in 1/256 of the way to the next one what it lacks ----------


def split(values: NDArray, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The nearest pattern of 16 bits of each value and the rest, int8 in -128 .. 127: together the nearest
    of 24 bits, ties away from zero. Where the first one is infinite or no number, so is the value, and the
    rest is 0."""
    form = FORMATS[dtype]
    is_inside, finite = magnitudes_of(values, form)
    lower, fraction = neighbours(finite, form)
    steps = lower * 256 + np.floor(kept_fraction(fraction, dtype) * 256 + 0.5).astype(int)
    upper = (steps + 128) // 256
    is_whole = is_inside & (upper < form.infinity)
    residual = torch.from_numpy(np.where(is_whole, steps - upper * 256, 0).astype(np.int8))
    nearest = bits(round_to(values, dtype)).numpy().astype(int) & 0x7FFF
    return of_patterns(np.where(is_whole, upper, nearest), values, dtype), residual


def join(upper: Tensor, residual: Tensor) -> NDArray[np.float32]:
    """The values of 24 bits, flat; what is infinite or no number has no rest, that of zero is modulo 128."""
    form = FORMATS[upper.dtype]
    table = magnitudes(form)
    pattern = bits(upper).reshape(-1).numpy().astype(int) & 0x7FFF
    is_number = pattern < form.infinity
    rest = residual.reshape(-1).numpy().astype(int)
    steps = np.where(is_number, pattern * 256 + np.where(pattern == 0, rest % 128, rest), 0)
    low = table[steps // 256]
    whole = low + (table[steps // 256 + 1] - low) * (steps % 256) / 256
    with np.errstate(invalid="ignore"):  # signalling NaN
        return np.where(is_number, np.copysign(whole, numbers(upper)), numbers(upper)).astype(np.float32)


def some_residuals(theta: Tensor) -> Tensor:
    """Residuals of every size, a function of the weight, also beside what is not finite; none makes a weight
    less than zero in magnitude. Empty for wide theta."""
    if theta.dtype not in FORMATS:
        return torch.empty(0, dtype=torch.int8)
    pattern = bits(theta).long() & 0x7FFF  # not its value, which a program may flush to zero
    residual = pattern.mul(37).remainder(256).sub(128)
    return torch.where(pattern == 0, residual.abs().clamp(max=127), residual).to(torch.int8)


def equal_residuals(theta: Tensor, rounding: Rounding) -> list[Tensor | None]:
    """Two times the same residuals, for an operator and for the oracle to overwrite, or two times none."""
    if rounding != Rounding.RESIDUAL:
        return [None, None]
    return [some_residuals(theta), some_residuals(theta)]


def with_residual(theta: Tensor, residual: Tensor | None) -> Tensor:
    """Pairs of both, float32 [..., 2], where there is a residual of something: else theta."""
    if residual is None or theta.dtype not in FORMATS:
        return theta
    return torch.stack([theta.float(), residual.float()], dim=-1)


def as_list(residual: Tensor | None) -> list[Tensor]:
    """As operators take the residuals of a single tensor."""
    return [] if residual is None else [residual]


# --- The operators ----------------------------------------------------------------------------------


def numbers(tensor: Tensor) -> NDArray:
    """The values of a tensor in the precision of its arithmetic, flat."""
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return tensor.detach().to(wide).reshape(-1).numpy()


def direction(seed: int, key: int, at: NDArray[np.uint64], distribution: Distribution) -> NDArray[np.float32]:
    return (signs if distribution == Distribution.SIGN else normals)(seed, key, at)


class Window(NamedTuple):
    """The steps of a window, oldest first, their weights in the moments, and how these move theta."""

    coefficients: Sequence[Sequence[float]]
    first_weights: Sequence[float]
    second_weights: Sequence[float]
    lr: float
    eps: float
    decay: float = 0.0


def whole(theta: Tensor) -> Span:
    return (0, max(theta.numel(), 1), 0)


def estimate(directions: Sequence[NDArray], coefficients: Sequence[float], like: NDArray) -> NDArray:
    """``sum_k c_k D_k`` in the dtype of ``like``: it starts at minus zero and takes one fused
    multiply-add per term, in the order of k; terms with coefficient zero are left out."""
    total = np.full_like(like, -0.0)
    for term, coefficient in zip(directions, np.asarray(coefficients, dtype=np.float32), strict=True):
        if coefficient != 0:
            total = fused_multiply_add(coefficient, term, total)
    return total


def move_of(window: Window, directions: Sequence[Sequence[NDArray]], rule: Rule, like: NDArray) -> NDArray:
    """What a rule makes of a window, in the dtype of ``like``, every operation rounded once.

    ADAM (AdaMeZO, arXiv 2605.00650, section 3): ``-lr m / sqrt(v + eps)``, v of the estimates' squares.
    SIGN (Signum, arXiv 1802.04434): ``-lr sign(m)``, the sign of 0 and of NaN is 0.
    SCALAR_ADAM (MEAZO): ``-lr m / (sqrt(v) + eps)``, v of the squared sums of the coefficients.

    A step whose coefficients are all zero is left out, and where only m needs the estimate, so is one with
    the first weight zero. Where no step is left, or ``lr`` is zero, the result is minus zero, which moves
    nothing.
    """
    weights = np.asarray([window.first_weights, window.second_weights], dtype=np.float32).T
    m, v = np.full_like(like, -0.0), np.zeros_like(like)
    steps = [
        (terms, coefficients, *pair)
        for terms, coefficients, pair in zip(directions, window.coefficients, weights, strict=True)
        if np.asarray(coefficients, dtype=np.float32).any()
    ]
    lr, eps = like.dtype.type(np.float32(window.lr)), like.dtype.type(np.float32(window.eps))
    if lr == 0 or not steps:
        return m
    with np.errstate(all="ignore"):
        for terms, coefficients, first, second in steps:
            if rule == Rule.SCALAR_ADAM:
                p = np.full_like(like, projected_gradient(coefficients, like.dtype.type))
                v = fused_multiply_add(second, p * p, v)
            if rule != Rule.ADAM and first == 0:
                continue
            g = estimate(terms, coefficients, like)
            m = fused_multiply_add(first, g, m)
            if rule == Rule.ADAM:
                v = fused_multiply_add(second, g * g, v)
        if rule == Rule.SIGN:
            return -lr * np.where(m > 0, 1, np.where(m < 0, -1, 0)).astype(like.dtype)
        return -lr * (m / (np.sqrt(v) + eps if rule == Rule.SCALAR_ADAM else np.sqrt(v + eps)))


def projected_gradient(coefficients: Sequence[float], number: type) -> Any:
    """The sum of the coefficients, in their order, each addition rounded."""
    total = number(0)
    for coefficient in np.asarray(coefficients, dtype=np.float32):
        total = total + number(coefficient)
    return total


def factored_directions(left: Tensor, right: Tensor, terms: int, dtype: np.dtype) -> list[NDArray]:
    """``left_k^T right_k`` of every term, flat: a chain of fused multiply-adds over the rank, from -0."""
    directions = []
    for k in range(terms):
        columns, rows = (factor[k % len(factor)].numpy().astype(dtype) for factor in (left, right))
        total = np.full((columns.shape[1], rows.shape[1]), -0.0, dtype=dtype)
        for column, row in zip(columns, rows, strict=True):
            total = fused_multiply_add(column[:, None], row[None, :], total)
        directions.append(total.reshape(-1))
    return directions


def newest_rounding_bits(
    seeds: Sequence[Sequence[int]], key: int, at: NDArray[np.uint64], rounding: Rounding
) -> NDArray[np.uint32] | None:
    has_seeds = len(seeds) > 0 and len(seeds[-1]) > 0
    return rounding_bits(seeds[-1][0], key, at) if rounding == Rounding.STOCHASTIC and has_seeds else None


def displaced(
    theta: Tensor,
    change: NDArray,
    decay: float,
    random: NDArray[np.uint32] | None,
    residual: Tensor | None = None,
) -> Tensor:
    """``theta + (change - decay theta)``, rounded once to the dtype of theta, or, with a residual, to 24
    bits: the residual is overwritten."""
    is_long = residual is not None and theta.dtype in FORMATS
    value = join(theta, residual) if is_long else numbers(theta)
    if decay != 0:
        change = fused_multiply_add(-np.float32(decay), value, change)
    with np.errstate(all="ignore"):
        moved = value + change
    if not is_long:
        return round_to(moved, theta.dtype, random).reshape(theta.shape)
    upper, rest = split(moved, theta.dtype)
    residual.copy_(rest.reshape(residual.shape))
    return upper.reshape(theta.shape)


def combination(
    theta: Tensor,
    seeds: Sequence[int],
    coefficients: Sequence[float],
    decay: float = 0.0,
    *,
    key: int = 0,
    span: Span | None = None,
    distribution: Distribution = Distribution.NORMAL,
    rounding: Rounding = Rounding.NEAREST,
    residual: Tensor | None = None,
) -> Tensor:
    """``theta + (sum_k c_k D(s_k) - decay theta)``: what ``noise_axpy_`` makes of theta, to the bit.

    The sum starts at minus zero and takes one fused multiply-add per term, in the order of k, in
    float32 (float64 for float64); terms with coefficient zero are left out. One addition joins it to
    theta, one rounding stores it; rounding bits come from the first seed. A residual is overwritten, except
    where there is nothing to do.
    """
    if not len(seeds) and decay == 0:
        return theta.clone()
    at = indices(theta.numel(), span or whole(theta))
    directions = [direction(seed, key, at, distribution) for seed in seeds]
    change = estimate(directions, coefficients, numbers(theta))
    random = rounding_bits(seeds[0], key, at) if rounding == Rounding.STOCHASTIC and len(seeds) else None
    return displaced(theta, change, decay, random, residual)


def noise_window(
    theta: Tensor,
    seeds: Sequence[Sequence[int]],
    window: Window,
    *,
    rule: Rule = Rule.ADAM,
    key: int = 0,
    span: Span | None = None,
    distribution: Distribution = Distribution.NORMAL,
    rounding: Rounding = Rounding.NEAREST,
    residual: Tensor | None = None,
) -> Tensor:
    """What ``noise_window_`` makes of theta, to the bit. ``seeds`` are those of each step, oldest first."""
    at = indices(theta.numel(), span or whole(theta))
    directions = [[direction(seed, key, at, distribution) for seed in step] for step in seeds]
    random = newest_rounding_bits(seeds, key, at, rounding)
    return displaced(theta, move_of(window, directions, rule, numbers(theta)), window.decay, random, residual)


def factored_combination(
    theta: Tensor,
    left: Tensor,
    right: Tensor,
    seeds: Sequence[int],
    coefficients: Sequence[float],
    decay: float = 0.0,
    *,
    key: int = 0,
    span: Span | None = None,
    rounding: Rounding = Rounding.NEAREST,
    residual: Tensor | None = None,
) -> Tensor:
    """What ``factored_axpy_`` makes of theta, to the bit."""
    if not len(seeds) and decay == 0:
        return theta.clone()
    at = indices(theta.numel(), span or whole(theta))
    directions = factored_directions(left, right, len(seeds), numbers(theta).dtype)
    change = estimate(directions, coefficients, numbers(theta))
    random = rounding_bits(seeds[0], key, at) if rounding == Rounding.STOCHASTIC and len(seeds) else None
    return displaced(theta, change, decay, random, residual)


def factored_window(
    theta: Tensor,
    left: Tensor,
    right: Tensor,
    seeds: Sequence[Sequence[int]],
    window: Window,
    *,
    rule: Rule = Rule.ADAM,
    key: int = 0,
    span: Span | None = None,
    rounding: Rounding = Rounding.NEAREST,
    residual: Tensor | None = None,
) -> Tensor:
    """What ``factored_window_`` makes of theta, to the bit: factors are numbered step by step."""
    at = indices(theta.numel(), span or whole(theta))
    count = sum(len(step) for step in seeds)
    flat = iter(factored_directions(left, right, count, numbers(theta).dtype))
    directions = [[next(flat) for _ in step] for step in seeds]
    random = newest_rounding_bits(seeds, key, at, rounding)
    return displaced(theta, move_of(window, directions, rule, numbers(theta)), window.decay, random, residual)


# --- Comparison -------------------------------------------------------------------------------------

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """The storage patterns of a tensor: equality of these tells -0 from 0 and NaN from NaN."""
    return tensor.detach().contiguous().view(INTEGERS[tensor.element_size()])


def assert_same_residuals(residuals: Sequence[Tensor | None], what: str = "") -> None:
    first, second = residuals
    if first is None or second is None:
        assert first is second, what
    else:
        assert torch.equal(first, second), f"{what}: {int((first != second).sum())} residuals differ"


def assert_same_bits(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Equal dtype, shape and patterns; a NaN equals any NaN, as IEEE 754 leaves its payload open."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} is not {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} is not {tuple(expected.shape)}"
    differ = (bits(actual) != bits(expected)) & ~(actual.isnan() & expected.isnan())
    if differ.any():
        first = int(differ.reshape(-1).nonzero()[0])
        got, want = actual.reshape(-1)[first].item(), expected.reshape(-1)[first].item()
        raise AssertionError(
            f"{what}: {int(differ.sum())} of {differ.numel()} differ; at {first}: {got!r}, not {want!r}"
        )
