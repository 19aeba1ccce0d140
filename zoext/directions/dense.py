"""Directions with independent entries, drawn from the noise field."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from zoext import ops
from zoext._parameters.parameters import Parameters
from zoext.directions.base import Direction, Terms, Window, decay_of, rectangle, terms_of


class _Dense(Direction):
    distribution: ops.Distribution

    def axpy_(self, parameters: Parameters, steps: Sequence[Terms], decay: Tensor | None = None) -> None:
        ops.noise_axpy_(
            parameters.tensors,
            *terms_of(steps),
            decay_of(steps, decay),
            parameters.keys,
            parameters.spans,
            distribution=self.distribution,
            rounding=parameters.rounding,
            residuals=parameters.residuals,
        )

    def copy_(self, out: Sequence[Tensor], parameters: Parameters, terms: Terms) -> None:
        ops.noise_copy_(
            out,
            parameters.tensors,
            terms.seeds,
            terms.coefficients,
            parameters.keys,
            parameters.spans,
            distribution=self.distribution,
        )

    def window_(
        self, parameters: Parameters, window: Window, rule: ops.Rule, lr: Tensor, eps: Tensor, decay: Tensor
    ) -> None:
        ops.noise_window_(
            parameters.tensors,
            *rectangle(window.steps),
            window.first_weights,
            window.second_weights,
            lr,
            eps,
            decay,
            parameters.keys,
            parameters.spans,
            rule=rule,
            distribution=self.distribution,
            rounding=parameters.rounding,
            residuals=parameters.residuals,
        )


@dataclass(frozen=True)
class Gaussian(_Dense):
    """Independent standard normals (MeZO, arXiv 2305.17333)."""

    distribution = ops.Distribution.NORMAL


@dataclass(frozen=True)
class Rademacher(_Dense):
    """Independent signs, +1 or -1 with equal probability (Spall's SPSA; FZOO, arXiv 2506.09034)."""

    distribution = ops.Distribution.SIGN
