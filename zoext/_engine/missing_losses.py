"""Estimates of which some losses did not come back in time."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from zoext.distributed import EstimateRestart, Losses
from zoext.estimators import Estimate, Estimator, Round, deviation


@dataclass(frozen=True)
class MissingLosses:
    """What is missing of an estimate so far.

    Attributes:
        lost: how many losses did not come back, over all processes.
        probes: how many probes have no loss at all.
        draws: the indices of the directions that a missing loss belongs to.
        heard: the losses that did come back, by round.
    """

    lost: int = 0
    probes: int = 0
    draws: frozenset[int] = frozenset()
    heard: tuple[Tensor, ...] = ()

    def after(self, pending: Round, losses: Losses, estimator: Estimator) -> MissingLosses:
        """With what is missing of another round.

        Args:
            pending: the round.
            losses: those that all processes go on with.
            estimator: whose round it is.

        Raises:
            EstimateRestart: if the estimator cannot do without the missing ones.
        """
        count = len(pending.seeds)
        draws = set(self.draws)
        for index in losses.missing:
            support = pending.supports[index]
            if not estimator.averages and (len(support) != 1 or count == 1):  # no candidate of a pool
                raise EstimateRestart
            draws.update(support or range(count))  # without a centre, all one-sided differences are unknown
        if losses.missing and count - len(draws) < estimator.least_draws:
            raise EstimateRestart
        heard = losses.values
        if losses.missing:  # an index from the host must not be part of a graph
            heard = heard[[index for index in range(len(pending)) if index not in losses.missing]]
        return MissingLosses(
            self.lost + losses.lost,
            self.probes + len(losses.missing),
            frozenset(draws),
            (*self.heard, heard),
        )

    def without(self, estimate: Estimate, *, averages: bool) -> Estimate:
        """The estimate from the losses that are there.

        Args:
            estimate: made with NaN in the place of missing losses.
            averages: see ``Estimator.averages``.
        """
        estimate = dataclasses.replace(estimate, missing=self.lost)
        if not self.probes:
            return estimate
        heard = torch.cat(self.heard)
        coefficients = estimate.coefficients
        if averages:
            count = len(coefficients)
            coefficients = coefficients * (count / (count - len(self.draws)))
        return dataclasses.replace(
            estimate,
            coefficients=coefficients,
            loss=heard.mean().to(torch.float32),
            loss_std=deviation(heard),
            forwards=estimate.forwards - self.probes,
            # A pool leaves candidates out whose loss is not finite, and those that are missing likewise.
            finite=torch.isfinite(heard).all() if averages else estimate.finite,
        )
