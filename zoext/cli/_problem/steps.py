"""One optimizer step on the batch of a step number."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from zoext import BatchedProbeError, StreamedProbeError, ZerothOrderOptimizer, repeat
from zoext.cli._errors import UserError
from zoext.cli._failures import of_model
from zoext.cli._problem.problem import Problem
from zoext.cli._ranks import ALONE, Ranks
from zoext.cli._settings import Settings, SettingsT
from zoext.tasks import Batch, Example, Scores


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


def with_batch_that_fits(settings: SettingsT, given: Collection[str], examples: int) -> SettingsT:
    """The settings with a batch of all ``examples`` where the default has more.

    Raises:
        UserError: if the batch size is ``given`` and larger: some examples would count twice in a batch.
    """
    if settings.batch_size <= examples:
        return settings
    if "batch_size" in given:
        raise UserError(
            f"--batch-size {settings.batch_size}: there are only {examples} training examples; give as many "
            "or fewer"
        )
    return dataclasses.replace(settings, batch_size=examples)


def batches(problem: Problem, settings: Settings, step: int, device: torch.device) -> list[Batch]:
    """The batch of step ``step``, in the pieces that it is evaluated in: a pure function of the seed."""
    return _collated(problem, settings, _examples(problem, settings, step), device)


def _collated(
    problem: Problem, settings: Settings, examples: Sequence[Example], device: torch.device
) -> list[Batch]:
    size = settings.at_once
    return [
        problem.objective.training.collate(examples[start : start + size], device)
        for start in range(0, len(examples), size)
    ]


def scores_of(problem: Problem, pieces: Sequence[Batch]) -> Scores:
    """The scores that are trained, of the examples of all pieces as of one batch."""
    loss, predictions = _scores(problem, pieces, 1)
    return Scores(loss[0], predictions[0])


def _scores(problem: Problem, pieces: Sequence[Batch], copies: int) -> tuple[Tensor, Tensor]:
    """The losses and the numbers of predictions of the examples of all pieces, [copies, B] each."""
    objective = problem.objective.training
    each = [objective.scores(problem.model, repeat(piece, copies), copies) for piece in pieces]
    return (
        torch.cat([scores.loss.view(copies, -1) for scores in each], 1),
        torch.cat([scores.predictions.view(copies, -1) for scores in each], 1),
    )


def _examples(problem: Problem, settings: Settings, step: int) -> list[Example]:
    chosen = batch_indices(settings.seed, step, settings.batch_size, len(problem.train))
    return [problem.train[index] for index in chosen]


def take(
    problem: Problem,
    optimizer: ZerothOrderOptimizer,
    settings: Settings,
    step: int,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> Tensor:
    """Updates the model on the batch of step ``step`` and returns the loss, over all ranks.

    Raises:
        FloatingPointError: for a loss that is not finite.
        UserError: for a model that raises, and for one whose weights the probe cannot perturb.
    """
    closure = _loss_of(problem, settings, step, device, ranks)
    try:
        return optimizer.step(closure)
    except StreamedProbeError as error:
        cause = str(error).partition(". ")[0]
        raise UserError(f"{cause}; give --probe inplace, with --overwrite") from None
    except BatchedProbeError as error:
        cause = str(error).partition("; probe=")[0]
        raise UserError(f"{cause}; give --probe streamed, with --overwrite") from None


def _loss_of(
    problem: Problem, settings: Settings, step: int, device: torch.device, ranks: Ranks
) -> Callable[..., Tensor | tuple[Tensor, Tensor]]:
    """The closure of a step: the loss of the batch, or of the part of this rank with its weight.

    With ``copies``, which a batched probe gives, it is that of each copy.
    """
    problem.objective.training.prepare(problem.model)
    examples = _examples(problem, settings, step)
    if ranks.batch_parts(settings.parallel) == 1:
        whole = _collated(problem, settings, examples, device)

        def loss(copies: int | None = None) -> Tensor:
            with of_model(f"step {step + 1}"):
                return _mean_loss(*_scores(problem, whole, copies or 1), copies)

        return loss
    # A rank without examples evaluates one that does not count, so that it takes the step like the others.
    own = ranks.share_of(examples)
    part = _collated(problem, settings, own or examples[:1], device)

    def closure(copies: int | None = None) -> tuple[Tensor, Tensor]:
        with of_model(f"step {step + 1}"):
            losses, predictions = _scores(problem, part, copies or 1)
        weight = predictions[0].sum()  # that of all copies
        return _mean_loss(losses, predictions, copies), weight if own else torch.zeros_like(weight)

    return closure


def _mean_loss(losses: Tensor, predictions: Tensor, copies: int | None) -> Tensor:
    """The mean over predictions: [copies], or [] if no number of copies was asked for."""
    if copies is None:
        return losses.sum() / predictions.sum()
    return losses.sum(1) / predictions.sum(1)


def is_flat(optimizer: ZerothOrderOptimizer) -> Tensor:
    """1 if all losses of the last step were equal, and else 0; float32 [] on their device."""
    estimate = optimizer.last_estimate
    if estimate is None:
        raise RuntimeError("no step was taken")
    return (estimate.loss_std == 0).float()


def forwards_of(optimizer: ZerothOrderOptimizer) -> int:
    """The number of forward passes of the last step."""
    estimate = optimizer.last_estimate
    return 0 if estimate is None else estimate.forwards
