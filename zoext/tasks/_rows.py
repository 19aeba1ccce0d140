"""What becomes a batch: rows of tokens with labels, and the examples that they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: The label that losses ignore: prompts and padding.
IGNORED = -100


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens that the model reads, and those that it is to predict.

    Attributes:
        tokens: the input.
        labels: of a causal or masked model one per token, ``IGNORED`` where there is no loss; of a
            sequence-to-sequence model the tokens of the decoder; empty for a classifier.
        types: token_type_ids, which tell the two texts of a pair apart; empty if the tokenizer makes none.
    """

    tokens: tuple[int, ...]
    labels: tuple[int, ...] = ()
    types: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """The number of its tokens, or of the decoder's if these are more."""
        return max(len(self.tokens), len(self.labels))

    @property
    def unlabelled(self) -> int:
        """The number of tokens before the first label: of a causal model, its prompt."""
        return next((i for i, label in enumerate(self.labels) if label != IGNORED), len(self.tokens))

    @property
    def before_last_answer(self) -> int:
        """The number of tokens before the last labels in a row: in a conversation, the last answer."""
        is_labelled = [label != IGNORED for label in self.labels]
        if not any(is_labelled):
            return len(self.tokens)
        end = len(is_labelled) - is_labelled[::-1].index(True)
        return next((i + 1 for i in reversed(range(end)) if not is_labelled[i]), 0)


@dataclass(frozen=True, slots=True)
class Example:
    """The rows of one example.

    Attributes:
        rows: one per candidate answer where candidates are scored as texts, and otherwise one.
        label: the index of the right class or candidate, if there are any.
        also_right: candidates that count as right as well.
        references: texts that a generated answer is compared with.
    """

    rows: tuple[Row, ...]
    label: int | None = None
    also_right: tuple[int, ...] = ()
    references: tuple[str, ...] = ()

    @property
    def tokens(self) -> tuple[int, ...]:
        """The input of the first row."""
        return self.rows[0].tokens

    @property
    def is_answered(self) -> bool:
        """Whether the right answer is known, which losses need: not of ``examples(..., answered=False)``."""
        return self.label is not None or (len(self.rows) == 1 and bool(self.rows[0].labels))

    @property
    def length(self) -> int:
        """The number of tokens of the longest row, of the decoder as well."""
        return max(row.size for row in self.rows)


def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """int64 [rows, longest], filled with ``value`` on the right."""
    result = torch.full((len(rows), max(map(len, rows), default=0)), value, dtype=torch.int64)
    for row, tokens in enumerate(rows):
        result[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
    return result


def collate_rows(rows: Sequence[Row], padding: int) -> dict[str, Tensor]:
    """input_ids, attention_mask and, if rows have them, labels and token_type_ids.

    All are int64 [rows, longest], padded on the right.
    """
    tokens = padded([row.tokens for row in rows], padding)
    mask = padded([[1] * len(row.tokens) for row in rows], 0)
    batch = {"input_ids": tokens, "attention_mask": mask}
    if any(row.labels for row in rows):
        batch["labels"] = padded([row.labels for row in rows], IGNORED)
    if any(row.types for row in rows):
        batch["token_type_ids"] = padded([row.types for row in rows], 0)
    return batch
