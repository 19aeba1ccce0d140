"""The base classes of updates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from zoext._parameters.parameters import Parameters
from zoext.directions import Direction, Terms
from zoext.estimators import Estimate

#: The state of an update for one group: plain data and small tensors, part of ``state_dict``.
State = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class GroupStep:
    """One step, for one group of parameters: the input of an update.

    Attributes:
        terms: the gradient estimate of this group.
        estimate: what the terms were computed from; if none of its losses was finite, theta must not change.
        lr: learning rate, a float or a tensor [].
        weight_decay: decoupled, per unit of lr.
    """

    terms: Terms
    estimate: Estimate
    lr: float | Tensor
    weight_decay: float

    @property
    def decay(self) -> Tensor:
        """The fraction of theta that weight decay removes in this step, float32 []."""
        return self.estimate.finite * torch.as_tensor(self.lr * self.weight_decay, dtype=torch.float32)


def of_each(values: Sequence[Tensor]) -> Tensor:
    """A number for each step, [S], or [] for a single one."""
    return values[0] if len(values) == 1 else torch.stack(list(values))


class Update(ABC):
    """Moves theta by gradient estimates."""

    #: Whether it divides by the sum of an estimate's coefficients, which then must not cancel.
    sums_coefficients: ClassVar[bool] = False

    @abstractmethod
    def apply(
        self, direction: Direction, parameters: Parameters, steps: Sequence[GroupStep], state: State
    ) -> State:
        """Applies steps to one group, in order, and returns its new state; ``state`` is not modified.

        Several steps in one call give the same bits as one call per step: a run applies one step per call,
        its replay many.

        Args:
            direction: the direction that the terms belong to.
            parameters: the tensors of the group that move.
            steps: at least one, oldest first.
            state: what the previous call returned; empty at first.
        """


class LinearUpdate(Update):
    """An update that adds a combination of the step's own directions: ``theta + sum_k c_k D(s_k)``.

    A subclass is a frozen dataclass with one method, ``terms``. Decoupled weight decay is added to it.
    """

    @abstractmethod
    def terms(self, step: GroupStep) -> Terms:
        """What a step adds to theta besides its decay: usually ``step.terms`` with other coefficients."""

    def apply(
        self, direction: Direction, parameters: Parameters, steps: Sequence[GroupStep], state: State
    ) -> State:
        decays = any(step.weight_decay for step in steps)
        decay = of_each([step.decay for step in steps]) if decays else None
        direction.axpy_(parameters, [self.terms(step) for step in steps], decay)
        return state

    def restore_and_apply(
        self, direction: Direction, parameters: Parameters, step: GroupStep, displaced: Terms, state: State
    ) -> State:
        """``apply`` for parameters that are at ``theta + displaced``, in one pass over them.

        theta + displaced + (terms - (1 - decay) displaced - decay (theta + displaced))
        """
        decay = step.decay if step.weight_decay else None
        kept = displaced.coefficients if decay is None else displaced.coefficients * (1 - decay)
        back = Terms(displaced.seeds, -kept, displaced.frame)
        direction.axpy_(parameters, [self.terms(step).plus(back)], decay)
        return state
