"""The objective of a task of ``zoext.tasks`` in ``Trainer``: its batches, its loss and its metrics."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from zoext.losses import repeat
from zoext.tasks import Batch, Example, Objective, Scores

#: Arguments of a trainer that an objective takes the place of.
_REPLACED = ("data_collator", "compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics")
#: How Trainer may form batches by the lengths of "input_ids".
_BY_LENGTH = ("group_by_length", "batch_rebalance")


class TaskLoss:
    """Trains and evaluates a model by ``objective``, in the autocast of ``trainer``."""

    def __init__(self, trainer: Trainer, objective: Objective) -> None:
        self._trainer = trainer
        self._objective = objective
        self._training = objective.training

    def prepare(self, model: nn.Module) -> None:
        """Runs what the loss needs of ``model`` only once, which no closure may run."""
        with self._autocast():
            self._training.prepare(model)

    def closure(self, model: nn.Module, micro_batches: Sequence[Batch]) -> Callable[..., Any]:
        """The closure of a step: the mean over the predictions of all micro-batches, on all processes."""
        is_shared = self._trainer.accelerator.num_processes > 1

        def loss(copies: int | None = None) -> Tensor | tuple[Tensor, Tensor]:
            each = [self._sums(model, micro_batch, copies) for micro_batch in micro_batches]
            losses, predictions = (torch.stack(sums).sum(0) for sums in zip(*each, strict=True))
            mean = losses / predictions
            # Each process has a weight for its losses, which all copies of its batch share.
            return (mean, predictions.flatten()[0]) if is_shared else mean

        return loss

    def _sums(self, model: nn.Module, batch: Batch, copies: int | None) -> tuple[Tensor, Tensor]:
        """The sum of the losses and the number of predictions, [], or those of each copy, [copies]."""
        if copies is None:
            scores = self._scores(self._training, model, batch)
            return scores.loss.sum(), scores.predictions.sum()
        scores = self._scores(self._training, model, repeat(batch, copies), copies)
        return scores.loss.view(copies, -1).sum(1), scores.predictions.view(copies, -1).sum(1)

    def _scores(self, objective: Objective, model: nn.Module, batch: Batch, copies: int = 1) -> Scores:
        with self._trainer.compute_loss_context_manager(), self._autocast():
            return objective.scores(model, batch, copies)

    def _autocast(self) -> AbstractContextManager[Any]:
        # Accelerate puts it around the forward of the model only.
        found: AbstractContextManager[Any] = self._trainer.accelerator.autocast()
        return found

    @torch.no_grad()
    def evaluate(self, model: nn.Module, examples: Sequence[Example], prefix: str) -> dict[str, float]:
        """The loss over all predictions, and the mean of each metric over the examples of all processes.

        Batches are of similar lengths, and are dealt out over the processes.
        """
        trainer, objective = self._trainer, self._objective
        size, device = trainer.args.eval_batch_size, trainer.args.device
        by_length = sorted(examples, key=lambda example: example.length)
        sums = torch.zeros(3 + len(objective.metrics), dtype=torch.float64, device=device)
        starts = range(0, len(by_length), size)
        own = starts[trainer.accelerator.process_index :: trainer.accelerator.num_processes]
        for start in own:
            some = by_length[start : start + size]
            scores = self._scores(objective, model, objective.collate(some, device))
            with self._autocast():
                metrics = {**scores.metrics, **objective.examine(model, some, device)}
            columns = [scores.loss, scores.predictions, torch.ones(len(some), device=device)]
            columns += [metrics[name].to(device) for name in objective.metrics]
            sums += torch.stack([column.double().sum() for column in columns])
        loss, predictions, count, *found = trainer.accelerator.reduce(sums).tolist()
        named = zip(objective.metrics, found, strict=True)
        return {
            f"{prefix}_loss": loss / predictions,
            **{f"{prefix}_{name}": value / count for name, value in named},
        }


def arguments(
    trainer: type[Trainer], objective: Objective, args: Sequence[Any], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of a trainer by name, with the collator of the objective.

    Raises:
        ValueError: for arguments that the objective would silently replace or ignore.
        TypeError: for anything but examples of a task to train on, or arguments that Trainer does not have.
    """
    given = dict(inspect.signature(Trainer).bind_partial(*args, **kwargs).arguments)
    _check(trainer, given.get("args"), given)
    return {**given, "data_collator": objective.training.collate}


def _check(trainer: type[Trainer], arguments: Any, given: dict[str, Any]) -> None:
    for name in _REPLACED:
        if given.get(name) is not None:
            raise ValueError(f"{name}: the objective has its own; leave out {name} or objective")
    if trainer.compute_loss is not Trainer.compute_loss:
        raise ValueError(
            f"objective: {trainer.__name__} has a compute_loss of its own; leave out one of them"
        )
    if getattr(arguments, "train_sampling_strategy", "random") in _BY_LENGTH or getattr(
        arguments, "group_by_length", False
    ):
        raise ValueError(
            "train_sampling_strategy: batches by length need data sets of dicts, and an objective has "
            "examples of a task; leave it at 'random'"
        )
    if getattr(arguments, "label_smoothing_factor", 0.0):
        raise ValueError("label_smoothing_factor: an objective has labels as they are; leave it at 0")
    for name in ("bf16_full_eval", "fp16_full_eval"):
        if getattr(arguments, name, False):
            raise ValueError(f"{name}: an objective evaluates the weights as they are; leave it off")
    if isinstance(some := given.get("train_dataset"), Sequence):
        examples_of(some[:1])
    if not getattr(arguments, "zo_compact_loss", True):
        raise ValueError("zo_compact_loss=False: an objective chooses its logits itself; leave it on")


def examples_of(dataset: Any) -> list[Example]:
    """The examples of a data set, whose losses can be found.

    Raises:
        TypeError: for anything but examples of a task.
        ValueError: for an example without its right answer.
    """
    examples = list(dataset)
    for example in examples[:1]:
        if not isinstance(example, Example):
            raise TypeError(
                f"with objective, a data set has examples of task.examples(rows, encoder), not "
                f"{type(example).__name__}"
            )
    if not all(example.is_answered for example in examples):
        raise ValueError(
            "an example has no right answer, so it has no loss; make the examples without answered=False. "
            "What the model answers is found by objective.answers(model, examples, device)"
        )
    return examples
