"""One step of training."""

from __future__ import annotations

import torch
from torch import Tensor

from zoext import StreamedProbeError, ZerothOrderOptimizer
from zoext.cli.batches import batch_indices
from zoext.cli.errors import UserError
from zoext.cli.objectives import Batch
from zoext.cli.problem import Problem
from zoext.cli.settings import Settings


def batch(problem: Problem, settings: Settings, step: int, device: torch.device) -> Batch:
    """The examples of step ``step``: a pure function of the seed."""
    chosen = batch_indices(settings.seed, step, settings.batch_size, len(problem.train))
    return problem.objective.collate([problem.train[index] for index in chosen], device)


def take(
    problem: Problem, optimizer: ZerothOrderOptimizer, settings: Settings, step: int, device: torch.device
) -> Tensor:
    """Moves the model by the batch of step ``step`` and returns its loss.

    Raises:
        FloatingPointError: for a loss that is not finite.
        UserError: for a model that streamed probes cannot displace.
    """
    examples = batch(problem, settings, step, device)
    try:
        return optimizer.step(lambda: problem.objective.scores(problem.model, examples).mean_loss())
    except StreamedProbeError as error:
        read_elsewhere = str(error).partition(". ")[0]
        raise UserError(f"{read_elsewhere}; give --probe inplace, with --overwrite") from None


def forwards_of(optimizer: ZerothOrderOptimizer) -> int:
    """How many forward passes its last step took."""
    estimate = optimizer.last_estimate
    return 0 if estimate is None else estimate.forwards
