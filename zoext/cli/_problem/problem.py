"""A model, its tokenizer, its objective, and the examples for training and evaluation."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from zoext.cli._errors import UserError
from zoext.cli._problem import adapters, choosing, data, models
from zoext.cli._problem.data import LABEL, Table
from zoext.cli._problem.holding_out import hold_out
from zoext.cli._problem.models import Base
from zoext.cli._settings import Settings
from zoext.tasks import PRESETS, Encoder, Example, LabelWords, Objective, Preset, RowError, Task


@dataclass(frozen=True)
class Problem:
    """``model`` and ``tokenizer`` are those of transformers; ``base`` says how the model was built.

    ``names`` are those of the answers, in the order of their indices, if they have names; ``notes`` are what
    a user should know about the data; ``settled`` are settings that data and model have decided.
    """

    title: str
    base: Base
    model: Any
    tokenizer: Any
    objective: Objective
    train: tuple[Example, ...]
    valid: tuple[Example, ...]
    names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    settled: Mapping[str, Any] = field(default_factory=dict)

    def fingerprint(self) -> str:
        """A hash of the tokenised examples: a resumed run must see the same ones.

        With adapters also of the weights that they adapt, which no checkpoint has.
        """
        digest = hashlib.sha256()
        for part in (self.train, self.valid):
            for example in part:
                digest.update(_identity(example).encode())
            digest.update(b"\n")
        if adapters.is_adapted(self.model):
            digest.update(adapters.digest_of_base(self.model).encode())
        return digest.hexdigest()


def _identity(example: Example) -> str:
    """All that determines the losses of an example; of one row as earlier versions had it."""
    (row, *others) = example.rows
    if others or row.labels not in ((), row.tokens):
        rows = [(each.tokens, each.labels) for each in example.rows]
        return repr((rows, example.label, example.also_right, example.references))
    return repr((row.tokens, example.label))


def load(settings: Settings) -> Problem:
    """Reads the data and loads the model that ``settings`` name."""
    if settings.model is None:
        raise UserError("--data needs --model as well; leave both out for the demo")
    train, valid = read(settings)
    name, kind, config = what_is_asked(settings, train)
    classes: tuple[str, ...] = ()
    if name in choosing.LABELLED:
        train, valid = choosing.labelled(train), None if valid is None else choosing.labelled(valid)
        classes = models.classes_of(config, choosing.labels_of(train))
    task = choosing.task_of(name, settings, train, kind, classes)
    if valid is None:
        label = LABEL if name in choosing.LABELLED else None
        keys = keys_of(task, train)
        train, valid = hold_out(train, settings.validation_fraction, settings.seed, keys, label)
    if name in choosing.LABELLED:
        _check_labels(train, valid)
    base, model, encoder, tokenizer = opened(settings, name, kind, classes)
    examples, held_out = (examples_of(task, part, encoder) for part in (train, valid))
    if isinstance(task, LabelWords) and len({example.label for example in examples}) < 2:
        raise UserError(f"{train.source}: every row has the same label; training needs two")
    return Problem(
        f"{settings.model} on {train.source} ({name})",
        base,
        model,
        tokenizer,
        task.objective(encoder),
        examples,
        held_out,
        names=tuple(getattr(task, "names", base.classes)),
        notes=(
            *choosing.what_is_left_out(settings, name, train),
            *_notes(task, config, name, encoder, len(examples) + len(held_out)),
        ),
        settled=choosing.settled(name, task, settings, classes),
    )


def what_is_asked(settings: Settings, table: Table, answered: bool = True) -> tuple[str, str, Any]:
    """The kind of the data, the kind of the model as it is asked, and its configuration."""
    config = models.config_of(str(settings.model))
    kind = models.kind_of(config, settings.task)
    name = choosing.name_of(settings, table, kind, answered)
    return name, kind if name == "classification" else models.kind_of(config, name), config


def opened(
    settings: Settings, name: str, kind: str, classes: tuple[str, ...]
) -> tuple[Base, Any, Encoder, Any]:
    """How the model is built, the model, what encodes for it, and its tokenizer."""
    names = classes if name == "classification" else ()
    base = Base(False, choosing.head_of(name, kind), names, settings.dtype, settings.seed, settings.lora)
    model, tokenizer = models.load(str(settings.model), base)
    positions = _positions(model)
    length = min(settings.max_length, positions or settings.max_length, int(tokenizer.model_max_length))
    return base, model, Encoder(tokenizer, kind, length, positions), tokenizer


def read(settings: Settings, *, answered: bool = True) -> tuple[Table, Table | None]:
    """The tables of training and held-out rows, with the columns that the task reads.

    Rows that are not ``answered`` need no column with the right answers.
    """
    preset = PRESETS.get(settings.task or "")
    if settings.data is None and preset is None:
        raise UserError("--model needs --data as well; leave both out for the demo")
    source = preset.source if preset and settings.data is None else (settings.data or "",)
    configuration = source[1] if len(source) > 1 else None
    train, valid = data.read(source[0], configuration, with_names=preset is None)
    if settings.valid_data is not None:
        valid, _ = data.read(settings.valid_data, with_names=preset is None, option="--valid-data")
    if preset is None:
        parts = [
            choosing.with_columns(part, settings, answered) for part in (train, valid) if part is not None
        ]
    else:
        needed = [name for name in preset.columns if answered or name != preset.answer]
        for part in (train, valid):
            if part is not None and any(name not in part.columns for name in needed):
                raise UserError(
                    f"{train.source}: --task {settings.task} needs the columns {', '.join(needed)}; "
                    f"it has {', '.join(train.columns)}"
                )
        parts = [_arranged(part, preset) for part in (train, valid) if part is not None]
    return parts[0], parts[1] if len(parts) > 1 else None


def _arranged(table: Table, preset: Preset) -> Table:
    rows = []
    for number, row in enumerate(table.rows, 1):
        try:
            rows.append(preset.arrange(row))
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise UserError(
                f"{table.source}: row {number}: is not of the form of {'/'.join(preset.source)} "
                f"({type(error).__name__}: {error}); correct or remove it"
            ) from None
    return dataclasses.replace(table, rows=tuple(rows))


def _check_labels(train: Table, valid: Table) -> None:
    labels = choosing.labels_of(train)
    if len(labels) < 2:
        raise UserError(
            f"{train.source}: every label is {next(iter(labels))!r}; classification needs two classes"
        )
    unknown = sorted(set(map(str, choosing.labels_of(valid))) - set(map(str, labels)))
    if unknown:
        raise UserError(
            f"{valid.source}: label {unknown[0]!r} does not occur in {train.source}; "
            "remove its examples there or add some to train on"
        )


def _positions(model: Any) -> int | None:
    """The number of positions of the model; None if it has no limit."""
    found = getattr(model.config, "max_position_embeddings", None)
    return int(found) if found else None


def keys_of(task: Task, table: Table) -> list[str]:
    """The inputs of the rows."""
    keys = []
    for number, row in enumerate(table.rows, 1):
        try:
            keys.append(task.key(row))
        except RowError as error:
            raise UserError(f"{table.source}: row {number}: {error}") from None
    return keys


def examples_of(task: Task, table: Table, encoder: Encoder, *, answered: bool = True) -> tuple[Example, ...]:
    """The examples of a table; with ``answered`` false, rows whose answers are not known."""
    try:
        return tuple(task.examples(table.rows, encoder, answered=answered))
    except RowError as error:
        raise UserError(f"{table.source}: {error}") from None
    except ValueError as error:
        raise UserError(choosing.in_terms_of_options(str(error))) from None


def _notes(task: Task, config: Any, name: str, encoder: Encoder, count: int) -> Sequence[str]:
    notes = []
    if described := choosing.described(task):
        notes.append(described)
    if choosing.words_are_numbers(task):
        notes.append(
            "the answers are numbers, which tell a language model nothing; --label-words LABEL=WORD,... "
            "names the classes"
        )
    if name == "classification" and not models.has_head(config, getattr(task, "classes", ())):
        notes.append(
            "the model gets a classification head with random weights, which takes many steps to train; a "
            "prompt starts from what a language model knows: --task label-words, with --template and "
            "--label-words"
        )
    if (cut := what_is_cut(encoder, count)) is not None:
        notes.append(cut)
    return notes


def what_is_cut(encoder: Encoder, count: int) -> str | None:
    """What to tell of examples, out of ``count``, that were too long; None if all fit."""
    cuts = encoder.cuts
    if not cuts.rows:
        return None
    lost = f"{100 * cuts.lost / cuts.tokens:.0f} % of their tokens"
    if cuts.for_room:
        return (
            f"{cuts.rows} of {count} examples lose their {cuts.part}, {lost}: they are longer than "
            f"{encoder.max_length} tokens, or leave no room for --max-new-tokens in the {encoder.positions} "
            "positions of the model"
        )
    return (
        f"{cuts.rows} of {count} examples are longer than {encoder.max_length} tokens and lose their "
        f"{cuts.part}, {lost}; --max-length keeps more"
    )
