"""The arguments that several operators share: enumerations, spans, and the marks of written tensors."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

Span = tuple[int, int, int]


class Stream(IntEnum):
    """The uses of random words (``csrc/core/stream.h``); no two of them share a word."""

    DENSE = 0
    LEFT_FACTOR = 1
    RIGHT_FACTOR = 2
    ROUNDING = 3
    POWER_ITERATION = 4
    SEED = 5
    SIGN = 6


class Distribution(IntEnum):
    NORMAL = 0
    SIGN = 1


class Rounding(IntEnum):
    NEAREST = 0
    STOCHASTIC = 1
    RESIDUAL = 2


class Rule(IntEnum):
    """What an update makes of the moments of an element (``csrc/core/rules.h``).

    With ``g_h`` the gradient estimates of a window and ``p_h`` their projected gradients, the sums of
    their coefficients, ``m = sum_h w1_h g_h`` and theta moves by:

    - ADAM: ``-lr m / sqrt(v + eps)`` with ``v = sum_h w2_h g_h**2``.
    - SIGN: ``-lr sign(m)``; ``w2`` and ``eps`` are not used.
    - SCALAR_ADAM: ``-lr m / (sqrt(v) + eps)`` with ``v = sum_h w2_h p_h**2``, the same for all elements.
    """

    ADAM = 0
    SIGN = 1
    SCALAR_ADAM = 2


def span_of(tensor: Tensor) -> Span:
    """The span of a tensor that is a whole parameter."""
    return (0, max(tensor.numel(), 1), 0)


def written(tensors: Sequence[Tensor]) -> None:
    # Autograd must see the change, or a stale saved tensor gives wrong gradients without an error. Operators
    # that move theta call this first, so that a call that fails between two launches is seen as well.
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(tensors)


def flat(spans: Sequence[Span]) -> list[int]:
    if len(spans) == 1:  # as for most modules of a streamed probe
        return [*spans[0]]
    return [number for span in spans for number in span]
