"""The operators on directions of matrices that are given by their factors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoext.ops import _library as _library  # the operators are registered before they are called
from zoext.ops._arguments import Rounding, Rule, Span, flat, written


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
    written([*theta, *residuals])
    torch.ops.zoext.factored_axpy_(
        list(theta),
        list(residuals),
        list(left),
        list(right),
        seeds,
        coefficients,
        decay,
        list(keys),
        flat(spans),
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
        flat(spans),
        int(rounding),
    )
    written(out)


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
    written([*theta, *residuals])
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
        flat(spans),
        int(rounding),
        int(rule),
    )
