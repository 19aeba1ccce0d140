"""The loss of a language model on answers, or on whole texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from zoext.tasks._language import LanguageModel, predictions_of
from zoext.tasks._objective import Batch, Objective, Scores
from zoext.tasks._rows import Example, collate_rows


class Answers(Objective):
    """Cross-entropy of each labelled token given those before it, in float32.

    Of an example with candidates, the right one is the answer.
    """

    is_per_token = True

    def __init__(self, padding: int, kind: str) -> None:
        super().__init__(padding)
        self._kind = kind
        self._language = LanguageModel(kind)

    def _collate(self, examples: Sequence[Example]) -> Batch:
        rows = [example.rows[example.label or 0 if len(example.rows) > 1 else 0] for example in examples]
        return collate_rows(rows, self.padding)

    def prepare(self, model: nn.Module) -> None:
        self._language.prepare(model)

    def scores(self, model: nn.Module, batch: Batch, copies: int = 1) -> Scores:
        losses = self._language.losses(model, batch, copies)
        return Scores(losses.sum(1), predictions_of(batch, self._kind))


class Classes(Objective):
    """Cross-entropy over the classes of a classification head, in float32."""

    metrics = ("accuracy",)

    def _collate(self, examples: Sequence[Example]) -> Batch:
        batch = collate_rows([example.rows[0] for example in examples], self.padding)
        return batch | {"labels": torch.tensor([example.label for example in examples])}

    def scores(self, model: nn.Module, batch: Batch, copies: int = 1) -> Scores:
        labels = batch["labels"]
        logits = self._logits(model, batch).float()
        loss = nn.functional.cross_entropy(logits, labels, reduction="none")
        return Scores(loss, torch.ones_like(labels), {"accuracy": (logits.argmax(-1) == labels).float()})

    @torch.no_grad()
    def answers(self, model: nn.Module, examples: Sequence[Example], device: torch.device | str) -> list[int]:
        batch = self.collate([replace(example, label=0) for example in examples], device)
        return list(self._logits(model, batch).argmax(-1).tolist())

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits: Tensor = model(**inputs).logits
        return logits
