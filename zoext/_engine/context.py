"""The frozen context of a step: the inputs of its probes and its update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from zoext import noise
from zoext._engine.axes import Axes
from zoext._parameters.parameters import Parameters
from zoext.directions import Combination, Drawn, Frame, Terms


class StepSeeds(NamedTuple):
    """The seeds of one step."""

    draws: Tensor  # int64 [draws of the estimator]
    frame: Tensor  # int64 [1]

    @classmethod
    def empty(cls, draws: int, device: torch.device) -> StepSeeds:
        return cls(*(torch.empty(size, dtype=torch.int64, device=device) for size in (draws, 1)))

    def fill(self, seed: int, step: int, origin: int) -> None:
        """Writes the seeds of ``step``, and the seed of its frame: that of draw 0 of step ``origin``."""
        for draw in range(self.draws.numel()):  # fill_ passes the value as a kernel argument: no copy
            self.draws[draw].fill_(noise.signed(noise.step_seed(seed, step, draw)))
        self.frame.fill_(noise.signed(noise.step_seed(seed, origin)))


@dataclass(frozen=True, slots=True)
class StepContext:
    """What all estimates of one step share.

    Attributes:
        axes: direction, estimator and update.
        module: the module whose forward some directions observe; None if unknown.
        groups: the trainable tensors of each parameter group; some groups may be empty.
        mus: the scale of the displacement in each parameter group.
        seeds: the seeds of the step.
        devices: where the parameters are, frozen ones as well.
        shares_random: whether every probe starts from the same state of the global generators; False if
            the closure must not read them.
        held: see ``Terms.held``.
        drawn: see ``Terms.drawn``.
    """

    axes: Axes
    module: nn.Module | None
    groups: tuple[Parameters, ...]
    mus: tuple[float, ...]
    seeds: StepSeeds
    devices: tuple[torch.device, ...]
    shares_random: bool = True
    held: Mapping[int, Tensor] = field(default_factory=dict)
    drawn: dict[int, Drawn] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where seeds, coefficients and losses are; weights may also be elsewhere."""
        return next(group.device for group in self.groups if len(group))

    def terms(self, position: int, seeds: Tensor, coefficients: Tensor, frame: Frame) -> Terms:
        """``mu * sum_k coefficients[k] D(seeds[k])``, with the mu of the group at ``position``."""
        return Terms(seeds, coefficients * self.mus[position], frame, held=self.held, drawn=self.drawn)

    def combination(self, seeds: Tensor, coefficients: Tensor, frame: Frame) -> Combination:
        """The displacement of all groups. At theta there are no seeds, and the frame is ignored."""
        if self.held and not len(seeds):  # weights lack something at theta, too
            seeds, coefficients = self.seeds.frame, coefficients.new_zeros((*coefficients.shape[:-1], 1))
        terms = tuple(
            (group, self.terms(position, seeds, coefficients, frame))
            for position, group in enumerate(self.groups)
            if len(group)
        )
        return Combination(self.axes.direction, seeds, terms)
