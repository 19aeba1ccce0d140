"""A folder that a command writes into: it knows its own files and spares all others."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Generic

from zoext._runtime import atomic
from zoext.cli.errors import UserError, writing
from zoext.cli.objectives import Example
from zoext.cli.settings import CommonSettings
from zoext.cli.stored_settings import OtherVersionError, SettingsT

PLACES = ("model", "data", "valid_data")


class OutputFolder(ABC, Generic[SettingsT]):
    """Paths below ``--out``: a note of the settings, which makes it the command's own, and the results.

    It is ``claim.claimed`` before anything is looked at: what is found holds until the command ends.
    """

    def __init__(self, path: Path, note: str, results: Iterable[str]) -> None:
        self.path = path
        self.note = path / note
        self._results = tuple(path / name for name in results)

    @abstractmethod
    def _parse(self, record: Any) -> SettingsT:
        """Settings from the plain data in the note. Raises a ValueError where they are not."""

    @property
    def _written(self) -> tuple[Path, ...]:
        return self.note, *self._results

    @property
    def holds_run(self) -> bool:
        return self.note.is_file()

    def read_note(self) -> tuple[SettingsT, str]:
        """The settings of the run, and the fingerprint of what it began with."""
        if not self.holds_run:
            raise UserError(f"--out {self.path}: holds no run to resume; leave out --resume to start one")
        try:
            record = json.loads(self.note.read_text(encoding="utf-8"))
            settings, data = self._parse(record["settings"]), str(record["data"])
            checksum = record["checksum"]
        except OtherVersionError as error:
            raise UserError(
                f"{self.note}: is of another version of zoext, it {error}; resume with that version, or "
                "start again with --overwrite"
            ) from None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{self.note}: damaged ({error!r}); start again with --overwrite") from None
        if checksum != _checksum(settings, data):
            raise UserError(
                f"{self.note}: was changed, and the run had other settings; put back what it was (only where "
                f"{', '.join(PLACES)} are may change), or start again with --overwrite"
            )
        return settings, data

    def check_spares_inputs(self, settings: CommonSettings) -> None:
        """Raises a UserError if a run here would replace the model or the data that it reads."""
        for field in PLACES:
            given = getattr(settings, field)
            if given is None or not Path(given).exists():  # the demo's, or a name on the hub
                continue
            real = Path(given).resolve()
            for ours in self._written:
                # samefile and no comparison of names: case may not matter, and links may lead here.
                if ours.exists() and any(ours.samefile(path) for path in (real, *real.parents)):
                    raise UserError(
                        f"--{field.replace('_', '-')} {given}: the run would replace {ours}, where this is; "
                        "give another --out, or copy it elsewhere"
                    )

    def check_free(self, overwrite: bool) -> None:
        """Raises a UserError if a new run here would replace anything but, on ``overwrite``, a run."""
        if self.holds_run:
            if not overwrite:
                raise UserError(
                    f"--out {self.path}: holds a run already; give --resume, --overwrite or another folder"
                )
            return
        for path in self._written:
            if path.exists() or path.is_symlink():
                raise UserError(
                    f"--out {self.path}: {path} is there, but no {self.note.name} of a run that wrote it; "
                    "move it away or give another folder"
                )

    def start(self, settings: SettingsT, data: str, overwrite: bool) -> None:
        """Notes the settings of a new run; on ``overwrite`` the one that was here is removed.

        Raises:
            UserError: as ``check_free``, for what came here since.
        """
        self.check_free(overwrite)  # a file system may have no locks, and files may be anybody's
        with writing(self.path):
            self.remove_leftovers()
            if self.holds_run:
                self._remove_results()
        self.write_note(settings, data)

    def _remove_results(self) -> None:
        # The note stays until it is replaced: without it, what a killed process leaves would be no run's.
        for path in self._results:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def write_note(self, settings: SettingsT, data: str) -> None:
        record = {
            "settings": dataclasses.asdict(settings),
            "data": data,
            "checksum": _checksum(settings, data),
        }
        with writing(self.note):
            atomic.write_text(self.note, json.dumps(record, indent=1) + "\n")

    def remove_leftovers(self) -> None:
        for path in self._written:
            atomic.remove_leftovers(path)


def _checksum(settings: CommonSettings, data: str) -> str:
    """Of all that makes the run; model and data may have been moved."""
    record = {name: value for name, value in dataclasses.asdict(settings).items() if name not in PLACES}
    return hashlib.sha256(json.dumps([record, data], sort_keys=True).encode()).hexdigest()


def fingerprint(*parts: Iterable[Example]) -> str:
    """A hash of the tokenised examples: a run that is resumed must see the same."""
    digest = hashlib.sha256()
    for part in parts:
        for example in part:
            digest.update(repr((example.tokens, example.label)).encode())
        digest.update(b"\n")
    return digest.hexdigest()
