"""Answers that are generated and compared with references."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zoext.tasks._answers import Answers
from zoext.tasks._encoding import Encoder
from zoext.tasks._generating import LINE, generate
from zoext.tasks._kinds import CAUSAL, SEQ2SEQ
from zoext.tasks._metrics import exact_match, f1
from zoext.tasks._objective import Objective
from zoext.tasks._prompts import Prompt
from zoext.tasks._rows import Example
from zoext.tasks._task import PromptedTask, Record, of_rows
from zoext.tasks._templates import Template, text_of


class Generation(PromptedTask):
    """Questions whose answers are generated: trained by the language-model loss of the first reference.

    Evaluated by exact match and F1 of SQuAD (arXiv 1606.05250) between the line that the model generates
    greedily and the references.

    Args:
        template: the prompt, with columns in braces.
        answers: the column with a text, or with a list of texts that are all right.
        max_new_tokens: the length of a generated answer. Default 50, as in MeZO.
    """

    kinds = (CAUSAL, SEQ2SEQ)

    def __init__(
        self, template: str | Template, *, answers: str = "answers", max_new_tokens: int = 50
    ) -> None:
        super().__init__(template)
        self.answers, self.max_new_tokens = answers, max_new_tokens

    def examples(self, rows: Sequence[Record], encoder: Encoder, *, answered: bool = True) -> list[Example]:
        self.check(encoder)
        pieces = of_rows(rows, self.template.pieces)
        if not answered:
            return [
                Example(each)
                for each in encoder.asked([Prompt(some, room=self.max_new_tokens) for some in pieces])
            ]
        references = of_rows(rows, self._references)
        # A sequence-to-sequence model ends its output, and a causal one the line.
        ends = encoder.kind == SEQ2SEQ
        answers = [self.template.joint + first + ("" if ends else LINE) for first, *_ in references]
        room = self.max_new_tokens  # which the evaluation needs
        prompts = [Prompt(some, [answer], ends, room) for some, answer in zip(pieces, answers, strict=True)]
        encoded = encoder.answered(prompts)
        return [
            Example(each, references=tuple(found)) for each, found in zip(encoded, references, strict=True)
        ]

    def objective(self, encoder: Encoder) -> Objective:
        self.check(encoder)
        return GeneratedAnswers(encoder, self.max_new_tokens)

    def _references(self, row: Record) -> list[str]:
        value = row.get(self.answers)
        if isinstance(value, list | tuple) and value and all(isinstance(each, str) for each in value):
            return list(value)
        return [text_of(row, self.answers)]


class GeneratedAnswers(Answers):
    """The loss of the first reference, and what the model generates compared with all."""

    metrics = ("exact_match", "f1")

    def __init__(self, encoder: Encoder, max_new_tokens: int) -> None:
        super().__init__(encoder.padding, encoder.kind)
        self._encoder = encoder
        self._max_new_tokens = max_new_tokens
        self._training = Answers(encoder.padding, encoder.kind)

    @property
    def training(self) -> Objective:
        return self._training

    def examine(
        self, model: nn.Module, examples: Sequence[Example], device: torch.device | str
    ) -> dict[str, Tensor]:
        generated = self.answers(model, examples, device)
        pairs = list(zip(generated, examples, strict=True))
        return {
            "exact_match": torch.tensor([exact_match(text, each.references) for text, each in pairs]),
            "f1": torch.tensor([f1(text, each.references) for text, each in pairs]),
        }

    def answers(self, model: nn.Module, examples: Sequence[Example], device: torch.device | str) -> list[str]:
        return generate(model, self._encoder, examples, self._max_new_tokens, device, one_line=True)
