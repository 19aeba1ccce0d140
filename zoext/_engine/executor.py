"""What may take a step in place of the engine's own way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from zoext._engine.engine import StepEngine


class StepExecutor(ABC):
    """An alternative way to take a whole step; ``optimizer.step(executor)`` calls it between its hooks."""

    @abstractmethod
    def advance(self, engine: StepEngine) -> Tensor:
        """Takes one step with ``engine`` and returns its loss."""
