"""A step that was taken: what moved theta, and all that is needed to take it again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from zoext.directions import Frame
from zoext.estimators import Estimate


class GroupOptions(NamedTuple):
    """The numbers of a parameter group during a step."""

    lr: float | Tensor
    mu: float
    weight_decay: float


@dataclass(frozen=True, slots=True)
class AppliedStep:
    """An estimate, the frame of its directions, and the options of each parameter group."""

    estimate: Estimate
    frame: Frame
    options: tuple[GroupOptions, ...]


class Recorder(Protocol):
    """Receives every step; see ``ZerothOrderOptimizer.recorder``."""

    def check(self) -> None:
        """Called before a step moves anything. Raises if the step could not be recorded."""

    def record(self, step: AppliedStep) -> None:
        """Called after a step. Does not wait for the device."""
