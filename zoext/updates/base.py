"""What all updates share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from zoext.directions import Direction, Terms
from zoext.estimators import Estimate
from zoext.parameters import Parameters

#: What an update remembers of a group: plain data and small tensors, part of ``state_dict``.
State = Mapping[str, Any]


class Update(ABC):
    """From an estimate to a change of theta."""

    @abstractmethod
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
        """Moves one group and returns its new state; the old one is not changed.

        Args:
            direction: what the terms are terms of.
            parameters: the tensors of the group that move.
            terms: the gradient estimate of this group.
            state: what the last call returned, empty at first.
            estimate: how the terms were come by; where nothing of it was finite nothing may move.
            lr: learning rate, a float or float32 [].
            weight_decay: decoupled, per unit of lr.
        """
