"""What all updates share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoext._parameters.parameters import Parameters
from zoext.directions import Direction, Terms
from zoext.estimators import Estimate

#: What an update remembers of a group: plain data and small tensors, part of ``state_dict``.
State = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Move:
    """What one step asks of an update, for one group of parameters.

    Attributes:
        terms: the gradient estimate of this group.
        estimate: how the terms were come by; where nothing of it was finite nothing may move.
        lr: learning rate, a float or a tensor [].
        weight_decay: decoupled, per unit of lr.
    """

    terms: Terms
    estimate: Estimate
    lr: float | Tensor
    weight_decay: float

    @property
    def decay(self) -> Tensor:
        """The share of theta that this step takes away, float32 []."""
        return self.estimate.finite * torch.as_tensor(self.lr * self.weight_decay, dtype=torch.float32)


def of_each(values: Sequence[Tensor]) -> Tensor:
    """A number for each step, [S], or [] for a single one."""
    return values[0] if len(values) == 1 else torch.stack(list(values))


class Update(ABC):
    """From estimates to changes of theta."""

    @abstractmethod
    def apply(
        self, direction: Direction, parameters: Parameters, moves: Sequence[Move], state: State
    ) -> State:
        """Moves one group, by one step after the other, and returns its new state; the old one stays.

        Several steps at once leave the same bits as one call for each of them: a run makes one, its replay
        many.

        Args:
            direction: what the terms are terms of.
            parameters: the tensors of the group that move.
            moves: the steps, at least one, oldest first.
            state: what the last call returned, empty at first.
        """
