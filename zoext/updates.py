"""The axis Update: how do estimates move theta?"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from zoext.directions import Direction
from zoext.parameters import Parameters


class Update(ABC):
    """From an estimate to a change of theta."""

    @abstractmethod
    def apply(
        self,
        direction: Direction,
        parameters: Parameters,
        seeds: Tensor,
        coefficients: Tensor,
        finite: Tensor,
        *,
        lr: float | Tensor,
        weight_decay: float,
    ) -> None:
        """Moves one group along the gradient estimate ``sum_k coefficients[k] D(seeds[k])``.

        ``seeds`` is int64 [K], ``coefficients`` float32 [K]; ``finite`` (bool []) tells whether all
        losses behind them were finite.
        """


@dataclass(frozen=True)
class SGD(Update):
    """``theta <- theta - lr * (g + weight_decay * theta)``: decoupled weight decay and no momentum.

    An estimate with a loss that was not finite decays nothing.
    """

    def apply(
        self,
        direction: Direction,
        parameters: Parameters,
        seeds: Tensor,
        coefficients: Tensor,
        finite: Tensor,
        *,
        lr: float | Tensor,
        weight_decay: float,
    ) -> None:
        decay = finite * torch.as_tensor(lr * weight_decay, dtype=torch.float32) if weight_decay else None
        direction.axpy_(parameters, seeds, coefficients * -lr, decay)
