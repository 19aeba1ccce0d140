"""A model, its tokenizer, and the examples it is to learn from and be judged by."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zoext.cli import data, models
from zoext.cli.base import Base
from zoext.cli.data import Table
from zoext.cli.errors import UserError
from zoext.cli.objectives import Classification, Example, NextToken, Objective
from zoext.cli.settings import Settings


@dataclass(frozen=True)
class Problem:
    """What there is to learn. ``model`` and ``tokenizer`` are those of transformers."""

    title: str
    base: Base
    model: Any
    tokenizer: Any
    objective: Objective
    train: tuple[Example, ...]
    valid: tuple[Example, ...]


def load(settings: Settings) -> Problem:
    """Reads the data and loads the model that ``settings`` name."""
    if settings.model is None or settings.data is None:
        given, missing = ("--data", "--model") if settings.model is None else ("--model", "--data")
        raise UserError(f"{given} needs {missing} beside it; leave both out for the demo")
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
        if settings.task == "causal-lm":  # its labels, if any, are no classes to learn
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
    """How many tokens of a text are read: no more than the model has positions for."""
    positions = getattr(model.config, "max_position_embeddings", settings.max_length)
    return min(settings.max_length, int(positions), int(tokenizer.model_max_length))


def tokenize(
    tokenizer: Any, table: Table, max_length: int, classes: Sequence[str] | None = None
) -> tuple[Example, ...]:
    """Token ids once for the whole run, cut at ``max_length``, with the index of each label's class."""
    encoded = models.encode(tokenizer, table.texts, truncation=True, max_length=max_length)
    rows: Sequence[list[int]] = encoded["input_ids"]
    if classes is None or table.labels is None:
        return tuple(Example(tuple(row)) for row in rows)
    indices = {name: index for index, name in enumerate(classes)}
    return tuple(
        Example(tuple(row), indices[str(label)]) for row, label in zip(rows, table.labels, strict=True)
    )


def _predictable(examples: tuple[Example, ...], table: Table) -> tuple[Example, ...]:
    """Those with a token that has one before it."""
    kept = tuple(example for example in examples if len(example.tokens) > 1)
    if not kept:
        raise UserError(f"{table.source}: no text of two tokens or more, so there is nothing to predict")
    return kept
