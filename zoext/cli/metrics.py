"""The metrics of a run as JSON lines: one for each step, one for each evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from zoext.cli import atomic
from zoext.cli.errors import UserError, writing

Record = dict[str, Any]


def read(path: Path) -> list[Record]:
    """The whole lines of ``path``; a last line that a killed process left torn is dropped."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    records = []
    for number, line in enumerate(lines[:-1], 1):  # after the last newline: nothing, or a torn line
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if not _is_record(record):
            raise UserError(f"{path}: line {number} is damaged; start again with --overwrite")
        records.append(record)
    return records


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
    kept = [record for record in read(path) if record["step"] <= step]
    with writing(path):
        atomic.write_text(path, "".join(_line(record) for record in kept))


def append(path: Path, records: list[Record]) -> None:
    """Adds ``records``, each of which has a "step"."""
    with writing(path):
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(_line(record) for record in records))
        atomic.sync(path)  # a checkpoint that is on the disk must find its metrics there


def _line(record: Record) -> str:
    return json.dumps(record) + "\n"
