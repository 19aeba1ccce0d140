"""Typed functions over ``torch.ops.zoext``, which no other module calls.

All tensors of a call are on one device. ``keys`` holds one parameter key per tensor, ``spans`` one
``(base, run, stride)`` per tensor: local element ``i`` has index
``base + (i // run) * stride + i % run`` in the unsharded parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from zoext import _C as _C  # registers the schemas and the CPU kernels

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


def _load_cuda() -> str | None:
    """Registers the CUDA kernels; returns why they are missing, or None if they are there."""
    candidates = [Path(__file__).parent / f"_cuda{suffix}" for suffix in EXTENSION_SUFFIXES]
    library = next((path for path in candidates if path.exists()), None)
    if library is None:
        return "not built"
    if torch.version.cuda is None:
        return f"built, but torch {torch.__version__} is a CPU build"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"built, but cannot be loaded: {error}"
    return None


#: Why there are no CUDA kernels, or None if there are.
cuda_missing = _load_cuda()


_ROUNDED = frozenset(getattr(torch, name) for name in _C.rounded_dtypes())


def rounds(dtype: torch.dtype) -> bool:
    """Whether weights of ``dtype`` hold less than the arithmetic they are moved in (float32).

    Only moves of such weights are rounded in one of the ways of ``Rounding``, and only these have residuals.
    """
    return dtype in _ROUNDED


def span_of(tensor: Tensor) -> Span:
    """The span of a tensor that is a whole parameter."""
    return (0, max(tensor.numel(), 1), 0)


def _written(tensors: Sequence[Tensor]) -> None:
    # Autograd must see the change, or a stale saved tensor gives wrong gradients without an error. Operators
    # that move theta call this first, so that a call that fails between two launches is seen as well.
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(tensors)


def _flat(spans: Sequence[Span]) -> list[int]:
    return [number for span in spans for number in span]


def normal_(
    out: Sequence[Tensor],
    seed: Tensor,
    keys: Sequence[int],
    spans: Sequence[Span],
    *,
    stream: int = Stream.DENSE,
    distribution: Distribution = Distribution.NORMAL,
) -> None:
    """``out = z(seed)``; ``seed`` is an int64 tensor of one element."""
    torch.ops.zoext.normal_(list(out), seed, list(keys), _flat(spans), int(stream), int(distribution))
    _written(out)


def noise_axpy_(
    theta: Sequence[Tensor],
    seeds: Tensor,
    coefficients: Tensor,
    decay: Tensor,
    keys: Sequence[int],
    spans: Sequence[Span],
    *,
    distribution: Distribution = Distribution.NORMAL,
    rounding: Rounding = Rounding.NEAREST,
    residuals: Sequence[Tensor] = (),
) -> None:
    """``theta = theta + (sum_k coefficients[k] z(seeds[k]) - decay * theta)``, rounded once.

    ``seeds`` is int64 [K], ``coefficients`` float32 [K], ``decay`` float32 []. The sum is a chain of
    fused multiply-adds in the order of k; a coefficient of zero leaves its term out. With ``seeds`` [S, K],
    ``coefficients`` [S, K] and ``decay`` [S] there are S such steps one after the other, each rounded, in one
    pass over theta.

    With ``Rounding.RESIDUAL`` theta is the upper part of floats of 24 bits, and ``residuals`` has int8
    tensors with the lower parts: as large as theta in 16 bits, empty for others. Bits of stochastic
    rounding come from the first seed of a step.
    """
    _written([*theta, *residuals])
    torch.ops.zoext.noise_axpy_(
        list(theta),
        list(residuals),
        seeds,
        coefficients,
        decay,
        list(keys),
        _flat(spans),
        int(distribution),
        int(rounding),
    )


def noise_copy_(
    out: Sequence[Tensor],
    theta: Sequence[Tensor],
    seeds: Tensor,
    coefficients: Tensor,
    keys: Sequence[int],
    spans: Sequence[Span],
    *,
    distribution: Distribution = Distribution.NORMAL,
    rounding: Rounding = Rounding.NEAREST,
) -> None:
    """``out = theta + sum_k coefficients[k] z(seeds[k])``, rounded once; theta is only read.

    A tensor of ``out`` is that of theta itself or shares no memory with it.
    """
    torch.ops.zoext.noise_copy_(
        list(out),
        list(theta),
        seeds,
        coefficients,
        list(keys),
        _flat(spans),
        int(distribution),
        int(rounding),
    )
    _written(out)


def noise_window_(
    theta: Sequence[Tensor],
    seeds: Tensor,
    coefficients: Tensor,
    first_weights: Tensor,
    second_weights: Tensor,
    lr: Tensor,
    eps: Tensor,
    decay: Tensor,
    keys: Sequence[int],
    spans: Sequence[Span],
    *,
    rule: Rule = Rule.ADAM,
    distribution: Distribution = Distribution.NORMAL,
    rounding: Rounding = Rounding.NEAREST,
    residuals: Sequence[Tensor] = (),
) -> None:
    """``theta = theta + (move - decay theta)``, rounded once, with the move that ``rule`` makes of a window.

    The window has H steps, oldest first. The estimate of step h is
    ``g_h = sum_k coefficients[h, k] z(seeds[h, k])``, and ``m = sum_h first_weights[h] g_h``. ``Rule`` says
    what v is and what the move is.

    ``seeds`` is int64 [H, K], ``coefficients`` float32 [H, K], the weights are float32 [H], and ``lr``,
    ``eps`` and ``decay`` float32 []. Bits of stochastic rounding come from the first seed of the newest
    step. A step whose coefficients are all zero is left out. Where ``lr`` is zero only the decay moves
    theta. Rules that do not square each estimate do not draw one whose first weight is zero.

    To take S steps one after the other in one pass over theta, pass ``seeds`` and ``coefficients``
    [S + H - 1, K], weights [S, H], and ``lr`` and ``decay`` [S]; the window of each step ends one row
    later than that of the step before. ``residuals`` is that of ``noise_axpy_``.
    """
    _written([*theta, *residuals])
    torch.ops.zoext.noise_window_(
        list(theta),
        list(residuals),
        seeds,
        coefficients,
        first_weights,
        second_weights,
        lr,
        eps,
        decay,
        list(keys),
        _flat(spans),
        int(distribution),
        int(rounding),
        int(rule),
    )


def factored_axpy_(
    theta: Sequence[Tensor],
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    seeds: Tensor,
    coefficients: Tensor,
    decay: Tensor,
    keys: Sequence[int],
    spans: Sequence[Span],
    *,
    rounding: Rounding = Rounding.NEAREST,
    residuals: Sequence[Tensor] = (),
) -> None:
    """``theta = theta + (sum_k coefficients[k] left_k^T right_k - decay theta)``, rounded once.

    For matrices of m x n: ``left[t]`` is float32 [K or 1, r, m], ``right[t]`` float32 [K or 1, r, n]; a
    factor with one entry serves all terms. ``seeds`` (int64 [K]) give bits of stochastic rounding. Several
    steps at once and ``residuals`` are those of ``noise_axpy_``; term k of step s has the factors number
    ``s * K + k``.
    """
    _written([*theta, *residuals])
    torch.ops.zoext.factored_axpy_(
        list(theta),
        list(residuals),
        list(left),
        list(right),
        seeds,
        coefficients,
        decay,
        list(keys),
        _flat(spans),
        int(rounding),
    )


def factored_copy_(
    out: Sequence[Tensor],
    theta: Sequence[Tensor],
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    seeds: Tensor,
    coefficients: Tensor,
    keys: Sequence[int],
    spans: Sequence[Span],
    *,
    rounding: Rounding = Rounding.NEAREST,
) -> None:
    """``out = theta + sum_k coefficients[k] left_k^T right_k``, rounded once; theta is only read."""
    torch.ops.zoext.factored_copy_(
        list(out),
        list(theta),
        list(left),
        list(right),
        seeds,
        coefficients,
        list(keys),
        _flat(spans),
        int(rounding),
    )
    _written(out)


def factored_window_(
    theta: Sequence[Tensor],
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    seeds: Tensor,
    coefficients: Tensor,
    first_weights: Tensor,
    second_weights: Tensor,
    lr: Tensor,
    eps: Tensor,
    decay: Tensor,
    keys: Sequence[int],
    spans: Sequence[Span],
    *,
    rule: Rule = Rule.ADAM,
    rounding: Rounding = Rounding.NEAREST,
    residuals: Sequence[Tensor] = (),
) -> None:
    """``noise_window_`` for directions of matrices given by their factors.

    The term of row h and column k is number ``h * K + k`` of the factors, float32 [H K or 1, r, m] and
    [H K or 1, r, n]. Several steps at once and ``residuals`` are those of ``noise_window_``.
    """
    _written([*theta, *residuals])
    torch.ops.zoext.factored_window_(
        list(theta),
        list(residuals),
        list(left),
        list(right),
        seeds,
        coefficients,
        first_weights,
        second_weights,
        lr,
        eps,
        decay,
        list(keys),
        _flat(spans),
        int(rounding),
        int(rule),
    )


def power_iteration(
    input: Tensor, mask: Tensor | None, seed: Tensor, *, rank: int, iterations: int
) -> tuple[Tensor, Tensor]:
    """An orthonormal basis of the leading ``rank`` right singular vectors of the rows of ``input``.

    Args:
        input: [..., d], contiguous, of any floating-point dtype; the arithmetic is float32.
        mask: bool [...], which rows count; None counts all. The others may hold anything.
        seed: int64, one element; the start is drawn from the noise field, with key 0 whatever the layer.
        rank: how many vectors, 1 to d.
        iterations: how many products with the Gram matrix, 0 or more.

    Returns:
        The basis, float32 [rank, d], one vector a row, and the singular values, float32 [rank], in
        descending order. Vectors beyond the rank of the input are zero, and so are their values; without
        rows that count, all are. The rank is that of float32: values below 1e-6 of the largest are lost
        in its rounding. If a row that counts is not finite, also once it is float32, or exceeds 1e36,
        the basis is zero and the values are NaN.

    The method is a block Krylov iteration with Rayleigh-Ritz (Musco and Musco, NeurIPS 2015, algorithm 2)
    on ``H^T H`` for the rows ``H``: it takes as many products with ``H`` as power iteration and is far
    more accurate.
    """
    basis, values = torch.ops.zoext.power_iteration(input, mask, seed, rank, iterations)
    return basis, values


def _fake_power_iteration(
    input: Tensor, mask: Tensor | None, seed: Tensor, rank: int, iterations: int
) -> tuple[Tensor, Tensor]:
    basis = input.new_empty((rank, input.shape[-1]), dtype=torch.float32)
    return basis, input.new_empty((rank,), dtype=torch.float32)


torch.library.register_fake("zoext::power_iteration", _fake_power_iteration)
