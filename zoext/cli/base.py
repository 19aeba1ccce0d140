"""How the model that a run begins with is built from its files."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from zoext.cli.settings import DTYPES, TASKS
from zoext.trajectory import Fields, Header

#: The name under which the notes of a trajectory have it.
NOTE = "zoext finetune"


@dataclass(frozen=True)
class Base:
    """What the files of a model do not say, and the run that began with it chose.

    Attributes:
        demo: whether it is the model of the demo.
        task: one of ``TASKS``; which head the model has.
        classes: their names, in the order of the outputs of a classifier.
        dtype: of the weights.
        seed: of the weights of a head that the files do not have.
    """

    demo: bool
    task: str
    classes: tuple[str, ...]
    dtype: str
    seed: int

    def notes(self) -> dict[str, Any]:
        """Plain data for the header of a trajectory."""
        return {NOTE: {**dataclasses.asdict(self), "classes": list(self.classes)}}


def of_header(header: Header, where: str) -> Base | None:
    """What a run wrote into the notes of its trajectory; None for notes of anybody else.

    Raises:
        TrajectoryError: for notes that no run wrote.
    """
    if NOTE not in header.notes:
        return None
    fields = Fields(header.notes[NOTE], f"{where}: notes")
    task, dtype = fields.text("task"), fields.text("dtype")
    for name, value, known in (("task", task, TASKS), ("dtype", dtype, DTYPES)):
        if value not in known:
            raise fields.error(f"{name} must be one of {', '.join(known)}, not {value[:20]!r}")
    classes = fields.list_of("classes", lambda name: isinstance(name, str), "names")
    if task == "classification":
        _check_classes(classes, header, fields)
    seed = fields.integer("seed", -(2**63), 2**64 - 1)
    return Base(fields.flag("demo"), task, tuple(classes), dtype, seed)


def _check_classes(classes: list[str], header: Header, fields: Fields) -> None:
    """Before a model is made with as many outputs: it may not fit into memory."""
    if len(set(classes)) < len(classes):
        raise fields.error("classes must be distinct names")
    if not any(parameter.shape[:1] == (len(classes),) for parameter in header.parameters):
        raise fields.error(f"classes has {len(classes)} names, and no parameter of the run has as many rows")
