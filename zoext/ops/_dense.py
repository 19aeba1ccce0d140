"""The operators on dense directions, drawn from the noise field."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoext.ops import _library as _library  # the operators are registered before they are called
from zoext.ops._arguments import Distribution, Rounding, Rule, Span, Stream, flat, written


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
    torch.ops.zoext.normal_(list(out), seed, list(keys), flat(spans), int(stream), int(distribution))
    written(out)


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
    written([*theta, *residuals])
    torch.ops.zoext.noise_axpy_(
        list(theta),
        list(residuals),
        seeds,
        coefficients,
        decay,
        list(keys),
        flat(spans),
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
        flat(spans),
        int(distribution),
        int(rounding),
    )
    written(out)


def noise_copies_(
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
    """``out[t][c] = theta[t] + sum_k coefficients[c, k] z(seeds[k])``, rounded once; theta is only read.

    ``out[t]`` is [C, *theta[t].shape], contiguous, and shares no memory with ``theta[t]``. ``seeds`` is int64
    [K] and ``coefficients`` float32 [C, K]. A copy has the bits that ``noise_copy_`` gives with its row of
    coefficients, but each ``z(seeds[k])`` is generated once for all copies, and theta is read once.

    Example:
        >>> theta, out = [torch.ones(3)], [torch.empty(2, 3)]
        >>> terms = torch.tensor([7]), torch.tensor([[0.5], [-0.5]])
        >>> noise_copies_(out, theta, *terms, [0], [span_of(theta[0])])
        >>> bool((out[0].mean(0) - theta[0]).abs().max() < 1e-6)
        True
    """
    torch.ops.zoext.noise_copies_(
        list(out),
        list(theta),
        seeds,
        coefficients,
        list(keys),
        flat(spans),
        int(distribution),
        int(rounding),
    )
    written(out)


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
    written([*theta, *residuals])
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
        flat(spans),
        int(distribution),
        int(rounding),
        int(rule),
    )
