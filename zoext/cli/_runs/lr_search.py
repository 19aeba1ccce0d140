"""``--lr auto``: a short sweep of short runs on a part of the training examples.

Short runs favour a large lr: what they choose suits a schedule that falls, and may be somewhat high for a
long run with a constant one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence

import torch

from zoext.cli._errors import UserError
from zoext.cli._problem import optimizers, steps
from zoext.cli._problem.evaluation import evaluate
from zoext.cli._problem.problem import Problem
from zoext.cli._ranks import Ranks
from zoext.cli._runs import tensors
from zoext.cli._runs.outcome import DIVERGED
from zoext.cli._schedules import CONSTANT
from zoext.cli._settings import Settings
from zoext.tasks import Example

AUTO = "auto"

_FACTORS = (1 / 9, 1 / 3, 1.0, 3.0, 9.0)  # of the default
_MORE = 5  # beyond an edge of the grid, at most
_STEPS = (20, 200)  # of a run: a twentieth of the real one, within these limits
_HELD_OUT = (0.1, 256)  # of the training examples: this share, but at most so many


def choose(settings: Settings, problem: Problem, device: torch.device, ranks: Ranks, quiet: bool) -> float:
    """The lr with the lowest loss after a short run, out of a grid around that of ``settings``.

    Losses are those of training examples that the runs leave out. The weights are restored.

    Raises:
        UserError: for too few training examples, or if every run diverged.
    """
    search = _Search(settings, problem, device, ranks)
    if not quiet:
        print(
            f"--lr {AUTO}: runs of {search.steps} steps, evaluated on {len(search.held_out)} training "
            f"examples that they leave out; loss before {search.before:.4f}\n{'lr':>10}  loss",
            flush=True,
        )
    losses: dict[float, float] = {}

    def measure(lr: float) -> None:
        losses[lr] = search.loss_after(lr)
        if not quiet:
            print(f"{lr:>10.3g}  {_shown(losses[lr])}", flush=True)

    for factor in _FACTORS:
        measure(settings.lr * factor)
    for _ in range(_MORE):
        beyond = _beyond(losses)
        if beyond is None:
            break
        measure(beyond)
    lr = min(losses, key=lambda each: losses[each])
    if not math.isfinite(losses[lr]):
        raise UserError(f"--lr {AUTO}: every run diverged, down to lr {min(losses):.3g}; give --lr or --mu")
    # As it is shown, so that the same command line with this lr makes the same run.
    lr = float(f"{lr:.3g}")
    if not quiet:
        edge = "" if _beyond(losses) is None else " (the last one tried; a better one may lie beyond)"
        print(f"chosen: --lr {lr:g}{edge}", flush=True)
    return lr


def _beyond(losses: dict[float, float]) -> float | None:
    """The next lr beyond the edge that the best one is at; None if it is inside."""
    tried = sorted(losses)
    best = min(tried, key=lambda lr: losses[lr])  # the lowest if all diverged
    if best == tried[0]:
        return tried[0] / 3
    return tried[-1] * 3 if best == tried[-1] else None


def _shown(loss: float) -> str:
    return f"{loss:.4f}" if math.isfinite(loss) else "diverged"


class _Search:
    """Short runs that all begin with the weights of ``problem``."""

    def __init__(self, settings: Settings, problem: Problem, device: torch.device, ranks: Ranks) -> None:
        self.held_out, trained = split(problem.train)
        self._problem = dataclasses.replace(problem, train=tuple(trained))
        self._settings = dataclasses.replace(settings, schedule=CONSTANT, warmup=0)
        self._device, self._ranks = device, ranks
        least, most = _STEPS
        self.steps = min(most, max(least, settings.steps // 20))
        self._weights = tensors.copy_of(problem.model)
        self.before = self._loss()

    def loss_after(self, lr: float) -> float:
        """The held-out loss after a run; infinite if it diverged."""
        settings = dataclasses.replace(self._settings, lr=lr)
        try:
            optimizer = optimizers.make(self._problem.model, settings, self._ranks)
            for step in range(self.steps):
                steps.take(self._problem, optimizer, settings, step, self._device, self._ranks)
            loss = self._loss()
        except FloatingPointError:
            return math.inf
        finally:
            tensors.put(self._problem.model, self._weights)
        return loss if loss <= DIVERGED * self.before else math.inf  # also if it is NaN

    def _loss(self) -> float:
        problem, size = self._problem, self._settings.at_once
        result = evaluate(problem.model, problem.objective, self.held_out, size, self._device, self._ranks)
        return result.loss.value


def split(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """A part to evaluate and the rest, by a hash of the tokens: equal texts are in the same part."""
    order = sorted({example.tokens for example in examples}, key=_digest)
    share, most = _HELD_OUT
    first = set(order[: min(most, math.ceil(share * len(order)))])
    parts: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        parts[example.tokens not in first].append(example)
    if len(order) < 2:
        raise UserError(f"--lr {AUTO}: needs at least two different training texts; give --lr X")
    return parts


def _digest(tokens: tuple[int, ...]) -> bytes:
    return hashlib.blake2b(f"lr {tokens}".encode(), digest_size=16).digest()
