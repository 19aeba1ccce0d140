"""Real tasks: their files, their prompts, and the examples that a seed trains on, validates on and tests on.

The held-out file is cut once into two halves, whatever the seed. One half chooses learning rates and
schedules, and only the other is reported, so no seed reports a row that another has chosen by.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from zoext.cli._errors import UserError
from zoext.cli._problem.data import Row, read_file
from zoext.tasks import Encoder, Example, LabelWords, Objective

#: Label words alone follow the text.
WITHOUT_PROMPT = "{text}"


@dataclass(frozen=True)
class Question:
    """A data set of texts with labels, in ``NAME_train.csv`` and ``NAME_test.csv``, and how it is asked."""

    template: str
    words: Mapping[str, str]

    def task(self, *, prompted: bool) -> LabelWords:
        return LabelWords(self.template if prompted else WITHOUT_PROMPT, self.words)


# The prompt of SST-2 is that of the pages, that of TREC the best of a dozen on 96 training rows.
QUESTIONS = {
    "sst2": Question("Review: {text}\nSentiment:", {"negative": " negative", "positive": " positive"}),
    "trec": Question(
        "Question: {text}\nType:",
        {
            "description": " description",
            "entity": " entity",
            "abbreviation": " abbreviation",
            "person": " person",
            "location": " location",
            "number": " number",
        },
    ),
}


@dataclass(frozen=True)
class Rows:
    """The rows of a data set: all that may train, and two halves of what is held out."""

    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    test: tuple[Row, ...]


@dataclass(frozen=True)
class Examples:
    """What one seed uses of a data set, and the objective that scores it."""

    objective: Objective
    train: list[Example]
    validation: list[Example]
    test: list[Example]


def read(folder: Path, name: str) -> Rows:
    """The rows of the data set ``name``; a text that trains is not held out.

    Raises:
        UserError: for a missing file, or one that cannot be read.
    """
    train, all_held_out = (_labelled(folder / f"{name}_{part}.csv") for part in ("train", "test"))
    known = {row["text"] for row in train}
    held_out = {row["text"]: row for row in all_held_out if row["text"] not in known}
    shuffled = _shuffled(list(held_out.values()), "halves")
    middle = len(shuffled) // 2
    return Rows(train, tuple(shuffled[:middle]), tuple(shuffled[middle:]))


def _labelled(path: Path) -> tuple[Row, ...]:
    table = read_file(path)
    if missing := [name for name in ("text", "label") if name not in table.columns]:
        raise UserError(f"{path}: no column {missing[0]!r}; it has {', '.join(table.columns)}")
    return table.rows


def draw(rows: Rows, question: Question, seed: int, per_class: int, held_out: int) -> Rows:
    """What ``seed`` uses: ``per_class`` training rows of each label, and half of ``held_out`` from each half.

    Raises:
        UserError: if there are fewer.
    """
    train: list[Row] = []
    for label in question.words:
        of_label = [row for row in _shuffled(rows.train, f"train {seed}") if row["label"] == label]
        if len(of_label) < per_class:
            raise UserError(f"--per-class {per_class}: only {len(of_label)} rows have the label {label!r}")
        train += of_label[:per_class]
    half = held_out // 2
    smaller = min(len(rows.validation), len(rows.test))
    if half > smaller:
        raise UserError(
            f"--held-out {held_out}: each half has only {smaller} rows; give {2 * smaller} or fewer"
        )
    return Rows(
        tuple(_shuffled(train, f"order {seed}")),
        tuple(_shuffled(rows.validation, f"validation {seed}")[:half]),
        tuple(_shuffled(rows.test, f"test {seed}")[:half]),
    )


def encode(drawn: Rows, task: LabelWords, encoder: Encoder) -> Examples:
    """The examples of rows under a prompt."""
    parts = (task.examples(part, encoder) for part in (drawn.train, drawn.validation, drawn.test))
    return Examples(task.objective(encoder), *parts)


def _shuffled(rows: Sequence[Row], salt: str) -> list[Row]:
    """Sorted by a hash of the text, which is the same order in every version of Python."""

    def digest(row: Row) -> bytes:
        return hashlib.blake2b(f"{salt} {row['text']}".encode(), digest_size=16).digest()

    return sorted(rows, key=digest)
