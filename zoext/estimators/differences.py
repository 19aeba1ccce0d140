"""Finite differences along independent directions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zoext._runtime.arguments import check_count
from zoext.estimators.base import Estimator, Round, Rounds, assemble


@dataclass(frozen=True)
class CentralDifference(Estimator):
    """Two-sided differences along ``samples`` directions (SPSA; MeZO, arXiv 2305.17333, algorithm 1).

        g = 1/n sum_k (L(theta + mu D_k) - L(theta - mu D_k)) / (2 mu) D_k

    ``2 * samples`` forwards per step; the loss is the mean over all of them.
    """

    averages = True

    samples: int = 1

    def __post_init__(self) -> None:
        check_count("samples", self.samples, meaning="directions")

    @property
    def draws(self) -> int:
        return self.samples

    def rounds(self, seeds: Tensor, mu: float) -> Rounds:
        losses = yield Round.along_each(seeds, two_sided=True)
        plus, minus = losses[::2], losses[1::2]
        return assemble(seeds, (plus - minus) / (2 * mu) / self.samples, losses.unbind())


@dataclass(frozen=True)
class ForwardDifference(Estimator):
    """One-sided differences along ``samples`` directions that share their centre.

        g = 1/n sum_k (L(theta + mu D_k) - L(theta)) / mu D_k

    ``samples + 1`` forwards per step. For many samples this is about half the cost of a central difference,
    with an error of order mu from the curvature along the direction. The loss is the mean over all forwards.
    """

    averages = True

    samples: int = 1

    def __post_init__(self) -> None:
        check_count("samples", self.samples, meaning="directions")

    @property
    def draws(self) -> int:
        return self.samples

    def rounds(self, seeds: Tensor, mu: float) -> Rounds:
        centre, *losses = yield Round.along_each(seeds, centre=True)
        return assemble(seeds, (torch.stack(losses) - centre) / mu / self.samples, losses, centre)
