"""The metrics of a run as JSON lines: one for each step, one for each evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from zoext.cli import atomic
from zoext.cli.errors import UserError

Record = dict[str, Any]


def read(path: Path) -> list[Record]:
    """The whole lines of ``path``; a last line that a killed process left torn is dropped."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    try:
        return [json.loads(line) for line in lines[:-1]]  # after the last newline: nothing, or a torn line
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: damaged ({error}); start again with --overwrite") from None


def keep_until(path: Path, step: int) -> None:
    """Drops what was recorded after ``step``: a run that resumes there records it again."""
    kept = [record for record in read(path) if record["step"] <= step]
    atomic.write_text(path, "".join(_line(record) for record in kept))


def append(path: Path, records: list[Record]) -> None:
    """Adds ``records``, each of which has a "step"."""
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(_line(record) for record in records))
    atomic.sync(path)  # a checkpoint that is on the disk must find its metrics there


def _line(record: Record) -> str:
    return json.dumps(record) + "\n"
