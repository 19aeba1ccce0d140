"""The raw records of a comparison, one JSON object per line.

    {"record": "method", "method", "forwards_a_step", "extra_bytes"}
    {"record": "evaluation", RUN, "step", "forwards", "seconds", "training_loss", HELD-OUT}
    {"record": "end", RUN, "step", "forwards", "seconds", "diverged"}

RUN is "phase" ("sweep" or "final"), "method", "lr", "schedule" (which earlier versions did not write: it was
constant), "seed" and "budget" (forward passes). "extra_bytes" is the peak memory of two steps minus that of a
forward pass. "forwards" and "seconds" count the steps of the run so far, without evaluations.
"training_loss" is the mean since the previous evaluation, null at the start.
HELD-OUT is "selection_loss", "report_loss" and, for classifiers, "selection_accuracy" and "report_accuracy",
each with its standard error over examples as "..._error". "diverged" is null or the reason. A run without its
"end" was interrupted and is ignored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from zoext.cli._runs import records
from zoext.cli._runs.records import Record
from zoext.cli._schedules import CONSTANT


class Choice(NamedTuple):
    """What a sweep chooses."""

    lr: float
    schedule: str


@dataclass(frozen=True)
class Run:
    """The identity of a run. The phase that it was made for is not part of it."""

    method: str
    lr: float
    schedule: str
    seed: int
    budget: int

    @classmethod
    def of(cls, record: Record) -> Run:
        """The run that a record belongs to."""
        schedule = record.get("schedule", CONSTANT)
        return cls(record["method"], record["lr"], schedule, record["seed"], record["budget"])

    def record(self, phase: str) -> Record:
        """The fields RUN of its records."""
        return {
            "phase": phase,
            "method": self.method,
            "lr": self.lr,
            "schedule": self.schedule,
            "seed": self.seed,
            "budget": self.budget,
        }


@dataclass(frozen=True)
class Outcome:
    """The evaluations of a finished run, and the record of its end."""

    evaluations: tuple[Record, ...]
    end: Record

    @property
    def diverged(self) -> bool:
        return self.end["diverged"] is not None

    @property
    def selection_loss(self) -> float:
        """The loss that selects a learning rate; infinite if the run diverged."""
        return math.inf if self.diverged else float(self.evaluations[-1]["selection_loss"])


Outcomes = dict[Run, Outcome]


def read(path: Path) -> list[Record]:
    """The records of ``path`` without those of interrupted runs."""
    found = records.read(path, _is_record)
    ended = {Run.of(record) for record in found if record["record"] == "end"}
    return [record for record in found if record["record"] == "method" or Run.of(record) in ended]


def outcomes(raw: Iterable[Record]) -> Outcomes:
    """The finished runs."""
    evaluations: dict[Run, list[Record]] = {}
    done: Outcomes = {}
    for record in raw:
        if record["record"] == "evaluation":
            evaluations.setdefault(Run.of(record), []).append(record)
        elif record["record"] == "end":
            run = Run.of(record)
            done[run] = Outcome(tuple(evaluations.get(run, ())), record)
    return done


def costs(raw: Iterable[Record]) -> dict[str, Record]:
    """The records of kind "method", by method."""
    return {record["method"]: record for record in raw if record["record"] == "method"}


_NUMBERS = {
    "method": ("forwards_a_step", "extra_bytes"),
    "evaluation": (
        *("lr", "seed", "budget", "step", "forwards", "seconds"),
        *("selection_loss", "selection_loss_error", "report_loss", "report_loss_error"),
    ),
    "end": ("lr", "seed", "budget", "step", "forwards", "seconds"),
}


def _is_record(value: Any) -> bool:
    """Whether ``value`` is a record of one of the three kinds and has every field that is read."""
    if not isinstance(value, dict) or value.get("record") not in _NUMBERS:
        return False
    kind = value["record"]
    numbers = _NUMBERS[kind]
    if kind == "evaluation" and "report_accuracy" in value:
        numbers += ("report_accuracy", "report_accuracy_error")
    return (
        isinstance(value.get("method"), str)
        and isinstance(value.get("schedule", CONSTANT), str)
        and all(type(value.get(name)) in (int, float) for name in numbers)
        and (kind != "end" or isinstance(value.get("diverged", 0), str | None))
    )
