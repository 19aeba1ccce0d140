"""A benchmark's figures as a table for people and as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from zoext._benchmarking.machine import environment
from zoext._benchmarking.timing import Spread


@dataclass(frozen=True, slots=True)
class Bar:
    """What a figure must reach, as promised in the project's contract."""

    relation: str
    value: float

    def met_by(self, value: float) -> bool:
        return value >= self.value if self.relation == ">=" else value <= self.value

    def __str__(self) -> str:
        return f"{self.relation} {self.value:.4g}"


def at_least(value: float) -> Bar:
    return Bar(">=", value)


def at_most(value: float) -> Bar:
    return Bar("<=", value)


@dataclass(frozen=True, slots=True)
class _Figure:
    name: str
    spread: Spread
    unit: str
    bar: Bar | None

    def row(self) -> tuple[str, ...]:
        bar = f"{self.bar} {'met' if self.bar.met_by(self.spread.median) else 'MISSED'}" if self.bar else ""
        numbers = (self.spread.median, min(self.spread.rounds), max(self.spread.rounds))
        return (self.name, *(f"{number:.2f}" for number in numbers), self.unit, bar)

    def as_json(self) -> dict[str, Any]:
        rounds = self.spread.rounds
        figure: dict[str, Any] = {
            "median": self.spread.median,
            "minimum": min(rounds),
            "maximum": max(rounds),
            "rounds": list(rounds),
            "unit": self.unit,
        }
        if self.bar:
            figure["bar"] = str(self.bar)
            figure["met"] = self.bar.met_by(self.spread.median)
        return figure


@dataclass
class Report:
    """The figures of one program, in the order in which they were added.

    ``settings`` is what the program was asked to do: plain data. Its ``device``, if there is one, is
    described as well.
    """

    title: str
    settings: dict[str, Any]
    _figures: list[_Figure] = field(default_factory=list)
    _notes: list[str] = field(default_factory=list)

    def add_times(self, label: str, times: Mapping[str, Spread]) -> None:
        """Adds seconds, shown in milliseconds."""
        for name, spread in times.items():
            milliseconds = Spread(tuple(1e3 * second for second in spread.rounds))
            self.add(f"{label}: {name}", milliseconds, "ms")

    def add(self, name: str, spread: Spread, unit: str, bar: Bar | None = None) -> None:
        """Adds a figure; a ratio has the unit "x".

        Raises:
            ValueError: if there is a figure of that name, which the JSON would lose.
        """
        if any(figure.name == name for figure in self._figures):
            raise ValueError(f"there is a figure called {name!r} already")
        self._figures.append(_Figure(name, spread, unit, bar))

    def note(self, text: str) -> None:
        """Adds a line of text, which stands below the table: what was left out, and why."""
        self._notes.append(text)

    def __str__(self) -> str:
        head = ("", "median", "min", "max", "", "bar")
        rows = [head, *(figure.row() for figure in self._figures)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [self.title, ", ".join(f"{key} {value}" for key, value in self._environment().items()), ""]
        for row in rows:
            cells = zip((str.ljust, *3 * [str.rjust], str.ljust, str.ljust), row, widths, strict=True)
            lines.append("  ".join(align(cell, width) for align, cell, width in cells).rstrip())
        return "\n".join([*lines, *([""] if self._notes else []), *self._notes])

    def finish(self, path: Path | None) -> None:
        """Prints the table, and writes the JSON to ``path`` unless it is None."""
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
