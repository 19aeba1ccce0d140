"""Reports a benchmark's figures as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from zoext._benchmarking.machine import environment
from zoext._benchmarking.timing import Measurement


@dataclass(frozen=True, slots=True)
class Target:
    """The value that a figure should reach."""

    relation: str
    value: float

    def met_by(self, value: float) -> bool:
        return value >= self.value if self.relation == ">=" else value <= self.value

    def __str__(self) -> str:
        return f"{self.relation} {self.value:.4g}"


def at_least(value: float) -> Target:
    """A lower bound."""
    return Target(">=", value)


def at_most(value: float) -> Target:
    """An upper bound."""
    return Target("<=", value)


@dataclass(frozen=True, slots=True)
class _Figure:
    name: str
    measured: Measurement
    unit: str
    target: Target | None

    def row(self) -> tuple[str, ...]:
        target = (
            f"{self.target} {'met' if self.target.met_by(self.measured.median) else 'MISSED'}"
            if self.target
            else ""
        )
        numbers = (self.measured.median, min(self.measured.rounds), max(self.measured.rounds))
        return (self.name, *(f"{number:.2f}" for number in numbers), self.unit, target)

    def as_json(self) -> dict[str, Any]:
        rounds = self.measured.rounds
        figure: dict[str, Any] = {
            "median": self.measured.median,
            "minimum": min(rounds),
            "maximum": max(rounds),
            "rounds": list(rounds),
            "unit": self.unit,
        }
        if self.target:
            figure["target"] = str(self.target)
            figure["met"] = self.target.met_by(self.measured.median)
        return figure


@dataclass
class Report:
    """The figures of one program, in the order in which they were added.

    ``settings`` are the options of the program as plain data. If they name a ``device``, the report describes
    it.
    """

    title: str
    settings: dict[str, Any]
    _figures: list[_Figure] = field(default_factory=list)
    _notes: list[str] = field(default_factory=list)

    def add_times(self, label: str, times: Mapping[str, Measurement]) -> None:
        """Adds times in seconds, which are shown in milliseconds."""
        for name, measured in times.items():
            milliseconds = Measurement(tuple(1e3 * second for second in measured.rounds))
            self.add(f"{label}: {name}", milliseconds, "ms")

    def add(self, name: str, measured: Measurement, unit: str, target: Target | None = None) -> None:
        """Adds a figure; a ratio has the unit "x".

        Raises:
            ValueError: if there already is a figure of that name, which the JSON would lose.
        """
        if any(figure.name == name for figure in self._figures):
            raise ValueError(f"there is already a figure called {name!r}")
        self._figures.append(_Figure(name, measured, unit, target))

    def note(self, text: str) -> None:
        """Adds a line of text below the table, such as what was skipped and why."""
        self._notes.append(text)

    def __str__(self) -> str:
        head = ("", "median", "min", "max", "", "target")
        rows = [head, *(figure.row() for figure in self._figures)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [self.title, ", ".join(f"{key} {value}" for key, value in self._environment().items()), ""]
        for row in rows:
            cells = zip((str.ljust, *3 * [str.rjust], str.ljust, str.ljust), row, widths, strict=True)
            lines.append("  ".join(align(cell, width) for align, cell, width in cells).rstrip())
        return "\n".join([*lines, *([""] if self._notes else []), *self._notes])

    def finish(self, path: Path | None) -> None:
        """Prints the table, and writes the JSON to ``path`` unless that is None."""
        print(self)
        if path is None:
            return
        document = {
            "title": self.title,
            "settings": self.settings,
            "environment": self._environment(),
            "figures": {figure.name: figure.as_json() for figure in self._figures},
            "notes": self._notes,
        }
        path.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n")

    def _environment(self) -> dict[str, Any]:
        return environment(torch.device(self.settings.get("device", "cpu")))
