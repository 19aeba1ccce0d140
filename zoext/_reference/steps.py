"""Combinations of directions: what dense and factored ``axpy_`` and ``copy_`` have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from zoext._reference.field import RoundingBits, rounding_keys
from zoext._reference.places import chunks
from zoext._reference.weights import Term, Tile, combination, combinations
from zoext.ops import Rounding, Span


class Target(NamedTuple):
    """One tensor of a call and the directions on it, step by step."""

    theta: Tensor
    residual: Tensor | None
    key: int
    span: Span
    terms: Sequence[Term]
    columns: int = 1  # a chunk has whole rows of this many elements, or part of one row

    def tiles(self) -> Iterator[Tile]:
        for places in chunks(self.theta.numel(), self.span, self.theta.device, self.columns):
            yield Tile(self.theta, self.residual, places)


class RoundingSeeds:
    """The bits of stochastic rounding of each step of a call."""

    def __init__(self, rounding: Rounding, seeds: Tensor) -> None:
        """``seeds`` is int64 [S], the first of each step; if empty, steps round to nearest."""
        self._keys = rounding_keys(seeds) if rounding == Rounding.STOCHASTIC and len(seeds) else None

    def bits(self, step: int, key: int) -> RoundingBits | None:
        return None if self._keys is None else RoundingBits(self._keys[step], key)


def axpy_(
    targets: Sequence[Target], seeds: Tensor, coefficients: Tensor, decay: Tensor, rounding: Rounding
) -> None:
    """``theta = theta + (sum_k coefficients[s, k] terms[s K + k] - decay[s] theta)`` for each step s."""
    if seeds.dim() == 1:
        seeds, coefficients = seeds.unsqueeze(0), coefficients.unsqueeze(0)
    steps, terms = seeds.shape
    decay = decay.reshape(-1)
    moves = (coefficients != 0).any(1) | (decay != 0)
    random = RoundingSeeds(rounding, seeds[:, 0] if terms else seeds.flatten())
    for target in targets:
        for tile in target.tiles():
            for s in range(steps):
                own = target.terms[s * terms : (s + 1) * terms]
                change = combination(own, coefficients[s], tile.places, tile.arithmetic)
                tile.move(change, decay[s], moves[s], random.bits(s, target.key))
            tile.write(target.theta, target.residual)


def copy_(
    out: Sequence[Tensor],
    targets: Sequence[Target],
    seeds: Tensor,
    coefficients: Tensor,
    rounding: Rounding,
) -> None:
    """``out = theta + sum_k coefficients[k] terms[k]``."""
    random = RoundingSeeds(rounding, seeds[:1])
    for to, target in zip(out, targets, strict=True):
        for tile in target.tiles():
            change = combination(target.terms, coefficients, tile.places, tile.arithmetic)
            tile.move(change, bits=random.bits(0, target.key))
            tile.write(to)


def copies_(
    out: Sequence[Tensor],
    targets: Sequence[Target],
    seeds: Tensor,
    coefficients: Tensor,
    rounding: Rounding,
) -> None:
    """``out[c] = theta + sum_k coefficients[c, k] terms[k]``."""
    random = RoundingSeeds(rounding, seeds[:1])
    for to, target in zip(out, targets, strict=True):
        for tile in target.tiles():
            changes = combinations(target.terms, coefficients, tile.places, tile.arithmetic)
            for copy, change in zip(to.unbind(), changes, strict=True):
                displaced = Tile(target.theta, None, tile.places)
                displaced.move(change, bits=random.bits(0, target.key))
                displaced.write(copy)


def own_residuals(residuals: Sequence[Tensor], theta: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """The residual of each tensor of theta; None for each if there are none."""
    return residuals if residuals else [None] * len(theta)
