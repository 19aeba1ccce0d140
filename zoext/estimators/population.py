"""Evolution strategies: a population of candidates, each of which is evaluated once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zoext._runtime.arguments import check_count
from zoext._runtime.devices import widest
from zoext.estimators.base import Estimator, Round, Rounds, assemble, without_gaps

SHAPINGS = ("centered", "zscore", "rank")


@dataclass(frozen=True)
class Population(Estimator):
    """Each candidate's direction, weighted by how its loss compares with those of the others.

        L_p = L(theta + mu D_p), p = 1 .. n;    g = sum_p c_p D_p

        "centered":  c_p = (L_p - mean of the other losses) / (mu n) = (L_p - mean) / (mu (n - 1))
        "zscore":    c_p = (L_p - mean) / std / n
        "rank":      c_p = (place of L_p / (n - 1) - 1/2) / n,   place 0 is the lowest loss

    with n = ``size``: as many forwards per step, all in one round, and none at theta. The loss of an estimate
    is the mean over the candidates.

    "centered" is the leave-one-out baseline of RLOO (arXiv 2402.14740). The mean of the other losses does not
    depend on D_p, whose mean is zero, so subtracting it does not change the expectation of
    ``L(theta + mu D) D / mu``: the gradient of the loss smoothed by normals of scale mu, and the gradient of
    L itself if L is linear or quadratic. It replaces the loss at theta of ``ForwardDifference``, and costs no
    forward.

    "zscore" (ES at Scale, arXiv 2509.24372, algorithm 2) divides by the standard deviation of the losses
    (over n, as the authors' code does), so a step does not depend on the scale of the loss. "rank" (OpenAI
    ES, arXiv 1703.03864) uses only the order of the losses: no outlier and no increasing function of the
    loss changes a step. Equal losses share the mean of their places. Neither divides by mu, so g is a varying
    multiple of the gradient ("zscore": about mu / std), and lr has other units: a step is lr / sqrt(n)
    ("zscore") or about .3 lr / sqrt(n) ("rank") times as long as a direction. ES at Scale uses lr 5e-4 with
    mu 1e-3 and n = 30.

    With ``antithetic=True`` the candidates are n / 2 pairs ``theta + mu D`` and ``theta - mu D``, with one
    seed for each pair. Losses are compared over all n candidates. "centered" leaves both losses of a pair out
    of their baseline, which then cancels: it equals ``CentralDifference(samples=n / 2)``.

        "centered":          c_k = (L_k+ - L_k-) / (mu n)
        "zscore" and "rank": c_k = (u_k+ - u_k-) / n,   u = n c_p of the formulas above

    If all losses are equal, g is exactly zero. A candidate whose loss is not finite, or did not come back
    from another process, is left out of means, places and n; a pair is left out as a whole. If fewer than
    two candidates remain, the step does nothing and counts as not finite.

    Unless antithetic, the coefficients sum to zero: optimizers reject ``ScalarAdam``, which divides by the
    sum.

    Args:
        size: candidates n, at least 2, and even if antithetic.
        shaping: "centered" (default), "zscore" or "rank".
        antithetic: evaluate both sides of every direction. Default False.

    Raises:
        ValueError: for arguments out of range.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = zoext.ZerothOrderOptimizer(
        ...     model, estimator=zoext.Population(8, shaping="zscore"), lr=5e-3, mu=1e-2
        ... )
        >>> x = torch.ones(3, 4)
        >>> loss = optimizer.step(lambda: -model(x).argmax(1).float().mean())  # a reward of 0 or 1
    """

    size: int = 8
    shaping: str = "centered"
    antithetic: bool = False

    def __post_init__(self) -> None:
        check_count("size", self.size, 2, meaning="candidates, which are compared with each other")
        if self.shaping not in SHAPINGS:
            raise ValueError(f"shaping must be 'centered', 'zscore' or 'rank', not {self.shaping!r}")
        if not isinstance(self.antithetic, bool):
            raise ValueError(f"antithetic must be True or False, not {self.antithetic!r}")
        if self.antithetic and self.size % 2:
            raise ValueError(
                f"size must be even with antithetic=True, not {self.size}: it counts candidates, of which "
                "every direction has two"
            )

    @property
    def draws(self) -> int:
        return self.size // 2 if self.antithetic else self.size

    @property
    def least_draws(self) -> int:
        return 1 if self.antithetic else 2

    @property
    def coefficients_cancel(self) -> bool:
        return not self.antithetic

    def rounds(self, seeds: Tensor, mu: float) -> Rounds:
        losses = yield Round.along_each(seeds, two_sided=self.antithetic)
        known = torch.isfinite(losses)
        if self.antithetic:
            known = known.unflatten(0, (-1, 2)).all(1, keepdim=True).expand(-1, 2).flatten()
        count = known.sum()
        weights = torch.where(known, self._weights(losses, known, mu) / count, 0.0)
        if self.antithetic:
            weights = weights[::2] - weights[1::2]
        usable = count >= 2
        return assemble(seeds, torch.where(usable, weights, 0.0), without_gaps(losses), usable=usable)

    def _weights(self, losses: Tensor, known: Tensor, mu: float) -> Tensor:
        """What the candidates are weighted with, [P], times their number; of any value where not known."""
        if self.shaping == "rank":
            return _places(losses, known) / (known.sum() - 1) - 0.5
        # Above the lowest loss, so that equal losses give zeros; halved, so that no difference overflows.
        halves = losses.to(widest(losses.device)) / 2
        lowest = torch.where(known, halves, torch.inf).min()
        above = torch.where(known, halves - lowest, 0.0)
        count = known.sum()
        if self.shaping == "zscore":
            above = above / above.max().clamp_min(torch.finfo(above.dtype).tiny)  # squares do not overflow
        deviations = torch.where(known, above - (above / count).sum(), 0.0)
        if self.shaping == "zscore":
            std = (deviations.square().sum() / count).sqrt()
            return torch.where(above.max() > 0, deviations / std, 0.0)
        if self.antithetic:
            return deviations / (mu / 2)
        return deviations / (mu / 2) * (count / (count - 1))


def _places(losses: Tensor, known: Tensor) -> Tensor:
    """How many of the known losses are lower than each, [P]; equal ones share the mean of their places."""
    values = torch.where(known, losses, torch.inf)
    order = values.sort().values
    first, end = (torch.searchsorted(order, values, right=right) for right in (False, True))
    return (first + end - 1).to(widest(losses.device)) / 2
