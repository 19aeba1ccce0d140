"""What a data set asks of a model: the rows of its tables become examples, and its objective scores them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from zoext.tasks._encoding import Encoder
from zoext.tasks._objective import Objective
from zoext.tasks._rows import Example
from zoext.tasks._templates import RowError, Template

#: A row of a table: values by column.
Record = Mapping[str, Any]

_Made = TypeVar("_Made")


def of_rows(rows: Sequence[Record], make: Callable[[Record], _Made]) -> list[_Made]:
    """What ``make`` makes of each row.

    Raises:
        RowError: of ``make``, with the number of the row.
    """
    made = []
    for number, row in enumerate(rows, 1):
        try:
            made.append(make(row))
        except RowError as error:
            raise RowError(f"row {number}: {error}") from None
    return made


class Task(ABC):
    """A kind of data, for example texts with labels that a prompt asks for.

    A task is bound to a model's tokenizer by ``encoder`` and ``objective``:

        >>> task = zoext.tasks.LabelWords("Review: {text}\\nSentiment:", {"bad": " bad", "good": " good"})
        >>> encoder = zoext.tasks.Encoder(tokenizer, zoext.tasks.kind_of(model.config), max_length=128)
        >>> objective = task.objective(encoder)
        >>> examples = task.examples(rows, encoder)
        >>> batch = objective.collate(examples[:16])
        >>> optimizer.step(lambda: objective.loss(model, batch))
    """

    #: The kinds of models that it can ask, see ``kind_of``.
    kinds: tuple[str, ...]

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """The columns that it reads."""

    @abstractmethod
    def examples(self, rows: Sequence[Record], encoder: Encoder, *, answered: bool = True) -> list[Example]:
        """The examples of rows.

        Args:
            answered: False for rows whose right answers are not known and not read; they have no loss.

        Raises:
            RowError: for a row that cannot be used; the message names it and the remedy.
        """

    @abstractmethod
    def objective(self, encoder: Encoder) -> Objective:
        """What a model is trained for, and how it is scored."""

    @abstractmethod
    def key(self, row: Record) -> str:
        """The input: rows that have the same must not be held out while others of them train.

        Raises:
            RowError: for a row without an input.
        """

    def check(self, encoder: Encoder) -> None:
        """Raises a ValueError, with the remedy, for a kind of model that the task cannot ask."""
        if encoder.kind not in self.kinds:
            raise ValueError(
                f"{type(self).__name__} asks {' or '.join(self.kinds)} models, not {encoder.kind}"
            )


class PromptedTask(Task):
    """A task whose input is a prompt.

    Args:
        template: the prompt, with columns in braces.
    """

    def __init__(self, template: str | Template) -> None:
        self.template = template if isinstance(template, Template) else Template(template)

    @property
    def columns(self) -> tuple[str, ...]:
        return self.template.columns

    def key(self, row: Record) -> str:
        return self.template.key(row)
