"""The frozen context of a step: everything that its probes and its update are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from zoext import noise
from zoext._engine.axes import Axes
from zoext._parameters.parameters import Parameters
from zoext.directions import Combination, Frame, Terms


class StepSeeds(NamedTuple):
    """The seeds of one step."""

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


@dataclass(frozen=True, slots=True)
class StepContext:
    """What the estimates of one step have in common.

    Attributes:
        axes: direction, estimator and update.
        module: the module whose forward some directions watch, if it is known.
        groups: the tensors that move, by parameter group; some groups may be empty.
        mus: scale of the displacement, by parameter group.
        seeds: of the step.
        shares_random: whether every probe begins with the same state of the global generators; False where
            the closure must not read them.
    """

    axes: Axes
    module: nn.Module | None
    groups: tuple[Parameters, ...]
    mus: tuple[float, ...]
    seeds: StepSeeds
    shares_random: bool = True

    @property
    def device(self) -> torch.device:
        return next(group.device for group in self.groups if len(group))

    def terms(self, position: int, seeds: Tensor, coefficients: Tensor, frame: Frame) -> Terms:
        """``mu * sum_k coefficients[k] D(seeds[k])``, with the mu of the group at ``position``."""
        return Terms(seeds, coefficients * self.mus[position], frame)

    def combination(self, seeds: Tensor, coefficients: Tensor, frame: Frame) -> Combination:
        """The displacement of all groups; at theta, where there are no seeds, any frame will do."""
        terms = tuple(
            (group, self.terms(position, seeds, coefficients, frame))
            for position, group in enumerate(self.groups)
            if len(group)
        )
        return Combination(self.axes.direction, seeds, terms)
