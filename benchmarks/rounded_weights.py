"""Weights of 16 bits that are moved by steps which are rounded in a given way, and how far they moved."""

from __future__ import annotations

import torch
from torch import Tensor

from zoext import ops

PRECISIONS = ("nearest", "stochastic", "residual")


class RoundedWeights:
    """A tensor in ``dtype``, and the residual beside it where ``precision`` is "residual".

    Args:
        start: float32, the weights before; rounded to ``dtype``.
        dtype: bfloat16 or float16; float64 for what no rounding would have made of the weights.
        precision: one of ``PRECISIONS``.
    """

    def __init__(self, start: Tensor, dtype: torch.dtype, precision: str) -> None:
        self.theta = start.to(dtype)
        self._rounding = ops.Rounding[precision.upper()]
        is_kept = self._rounding is ops.Rounding.RESIDUAL
        self._residuals = [torch.zeros(self.theta.shape, dtype=torch.int8)] if is_kept else []

    def move(self, seeds: Tensor, coefficients: Tensor, decay: Tensor) -> None:
        """One step after the other: ``theta += coefficients[s] z(seeds[s]) - decay[s] theta``, each rounded.

        ``seeds`` is int64 [S], the others are float32 [S].
        """
        ops.noise_axpy_(
            [self.theta],
            seeds[:, None],
            coefficients[:, None],
            decay,
            [0],
            [ops.span_of(self.theta)],
            rounding=self._rounding,
            residuals=self._residuals,
        )

    def whole(self) -> Tensor:
        """The weights in float64, with what the residual has of them."""
        if not self._residuals:
            return self.theta.double()
        bits = self.theta.view(torch.int16).int()
        sign = 1 - 2 * (bits < 0).double()
        # Patterns of floats count on over powers of two, and so do those with eight more bits.
        longer = ((bits & 0x7FFF) << 8) + self._residuals[0]
        if self.theta.dtype == torch.bfloat16:
            return sign * (longer << 8).view(torch.float32).double()
        return sign * (longer << 5).view(torch.float32).double() * 2.0**112


def steps_of(first: int, count: int, coefficient: float, decay: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """What ``RoundedWeights.move`` takes, of ``count`` steps with seeds from ``first`` on."""
    seeds = torch.arange(first, first + count)
    return seeds, torch.full((count,), coefficient), torch.full((count,), decay)
