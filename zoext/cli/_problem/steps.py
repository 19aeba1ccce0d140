"""One optimizer step on the batch of a step number."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch
from torch import Tensor

from zoext import StreamedProbeError, ZerothOrderOptimizer
from zoext.cli._errors import UserError
from zoext.cli._problem.objectives import Batch
from zoext.cli._problem.problem import Problem
from zoext.cli._settings import Settings


def batch_indices(seed: int, step: int, batch_size: int, size: int) -> list[int]:
    """The examples of step ``step``, out of ``size``: each epoch is a new shuffle of all of them."""
    first = step * batch_size
    return [
        _epoch_order(seed, position // size, size)[position % size]
        for position in range(first, first + batch_size)
    ]


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, size: int) -> list[int]:
    # Sorting by a hash gives the same shuffle in every version of Python and NumPy and needs no generator
    # state, so that a run can be resumed elsewhere.
    def digest(index: int) -> bytes:
        return hashlib.blake2b(f"{seed} {epoch} {index}".encode(), digest_size=16).digest()

    return sorted(range(size), key=digest)


def batch(problem: Problem, settings: Settings, step: int, device: torch.device) -> Batch:
    """The batch of step ``step``: a pure function of the seed."""
    chosen = batch_indices(settings.seed, step, settings.batch_size, len(problem.train))
    return problem.objective.collate([problem.train[index] for index in chosen], device)


def take(
    problem: Problem, optimizer: ZerothOrderOptimizer, settings: Settings, step: int, device: torch.device
) -> Tensor:
    """Updates the model on the batch of step ``step`` and returns the loss.

    Raises:
        FloatingPointError: for a loss that is not finite.
        UserError: for a model whose weights streamed probes cannot perturb.
    """
    examples = batch(problem, settings, step, device)
    try:
        return optimizer.step(lambda: problem.objective.scores(problem.model, examples).mean_loss())
    except StreamedProbeError as error:
        cause = str(error).partition(". ")[0]
        raise UserError(f"{cause}; give --probe inplace, with --overwrite") from None


def forwards_of(optimizer: ZerothOrderOptimizer) -> int:
    """The number of forward passes of the last step."""
    estimate = optimizer.last_estimate
    return 0 if estimate is None else estimate.forwards
