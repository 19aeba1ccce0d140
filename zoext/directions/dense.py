"""Directions with independent entries, drawn from the noise field."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from zoext import ops
from zoext._parameters.parameters import Parameters
from zoext._runtime.devices import moved
from zoext.directions._parts import parts
from zoext.directions.base import Direction, Terms, Window, decay_of, rectangle, terms_of


class _Dense(Direction):
    distribution: ops.Distribution

    def axpy_(self, parameters: Parameters, steps: Sequence[Terms], decay: Tensor | None = None) -> None:
        seeds, coefficients = terms_of(steps)
        decay = decay_of(steps, decay)
        for part in parts(parameters.tensors, parameters.spans):
            ops.noise_axpy_(
                part.tensors,
                part.here(seeds),
                part.here(coefficients),
                part.here(decay),
                part.of(parameters.keys),
                part.spans,
                distribution=self.distribution,
                rounding=parameters.rounding,
                residuals=part.rows_of(parameters.residuals),
            )

    def copy_(self, out: Sequence[Tensor], parameters: Parameters, terms: Terms) -> None:
        if parameters.is_whole and all(tensor.is_contiguous() for tensor in out):
            device = parameters.device
            ops.noise_copy_(
                out,
                parameters.tensors,
                moved(terms.seeds, device),
                moved(terms.coefficients, device),
                parameters.keys,
                parameters.spans,
                distribution=self.distribution,
            )
            return
        for part in parts(parameters.tensors, parameters.spans, out):
            ops.noise_copy_(
                part.out,
                part.tensors,
                part.here(terms.seeds),
                part.here(terms.coefficients),
                part.of(parameters.keys),
                part.spans,
                distribution=self.distribution,
            )

    def copies_(self, out: Sequence[Tensor], parameters: Parameters, terms: Terms) -> None:
        if not parameters.is_whole:
            super().copies_(out, parameters, terms)
            return
        device = parameters.device
        ops.noise_copies_(
            out,
            parameters.tensors,
            moved(terms.seeds, device),
            moved(terms.coefficients, device),
            parameters.keys,
            parameters.spans,
            distribution=self.distribution,
        )

    def window_(
        self, parameters: Parameters, window: Window, rule: ops.Rule, lr: Tensor, eps: Tensor, decay: Tensor
    ) -> None:
        seeds, coefficients = rectangle(window.steps)
        for part in parts(parameters.tensors, parameters.spans):
            ops.noise_window_(
                part.tensors,
                part.here(seeds),
                part.here(coefficients),
                part.here(window.first_weights),
                part.here(window.second_weights),
                part.here(lr),
                part.here(eps),
                part.here(decay),
                part.of(parameters.keys),
                part.spans,
                rule=rule,
                distribution=self.distribution,
                rounding=parameters.rounding,
                residuals=part.rows_of(parameters.residuals),
            )


@dataclass(frozen=True)
class Gaussian(_Dense):
    """Independent standard normals (MeZO, arXiv 2305.17333)."""

    distribution = ops.Distribution.NORMAL


@dataclass(frozen=True)
class Rademacher(_Dense):
    """Independent signs, +1 or -1 with equal probability (Spall's SPSA; FZOO, arXiv 2506.09034)."""

    distribution = ops.Distribution.SIGN
