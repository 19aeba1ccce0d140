"""How examples become a batch, and a batch becomes losses and other scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from zoext.losses import repeat
from zoext.tasks._rows import Example

#: Tensors whose first dimension is the example, so that ``zoext.repeat`` makes copies of it.
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Scores:
    """Sums over the predictions of each example; all tensors are [B], of all copies one after the other.

    Attributes:
        loss: the sum of the losses, float32.
        predictions: the number of predictions that ``loss`` sums.
        metrics: by name, what else was found, one value per example: for example 1 where the answer is right.
    """

    loss: Tensor
    predictions: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)

    def mean_loss(self) -> Tensor:
        """The mean over all predictions, float32 []."""
        return self.loss.sum() / self.predictions.sum()


class NotAnsweringError(ValueError):
    """The objective has losses, but no answers that could be predicted."""


class Objective(ABC):
    """What a model is trained for: its batches and its scores.

    Args:
        padding: the token that fills rows up. The attention mask and the labels exclude it.
    """

    #: The names of the metrics that ``scores`` finds.
    metrics: tuple[str, ...] = ()
    #: Whether the loss is a mean over tokens of text, whose exponential is the perplexity.
    is_per_token: bool = False

    def __init__(self, padding: int) -> None:
        self.padding = padding

    @property
    def training(self) -> Objective:
        """The objective of training steps, of which this one is the evaluation."""
        return self

    @abstractmethod
    def _collate(self, examples: Sequence[Example]) -> Batch: ...

    def collate(self, examples: Sequence[Example], device: torch.device | str = "cpu") -> Batch:
        """The batch of the examples on a device; the first dimension of each tensor is the example."""
        return {name: tensor.to(device) for name, tensor in self._collate(examples).items()}

    def prepare(self, model: nn.Module) -> None:  # noqa: B027
        """Runs what ``scores`` needs of ``model`` only once, so that no closure of a step runs it."""

    @abstractmethod
    def scores(self, model: nn.Module, batch: Batch, copies: int = 1) -> Scores:
        """The scores of ``model`` on a batch, which is ``copies`` copies of one."""

    def examine(
        self, model: nn.Module, examples: Sequence[Example], device: torch.device | str
    ) -> Mapping[str, Tensor]:
        """Metrics of examples that need more than a forward of their batch, one value per example."""
        return {}

    def answers(
        self, model: nn.Module, examples: Sequence[Example], device: torch.device | str
    ) -> Sequence[int] | Sequence[str]:
        """What the model answers: indices of classes or candidates, or texts.

        Raises:
            NotAnsweringError: for an objective that has no answers, as that of plain text.
        """
        raise NotAnsweringError("plain text has no answers; evaluate its loss instead")

    def loss(self, model: nn.Module, batch: Batch, copies: int | None = None) -> Tensor:
        """The mean loss over the predictions of a batch, float32 [].

        With ``copies``, which a batched probe gives, the loss [copies] of each copy of the batch.
        """
        if copies is None:
            return self.scores(model, batch).mean_loss()
        scores = self.scores(model, repeat(batch, copies), copies)
        return scores.loss.view(copies, -1).sum(1) / scores.predictions.view(copies, -1).sum(1)
