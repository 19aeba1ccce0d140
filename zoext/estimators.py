"""The axis Estimator: which probes, and which coefficients do their losses give?

Losses become coefficients by tensor expressions on the device where the losses are; nothing here
waits for the host. An estimator knows nothing of what a direction looks like or of how theta moves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: ``probe(seeds, coefficients)`` is the loss at ``theta + mu * sum_k coefficients[k] D(seeds[k])``.
Probe = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A gradient estimate ``sum_k coefficients[k] D(seeds[k])`` and how it was come by.

    Attributes:
        seeds: int64 [K].
        coefficients: float32 [K], in units of the loss per unit of theta; for a central difference
            these are the projected gradients. Zero where a loss was not finite.
        loss: float32 [], the mean of the losses that were evaluated.
        forwards: how many times the closure ran.
        finite: bool [], whether every loss and every coefficient was finite.
    """

    seeds: Tensor
    coefficients: Tensor
    loss: Tensor
    forwards: int
    finite: Tensor


class Estimator(ABC):
    """From probes to an estimate of the gradient."""

    @property
    @abstractmethod
    def draws(self) -> int:
        """How many seeds a step needs."""

    @abstractmethod
    def estimate(self, probe: Probe, seeds: Tensor, mu: float) -> Estimate:
        """Evaluates probes along ``D(seeds[0]) ... D(seeds[draws - 1])`` at scale ``mu``."""


def _check_samples(samples: int) -> None:
    if not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples must be an integer of at least 1, not {samples!r}; it counts directions")


def _assemble(seeds: Tensor, slopes: list[Tensor], losses: list[Tensor]) -> Estimate:
    """The mean over independent directions of ``slopes[k] D(seeds[k])``."""
    coefficients = (torch.stack(slopes) / len(slopes)).to(torch.float32)
    finite = torch.isfinite(coefficients)
    return Estimate(
        seeds=seeds,
        coefficients=torch.where(finite, coefficients, 0.0),
        loss=torch.stack(losses).mean().to(torch.float32),
        forwards=len(losses),
        finite=finite.all(),
    )


@dataclass(frozen=True)
class CentralDifference(Estimator):
    """Two-sided differences along ``samples`` directions (SPSA; MeZO, arXiv 2305.17333, algorithm 1).

        g = 1/n sum_k (L(theta + mu D_k) - L(theta - mu D_k)) / (2 mu) D_k

    ``2 * samples`` forwards a step; the loss is the mean over all of them.
    """

    samples: int = 1

    def __post_init__(self) -> None:
        _check_samples(self.samples)

    @property
    def draws(self) -> int:
        return self.samples

    def estimate(self, probe: Probe, seeds: Tensor, mu: float) -> Estimate:
        one = torch.ones(1, device=seeds.device)
        losses = [probe(seed, side) for seed in seeds.split(1) for side in (one, -one)]
        slopes = [(plus - minus) / (2 * mu) for plus, minus in zip(losses[::2], losses[1::2], strict=True)]
        return _assemble(seeds, slopes, losses)


@dataclass(frozen=True)
class ForwardDifference(Estimator):
    """One-sided differences along ``samples`` directions that share their centre.

        g = 1/n sum_k (L(theta + mu D_k) - L(theta)) / mu D_k

    ``samples + 1`` forwards a step. Half the price of a central difference, with an error of order mu
    from the curvature along the direction. The loss is the mean over all forwards.
    """

    samples: int = 1

    def __post_init__(self) -> None:
        _check_samples(self.samples)

    @property
    def draws(self) -> int:
        return self.samples

    def estimate(self, probe: Probe, seeds: Tensor, mu: float) -> Estimate:
        one = torch.ones(1, device=seeds.device)
        centre = probe(seeds[:0], one[:0])
        losses = [probe(seed, one) for seed in seeds.split(1)]
        return _assemble(seeds, [(loss - centre) / mu for loss in losses], [centre, *losses])


def average(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of several estimates at the same theta, as from the micro-batches of one step."""
    if len(estimates) == 1:
        return estimates[0]
    first = estimates[0]
    if all(estimate.seeds is first.seeds for estimate in estimates):
        seeds = first.seeds
        coefficients = torch.stack([estimate.coefficients for estimate in estimates]).mean(0)
    else:
        seeds = torch.cat([estimate.seeds for estimate in estimates])
        coefficients = torch.cat([estimate.coefficients for estimate in estimates]) / len(estimates)
    return Estimate(
        seeds=seeds,
        coefficients=coefficients,
        loss=torch.stack([estimate.loss for estimate in estimates]).mean(),
        forwards=sum(estimate.forwards for estimate in estimates),
        finite=torch.stack([estimate.finite for estimate in estimates]).all(),
    )
