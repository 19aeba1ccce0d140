"""A model, its tokenizer, its objective, and the examples for training and evaluation."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zoext.cli._errors import UserError
from zoext.cli._problem import data, models
from zoext.cli._problem.data import Table
from zoext.cli._problem.models import Base
from zoext.cli._problem.objectives import Classification, Example, NextToken, Objective
from zoext.cli._settings import Settings


@dataclass(frozen=True)
class Problem:
    """``model`` and ``tokenizer`` are those of transformers; ``base`` says how the model was built."""

    title: str
    base: Base
    model: Any
    tokenizer: Any
    objective: Objective
    train: tuple[Example, ...]
    valid: tuple[Example, ...]

    def fingerprint(self) -> str:
        """A hash of the tokenised examples: a resumed run must see the same ones."""
        digest = hashlib.sha256()
        for part in (self.train, self.valid):
            for example in part:
                digest.update(repr((example.tokens, example.label)).encode())
            digest.update(b"\n")
        return digest.hexdigest()


def load(settings: Settings) -> Problem:
    """Reads the data and loads the model that ``settings`` name."""
    if settings.model is None or settings.data is None:
        given, missing = ("--data", "--model") if settings.model is None else ("--model", "--data")
        raise UserError(f"{given} needs {missing} as well; leave both out for the demo")
    train, valid = _tables(settings.data, settings)
    task = settings.task or ("causal-lm" if train.labels is None else "classification")
    title = f"{settings.model} on {train.source} ({task})"
    labels = _check_labels(train, valid) if task == "classification" else None
    names = () if labels is None else models.classes_of(settings.model, labels)
    base = Base(False, task, names, settings.dtype, settings.seed)
    model, tokenizer = models.load(settings.model, base)
    length = _length(settings, model, tokenizer)
    if labels is None:
        objective: Objective = NextToken(tokenizer.pad_token_id)
        parts = [_predictable(tokenize(tokenizer, part, length), part) for part in (train, valid)]
    else:
        objective = Classification(tokenizer.pad_token_id)
        parts = [tokenize(tokenizer, part, length, names) for part in (train, valid)]
    return Problem(title, base, model, tokenizer, objective, parts[0], parts[1])


def _tables(source: str, settings: Settings) -> tuple[Table, Table]:
    train, valid = data.read(source)
    if settings.valid_data is not None:
        valid, _ = data.read(settings.valid_data)
    if valid is None:
        if settings.task == "causal-lm":  # labels are not used
            train = dataclasses.replace(train, labels=None)
        train, valid = data.hold_out(train, settings.validation_fraction, settings.seed)
    return train, valid


def _check_labels(train: Table, valid: Table) -> set[data.Label]:
    if train.labels is None or valid.labels is None:
        source = train.source if train.labels is None else valid.source
        raise UserError(f"{source}: classification needs a column 'label'; for plain text: --task causal-lm")
    labels = set(train.labels)
    if len(labels) < 2:
        raise UserError(
            f"{train.source}: every label is {train.labels[0]!r}; classification needs two classes"
        )
    unknown = sorted(set(map(str, valid.labels)) - set(map(str, labels)))
    if unknown:
        raise UserError(
            f"{valid.source}: label {unknown[0]!r} does not occur in {train.source}; "
            "remove its examples there or add some to train on"
        )
    return labels


def _length(settings: Settings, model: Any, tokenizer: Any) -> int:
    """The number of tokens that a text is truncated to, at most the number of positions of the model."""
    positions = getattr(model.config, "max_position_embeddings", settings.max_length)
    return min(settings.max_length, int(positions), int(tokenizer.model_max_length))


def tokenize(
    tokenizer: Any, table: Table, max_length: int, classes: Sequence[str] | None = None
) -> tuple[Example, ...]:
    """Tokenises the texts, truncated to ``max_length``, and maps labels to the indices of ``classes``."""
    encoded = models.encode(tokenizer, table.texts, truncation=True, max_length=max_length)
    rows: Sequence[list[int]] = encoded["input_ids"]
    if classes is None or table.labels is None:
        return tuple(Example(tuple(row)) for row in rows)
    indices = {name: index for index, name in enumerate(classes)}
    return tuple(
        Example(tuple(row), indices[str(label)]) for row, label in zip(rows, table.labels, strict=True)
    )


def _predictable(examples: tuple[Example, ...], table: Table) -> tuple[Example, ...]:
    """Keeps the examples with at least two tokens: the first token is not predicted."""
    kept = tuple(example for example in examples if len(example.tokens) > 1)
    if not kept:
        raise UserError(
            f"{table.source}: every text has fewer than two tokens, so there is nothing to predict"
        )
    return kept
