"""The choice among candidate answers by their probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from zoext.tasks._answers import Answers
from zoext.tasks._kinds import CAUSAL
from zoext.tasks._language import LanguageModel, predictions_of
from zoext.tasks._objective import Batch, Objective, Scores
from zoext.tasks._rows import IGNORED, Example, Row, collate_rows, padded


class Choices(Objective):
    """The choice among candidates by the mean log-probability of their tokens:

    ``s_c = mean_t log p(token t of candidate c | prompt, tokens before t)``, and the loss is
    ``-log softmax(s)[right]``, as in MeZO (arXiv 2305.17333, appendix E); several right ones add up. Where
    all candidates of a batch are single tokens at the same place, one row per example gives all of them.

    Args:
        padding: the token that fills rows up.
        kind: of the model, see ``kind_of``.
        trains: "choice" trains this loss, "answer" the language-model loss of the right candidate, which is
            then the loss of ``scores`` too.
        prior: what is subtracted from the score of each candidate, float32 [candidates]: its score without
            an input (contextual calibration, arXiv 2102.09690).
    """

    metrics = ("accuracy",)

    def __init__(self, padding: int, kind: str, trains: str = "choice", prior: Tensor | None = None) -> None:
        super().__init__(padding)
        self._kind = kind
        self._language = LanguageModel(kind)
        self._training = Answers(padding, kind) if trains == "answer" else self
        self._prior = prior
        self._flat: tuple[Tensor, Tensor] | None = None  # the last labels, and these with one dimension less

    @property
    def training(self) -> Objective:
        return self._training

    def prepare(self, model: nn.Module) -> None:
        self._language.prepare(model)
        if self._training is not self:
            self._training.prepare(model)

    def _collate(self, examples: Sequence[Example]) -> Batch:
        most = max(len(example.rows) for example in examples)
        right, wrong = [], []
        for example in examples:
            accepted = {example.label, *example.also_right}
            right.append([float(index in accepted) for index in range(most)])
            wrong.append([float(index >= len(example.rows)) for index in range(most)])
        batch = {
            "label": torch.tensor([example.label for example in examples]),
            "is_right": torch.tensor(right),
            "is_absent": torch.tensor(wrong),
        }
        tokens = [_tokens_at_one_place(example, self._kind) for example in examples]
        if all(tokens):
            rows = [example.rows[example.label or 0] for example in examples]
            candidates = padded([token for token in tokens if token is not None], 0)
            return batch | {"candidates": candidates, **collate_rows(rows, self.padding)}
        return batch | self._collate_texts(examples, most)

    def _collate_texts(self, examples: Sequence[Example], most: int) -> Batch:
        """All candidates, [B, most, T]; absent ones repeat the first, with one label."""
        rows = [row for example in examples for row in (*example.rows, *[example.rows[0]] * most)[:most]]
        flat = collate_rows(rows, self.padding)
        return {name: tensor.view(len(examples), most, -1) for name, tensor in flat.items()}

    def scores(self, model: nn.Module, batch: Batch, copies: int = 1) -> Scores:
        sums, counts = self._log_probabilities(model, batch, copies)
        scores = self._scores(sums, counts, batch)
        accuracy = batch["is_right"].gather(1, scores.argmax(1, keepdim=True)).squeeze(1)
        label = batch["label"]
        if self._training is self:
            right_ones = scores.masked_fill(batch["is_right"] == 0, -torch.inf)
            loss = scores.logsumexp(1) - right_ones.logsumexp(1)
            return Scores(loss, torch.ones_like(label), {"accuracy": accuracy})
        right = label.unsqueeze(1)
        loss, predictions = -sums.gather(1, right).squeeze(1), counts.gather(1, right).squeeze(1)
        return Scores(loss, predictions, {"accuracy": accuracy})

    @torch.no_grad()
    def answers(self, model: nn.Module, examples: Sequence[Example], device: torch.device | str) -> list[int]:
        known = [replace(example, label=example.label or 0) for example in examples]
        return list(self.candidates(model, self.collate(known, device)).argmax(1).tolist())

    def candidates(self, model: nn.Module, batch: Batch, copies: int = 1) -> Tensor:
        """The scores of the candidates, float32 [B, candidates]; -inf for absent ones."""
        return self._scores(*self._log_probabilities(model, batch, copies), batch)

    def _log_probabilities(self, model: nn.Module, batch: Batch, copies: int) -> tuple[Tensor, Tensor]:
        """The log-probability of each candidate and the number of its tokens, both [B, candidates]."""
        if "candidates" in batch:
            logits = self._language.logits(model, batch, copies).float()
            sums = logits.log_softmax(1).gather(1, batch["candidates"])
            return sums, torch.ones_like(batch["candidates"])
        inputs = {name: batch[name].flatten(0, 1) for name in ("input_ids", "attention_mask")}
        inputs["labels"] = self._flat_labels(batch["labels"])
        sums = -self._language.losses(model, inputs, copies).sum(1).float()
        shape = batch["is_right"].shape
        return sums.view(shape), predictions_of(inputs, self._kind).view(shape)

    def _flat_labels(self, labels: Tensor) -> Tensor:
        """Labels [B, K, T] as [B K, T]: the same object for all probes, as a new one waits for its device."""
        if self._flat is None or self._flat[0] is not labels:
            self._flat = labels, labels.flatten(0, 1)
        return self._flat[1]

    def _scores(self, sums: Tensor, counts: Tensor, batch: Batch) -> Tensor:
        scores = sums / counts
        if self._prior is not None:
            scores = scores - self._prior.to(scores.device)
        return scores.masked_fill(batch["is_absent"].bool(), -torch.inf)


def _tokens_at_one_place(example: Example, kind: str) -> list[int] | None:
    """The only labels of the candidates, if all are predicted from the same tokens at the same place."""
    found, contexts = [], set()
    for row in example.rows:
        places = [place for place, label in enumerate(row.labels) if label != IGNORED]
        if len(places) != 1:
            return None
        found.append(row.labels[places[0]])
        contexts.add((_context(row, places[0], kind), places[0]))
    return found if len(contexts) == 1 else None


def _context(row: Row, place: int, kind: str) -> tuple[int, ...]:
    return row.tokens[:place] if kind == CAUSAL else row.tokens
