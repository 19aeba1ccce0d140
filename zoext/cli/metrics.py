"""The metrics of a run as JSON lines: one for each step, one for each evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zoext.cli import json_lines
from zoext.cli.errors import UserError
from zoext.cli.json_lines import Record


def read(path: Path) -> list[Record]:
    """The records of ``path``, each of which is of a step or of an evaluation."""
    return json_lines.read(path, _is_record)


def damage(path: Path, *, evaluated: bool) -> str | None:
    """What is wrong with the metrics of a run, which was ``evaluated`` at least once; None if nothing is."""
    try:
        records = read(path)
    except UserError as error:
        return str(error).partition(";")[0]  # then comes a remedy, which here is another one
    if evaluated and not any("valid_loss" in record for record in records):
        return f"{path}: lacks what was recorded"
    return None


def _is_record(value: Any) -> bool:
    """Whether ``value`` is of a step or of an evaluation, with all the numbers that belong to it."""
    if not isinstance(value, dict):
        return False
    errors = [f"{name}_error" for name in ("valid_loss", "valid_accuracy") if name in value]
    known = [name for name in ("loss", "valid_loss", "valid_accuracy", "seconds") if name in value]
    return all(type(value.get(name)) is int for name in ("step", "forwards")) and all(
        type(value.get(name)) in (int, float) for name in known + errors
    )


def keep_until(path: Path, step: int) -> None:
    """Drops what was recorded after ``step``: a run that resumes there records it again."""
    json_lines.replace(path, [record for record in read(path) if record["step"] <= step])


def append(path: Path, records: list[Record]) -> None:
    """Adds ``records``: a checkpoint that is on the disk must find its metrics there."""
    json_lines.append(path, records)
