"""A benchmark's figures as a table for people and as JSON for programs."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from zoext import _C
from zoext.benchmarking.timing import Spread


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

    ``settings`` is what the program was asked to do: plain data.
    """

    title: str
    settings: dict[str, Any]
    _figures: list[_Figure] = field(default_factory=list)

    def add_times(self, label: str, times: Mapping[str, Spread]) -> None:
        """Adds seconds, shown in milliseconds."""
        for name, spread in times.items():
            milliseconds = Spread(tuple(1e3 * second for second in spread.rounds))
            self.add(f"{label}: {name}", milliseconds, "ms")

    def add(self, name: str, spread: Spread, unit: str, bar: Bar | None = None) -> None:
        """Adds a figure; a ratio has the unit "x"."""
        self._figures.append(_Figure(name, spread, unit, bar))

    def __str__(self) -> str:
        head = ("", "median", "min", "max", "", "bar")
        rows = [head, *(figure.row() for figure in self._figures)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [self.title, ", ".join(f"{key} {value}" for key, value in environment().items()), ""]
        for row in rows:
            cells = zip((str.ljust, *3 * [str.rjust], str.ljust, str.ljust), row, widths, strict=True)
            lines.append("  ".join(align(cell, width) for align, cell, width in cells).rstrip())
        return "\n".join(lines)

    def finish(self, path: Path | None) -> None:
        """Prints the table, and writes the JSON to ``path`` unless it is None."""
        print(self)
        if path is None:
            return
        document = {
            "title": self.title,
            "settings": self.settings,
            "environment": environment(),
            "figures": {figure.name: figure.as_json() for figure in self._figures},
        }
        path.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n")


def environment() -> dict[str, Any]:
    """What the figures depend on besides the settings."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "instruction set": _C.instruction_set(),
        "compiler": _C.compiler(),
    }


def _processor() -> str:
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
