"""How weights are stored: rounding to nearest, stochastic rounding, and 24-bit floats in two parts.

The rules are those of ``csrc/core/storage.h``, as integer operations on the bit patterns of floats. float16
patterns are never computed from subnormal float32 numbers, which many devices flush to zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

_HALVES = (torch.bfloat16, torch.float16)
_MAGNITUDE = 0x7FFFFFFF
_INFINITY = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}

#: float32 patterns from which values are rounded to nearest, since there is no finite neighbour above them.
_UNBOUNDED = {torch.bfloat16: 0x7F7F0000, torch.float16: 0x477FE000}
_UNSPLIT = {torch.bfloat16: 0x7F7F7F80, torch.float16: 0x477FEFF0}

#: Difference between the exponent biases of float32 and float16, in the exponent bits of float32.
_HALF_BIAS = 0x38000000


def is_rounded(dtype: torch.dtype) -> bool:
    """Whether weights of this type have less precision than their arithmetic."""
    return dtype in _HALVES


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The dtype of computations on weights of this type."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def stochastic(value: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    """Rounds float32 up with the discarded fraction as probability; ``random`` is int32, 16 bits."""
    bits = value.view(torch.int32)
    magnitude = bits & _MAGNITUDE
    if dtype == torch.bfloat16:
        pattern = (bits + random) >> 16
    else:
        pattern = _signed_half((_half_pattern(value.abs()) + (random >> 3)) >> 13, bits)
    nearest = value.to(dtype)
    rounded = pattern.to(torch.int16).view(dtype)
    return torch.where(magnitude >= _UNBOUNDED[dtype], nearest, rounded)


def split(value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Splits float32 into the nearest 16-bit number and an int8 residual in 1/256 of its last place."""
    bits = value.view(torch.int32)
    if dtype == torch.bfloat16:
        rounded = bits + 0x80
        pattern, rest = (rounded + 0x8000) >> 16, rounded >> 8
    else:
        rounded = _half_pattern(value.abs()) + 0x10
        pattern, rest = _signed_half((rounded + 0x1000) >> 13, bits), rounded >> 5
    is_whole = (bits & _MAGNITUDE) < _UNSPLIT[dtype]
    upper = torch.where(is_whole, pattern.to(torch.int16).view(dtype), value.to(dtype))
    residual = ((rest & 0xFF) ^ 0x80) - 0x80
    return upper, torch.where(is_whole, residual, 0).to(torch.int8)


def join(upper: Tensor, residual: Tensor) -> Tensor:
    """The float32 that the two parts represent, exactly."""
    pattern = upper.view(torch.int16).to(torch.int32)
    magnitude = pattern & 0x7FFF
    rest = residual.to(torch.int32)
    rest = torch.where(magnitude == 0, rest & 0x7F, rest)  # zero has nothing below it
    if upper.dtype == torch.bfloat16:
        whole = (pattern * 2**16 + rest * 2**8).view(torch.float32)
    else:
        normal = (magnitude * 2**13 + rest * 2**5 + _HALF_BIAS).view(torch.float32)
        positive = torch.minimum(2.0 * normal - 2.0**-14, normal)
        whole = torch.where(pattern < 0, -positive, positive)
    return torch.where(magnitude < _INFINITY[upper.dtype], whole, upper.to(torch.float32))


def _half_pattern(magnitude: Tensor) -> Tensor:
    """Magnitudes as patterns of float16 with 13 more bits behind them, int32."""
    # (a + 2**-14) / 2 has the spacing of float16's subnormals, and the larger pattern only for these.
    counted = (0.5 * magnitude + 2.0**-15).view(torch.int32)
    return torch.maximum(magnitude.view(torch.int32), counted) - _HALF_BIAS


def _signed_half(pattern: Tensor, bits: Tensor) -> Tensor:
    return torch.where(bits < 0, pattern - 2**15, pattern)
