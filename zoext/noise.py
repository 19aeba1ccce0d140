"""The noise field: random numbers that are a pure function of (seed, key, index).

Philox4x32-10 with the seed as key and (block, parameter key, stream) as counter, Box-Muller on word
pairs (``csrc/core``). Any element can be generated alone, on any device, in any order, with the same bits.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from zoext import _C, ops

#: Raised whenever a bit of the noise field, of rounding or of an update changes.
NOISE_FIELD = 2

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def signed(seed: int) -> int:
    """A 64-bit seed as the int64 that a tensor can hold; the bits are the same."""
    try:
        seed = operator.index(seed)
    except TypeError:
        raise TypeError(f"seed must be an integer, not {seed!r}") from None
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must fit into 64 bits, not {seed}; take it modulo 2**64")
    return seed - 2**64 if seed >= 2**63 else seed


def step_seed(seed: int, step: int, draw: int = 0) -> int:
    """The seed of draw ``draw`` (0 .. 2**32 - 1) of step ``step`` of a run with seed ``seed``.

    No generator state is kept anywhere: resuming a run needs only the step number. The result is in
    0 .. 2**64 - 1.
    """
    return _C.step_seed(signed(seed) % 2**64, step, draw)


def normal(
    shape: int | Sequence[int],
    *,
    seed: int,
    key: int = 0,
    stream: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normals ``z(seed, key, index)``, with ``index`` the row-major position in ``shape``.

    Computed in float32 and rounded once to ``dtype`` (float32, float64, bfloat16 or float16). The bits
    do not depend on the device. ``key`` and ``stream`` are in 0 .. 2**32 - 1; ``seed`` has 64 bits.
    torch's generators are neither read nor advanced.
    """
    if dtype not in FLOATING:
        raise TypeError(f"dtype must be one of {', '.join(map(str, FLOATING))}, not {dtype}")
    out = torch.empty(shape, dtype=dtype, device=device)
    seeds = torch.full((1,), signed(seed), dtype=torch.int64, device=out.device)
    ops.normal_([out], seeds, [key], [ops.span_of(out)], stream=stream)
    return out
