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
from zoext.tasks._task import Record, Task
from zoext.tasks._templates import RowError, Template, text_of


class Generation(Task):
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
        self.template = template if isinstance(template, Template) else Template(template)
        self.answers, self.max_new_tokens = answers, max_new_tokens

    @property
    def columns(self) -> tuple[str, ...]:
        return self.template.columns

    def key(self, row: Record) -> str:
        return self.template.key(row)

    def examples(self, rows: Sequence[Record], encoder: Encoder, *, answered: bool = True) -> list[Example]:
        self.check(encoder)
        prompts, references = [], []
        for number, row in enumerate(rows, 1):
            try:
                found = self._references(row) if answered else []
                # A sequence-to-sequence model ends its output, and a causal one the line.
                ends = encoder.kind == SEQ2SEQ
                answers = [self.template.joint + text + ("" if ends else LINE) for text in found[:1]]
                prompts.append(Prompt(self.template.pieces(row), answers, ends))
            except RowError as error:
                raise RowError(f"row {number}: {error}") from None
            references.append(found)
        encoded = encoder.answered(prompts) if answered else encoder.asked(prompts)
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
