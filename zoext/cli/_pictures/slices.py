"""The loss along random directions, and what central differences make of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import zoext
from zoext import noise

#: Central differences are taken at these multiples of mu.
MULTIPLES = tuple(10 ** (k / 2) for k in range(-6, 5))
#: Terms of the error, mu^2, mu^4 and so on, that an extrapolation may remove.
_ORDERS = 3


@dataclass(frozen=True)
class Plan:
    """What to evaluate: losses at ``points`` distances, an odd number, from ``-reach`` to ``reach``."""

    mu: float
    reach: float
    points: int
    directions: int
    seed: int

    @property
    def distances(self) -> tuple[float, ...]:
        """Ascending; 0 is the middle one."""
        half = self.points // 2
        return tuple(_float32(self.reach * k / half) for k in range(-half, half + 1))

    @property
    def mus(self) -> tuple[float, ...]:
        """Ascending; ``mu`` is among them."""
        return tuple(_float32(self.mu * multiple) for multiple in MULTIPLES)

    @property
    def evaluations(self) -> int:
        """How many points of weight space are visited, with a forward pass for each batch."""
        return self.directions * (len(self.distances) + 2 * len(self.mus))


def _float32(value: float) -> float:
    """A distance as the perturbation uses it."""
    return torch.tensor(value, dtype=torch.float32).item()


@dataclass(frozen=True)
class Slice:
    """Losses at ``theta + t z`` for D directions z ~ N(0, I) and B batches, float64.

    Attributes:
        losses: [D, T, B], at each distance t.
        slopes: [D, M, B], ``(L(theta + mu z) - L(theta - mu z)) / (2 mu)`` for each mu.
    """

    plan: Plan
    losses: Tensor
    slopes: Tensor


def measure(
    module: nn.Module,
    batches: Sequence[Callable[[], Tensor]],
    plan: Plan,
    probe: str = "auto",
    progress: Callable[[], object] = lambda: None,
) -> Slice:
    """Evaluates the loss of each batch at each point, and leaves the weights bit for bit as they were.

    Args:
        module: the model. The parameters that require grad are displaced.
        batches: evaluate the loss on a batch.
        progress: called after each point.

    Raises:
        StreamedProbeError: for a model whose weights streamed probes cannot perturb.
    """
    # With mu = 1, coefficients are distances.
    optimizer = zoext.MeZO(module, mu=1.0, seed=plan.seed, probe=probe, process_group=None)
    seeds = [noise.step_seed(plan.seed, 0, draw) for draw in range(plan.directions)]

    def losses_at(seed: int, distance: float) -> list[float]:
        with torch.no_grad(), _restored(optimizer), optimizer.displaced([seed], [distance]):
            found = [loss().item() for loss in batches]
        progress()
        return found

    def slopes_at(seed: int, mu: float) -> list[float]:
        pairs = zip(losses_at(seed, mu), losses_at(seed, -mu), strict=True)
        return [(above - below) / (2 * mu) for above, below in pairs]

    losses = [[losses_at(seed, distance) for distance in plan.distances] for seed in seeds]
    slopes = [[slopes_at(seed, mu) for mu in plan.mus] for seed in seeds]
    return Slice(plan, torch.tensor(losses, dtype=torch.float64), torch.tensor(slopes, dtype=torch.float64))


@contextmanager
def _restored(optimizer: zoext.ZerothOrderOptimizer) -> Iterator[None]:
    """Copies the weights back where a probe restores them only up to rounding."""
    moved = [] if optimizer.probe.is_exact else _trainable(optimizer)
    before = [parameter.detach().clone() for parameter in moved]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(moved, before, strict=True):
                parameter.copy_(value)


def _trainable(optimizer: zoext.ZerothOrderOptimizer) -> list[Tensor]:
    return [tensor for group in optimizer.param_groups for tensor in group["params"] if tensor.requires_grad]


@dataclass(frozen=True)
class Accuracy:
    """How exact central differences are, as root mean squares over directions.

    Attributes:
        reference: [D, B], the derivative of each batch's loss along each direction, extrapolated to mu = 0.
        reference_error: an estimate of the error of ``reference``.
        errors: for each mu, the difference between slope and reference, over batches too.
        batch_noise: the standard deviation of the reference over batches; nan with a single batch.
    """

    reference: Tensor
    reference_error: float
    errors: tuple[float, ...]
    batch_noise: float

    def good_mus(self, mus: Sequence[float]) -> list[float]:
        """Those whose error is at most a tenth of the batch noise."""
        return [mu for mu, error in zip(mus, self.errors, strict=True) if error <= 0.1 * self.batch_noise]


def accuracy(measured: Slice) -> Accuracy:
    """Compares the slopes with their extrapolation, which needs forward passes only."""
    reference, error = _extrapolated(measured.slopes, measured.plan.mus)
    errors = _rms((measured.slopes - reference[:, None]).movedim(1, 0))
    spread = _rms(reference.std(1, correction=1)[None]) if reference.shape[1] > 1 else [math.nan]
    return Accuracy(reference, error, tuple(errors), spread[0])


def _extrapolated(slopes: Tensor, mus: Sequence[float]) -> tuple[Tensor, float]:
    """Ridders' method: Richardson extrapolations of all orders from all mu; the most consistent one is taken.

    A central difference has an error of c1 mu^2 + c2 mu^4 + ..., and rounding, which grows as 1 / mu. The
    choice is that of all directions and batches together: alone, one could agree by chance. At a mu where two
    losses have the same bits, they are too coarse for it; the zeros of several such mu would agree exactly.
    """
    coarse = (slopes == 0).any(0).any(-1)
    if not coarse.all():
        slopes = torch.where(coarse[:, None], torch.nan, slopes)
    rows = [[slopes[:, m]] for m in range(len(mus))]
    best, least = slopes[:, len(mus) // 2], math.inf
    for m in range(1, len(mus)):
        for order in range(1, min(_ORDERS, m) + 1):
            # From mus[m - order] ... mus[m]: eliminates mu^(2 order).
            ratio = (mus[m] / mus[m - order]) ** 2
            finer, coarser = rows[m - 1][order - 1], rows[m][order - 1]
            entry = (ratio * finer - coarser) / (ratio - 1)
            rows[m].append(entry)
            error = max(*_rms(torch.stack([entry - finer, entry - coarser])))
            if error < least:  # false for nan
                best, least = entry, error
    return best, least


def _rms(values: Tensor) -> list[float]:
    """The root mean square of each row."""
    found: list[float] = values.flatten(1).square().mean(1).sqrt().tolist()
    return found


def advice(measured: Slice, found: Accuracy) -> str:
    """Which mu suit the model, in a line."""
    mus = measured.plan.mus
    known = {error: mu for mu, error in zip(mus, found.errors, strict=True) if math.isfinite(error)}
    if not known:
        return "the losses are not finite, so no mu can be recommended"
    best = known[min(known)]
    if math.isnan(found.batch_noise):
        return f"the error of a central difference is lowest at mu {best:.2g}"
    good = ", ".join(f"{mu:.2g}" for mu in found.good_mus(mus))
    return (
        "the error of a central difference is at most a tenth of its standard deviation over batches "
        f"({found.batch_noise:.2g}) at {f'mu {good}' if good else 'no mu'}; it is lowest at mu {best:.2g}"
    )
