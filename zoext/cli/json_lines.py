"""Files of JSON lines, to which a run adds records as it goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from zoext._runtime import atomic
from zoext.cli.errors import UserError, writing

Record = dict[str, Any]


def read(path: Path, accepts: Callable[[Any], bool]) -> list[Record]:
    """The whole lines of ``path``; a last line that a killed process left torn is dropped.

    Raises:
        UserError: for a line that is no JSON or that ``accepts`` refuses.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    records = []
    for number, line in enumerate(lines[:-1], 1):  # after the last newline: nothing, or a torn line
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not accepts(record):
            raise UserError(f"{path}: line {number} is damaged; start again with --overwrite")
        records.append(record)
    return records


def replace(path: Path, records: Iterable[Record]) -> None:
    """Makes ``records`` all that ``path`` holds, in one step."""
    with writing(path):
        atomic.write_text(path, _text(records))


def append(path: Path, records: Iterable[Record]) -> None:
    """Adds ``records`` and waits until they are on the disk."""
    with writing(path):
        is_new = not path.exists()
        with path.open("a", encoding="utf-8") as file:
            file.write(_text(records))
        atomic.sync(path)
        if is_new:
            atomic.sync(path.absolute().parent)


def _text(records: Iterable[Record]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)
