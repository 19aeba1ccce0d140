"""JSON lines that a command appends to while it runs, the metrics of a run among them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from zoext._runtime import atomic
from zoext.cli._errors import UserError, writing

Record = dict[str, Any]


#: For the user of a command that would continue the run.
_START_AGAIN = "start again with --overwrite"


def read(path: Path, accepts: Callable[[Any], bool], remedy: str = _START_AGAIN) -> list[Record]:
    """The complete lines of ``path``, without the partial last line that a killed process may leave.

    Raises:
        UserError: for a line that is not JSON or that ``accepts`` rejects; it names the ``remedy``.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    records = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is empty or partial
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not accepts(record):
            raise UserError(f"{path}: line {number} is corrupted; {remedy}")
        records.append(record)
    return records


def replace(path: Path, records: Iterable[Record]) -> None:
    """Atomically replaces the content of ``path`` with ``records``."""
    with writing(path):
        atomic.write_text(path, _text(records))


def append(path: Path, records: Iterable[Record]) -> None:
    """Appends ``records`` and waits until they are on the disk: no checkpoint may precede its metrics."""
    with writing(path):
        is_new = not path.exists()
        with path.open("a", encoding="utf-8") as file:
            file.write(_text(records))
        atomic.sync(path)
        if is_new:
            atomic.sync(path.absolute().parent)


def _text(records: Iterable[Record]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def read_metrics(path: Path, remedy: str = _START_AGAIN) -> list[Record]:
    """The metrics of a run: a record per step and per evaluation. See ``read``."""
    return read(path, _is_metric, remedy)


def _is_metric(value: Any) -> bool:
    """Whether ``value`` is the record of a step or an evaluation and has all its numbers."""
    if not isinstance(value, dict):
        return False
    errors = [f"{name}_error" for name in ("valid_loss", "valid_accuracy") if name in value]
    known = [name for name in ("loss", "valid_loss", "valid_accuracy", "seconds") if name in value]
    return all(type(value.get(name)) is int for name in ("step", "forwards")) and all(
        type(value.get(name)) in (int, float) for name in known + errors
    )
