"""The raw records of a comparison, one JSON object a line.

    {"record": "method", "method", "forwards_a_step", "extra_bytes"}
    {"record": "evaluation", RUN, "step", "forwards", "seconds", "training_loss", HELD-OUT}
    {"record": "end", RUN, "step", "forwards", "seconds", "diverged"}

RUN is "phase" ("sweep" or "final"), "method", "lr", "seed" and "budget" (forwards). "extra_bytes" is the
peak of memory of two steps beyond that of a forward. "forwards" and "seconds" are those of the run's
steps so far, evaluations left out. "training_loss" is the mean since the evaluation before, null at the
start. HELD-OUT is "selection_loss", "report_loss" and, where there is one, "selection_accuracy" and
"report_accuracy", each with its standard error over examples as "..._error". "diverged" is null or says
why. A run without its "end" was cut short and counts for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoext.cli import json_lines
from zoext.cli.json_lines import Record


@dataclass(frozen=True)
class Run:
    """What tells one run from another; the phase it was made for does not."""

    method: str
    lr: float
    seed: int
    budget: int

    @classmethod
    def of(cls, record: Record) -> Run:
        return cls(record["method"], record["lr"], record["seed"], record["budget"])

    def record(self, phase: str) -> Record:
        return {
            "phase": phase,
            "method": self.method,
            "lr": self.lr,
            "seed": self.seed,
            "budget": self.budget,
        }


@dataclass(frozen=True)
class Outcome:
    """A run that is done: its evaluations, and the record of its end."""

    evaluations: tuple[Record, ...]
    end: Record

    @property
    def diverged(self) -> bool:
        return self.end["diverged"] is not None

    @property
    def selection_loss(self) -> float:
        """What a learning rate is chosen by; infinite where the run diverged."""
        return math.inf if self.diverged else float(self.evaluations[-1]["selection_loss"])


Outcomes = dict[Run, Outcome]


def read(path: Path) -> list[Record]:
    """The records of ``path`` but those of runs that were cut short."""
    records = json_lines.read(path, _is_record)
    ended = {Run.of(record) for record in records if record["record"] == "end"}
    return [record for record in records if record["record"] == "method" or Run.of(record) in ended]


def outcomes(records: Iterable[Record]) -> Outcomes:
    """The runs that are done."""
    evaluations: dict[Run, list[Record]] = {}
    done: Outcomes = {}
    for record in records:
        if record["record"] == "evaluation":
            evaluations.setdefault(Run.of(record), []).append(record)
        elif record["record"] == "end":
            run = Run.of(record)
            done[run] = Outcome(tuple(evaluations.get(run, ())), record)
    return done


def costs(records: Iterable[Record]) -> dict[str, Record]:
    """The records of kind "method", by its name."""
    return {record["method"]: record for record in records if record["record"] == "method"}


_NUMBERS = {
    "method": ("forwards_a_step", "extra_bytes"),
    "evaluation": (
        *("lr", "seed", "budget", "step", "forwards", "seconds"),
        *("selection_loss", "selection_loss_error", "report_loss", "report_loss_error"),
    ),
    "end": ("lr", "seed", "budget", "step", "forwards", "seconds"),
}


def _is_record(value: Any) -> bool:
    """Whether ``value`` is of one of the three kinds, with all that is read of it."""
    if not isinstance(value, dict) or value.get("record") not in _NUMBERS:
        return False
    kind = value["record"]
    numbers = _NUMBERS[kind]
    if kind == "evaluation" and "report_accuracy" in value:
        numbers += ("report_accuracy", "report_accuracy_error")
    return (
        isinstance(value.get("method"), str)
        and all(type(value.get(name)) in (int, float) for name in numbers)
        and (kind != "end" or isinstance(value.get("diverged", 0), str | None))
    )
