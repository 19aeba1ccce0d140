"""Losses and logits of a language model at labelled tokens, from a compact loss where it takes the model."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from zoext.losses import CompactLoss, CompactLossError
from zoext.tasks._kinds import CAUSAL, SEQ2SEQ
from zoext.tasks._objective import Batch
from zoext.tasks._rows import IGNORED


class LanguageModel:
    """Calls models of a kind; what a model needs once is found at its first call."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._model: nn.Module | None = None
        self._compact: CompactLoss | None = None

    def prepare(self, model: nn.Module) -> None:
        """Finds how the logits of ``model`` are made."""
        if self._model is model:
            return
        try:
            self._compact = CompactLoss(model)
        except CompactLossError:
            self._compact = None
        self._model = model

    def losses(self, model: nn.Module, batch: Batch, copies: int) -> Tensor:
        """The cross-entropy of each label at its position, float32 [rows, T]; 0 where there is none."""
        self.prepare(model)
        if self._compact is not None:
            return self._compact.per_token(_inputs(batch), copies)
        logits = self._all_logits(model, batch).transpose(1, 2)
        labels = batch["labels"]
        if self._kind != CAUSAL:
            return cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)
        losses = cross_entropy(logits[..., :-1], labels[:, 1:], reduction="none", ignore_index=IGNORED)
        return nn.functional.pad(losses, (1, 0))

    def logits(self, model: nn.Module, batch: Batch, copies: int) -> Tensor:
        """The logits of each row's only labelled token, float32 [rows, vocabulary]."""
        self.prepare(model)
        if self._compact is not None:
            return self._compact.logits(_inputs(batch), copies).flatten(0, 1)
        labelled = batch["labels"] != IGNORED
        if self._kind == CAUSAL:
            labelled = nn.functional.pad(labelled[:, 1:], (0, 1))
        return self._all_logits(model, batch)[labelled]

    def _all_logits(self, model: nn.Module, batch: Batch) -> Tensor:
        inputs = _inputs(batch)
        if self._kind != SEQ2SEQ:  # whose decoder reads them
            del inputs["labels"]
        logits: Tensor = model(**inputs).logits
        return logits.float()


def _inputs(batch: Batch) -> Batch:
    return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}


def predictions_of(batch: Batch, kind: str) -> Tensor:
    """The number of labels in each row that the model predicts, int64 [rows]."""
    labels = batch["labels"]
    return (labels[:, 1:] if kind == CAUSAL else labels).ne(IGNORED).sum(1)
