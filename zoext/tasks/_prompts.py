"""Prompts before they are tokenised, and how they are cut where they are too long."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from zoext.tasks._templates import Piece

_Made = TypeVar("_Made")


@dataclass(frozen=True)
class Prompt:
    """The pieces of a prompt, and the answers that may follow it.

    ``ends`` says whether an end-of-sequence token follows an answer; ``room`` is the number of tokens that
    are to be generated after the prompt.
    """

    pieces: Sequence[Piece]
    answers: Sequence[str] = ()
    ends: bool = False
    room: int = 0

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)


@dataclass
class Cuts:
    """How many rows were cut, and the tokens that they had and lost.

    ``for_room`` of them were cut to leave room for what is to be generated. What they lost is their ``part``.
    """

    rows: int = 0
    tokens: int = 0
    lost: int = 0
    for_room: int = 0
    part: str = "end"

    def count(self, before: int, after: int, *, for_room: bool = False, part: str = "end") -> None:
        """Counts one row that was cut."""
        self.part = part
        self.rows += 1
        self.for_room += for_room
        self.tokens += before
        self.lost += before - after


def longest_fit(
    prompt: Prompt, make: Callable[[Prompt], _Made], fits: Callable[[_Made], bool]
) -> _Made | None:
    """What ``make`` makes of the prompt with the longest beginning of its longest column that fits.

    None if nothing fits, even without that column.
    """
    columns = [index for index, piece in enumerate(prompt.pieces) if piece.column is not None]
    if not columns:
        return None
    longest = max(columns, key=lambda index: len(prompt.pieces[index].text))
    text, column = prompt.pieces[longest].text, prompt.pieces[longest].column
    before, after = prompt.pieces[:longest], prompt.pieces[longest + 1 :]
    best, low, high = None, 0, len(text)
    while low < high:  # the number of tokens nearly grows with the text
        middle = (low + high) // 2
        shorter = Piece(text[:middle].rstrip(), column)
        made = make(replace(prompt, pieces=[*before, shorter, *after]))
        if fits(made):
            best, low = made, middle + 1
        else:
            high = middle
    return best
