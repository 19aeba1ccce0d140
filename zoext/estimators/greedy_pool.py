"""The best of a pool of candidate directions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zoext._runtime.arguments import check_count
from zoext.estimators.base import Estimator, Round, Rounds, assemble, without_gaps


@dataclass(frozen=True)
class GreedyPool(Estimator):
    """A central difference along the best of a pool (MeZO-Greedy, arXiv 2601.04710, algorithms 3 and 4).

        i = argmin_i L(theta + mu z_i),   g = (L(theta + mu z_i) - L(theta - mu z_i)) / (2 mu) z_i

    Ties go to the first candidate. A finite loss always wins over one that is not finite.

    Args:
        pool_size: candidates, M >= 2.
        reuse: take L(theta + mu z_i) from the pool, for M + 1 forwards per step. False evaluates it again, as
            in the paper, for M + 2; the estimate is the same if the closure is deterministic.

    Raises:
        ValueError: for a pool of fewer than two candidates.
    """

    pool_size: int = 4
    reuse: bool = True

    def __post_init__(self) -> None:
        check_count("pool_size", self.pool_size, 2, meaning="candidates, of which the best is chosen")
        if not isinstance(self.reuse, bool):
            raise ValueError(f"reuse must be True or False, not {self.reuse!r}")

    @property
    def draws(self) -> int:
        return self.pool_size

    def rounds(self, seeds: Tensor, mu: float) -> Rounds:
        losses = yield Round.along_each(seeds)
        best = torch.where(torch.isfinite(losses), losses, torch.inf).argmin().unsqueeze(0)
        winner = seeds.gather(0, best)
        one = torch.ones((1, 1), dtype=torch.float32, device=seeds.device)
        if self.reuse:
            plus = losses.gather(0, best).squeeze(0)
            (minus,) = yield Round.along_sums(winner, -one)
        else:
            plus, minus = yield Round.along_sums(winner, torch.cat((one, -one)))
        evaluated = [*without_gaps(losses), *([] if self.reuse else [plus]), minus]
        return assemble(winner, (plus - minus).unsqueeze(0) / (2 * mu), evaluated)
