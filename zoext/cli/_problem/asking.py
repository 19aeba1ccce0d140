"""A tuned model and the rows that it is asked about, for evaluation and prediction."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zoext.cli._errors import UserError, warn
from zoext.cli._problem import choosing, data, demo, models
from zoext.cli._problem.data import LABEL, Table
from zoext.cli._problem.holding_out import hold_out
from zoext.cli._problem.problem import examples_of, keys_of, opened, read, what_is_asked, what_is_cut
from zoext.cli._settings import Settings
from zoext.tasks import CLASSIFIER, Encoder, Example, Objective, Task


@dataclass(frozen=True)
class Asked:
    """A model, the task that it is asked, and the rows with their examples.

    ``names`` are those of the answers by their indices, if these have names.
    """

    title: str
    model: Any
    task: Task
    encoder: Encoder
    objective: Objective
    table: Table
    examples: tuple[Example, ...]
    names: tuple[str, ...]


def load(settings: Settings, device: torch.device, *, answered: bool, split: bool = False) -> Asked:
    """Loads the model and the rows that ``settings`` name: the held-out part of the data if it has one.

    Args:
        answered: whether the right answers are read, which losses need.
        split: whether data without such a part are split as a run splits them; otherwise all rows are taken.
    """
    if settings.model is None:
        raise UserError("needs the folder of a run, or --model and --data")
    train, valid = read(settings, answered=answered)
    table = train if valid is None else valid
    name, kind, config = what_is_asked(settings, table, answered)
    if answered and name in choosing.LABELLED:
        table = choosing.labelled(table)
    classes = _classes(settings, name, table, config)
    task = choosing.task_of(name, settings, table, kind, classes)
    if valid is None and split:
        label = LABEL if name in choosing.LABELLED else None
        keys = keys_of(task, table)
        _, table = hold_out(table, settings.validation_fraction, settings.seed, keys, label)
    base, model, encoder, _ = opened(settings, name, kind, classes)
    examples = examples_of(task, table, encoder, answered=answered)
    if (cut := what_is_cut(encoder, len(examples))) is not None:
        warn(cut)
    return Asked(
        f"{settings.model} on {table.source} ({name})",
        model.to(device),
        task,
        encoder,
        task.objective(encoder),
        table,
        examples,
        tuple(getattr(task, "names", base.classes)),
    )


def _classes(settings: Settings, name: str, table: Table, config: Any) -> tuple[str, ...]:
    """The labels by the indices of the answers: of the model's head, of the words, or those that occur."""
    if name == "classification":
        if models.kind_of(config, name) != CLASSIFIER:
            raise UserError(
                f"--model {settings.model}: has no classification head; give the model of a run, or --task "
                "label-words"
            )
        names = tuple(str(config.id2label[index]) for index in range(config.num_labels))
        labels = choosing.labels_of(table) if LABEL in table.columns else set()
        are_indices = all(isinstance(label, int) and 0 <= label < len(names) for label in labels)
        if labels and are_indices and not {str(label) for label in labels} <= set(names):
            return tuple(str(index) for index in range(len(names)))
        return names
    if name != "label-words" or settings.label_words:
        return tuple(settings.label_words)
    if LABEL not in table.columns:
        raise UserError(
            f"{table.source}: no column 'label' that would tell the labels; give --label-words "
            "LABEL=WORD,..., or the folder of a run"
        )
    return models.classes_of(config, choosing.labels_of(data.with_labels(table)))


def load_demo(settings: Settings, model: Path, device: torch.device) -> Asked:
    """The model of a run of the demo, and the held-out examples of the demo."""
    problem = demo.load(settings)
    tuned, _ = models.load(str(model), dataclasses.replace(problem.base, demo=False))
    return Asked(
        problem.title,
        tuned.to(device),
        demo.TASK,
        Encoder(problem.tokenizer, CLASSIFIER, settings.max_length),
        problem.objective,
        demo.held_out(),
        problem.valid,
        problem.names,
    )


def model_of(folder: Path) -> Path:
    """The model that the run in ``folder`` has written.

    Raises:
        UserError: if it has not yet.
    """
    model = folder / "model"
    if not model.is_dir():
        raise UserError(
            f"{folder}: has no model yet; let the run end, or make one of an earlier step with zoext replay"
        )
    return model
