"""The noise field in plain torch operators: Philox words, standard normals, signs and rounding bits.

The formulas and their constants are those of ``csrc/core`` (``philox.h``, ``normal.h``, ``sign.h`` and
``storage.h``). Words are int64 tensors with values in 0 .. 2**32 - 1, since few backends have all operators
for unsigned integers; the product of two of them wraps modulo 2**64, which keeps all of its bits. Nothing
here needs float64, copies from the host, or synchronizes with the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoext._reference.places import Places
from zoext.ops import Distribution, Stream

MASK = 0xFFFFFFFF
_SIGN_BIT = 0x80000000

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS, _ROUNDS_OF_ROUNDING = 10, 7

_BLOCK_OF_NORMALS, _BLOCK_OF_SIGNS, _BLOCK_OF_ROUNDING = 4, 128, 16


def _hex(*numbers: str) -> list[float]:
    return [float.fromhex(number) for number in numbers]


# -2 log(1 - w) / w in powers of w; sin(2 pi a) / a and cos(2 pi a) in powers of a**2.
_LOG = _hex(
    *("0x1.fffffcp+0", "0x1.0004cap+0", "0x1.53d3ccp-1", "0x1.16c8d8p-1"),
    *("0x1.3771dep-4", "0x1.9223f8p+0", "-0x1.14dfc8p+1", "0x1.2f57a6p+1"),
)
_SINE = _hex("0x1.921fb4p+2", "-0x1.4abbb6p+5", "0x1.46676ep+6", "-0x1.3232fap+6", "0x1.3c4b2cp+5")
_COSINE = _hex("0x1.fffffep-1", "-0x1.3bd3a6p+4", "0x1.03bd06p+6", "-0x1.54f61cp+6", "0x1.c1f080p+5")
# -2 log(2) in two parts; the first has few enough bits that its product with an exponent is exact.
_LOG_HIGH, _LOG_LOW = _hex("-0x1.62ep+0", "-0x1.0cp-14")


def _pair(first: int, second: int, device: torch.device) -> Tensor:
    """Two integers as [2, 1], made on the device: ``torch.tensor`` would copy them from the host."""
    return (torch.arange(2, device=device) * (second - first) + first).unsqueeze(1)


def round_keys(seeds: Tensor, rounds: int = _ROUNDS) -> Tensor:
    """The keys of the rounds, int64 [K, 2, rounds], of seeds, int64 [K]."""
    halves = torch.stack((seeds, seeds >> 32), dim=1).unsqueeze(2) & MASK
    steps = torch.arange(rounds, device=seeds.device) * _pair(*_KEY_STEPS, seeds.device)
    return (halves + steps) & MASK


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], keys: Tensor) -> Tensor:
    """Philox4x32 (Salmon et al., SC 2011): the words of four counter words, int64 [n] each, as [n, 4].

    ``keys`` are those of one seed, [2, rounds].
    """
    multipliers = _pair(*_MULTIPLIERS, keys.device)
    even, odd = torch.stack(counter[0::2]), torch.stack(counter[1::2])
    for key in keys.unbind(1):
        product = (even * multipliers).flip(0)
        even = ((product >> 32) & MASK) ^ odd ^ key.unsqueeze(1)
        odd = product & MASK
    return torch.stack((even[0], odd[0], even[1], odd[1]), dim=1)


def words(keys: Tensor, key: int, stream: int, blocks: Tensor) -> Tensor:
    """The words of the blocks with the given numbers (int64 [n]) of one parameter: int64 [n, 4]."""
    counter = (
        blocks & MASK,
        (blocks >> 32) & MASK,
        torch.full_like(blocks, key),
        torch.full_like(blocks, stream),
    )
    return philox4x32(counter, keys)


def normals_of_words(block_words: Tensor) -> Tensor:
    """Box-Muller normals of words [..., 2 n], the sine of each pair first: float32 of the same shape."""
    radius = _radius(block_words[..., 0::2])
    second = block_words[..., 1::2]
    # Dropping the top bit folds the turn onto half a turn; sine and cosine then change sign together.
    twice = (second << 1) & MASK
    radius = torch.where(((second ^ twice) & _SIGN_BIT) != 0, -radius, radius)
    turns = _signed(twice) * 2.0**-33 + 2.0**-33
    square = turns * turns
    sine = radius * (turns * _fused_polynomial(square, _SINE))
    cosine = radius * _fused_polynomial(square, _COSINE)
    return torch.stack((sine, cosine), dim=-1).reshape(block_words.shape)


def _radius(word: Tensor) -> Tensor:
    """``sqrt(-2 log((word + 1/2) / 2**32))``."""
    # The uniform if it is at most 1/2, else the uniform minus 1, which keeps the low bits of the word.
    nearest = _signed(word) * 2.0**-32 + 2.0**-33
    bits = nearest.view(torch.int32)
    exponent = (((bits >> 23) & 0x1FF) - 126).clamp(max=0)
    mantissa = (bits - exponent * 2**23).view(torch.float32)
    w = (nearest > 0).to(torch.float32) - mantissa
    exponent = exponent.to(torch.float32)
    log_mantissa = w * _polynomial(w, _LOG)
    return (exponent * _LOG_HIGH + (exponent * _LOG_LOW + log_mantissa)).sqrt()


def _signed(word: Tensor) -> Tensor:
    """Words read as two's complement integers of 32 bits, as float32."""
    return ((word ^ _SIGN_BIT) - _SIGN_BIT).to(torch.float32)


def _fused_polynomial(x: Tensor, coefficients: list[float]) -> Tensor:
    """``_polynomial`` with fused multiply-adds, for coefficients larger than the terms added to them.

    Few backends have an operator that is guaranteed to round once, and in the polynomials of sine and cosine
    a second rounding would cost more than 1e-6 of a normal. The rounding errors of both operations are
    therefore computed and added: that of the product by Dekker's algorithm, that of the sum by Fast2Sum.
    """
    x_high, x_low = _halves(x)
    total = torch.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        high, low = _halves(total)
        product = total * x
        error = ((high * x_high - product) + high * x_low + low * x_high) + low * x_low
        total = product + coefficient
        total = total + ((product - (total - coefficient)) + error)
    return total


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Veltkamp's splitting into two numbers of at most 12 bits."""
    scaled = x * 4097.0
    high = scaled - (scaled - x)
    return high, x - high


def _polynomial(x: Tensor, coefficients: list[float]) -> Tensor:
    total = x * coefficients[-1] + coefficients[-2]
    for coefficient in coefficients[-3::-1]:
        total = total * x + coefficient
    return total


class NoiseTerm:
    """One direction of the noise field on one parameter; ``keys`` are the ``round_keys`` of its seed."""

    def __init__(self, keys: Tensor, key: int, distribution: Distribution, stream: int | None = None) -> None:
        self._is_sign = distribution == Distribution.SIGN
        self._key = key
        self._stream = int(Stream.SIGN if self._is_sign else Stream.DENSE) if stream is None else stream
        self._keys = keys

    def at(self, places: Places, dtype: torch.dtype) -> Tensor:
        """Its entries at some places, [count]."""
        size = _BLOCK_OF_SIGNS if self._is_sign else _BLOCK_OF_NORMALS
        drawn = words(self._keys, self._key, self._stream, places.blocks(size))
        if not self._is_sign:
            return places.pick(normals_of_words(drawn), size).to(dtype)
        bit = places.pick(drawn, size) >> (places.indices & 31)
        return 1.0 - 2.0 * (bit & 1).to(dtype)


class RoundingBits:
    """The bits of stochastic rounding on one parameter; ``keys`` are ``rounding_keys`` of a seed."""

    def __init__(self, keys: Tensor, key: int) -> None:
        self._keys = keys
        self._key = key

    def at(self, places: Places) -> Tensor:
        """16 random bits for each place, int32 [count]."""
        drawn = words(self._keys, self._key, int(Stream.ROUNDING), places.blocks(_BLOCK_OF_ROUNDING))
        # A block serves 16 elements: the halves of its words, low half first, then those of the words
        # rotated by a byte.
        rotated = ((drawn << 8) | (drawn >> 24)) & MASK
        word = places.pick(torch.cat((drawn, rotated), dim=1), _BLOCK_OF_ROUNDING)
        return ((word >> ((places.indices & 1) * 16)) & 0xFFFF).to(torch.int32)


def rounding_keys(seeds: Tensor) -> Tensor:
    """The keys for ``RoundingBits``, [K, 2, rounds], of seeds, int64 [K]; rounding uses fewer rounds."""
    return round_keys(seeds, _ROUNDS_OF_ROUNDING)
