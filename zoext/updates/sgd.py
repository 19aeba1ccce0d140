"""Plain descent."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zoext.directions import Direction, Terms
from zoext.estimators import Estimate
from zoext.parameters import Parameters
from zoext.updates.base import State, Update


@dataclass(frozen=True)
class SGD(Update):
    """``theta <- theta - lr * (g + weight_decay * theta)``: decoupled weight decay and no momentum.

    An estimate with a loss that was not finite decays nothing.

    Args:
        normalized: divide g by the spread of the losses it comes from, their sample standard deviation
            (FZOO, arXiv 2506.09034): the length of a step does not depend on how steep the loss is, and
            lr not on its scale. Where all losses are equal nothing moves.
    """

    normalized: bool = False

    def apply(
        self,
        direction: Direction,
        parameters: Parameters,
        terms: Terms,
        state: State,
        *,
        estimate: Estimate,
        lr: float | Tensor,
        weight_decay: float,
    ) -> State:
        coefficients = terms.coefficients * -lr
        if self.normalized:
            spread = estimate.spread
            coefficients = torch.where(spread > 0, coefficients / spread, 0.0)
        decay = (
            estimate.finite * torch.as_tensor(lr * weight_decay, dtype=torch.float32)
            if weight_decay
            else None
        )
        direction.axpy_(parameters, Terms(terms.seeds, coefficients, terms.frame), decay)
        return state
