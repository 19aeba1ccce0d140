"""One step of training."""

from __future__ import annotations

import torch
from torch import Tensor

from zoext import StreamedProbeError, ZerothOrderOptimizer
from zoext.cli.batches import batch_indices
from zoext.cli.errors import UserError
from zoext.cli.problem import Problem
from zoext.cli.settings import Settings


def take(
    problem: Problem, optimizer: ZerothOrderOptimizer, settings: Settings, step: int, device: torch.device
) -> Tensor:
    """Moves the model by the batch of step ``step``, a pure function of the seed; returns its loss.

    Raises:
        FloatingPointError: for a loss that is not finite.
        UserError: for a model that streamed probes cannot displace.
    """
    chosen = batch_indices(settings.seed, step, settings.batch_size, len(problem.train))
    batch = problem.objective.collate([problem.train[index] for index in chosen], device)
    try:
        return optimizer.step(lambda: problem.objective.scores(problem.model, batch).mean_loss())
    except StreamedProbeError as error:
        read_elsewhere = str(error).partition(". ")[0]
        raise UserError(f"{read_elsewhere}; give --probe inplace, with --overwrite") from None
