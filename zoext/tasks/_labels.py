"""Texts with labels, which a prompt asks for by words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from zoext.tasks._choices import Choices
from zoext.tasks._encoding import Encoder
from zoext.tasks._kinds import CAUSAL, MASKED, SEQ2SEQ
from zoext.tasks._objective import Objective
from zoext.tasks._prompts import Prompt
from zoext.tasks._rows import Example, Row
from zoext.tasks._task import PromptedTask, Record, of_rows
from zoext.tasks._templates import RowError, Template

TRAINS = ("choice", "answer")


class LabelWords(PromptedTask):
    """Texts with labels: a template asks, and the words of the labels are the candidate answers.

    A causal model is asked for the words at the end of the prompt, a sequence-to-sequence model for them as
    its output, and a masked model for them in the place of ``{mask}``. Words may have several tokens, except
    for a masked model.

        >>> zoext.tasks.LabelWords("{text} It was", {"0": " terrible", "1": " great"})

    Args:
        template: the prompt, with columns in braces.
        words: the word of each label, with the space before it where the prompt does not end with one.
        label: the column with the labels.
        trains: "choice" (default): cross-entropy over the words; "answer": the language-model loss of the
            right word.

    Raises:
        ValueError: for fewer than two labels, for equal or empty words, or for a template without a column.
    """

    kinds = (CAUSAL, MASKED, SEQ2SEQ)

    def __init__(
        self,
        template: str | Template,
        words: Mapping[str, str],
        *,
        label: str = "label",
        trains: str = "choice",
    ) -> None:
        super().__init__(template)
        self.words = {str(name): word for name, word in words.items()}
        self.label = label
        self.trains = trains
        if not self.template.columns:
            raise ValueError(f"template {self.template.text!r}: needs a column in braces, such as {{text}}")
        if label in self.template.columns:
            raise ValueError(f"template {self.template.text!r}: tells the answer, column {label!r}")
        if len(self.words) < 2:
            raise ValueError(f"words: needs two labels or more, not {dict(words)}")
        distinct = {word.strip() for word in self.words.values()}
        if len(distinct) < len(self.words) or "" in distinct:
            raise ValueError(f"words: each label needs a word of its own, not {dict(words)}")
        if trains not in TRAINS:
            raise ValueError(f"trains must be one of {', '.join(TRAINS)}, not {trains!r}")

    @property
    def names(self) -> tuple[str, ...]:
        """The labels, in the order of the candidates."""
        return tuple(self.words)

    def check(self, encoder: Encoder) -> None:
        super().check(encoder)
        if encoder.kind == MASKED:
            if encoder.tokenizer.mask_token_id is None:
                raise ValueError("the tokenizer has no mask token; give that of the model")
            if self.template.masks != 1:
                raise ValueError(
                    f"template {self.template.text!r}: a masked model is asked in the place of {{mask}}, "
                    f"which must occur once, not {self.template.masks} times"
                )
        elif self.template.masks:
            raise ValueError(
                f"template {self.template.text!r}: a {encoder.kind} model has no {{mask}}; end the template "
                "where the answer begins"
            )

    def examples(self, rows: Sequence[Record], encoder: Encoder, *, answered: bool = True) -> list[Example]:
        self.check(encoder)
        labels = of_rows(rows, self._index) if answered else [None] * len(rows)
        answers = [] if encoder.kind == MASKED else list(self.words.values())
        prompts = of_rows(rows, lambda row: Prompt(self.template.pieces(row, encoder.mask), answers))
        if encoder.kind == MASKED:
            encoded = encoder.masked(prompts, list(self.words.values()))
        else:
            encoded = encoder.answered(prompts)
        self._check_words(encoded[:1], encoder)
        return [Example(each, label) for each, label in zip(encoded, labels, strict=True)]

    def _check_words(self, encoded: Sequence[tuple[Row, ...]], encoder: Encoder) -> None:
        """Raises a ValueError for words that a model cannot tell apart."""
        unknown = encoder.tokenizer.unk_token_id
        for rows in encoded:
            for word, row in zip(self.words.values(), rows, strict=True):
                if unknown is not None and unknown in row.labels:
                    raise ValueError(f"words: the tokenizer does not know {word!r}; give another word")
            if len(set(rows)) < len(rows):
                raise ValueError(
                    f"words: some of {list(self.words.values())} have the same tokens; give others"
                )

    def objective(self, encoder: Encoder) -> Objective:
        self.check(encoder)
        return Choices(encoder.padding, encoder.kind, self.trains)

    def without_input(self, encoder: Encoder) -> Example:
        """The example whose columns say "N/A": its scores calibrate those of others."""
        empty = dict.fromkeys(self.columns, "N/A")
        return self.examples([empty], encoder, answered=False)[0]

    def _index(self, row: Record) -> int:
        label = row.get(self.label)
        name = str(label)
        if name not in self.words:
            known = ", ".join(self.words)
            raise RowError(f"{self.label} is {label!r}, which has no label word; there are words for {known}")
        return self.names.index(name)


class MultipleChoice(PromptedTask):
    """A question with candidate answers of its own in each row.

        >>> task = zoext.tasks.MultipleChoice("{question}\\nAnswer:", choices="choices", answer="answer")

    Args:
        template: the prompt, with columns in braces.
        choices: the column with the list of candidate texts.
        answer: the column with the right one: its index, its text, or a list of texts that are all right.
        joint: what stands between the prompt and a candidate. Default: that of the template.
        trains: "choice" (default) or "answer", as for ``LabelWords``.
    """

    kinds = (CAUSAL, SEQ2SEQ)

    def __init__(
        self,
        template: str | Template,
        *,
        choices: str = "choices",
        answer: str = "answer",
        joint: str | None = None,
        trains: str = "choice",
    ) -> None:
        super().__init__(template)
        self.choices, self.answer = choices, answer
        self.joint = self.template.joint if joint is None else joint
        self.trains = trains
        if trains not in TRAINS:
            raise ValueError(f"trains must be one of {', '.join(TRAINS)}, not {trains!r}")

    def examples(self, rows: Sequence[Record], encoder: Encoder, *, answered: bool = True) -> list[Example]:
        self.check(encoder)
        prompts = of_rows(rows, self._prompt)
        right = of_rows(rows, self._right) if answered else [[]] * len(rows)
        return [
            Example(encoded, next(iter(indices), None), tuple(indices[1:]))
            for encoded, indices in zip(encoder.answered(prompts), right, strict=True)
        ]

    def _prompt(self, row: Record) -> Prompt:
        return Prompt(self.template.pieces(row), [self.joint + choice for choice in self._choices(row)])

    def objective(self, encoder: Encoder) -> Objective:
        self.check(encoder)
        return Choices(encoder.padding, encoder.kind, self.trains)

    def _choices(self, row: Record) -> list[str]:
        choices = row.get(self.choices)
        if not isinstance(choices, list | tuple) or len(choices) < 2:
            raise RowError(f"{self.choices} is {choices!r}, not a list of two texts or more")
        if not all(isinstance(choice, str) and choice.strip() for choice in choices):
            raise RowError(f"{self.choices} is {choices!r}: every choice must be a text")
        return list(choices)

    def _right(self, row: Record) -> list[int]:
        choices, answer = self._choices(row), row.get(self.answer)
        if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
            return [answer]
        texts = [answer] if isinstance(answer, str) else answer
        if isinstance(texts, list | tuple) and texts and all(text in choices for text in texts):
            return [choices.index(text) for text in texts]
        raise RowError(
            f"{self.answer} is {answer!r}: it must be the index of a choice, from 0, or the text of one"
        )
