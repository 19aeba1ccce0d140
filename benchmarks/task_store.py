"""Finished runs as lines of JSON, so that a comparison continues after whatever ended it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from task_plan import Record, Run, Start

from zoext.cli._errors import UserError
from zoext.cli._runs import records

_KINDS: dict[str, type[Run] | type[Start]] = {"run": Run, "start": Start}


class Store:
    """``runs.jsonl`` of a folder: the settings that all runs share, and then a line for each finished run.

    Raises:
        UserError: if the folder has runs with other settings.
    """

    def __init__(self, folder: Path, settings: Record) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "runs.jsonl"
        lines = records.read(self._path, _is_known, remedy="remove it")
        self.done: dict[Run | Start, Record] = {}
        if lines:
            _check_same(folder, lines[0], settings)
            self.done = {_identity(line): line for line in lines[1:]}
        else:
            lines = [{"record": "settings", **settings}]
        # Not without need: another process may be appending to it while this one only shows a table.
        if not self._path.exists() or not self._path.read_bytes().endswith(b"\n"):
            records.replace(self._path, lines)

    def add(self, identity: Run | Start, result: Record) -> Record:
        """Appends what is finished; returns its line."""
        kind = "run" if isinstance(identity, Run) else "start"
        line = {"record": kind, **identity._asdict(), **result}
        records.append(self._path, [line])
        self.done[identity] = line
        return line


def _identity(line: Record) -> Run | Start:
    kind = _KINDS[line["record"]]
    return kind(**{name: line[name] for name in kind._fields})


def _is_known(line: Any) -> bool:
    if not isinstance(line, dict) or line.get("record") not in ("settings", *_KINDS):
        return False
    kind = _KINDS.get(line["record"])
    return kind is None or all(name in line for name in kind._fields)


def _check_same(folder: Path, found: Record, settings: Record) -> None:
    for name, value in settings.items():
        if found.get(name) != value:
            option = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{option} {value}: the runs in {folder} have {found.get(name)}; give that, or another --out"
            )
