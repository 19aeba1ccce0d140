"""Objectives: cross-entropy over classes or over the next token, in float32."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from zoext.losses import CompactLoss, CompactLossError

IGNORED = -100  # the label that cross_entropy ignores: padding

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Example:
    """Token ids, and the class index of a labelled text."""

    tokens: tuple[int, ...]
    label: int | None = None


@dataclass(frozen=True)
class Scores:
    """Per example, [B]: the sum of its losses (float32), the number of predictions and of correct ones.

    The latter is 0 where the objective reports no accuracy.
    """

    loss: Tensor
    predictions: Tensor
    correct: Tensor

    def mean_loss(self) -> Tensor:
        """The mean over all predictions, float32 []."""
        return self.loss.sum() / self.predictions.sum()


class Objective(ABC):
    """How examples become a batch and a batch becomes losses."""

    #: Whether accuracy is reported.
    reports_accuracy: bool

    def __init__(self, padding: int) -> None:
        self._padding = padding

    def collate(self, examples: Sequence[Example], device: torch.device) -> Batch:
        """Builds input_ids, attention_mask and labels, right-padded to the longest example."""
        length = max(len(example.tokens) for example in examples)
        shape = (len(examples), length)
        tokens = torch.full(shape, self._padding, dtype=torch.int64)
        mask = torch.zeros(shape, dtype=torch.int64)
        for row, example in enumerate(examples):
            tokens[row, : len(example.tokens)] = torch.tensor(example.tokens)
            mask[row, : len(example.tokens)] = 1
        batch = {"input_ids": tokens, "attention_mask": mask, "labels": self._labels(examples, tokens, mask)}
        return {name: tensor.to(device) for name, tensor in batch.items()}

    @abstractmethod
    def _labels(self, examples: Sequence[Example], tokens: Tensor, mask: Tensor) -> Tensor: ...

    def prepare(self, model: nn.Module) -> None:  # noqa: B027
        """Runs what ``scores`` needs of ``model`` only once, so that no closure of a step runs it."""

    @abstractmethod
    def scores(self, model: nn.Module, batch: Batch) -> Scores:
        """The losses of ``model`` on a batch."""


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    logits: Tensor = output.logits
    return logits.float()


class Classification(Objective):
    """Cross-entropy over the classes."""

    reports_accuracy = True

    def _labels(self, examples: Sequence[Example], tokens: Tensor, mask: Tensor) -> Tensor:
        return torch.tensor([example.label for example in examples])

    def scores(self, model: nn.Module, batch: Batch) -> Scores:
        logits, labels = _logits(model, batch), batch["labels"]
        loss = cross_entropy(logits, labels, reduction="none")
        return Scores(loss, torch.ones_like(labels), logits.argmax(-1) == labels)


class NextToken(Objective):
    """Causal language modelling: cross-entropy of each token given those before it.

    Logits are made for tokens only, not for padding, and some at a time, if ``CompactLoss`` takes the model.
    """

    reports_accuracy = False

    def __init__(self, padding: int) -> None:
        super().__init__(padding)
        self._model: nn.Module | None = None

    def _labels(self, examples: Sequence[Example], tokens: Tensor, mask: Tensor) -> Tensor:
        return tokens.masked_fill(mask == 0, IGNORED)

    def prepare(self, model: nn.Module) -> None:
        if self._model is not model:
            try:
                self._compact: CompactLoss | None = CompactLoss(model)
            except CompactLossError:
                self._compact = None
            self._model = model

    def scores(self, model: nn.Module, batch: Batch) -> Scores:
        self.prepare(model)
        labels = batch["labels"][:, 1:]
        if self._compact is not None:
            losses = self._compact.per_token(batch)
        else:
            logits = _logits(model, batch)[:, :-1].transpose(1, 2)
            losses = cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)
        predictions = (labels != IGNORED).sum(1)
        return Scores(losses.sum(1), predictions, torch.zeros_like(predictions))
