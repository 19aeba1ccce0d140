"""A direction from the worse to the better candidates of a pool."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from zoext._runtime.arguments import check_count
from zoext._runtime.devices import widest
from zoext.estimators.base import Estimator, Round, Rounds, assemble, without_gaps

WEIGHTINGS = ("ranked", "centered")


@dataclass(frozen=True)
class GuidingVector(Estimator):
    """A central difference along a guiding vector (MeZO-GV, arXiv 2601.04710, algorithms 1 and 2).

        l_i = L(theta + mu z_i), i = 1 .. M;  the floor(alpha M) lowest are the top, the others the bottom
        v = mean of z_i over the top - mean of z_i over the bottom
        g = (L(theta + mu v) - L(theta - mu v)) / (2 mu) v

    with M = ``pool_size`` and alpha = ``elite_ratio``. v is never materialized: it is a combination of M
    seeds. ``pool_size + 2`` forwards per step. At M = 2, alpha = 1/2 this is MeZO along (z_1 - z_2) / sqrt(2)
    with twice the lr and sqrt(2) mu, whatever the candidates' losses. Candidates with equal losses keep their
    order; one whose loss is not finite ranks last and is left out. If either side has no finite candidate,
    the step does nothing and counts as not finite.

    Args:
        pool_size: candidates, M >= 2.
        elite_ratio: alpha, in (0, 1), such that both sides have at least one candidate.
        weighting: "ranked" (default) is the paper's rule; "centered" weights candidates by how far their
            losses lie below the mean loss, with the same sum of squares, so that the value of every loss
            counts and not only its side.

    Raises:
        ValueError: for arguments out of range.
    """

    coefficients_cancel = True

    pool_size: int = 4
    elite_ratio: float = 0.5
    weighting: str = "ranked"

    def __post_init__(self) -> None:
        check_count(
            "pool_size", self.pool_size, 2, meaning="candidates, of which there must be better and worse ones"
        )
        ratio = self.elite_ratio
        if not isinstance(ratio, int | float) or not 0 < ratio < 1:
            raise ValueError(
                f"elite_ratio must be between 0 and 1, not {ratio!r}; it is the share of the better ones"
            )
        if not 0 < self._top < self.pool_size:
            raise ValueError(
                f"elite_ratio must leave at least one of {self.pool_size} candidates on either side, but "
                f"{ratio} puts {self._top} at the top; use one of at least {1 / self.pool_size:.3g}"
            )
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"weighting must be 'ranked' or 'centered', not {self.weighting!r}")

    @property
    def _top(self) -> int:
        # Without the last factor, 0.29 of 100 would be 28: the product of the floats is 28.999999999999996.
        return math.floor(self.elite_ratio * self.pool_size * (1 + 1e-12))

    @property
    def draws(self) -> int:
        return self.pool_size

    def rounds(self, seeds: Tensor, mu: float) -> Rounds:
        candidates = yield Round.along_each(seeds)
        weights, usable = self._ranked(candidates)
        if self.weighting == "centered":
            weights = _centered(candidates, weights)
        weights = weights.to(torch.float32)
        # Weights that are not finite must not reach a probe: an in-place probe could not undo them.
        sound = torch.isfinite(weights).all()
        weights, usable = torch.where(sound, weights, 0.0), usable & sound
        plus, minus = yield Round.along_sums(seeds, torch.stack((weights, -weights)))
        slope = (plus - minus) / (2 * mu)
        return assemble(seeds, slope * weights, [*without_gaps(candidates), plus, minus], usable=usable)

    def _ranked(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """The weights of v, [M], and whether both sides have a finite candidate (bool [])."""
        known = torch.isfinite(losses)
        order = torch.argsort(torch.where(known, losses, torch.inf), stable=True)
        on_top = torch.arange(self.pool_size, device=losses.device) < self._top
        top, bottom = on_top & known[order], ~on_top & known[order]
        wide = widest(losses.device)
        ordered = top.to(wide) / top.sum() - bottom.to(wide) / bottom.sum()
        usable = top.any() & bottom.any()
        weights = torch.zeros_like(ordered).scatter(0, order, ordered)
        return torch.where(usable, weights, 0.0), usable


def _centered(losses: Tensor, ranked: Tensor) -> Tensor:
    """The negated centred losses, scaled to the norm of ``ranked``; ``ranked`` if all losses are equal."""
    known = torch.isfinite(losses)
    finite = torch.where(known, losses.to(ranked.dtype), 0.0)
    # Divided by the largest, so that neither the mean nor the squares of any finite losses overflow.
    finite = finite / finite.abs().max().clamp_min(torch.finfo(ranked.dtype).tiny)
    below = torch.where(known, finite.sum() / known.sum() - finite, 0.0)
    length = below.norm()
    return torch.where(length > 0, below * (ranked.norm() / length), ranked)
