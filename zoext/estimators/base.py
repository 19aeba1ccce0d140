"""The base class of estimators, rounds of probes, and the estimates computed from their losses."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

#: ``probe(seeds, coefficients)`` returns the loss at ``theta + mu * sum_k coefficients[k] D(seeds[k])``, [].
ProbeFn = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Round:
    """Probes that do not depend on each other's losses, so that they may be evaluated in any order.

    Attributes:
        seeds: int64 [K].
        coefficients: float32 [P, K]; probe p is the loss at
            ``theta + mu * sum_k coefficients[p, k] D(seeds[k])``.
        supports: for each probe, the consecutive range of k whose coefficients may be nonzero, known
            on the host without reading ``coefficients``. An empty range is a probe at theta.
    """

    seeds: Tensor
    coefficients: Tensor
    supports: tuple[range, ...]

    @classmethod
    def along_each(cls, seeds: Tensor, *, two_sided: bool = False, centre: bool = False) -> Round:
        """One probe along each seed's direction, or two: first ``+mu``, then ``-mu``.

        ``centre=True`` puts a probe at theta before them.
        """
        count = len(seeds)
        rows = torch.eye(count, dtype=torch.float32, device=seeds.device)
        supports = [range(k, k + 1) for k in range(count)]
        if two_sided:
            rows = torch.stack((rows, -rows), 1).flatten(0, 1)
            supports = [support for support in supports for _ in range(2)]
        if centre:
            rows = torch.cat((torch.zeros_like(rows[:1]), rows))
            supports = [range(0), *supports]
        return cls(seeds, rows, tuple(supports))

    @classmethod
    def along_sums(cls, seeds: Tensor, coefficients: Tensor) -> Round:
        """One probe for each row of ``coefficients``, float32 [P, K], along a sum of all K directions."""
        return cls(seeds, coefficients, (range(len(seeds)),) * len(coefficients))

    @classmethod
    def at_centre(cls, seeds: Tensor) -> Round:
        """A single probe at theta."""
        zeros = torch.zeros((1, len(seeds)), dtype=torch.float32, device=seeds.device)
        return cls(seeds, zeros, (range(0),))

    def __len__(self) -> int:
        return len(self.supports)

    def probes(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Seeds [k] and coefficients [k] of each probe, restricted to its support.

        Consecutive probes along the same directions get the same tensor of seeds.
        """
        known: dict[range, Tensor] = {range(len(self.seeds)): self.seeds}
        for row, support in zip(self.coefficients, self.supports, strict=True):
            if support not in known:
                known[support] = self.seeds[support.start : support.stop]
            yield known[support], row[support.start : support.stop]


#: What an estimator yields, receives (losses [P] of the round) and returns.
Rounds = Generator[Round, Tensor, "Estimate"]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A gradient estimate ``sum_k coefficients[k] D(seeds[k])`` and how it was obtained.

    Attributes:
        seeds: int64 [K].
        coefficients: float32 [K], in units of the loss per unit of theta; for a central difference
            these are the projected gradients. Zero where a loss was not finite.
        loss: float32 [], the mean of the losses that were evaluated.
        loss_std: float32 [], the sample standard deviation of the losses at displaced weights, or of
            all losses if there is only one of these.
        forwards: how many times the closure ran.
        finite: bool [], whether all losses that the coefficients depend on were finite.
        missing: how many losses did not come back in time from other processes (``ElasticGroup``, or None
            passed to ``tell``). The estimate is made without them.
    """

    seeds: Tensor
    coefficients: Tensor
    loss: Tensor
    loss_std: Tensor
    forwards: int
    finite: Tensor
    missing: int = 0


class Estimator(ABC):
    """Estimates the gradient from the losses of rounds of probes.

    A subclass is a frozen dataclass with ``draws`` and ``rounds``:

        @dataclass(frozen=True)
        class OneSided(Estimator):
            draws = 1

            def rounds(self, seeds, mu):
                centre, loss = yield Round.along_each(seeds, centre=True)
                return assemble(seeds, ((loss - centre) / mu).unsqueeze(0), [loss], centre)
    """

    #: Whether the estimate is an average over draws, each of which can be left out.
    averages: ClassVar[bool] = False

    @property
    @abstractmethod
    def draws(self) -> int:
        """How many seeds a step needs."""

    @property
    def least_draws(self) -> int:
        """How many draws must have their losses for an estimate. Default 1."""
        return 1

    @property
    def coefficients_cancel(self) -> bool:
        """Whether the coefficients of an estimate sum to zero for all losses. Default False."""
        return False

    @abstractmethod
    def rounds(self, seeds: Tensor, mu: float) -> Rounds:
        """Yields rounds, receives the losses [P] of each, and returns the estimate.

        It may use tensor expressions only, and must not synchronize with the host.

        Args:
            seeds: int64 [draws].
            mu: scale of the displacement; coefficients of a round are in units of it.
        """

    def estimate(self, probe: ProbeFn, seeds: Tensor, mu: float) -> Estimate:
        """Evaluates the rounds with ``probe``, one probe after another."""
        return evaluate(
            self.rounds(seeds, mu), lambda pending: stacked([probe(*terms) for terms in pending.probes()])
        )


def evaluate(rounds: Rounds, losses_of: Callable[[Round], Tensor]) -> Estimate:
    """Runs an estimator's rounds; ``losses_of(round)`` returns the losses [P] of one."""
    losses: Tensor | None = None
    while True:
        try:
            # A generator is started by sending None.
            pending = rounds.send(losses)  # type: ignore[arg-type]
        except StopIteration as done:  # losses_of stays outside: a closure may raise it too
            estimate: Estimate = done.value
            return estimate
        losses = losses_of(pending)


def stacked(losses: Sequence[Tensor]) -> Tensor:
    """The losses of a round, [P], in their common promoted dtype."""
    dtype = losses[0].dtype
    for loss in losses[1:]:
        dtype = torch.promote_types(dtype, loss.dtype)
    return torch.stack([loss.to(dtype) for loss in losses])


def centre_first(rounds: Rounds) -> Rounds:
    """Prepends a round with a single probe, at theta, to the rounds of an estimator.

    If the first round has a probe at theta, it is not evaluated twice. Otherwise the estimate counts one more
    forward.
    """
    first = next(rounds)
    centre = next((p for p, support in enumerate(first.supports) if not support), None)
    loss = yield Round.at_centre(first.seeds)
    if centre is None:
        losses = yield first
    elif len(first) == 1:
        losses = loss
    else:
        others = [p for p in range(len(first)) if p != centre]
        rows = torch.cat((first.coefficients[:centre], first.coefficients[centre + 1 :]))
        rest = yield Round(first.seeds, rows, tuple(first.supports[p] for p in others))
        dtype = torch.promote_types(loss.dtype, rest.dtype)
        losses = torch.cat((rest[:centre].to(dtype), loss.to(dtype), rest[centre:].to(dtype)))
    while True:
        try:
            following = rounds.send(losses)
        except StopIteration as done:
            estimate: Estimate = done.value
            break
        losses = yield following
    return dataclasses.replace(estimate, forwards=estimate.forwards + (centre is None))


def assemble(
    seeds: Tensor,
    coefficients: Tensor,
    displaced: Sequence[Tensor],
    centre: Tensor | None = None,
    usable: Tensor | None = None,
) -> Estimate:
    """An estimate from its coefficients ([K], any precision) and the losses they were computed from.

    ``usable`` (bool []) is for estimators whose estimate can be unusable even if all losses are finite.
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
        loss_std=deviation(scattered),
        forwards=len(losses),
        finite=everything,
    )


def deviation(losses: Tensor) -> Tensor:
    """The sample standard deviation of losses [P], float32 []; exactly zero if all are equal."""
    # torch subtracts a rounded mean, which may differ from equal losses by a unit in the last place.
    return (losses.std() * (losses.min() != losses.max())).to(torch.float32)


def without_gaps(losses: Tensor) -> tuple[Tensor, ...]:
    """The losses of a pool, [P], with those that are not finite replaced by the mean of the others."""
    known = torch.isfinite(losses)
    mean = torch.where(known, losses, 0.0).sum() / known.sum()
    return torch.where(known, losses, mean).unbind()


def checked_reduction(reduction: str) -> str:
    """``reduction``, if it is "mean" or "sum"."""
    if reduction not in {"mean", "sum"}:
        raise ValueError(f"reduction must be 'mean' or 'sum', not {reduction!r}")
    return reduction


def reduced(estimates: Sequence[Estimate], reduction: str) -> Estimate:
    """The mean or the sum of several estimates at the same theta, such as those of a step's micro-batches.

    Its ``loss`` and ``loss_std`` are the mean or the sum of theirs.
    """
    if len(estimates) == 1:
        return estimates[0]
    first, divisor = estimates[0], len(estimates) if reduction == "mean" else 1
    if all(estimate.seeds is first.seeds for estimate in estimates):
        seeds = first.seeds
        coefficients = torch.stack([estimate.coefficients for estimate in estimates]).sum(0) / divisor
    else:
        seeds = torch.cat([estimate.seeds for estimate in estimates])
        coefficients = torch.cat([estimate.coefficients for estimate in estimates]) / divisor
    return Estimate(
        seeds=seeds,
        coefficients=coefficients,
        loss=torch.stack([estimate.loss for estimate in estimates]).sum() / divisor,
        loss_std=torch.stack([estimate.loss_std for estimate in estimates]).sum() / divisor,
        forwards=sum(estimate.forwards for estimate in estimates),
        finite=torch.stack([estimate.finite for estimate in estimates]).all(),
        missing=sum(estimate.missing for estimate in estimates),
    )
