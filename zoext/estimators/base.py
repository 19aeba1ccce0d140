"""What all estimators share: the estimate, and how losses become one."""

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
        spread: float32 [], the sample standard deviation of the losses at displaced weights; where there
            is only one of these, of all losses.
        forwards: how many times the closure ran.
        finite: bool [], whether all losses that the coefficients depend on were finite.
    """

    seeds: Tensor
    coefficients: Tensor
    loss: Tensor
    spread: Tensor
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


def check_count(name: str, value: int, least: int, meaning: str) -> None:
    """Raises a ValueError unless ``value`` is an integer of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}; it counts {meaning}")


def assemble(
    seeds: Tensor,
    coefficients: Tensor,
    displaced: Sequence[Tensor],
    centre: Tensor | None = None,
    usable: Tensor | None = None,
) -> Estimate:
    """An estimate from its coefficients ([K], any precision) and the losses behind them.

    ``usable`` (bool []) tells where the losses do not decide alone whether the estimate may move theta.
    """
    coefficients = coefficients.to(torch.float32)
    finite = torch.isfinite(coefficients)
    everything = finite.all() if usable is None else finite.all() & usable
    losses = torch.stack([*displaced, *([] if centre is None else [centre])])
    scattered = losses[: len(displaced)] if len(displaced) > 1 else losses
    return Estimate(
        seeds=seeds,
        coefficients=torch.where(finite & (True if usable is None else usable), coefficients, 0.0),
        loss=losses.mean().to(torch.float32),
        spread=scattered.std().to(torch.float32),
        forwards=len(losses),
        finite=everything,
    )


def without_gaps(losses: Tensor) -> tuple[Tensor, ...]:
    """The losses of a pool, with the mean of the finite ones in the place of those that are not."""
    known = torch.isfinite(losses)
    mean = torch.where(known, losses, 0.0).sum() / known.sum()
    return torch.where(known, losses, mean).unbind()


def average(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of several estimates at the same theta, as from the micro-batches of one step.

    Their spread is the mean spread.
    """
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
        spread=torch.stack([estimate.spread for estimate in estimates]).mean(),
        forwards=sum(estimate.forwards for estimate in estimates),
        finite=torch.stack([estimate.finite for estimate in estimates]).all(),
    )
