"""The folder of a run: its settings, metrics, checkpoints, curve and final model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from zoext.cli import atomic
from zoext.cli.errors import UserError
from zoext.cli.objectives import Example
from zoext.cli.settings import Settings


class RunFolder:
    """Paths below ``--out``."""

    def __init__(self, path: Path) -> None:
        if path.exists() and not path.is_dir():
            raise UserError(f"--out {path}: is a file; give a folder")
        self.path = path
        self.run = path / "run.json"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.curve = path / "curve.png"
        self.model = path / "model"

    @property
    def holds_run(self) -> bool:
        return self.run.is_file()

    def read_settings(self) -> tuple[Settings, str]:
        """The settings of the run, and the fingerprint of its data."""
        if not self.holds_run:
            raise UserError(f"--out {self.path}: holds no run to resume; leave out --resume to start one")
        try:
            record = json.loads(self.run.read_text(encoding="utf-8"))
            return Settings(**record["settings"]), str(record["data"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.run}: damaged ({error!r}); start again with --overwrite") from None

    def start(self, settings: Settings, data: str) -> None:
        """Removes the run that was here, if there was one, and notes the settings of the new one."""
        self.path.mkdir(parents=True, exist_ok=True)
        for path in (self.run, self.metrics, self.curve):
            path.unlink(missing_ok=True)
        for path in (self.checkpoints, self.model):
            shutil.rmtree(path, ignore_errors=True)
        self.note(settings, data)

    def note(self, settings: Settings, data: str) -> None:
        record = {"settings": dataclasses.asdict(settings), "data": data}
        atomic.write_text(self.run, json.dumps(record, indent=1) + "\n")

    def remove_leftovers(self) -> None:
        for folder in (self.path, self.checkpoints):
            atomic.remove_leftovers(folder)


def unused(parent: Path, name: str) -> Path:
    """The first of ``name-1``, ``name-2``, ... that is not there yet."""
    number = 1
    while (parent / f"{name}-{number}").exists():
        number += 1
    return parent / f"{name}-{number}"


def fingerprint(*parts: Iterable[Example]) -> str:
    """A hash of the tokenised examples: a run that is resumed must see the same."""
    digest = hashlib.sha256()
    for part in parts:
        for example in part:
            digest.update(repr((example.tokens, example.label)).encode())
        digest.update(b"\n")
    return digest.hexdigest()
