"""Prompts with completions, plain texts, and texts for a classification head."""

from __future__ import annotations

from collections.abc import Sequence

from zoext.tasks._answers import Answers, Classes
from zoext.tasks._encoding import Encoder
from zoext.tasks._generating import Completions
from zoext.tasks._kinds import CAUSAL, CLASSIFIER, ENCODER, SEQ2SEQ
from zoext.tasks._objective import Objective
from zoext.tasks._prompts import Prompt
from zoext.tasks._rows import Example, Row
from zoext.tasks._task import PromptedTask, Record, Task, of_rows
from zoext.tasks._templates import RowError, Template, text_of


class Completion(PromptedTask):
    """Prompts and what is to follow them: the loss is that of the completion's tokens and of its end.

        >>> zoext.tasks.Completion()
        >>> zoext.tasks.Completion("Question: {question}\\nAnswer:", completion="answer", joint=" ")

    Args:
        template: the prompt, with columns in braces. Default: the column "prompt".
        completion: the column with the completion.
        joint: what stands between prompt and completion. Default: nothing.
        max_new_tokens: the length of an answer that is generated. Default 50.
    """

    kinds = (CAUSAL, SEQ2SEQ)

    def __init__(
        self,
        template: str | Template = "{prompt}",
        *,
        completion: str = "completion",
        joint: str = "",
        max_new_tokens: int = 50,
    ) -> None:
        super().__init__(template)
        self.completion, self.joint, self.max_new_tokens = completion, joint, max_new_tokens

    def examples(self, rows: Sequence[Record], encoder: Encoder, *, answered: bool = True) -> list[Example]:
        self.check(encoder)
        if not answered:
            room = self.max_new_tokens
            prompts = of_rows(rows, lambda row: Prompt(self.template.pieces(row), room=room))
            return [Example(found) for found in encoder.asked(prompts)]
        return [Example(found) for found in encoder.answered(of_rows(rows, self._prompt))]

    def _prompt(self, row: Record) -> Prompt:
        return Prompt(self.template.pieces(row), [self.joint + text_of(row, self.completion)], ends=True)

    def objective(self, encoder: Encoder) -> Objective:
        self.check(encoder)
        return Completions(encoder, self.max_new_tokens)


class Text(Task):
    """Plain texts: the loss of each token given those before it.

    Args:
        text: the column with the text.
    """

    kinds = (CAUSAL,)

    def __init__(self, text: str = "text") -> None:
        self.text = text

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.text,)

    def key(self, row: Record) -> str:
        return text_of(row, self.text)

    def check(self, encoder: Encoder) -> None:
        if encoder.kind == SEQ2SEQ:
            raise ValueError(
                "a sequence-to-sequence model learns what follows an input, not plain text; give data with "
                "the columns prompt and completion"
            )
        if encoder.kind not in self.kinds:
            raise ValueError(
                "an encoder sees the tokens that it would have to predict, so it cannot learn plain text; "
                "give a causal language model, or data with the columns text and label"
            )

    def examples(self, rows: Sequence[Record], encoder: Encoder, *, answered: bool = True) -> list[Example]:
        """Texts of a single token are left out: the first token is not predicted."""
        self.check(encoder)
        encoded = encoder.texts(of_rows(rows, self.key))
        kept = [Example((Row(row.tokens, row.tokens),)) for row in encoded if len(row.tokens) > 1]
        if rows and not kept:
            raise RowError("every text has fewer than two tokens, so there is nothing to predict")
        return kept

    def objective(self, encoder: Encoder) -> Objective:
        self.check(encoder)
        return Answers(encoder.padding, encoder.kind)


class Classification(Task):
    """Texts, or pairs of texts, with labels for a classification head.

    A head that the model was not saved with begins with random weights, which takes far more steps to train
    than ``LabelWords`` does.

    Args:
        classes: the labels, in the order of the outputs of the head.
        text: the column, or the two columns, with the text.
        label: the column with the labels.
    """

    kinds = (CLASSIFIER, ENCODER)

    def __init__(
        self, classes: Sequence[str], *, text: Sequence[str] = ("text",), label: str = "label"
    ) -> None:
        if not 1 <= len(text) <= 2:
            raise ValueError(f"text must name one column or two, not {text!r}")
        self.classes, self.text, self.label = tuple(classes), tuple(text), label

    @property
    def columns(self) -> tuple[str, ...]:
        return self.text

    def key(self, row: Record) -> str:
        return "\0".join(text_of(row, column) for column in self.text)

    def check(self, encoder: Encoder) -> None:
        """Any model can get a classification head."""

    def examples(self, rows: Sequence[Record], encoder: Encoder, *, answered: bool = True) -> list[Example]:
        texts = of_rows(rows, lambda row: [text_of(row, column) for column in self.text])
        labels = of_rows(rows, self._index) if answered else [None] * len(rows)
        encoded = encoder.texts(*zip(*texts, strict=True))
        return [Example((found,), label) for found, label in zip(encoded, labels, strict=True)]

    def _index(self, row: Record) -> int:
        label = row.get(self.label)
        if str(label) not in self.classes:
            raise RowError(
                f"{self.label} is {label!r}, which is no class; there are {', '.join(self.classes)}"
            )
        return self.classes.index(str(label))

    def objective(self, encoder: Encoder) -> Objective:
        return Classes(encoder.padding)
