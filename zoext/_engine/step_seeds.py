"""The seeds of a step."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zoext import noise


class StepSeeds(NamedTuple):
    """What tells the directions of a step from those of any other."""

    draws: Tensor  # int64 [draws of the estimator]
    frame: Tensor  # int64 [1]

    @classmethod
    def empty(cls, draws: int, device: torch.device) -> StepSeeds:
        return cls(*(torch.empty(size, dtype=torch.int64, device=device) for size in (draws, 1)))

    def fill(self, seed: int, step: int, origin: int) -> None:
        """Writes the seeds of ``step``, and that of draw 0 of the step that its frame is drawn from."""
        for draw in range(self.draws.numel()):  # fill_ passes the value with the launch: no copy to wait for
            self.draws[draw].fill_(noise.signed(noise.step_seed(seed, step, draw)))
        self.frame.fill_(noise.signed(noise.step_seed(seed, origin)))
