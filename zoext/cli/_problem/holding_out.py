"""Holds out a part of a table for evaluation."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

from zoext.cli._errors import UserError
from zoext.cli._problem.data import Table


def hold_out(
    examples: Table, fraction: float, seed: int, keys: Sequence[str], label: str | None = None
) -> tuple[Table, Table]:
    """Holds out ``fraction`` of the distinct inputs; rows with the same key stay together.

    At least one input of each label, if there is a column with labels, remains for training, so fewer may be
    held out.
    """
    # Sorting by a hash gives the same split on every platform and version.
    order = sorted(set(keys), key=lambda text: _digest(seed, text))
    if len(order) < 2:
        raise UserError(f"{examples.source}: too few distinct texts to hold some out; give --valid-data")
    labels = None if label is None else [row.get(label) for row in examples.rows]
    held = _held_out(keys, labels, order, min(max(1, round(fraction * len(order))), len(order) - 1))
    if not held:
        raise UserError(
            f"{examples.source}: no text can be held out without leaving a label with no training example; "
            "add examples or give --valid-data"
        )
    parts: tuple[list[int], list[int]] = ([], [])
    for i, text in enumerate(keys):
        parts[text in held].append(i)
    return examples.take(parts[0]), examples.take(parts[1])


def _held_out(
    keys: Sequence[str], labels: Sequence[Any] | None, order: Sequence[str], count: int
) -> set[str]:
    """The first ``count`` keys in ``order`` that are not the only remaining one of one of their labels."""
    if labels is None:
        return set(order[:count])
    of_key: dict[str, set[Any]] = {text: set() for text in order}
    for text, label in zip(keys, labels, strict=True):
        of_key[text].add(label)
    in_training = Counter(label for theirs in of_key.values() for label in theirs)
    held: set[str] = set()
    for text in order:
        if len(held) < count and all(in_training[label] > 1 for label in of_key[text]):
            held.add(text)
            in_training.subtract(of_key[text])
    return held


def _digest(seed: int, text: str) -> bytes:
    return hashlib.blake2b(f"{seed}\0{text}".encode(), digest_size=8).digest()
