"""A chunk of weights to which steps are applied one after another, and the sums that move it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from zoext._reference import rounding
from zoext._reference.field import RoundingBits
from zoext._reference.places import Places


class Term(Protocol):
    """One direction on one parameter."""

    def at(self, places: Places, dtype: torch.dtype) -> Tensor:
        """Its entries at some places, [count], computed in ``dtype``."""


def empty_sum(places: Places, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Minus zero, because x + (-0) is x for every x, signed zeros included."""
    return torch.full((places.count,), -0.0, dtype=dtype, device=device)


def combination(terms: Sequence[Term], coefficients: Tensor, places: Places, dtype: torch.dtype) -> Tensor:
    """``sum_k coefficients[k] terms[k]`` in the order of k. Terms with a coefficient of zero are skipped."""
    return combinations(terms, coefficients.unsqueeze(0), places, dtype)[0]


def combinations(
    terms: Sequence[Term], coefficients: Tensor, places: Places, dtype: torch.dtype
) -> list[Tensor]:
    """One for each row of ``coefficients`` [C, K]; the entries of a term are computed once."""
    totals = [empty_sum(places, dtype, coefficients.device) for _ in range(len(coefficients))]
    for term, column in zip(terms, coefficients.to(dtype).unbind(1), strict=True):
        entries = term.at(places, dtype)
        totals = [
            torch.where(coefficient != 0, total + coefficient * entries, total)
            for coefficient, total in zip(column.unbind(), totals, strict=True)
        ]
    return totals


class Tile:
    """The weights at some places; they are written only by ``write``."""

    def __init__(self, theta: Tensor, residual: Tensor | None, places: Places) -> None:
        self.places = places
        self.weights = _part(theta, places)
        self.arithmetic = rounding.arithmetic(theta.dtype)
        has_residual = residual is not None and rounding.is_rounded(theta.dtype)
        self._residual = _part(residual, places) if has_residual and residual is not None else None

    def move(
        self,
        change: Tensor,
        decay: Tensor | None = None,
        moves: Tensor | None = None,
        bits: RoundingBits | None = None,
    ) -> None:
        """``weights = weights + (change - decay * weights)``, rounded once.

        Args:
            change: in the arithmetic of the weights, [count].
            decay: float32 []; None for none.
            moves: bool [], whether the step moves anything; None for yes. If not, no bit changes.
            bits: of stochastic rounding; None rounds to nearest, with a residual to 24 bits.
        """
        before, residual = self.weights, self._residual
        value = before.to(self.arithmetic) if residual is None else rounding.join(before, residual)
        if decay is not None:
            change = torch.where(decay != 0, change - decay.to(self.arithmetic) * value, change)
        value = value + change
        if residual is not None:
            self.weights, rest = rounding.split(value, before.dtype)
            self._residual = rest if moves is None else torch.where(moves, rest, residual)
        elif bits is not None and rounding.is_rounded(before.dtype):
            self.weights = rounding.stochastic(value, before.dtype, bits.at(self.places))
        else:
            self.weights = value.to(before.dtype)
        if moves is not None:
            self.weights = torch.where(moves, self.weights, before)

    def write(self, out: Tensor, residual: Tensor | None = None) -> None:
        _part(out, self.places).copy_(self.weights)
        if residual is not None and self._residual is not None:
            _part(residual, self.places).copy_(self._residual)


def _part(tensor: Tensor, places: Places) -> Tensor:
    return tensor.view(-1).narrow(0, places.start, places.count)
