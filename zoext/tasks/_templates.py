"""Templates: texts with the names of columns in braces."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: The name in a template that stands for the mask token of a masked language model.
MASK = "mask"

_NO_SPACE_AFTER = frozenset("\n([{\u201c\u2018")  # the last two are opening quotation marks


class RowError(ValueError):
    """A row of the data cannot be used; the message names the column, its value and the remedy."""


@dataclass(frozen=True)
class Piece:
    """A part of a rendered template: a text of the template, or the value of a column."""

    text: str
    column: str | None = None


class Template:
    """A prompt with columns of the data in braces: ``"Review: {text}\\nSentiment:"``.

    ``{{`` and ``}}`` stand for braces. ``{mask}`` stands for the mask token of a masked language model.

        >>> zoext.tasks.Template("{premise} Does this mean that {hypothesis}?").columns
        ('premise', 'hypothesis')

    Args:
        text: the template; spaces at its end are left out.

    Raises:
        ValueError: for braces that do not match, or that contain anything but the name of a column.
    """

    def __init__(self, text: str) -> None:
        text = text.rstrip(" ")  # which belongs to the answer: tokens of words begin with their space
        try:
            parsed = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ValueError(f"template {text!r}: {error}; write {{{{ and }}}} for braces") from None
        self.text = text
        self._parts: list[tuple[str, str | None]] = []
        for literal, column, form, conversion in parsed:
            if column is not None and (not column.isidentifier() or form or conversion):
                raise ValueError(
                    f"template {text!r}: {{{column}}} must be the name of a column, such as {{text}}; write "
                    "{{ and }} for braces"
                )
            self._parts.append((literal, column))

    def __repr__(self) -> str:
        return f"Template({self.text!r})"

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it needs, each once."""
        named = (column for _, column in self._parts if column not in (None, MASK))
        return tuple(dict.fromkeys(column for column in named if column is not None))

    @property
    def masks(self) -> int:
        """How often it has ``{mask}``."""
        return sum(column == MASK for _, column in self._parts)

    @property
    def joint(self) -> str:
        """What separates an answer: nothing after a new line or an opening mark, otherwise a space."""
        end = self.text.partition(f"{{{MASK}}}")[0][-1:] if self.masks else self.text[-1:]
        return "" if end in _NO_SPACE_AFTER else " "

    def key(self, row: Mapping[str, Any]) -> str:
        """The prompt for ``row`` as a text; raises as ``pieces``."""
        return "".join(piece.text for piece in self.pieces(row))

    def pieces(self, row: Mapping[str, Any], mask: str = "") -> list[Piece]:
        """The parts of the prompt for ``row``; the mask token is ``mask``.

        Raises:
            RowError: for a column that is missing or not a text.
        """
        pieces = []
        for literal, column in self._parts:
            if literal:
                pieces.append(Piece(literal))
            if column == MASK:
                pieces.append(Piece(mask))
            elif column is not None:
                pieces.append(Piece(_written(row, column), column))
        return pieces


def text_of(row: Mapping[str, Any], column: str) -> str:
    """The text in ``column`` of ``row``.

    Raises:
        RowError: if it is missing, empty or not a text.
    """
    if column not in row:
        raise RowError(f"no column {column!r}; it has {', '.join(row)}: rename the one that it should be")
    value = row[column]
    if isinstance(value, list) and value and all(isinstance(each, dict) and "role" in each for each in value):
        raise RowError(
            f"{column} is a list of messages, not a text; put the whole conversation into a column 'messages'"
        )
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"{column} is {value!r}, not a text; correct or remove the row")
    return value


def _written(row: Mapping[str, Any], column: str) -> str:
    """As ``text_of``; numbers are written out."""
    value = row.get(column)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number else text_of(row, column)
