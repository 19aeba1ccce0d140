"""Plain descent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zoext._parameters.parameters import Parameters
from zoext.directions import Direction, Terms
from zoext.updates.base import Move, State, Update, of_each


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
        self, direction: Direction, parameters: Parameters, moves: Sequence[Move], state: State
    ) -> State:
        steps = [Terms(move.terms.seeds, self._coefficients(move), move.terms.frame) for move in moves]
        decays = any(move.weight_decay for move in moves)
        direction.axpy_(parameters, steps, of_each([move.decay for move in moves]) if decays else None)
        return state

    def _coefficients(self, move: Move) -> Tensor:
        coefficients = move.terms.coefficients * -move.lr
        if not self.normalized:
            return coefficients
        spread = move.estimate.spread
        return torch.where(spread > 0, coefficients / spread, 0.0)
