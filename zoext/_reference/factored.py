"""The operators on low-rank directions of matrices, given by their factors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoext._reference import checks, steps, windows
from zoext._reference.places import Places
from zoext._reference.steps import Target, own_residuals
from zoext._reference.windows import Window
from zoext.ops import Span


class _FactoredTerm:
    """``left^T right`` for factors [rank, m] and [rank, n]."""

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self._left = left
        self._right = right

    def at(self, places: Places, dtype: torch.dtype) -> Tensor:
        columns = self._right.shape[1]
        first_row, first_column = divmod(places.start, columns)
        rows, width = max(places.count // columns, 1), min(places.count, columns)
        left = self._left.narrow(1, first_row, rows).to(dtype).unsqueeze(2)
        right = self._right.narrow(1, first_column, width).to(dtype).unsqueeze(1)
        # Summed over the rank one by one: the order is fixed on all devices, unlike that of a matrix product.
        total = torch.full((rows, width), -0.0, dtype=dtype, device=left.device)
        for column, row in zip(left.unbind(), right.unbind(), strict=True):
            total = total + column * row
        return total.flatten()


def factored_axpy_(
    theta: Sequence[Tensor],
    residuals: Sequence[Tensor],
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    seeds: Tensor,
    coefficients: Tensor,
    decay: Tensor,
    keys: Sequence[int],
    spans: Sequence[int],
    rounding: int,
) -> None:
    checks.tensors("theta", theta)
    places_of = checks.places(theta, keys, spans)
    how = checks.rounding(rounding, theta, residuals)
    if not theta:
        return
    checks.steps(seeds, coefficients, decay, theta[0])
    checks.factors(theta, left, right, seeds.numel())
    with torch.inference_mode():
        targets = _targets(theta, residuals, left, right, seeds.numel(), keys, places_of)
        steps.axpy_(targets, seeds, coefficients, decay, how)


def factored_copy_(
    out: Sequence[Tensor],
    theta: Sequence[Tensor],
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    seeds: Tensor,
    coefficients: Tensor,
    keys: Sequence[int],
    spans: Sequence[int],
    rounding: int,
) -> None:
    checks.tensors("out", out)
    checks.tensors("theta", theta)
    checks.copies(out, theta)
    places_of = checks.places(theta, keys, spans)
    how = checks.rounding_of_copy(rounding)
    if not theta:
        return
    checks.terms(seeds, coefficients, theta[0], dimensions=1)
    checks.factors(theta, left, right, seeds.numel())
    with torch.inference_mode():
        targets = _targets(theta, (), left, right, seeds.numel(), keys, places_of)
        steps.copy_(out, targets, seeds, coefficients, how)


def factored_window_(
    theta: Sequence[Tensor],
    residuals: Sequence[Tensor],
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
    spans: Sequence[int],
    rounding: int,
    rule: int,
) -> None:
    checks.tensors("theta", theta)
    places_of = checks.places(theta, keys, spans)
    how, known = checks.rounding(rounding, theta, residuals), checks.rule(rule)
    if not theta:
        return
    arguments = seeds, coefficients, first_weights, second_weights, lr, eps, decay
    checks.windows(*arguments, theta[0])
    checks.factors(theta, left, right, seeds.numel())
    with torch.inference_mode():
        targets = _targets(theta, residuals, left, right, seeds.numel(), keys, places_of)
        windows.window_(targets, Window.of(*arguments), how, known)


def _targets(
    theta: Sequence[Tensor],
    residuals: Sequence[Tensor],
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    terms: int,
    keys: Sequence[int],
    spans: Sequence[Span],
) -> list[Target]:
    """A factor with one entry is used for all terms."""
    rows = zip(theta, own_residuals(residuals, theta), left, right, keys, spans, strict=True)
    return [
        Target(
            tensor.detach(),
            residual,
            key,
            span,
            [_FactoredTerm(own_left[k % len(own_left)], own_right[k % len(own_right)]) for k in range(terms)],
            columns=own_right.shape[2],
        )
        for tensor, residual, own_left, own_right, key, span in rows
    ]
