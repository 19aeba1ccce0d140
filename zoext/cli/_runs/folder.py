"""Output folders: the files that a command writes below ``--out``, and the protection of all others."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Generic

from zoext._runtime import atomic
from zoext.cli import _config
from zoext.cli._errors import UserError, writing
from zoext.cli._runs import checkpoint
from zoext.cli._runs.claim import make_unused
from zoext.cli._settings import AddArguments, CommonSettings, OtherVersionError, Settings, SettingsT, parse

#: Settings that are paths or names of inputs, which may move without changing the run.
_PLACES = ("model", "data", "valid_data")


class OutputFolder(Generic[SettingsT]):
    """A note with the settings, which marks the folder as the command's own, and the results.

    The folder must be ``claim.claimed`` first, so that nothing changes between a check and its use.

    Args:
        path: the folder.
        note: the name of the note.
        results: the names of everything else that the command writes, in the order of their removal.
        kind: the class of the settings.
        add_arguments: adds the command's options, which validate the stored settings.
        launch: identifies the processes that write here over their restarts; see ``Ranks``.
    """

    def __init__(
        self,
        path: Path,
        note: str,
        results: Iterable[str],
        kind: type[SettingsT],
        add_arguments: AddArguments,
        launch: str | None,
    ) -> None:
        self.path = path
        self.note = path / note
        self._config = path / _config.NAME
        self._results = (self._config, *(path / name for name in results))
        self._kind = kind
        self._add_arguments = add_arguments
        self._launch = launch

    @property
    def _written(self) -> tuple[Path, ...]:
        return self.note, *self._results

    @property
    def holds_run(self) -> bool:
        """Whether a command has written here."""
        return self.note.is_file()

    @property
    def is_restarted(self) -> bool:
        """Whether the run here was begun or resumed by this command before torchrun restarted it."""
        try:
            note = json.loads(self.note.read_text(encoding="utf-8"))
            return self._launch is not None and note["launch"] == self._launch
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return False

    def read_note(self) -> tuple[SettingsT, str]:
        """The settings of the run, and the fingerprint of its data."""
        if not self.holds_run:
            raise UserError(f"--out {self.path}: holds no run to resume; omit --resume to start one")
        try:
            record = json.loads(self.note.read_text(encoding="utf-8"))
            settings = parse(record["settings"], self._kind, self._add_arguments)
            data, checksum = str(record["data"]), record["checksum"]
        except OtherVersionError as error:
            raise UserError(
                f"{self.note}: was written by another version of zoext, it {error}; resume with that "
                "version, or start again with --overwrite"
            ) from None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{self.note}: corrupted ({error!r}); start again with --overwrite") from None
        if checksum != _checksum(record["settings"], data):
            raise UserError(
                f"{self.note}: was edited, and the run had other settings; restore it (only the paths "
                f"{', '.join(_PLACES)} may change), or start again with --overwrite"
            )
        return settings, data

    def check_spares_inputs(self, settings: CommonSettings) -> None:
        """Raises a UserError if a run here would replace the model or the data that it reads."""
        for field in _PLACES:
            given = getattr(settings, field)
            if given is None or not Path(given).exists():  # the demo's, or a name on the hub
                continue
            real = Path(given).resolve()
            for ours in self._written:
                # samefile instead of comparing names, because of links and case-insensitive file systems.
                if ours.exists() and any(ours.samefile(path) for path in (real, *real.parents)):
                    raise UserError(
                        f"--{field.replace('_', '-')} {given}: the run would replace {ours}, which contains "
                        "it; give another --out, or copy it elsewhere"
                    )

    def check_free(self, overwrite: bool) -> None:
        """Raises a UserError if a new run here would replace anything but, on ``overwrite``, a run."""
        if self.holds_run:
            if not overwrite:
                raise UserError(
                    f"--out {self.path}: already holds a run; give --resume, --overwrite or another folder"
                )
            return
        for path in self._written:
            if path.exists() or path.is_symlink():
                raise UserError(
                    f"--out {self.path}: {path} exists, but no {self.note.name} of a run that wrote it; "
                    "move it away or give another folder"
                )

    def start(self, settings: SettingsT, data: str, overwrite: bool) -> None:
        """Writes the note of a new run; on ``overwrite`` removes the previous run.

        Raises:
            UserError: as ``check_free``, for files that appeared since.
        """
        self.check_free(overwrite)  # again: a file system may have no locks, and other programs take none
        with writing(self.path):
            self.remove_leftovers()
            if self.holds_run:
                self._remove_results()
        self.write_note(settings, data)

    def _remove_results(self) -> None:
        # The note stays until it is replaced: if this process is killed, it marks the remaining files.
        for path in self._results:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def write_note(self, settings: SettingsT, data: str) -> None:
        """Stores the settings and the fingerprint ``data``."""
        stored = json.loads(json.dumps(dataclasses.asdict(settings)))
        record = {"settings": stored, "data": data, "checksum": _checksum(stored, data)}
        if self._launch is not None:
            record["launch"] = self._launch
        with writing(self.note):
            atomic.write_text(self.note, json.dumps(record, indent=1) + "\n")
        with writing(self._config):
            atomic.write_text(self._config, _config.text_of(settings))

    def remove_leftovers(self) -> None:
        """Removes the temporary files of killed processes."""
        for path in self._written:
            atomic.remove_leftovers(path)


class RunFolder(OutputFolder[Settings]):
    """The folder of ``zoext finetune``.

    ``best`` holds weights that the trajectory does not lead to; ``base`` is the model that the trajectory
    begins with, if the trajectory does not begin with the run; ``corrupted`` holds trajectories and metrics
    that could not be continued. ``of_trajectory`` are the trajectory, which is last, and the files that
    belong to it.
    """

    def __init__(self, path: Path, add_arguments: AddArguments, launch: str | None = None) -> None:
        # In the order of their removal: frames must not outlive their trajectory.
        of_trajectory = (
            "trajectory.base",
            "trajectory.frames.cut",
            "trajectory.jsonl.cut",
            "trajectory.frames",
            "trajectory.jsonl",
        )
        results = (
            "checkpoints",
            "best",
            "model",
            "metrics.jsonl",
            "first-evaluation.json",
            "metrics.csv",
            "tensorboard",
            "wandb",
            "curve.png",
            "corrupted",
            *of_trajectory,
        )
        super().__init__(path, "run.json", results, Settings, add_arguments, launch)
        self.checkpoints, self.best, self.model = path / "checkpoints", path / "best", path / "model"
        self.metrics, self.first_evaluation = path / "metrics.jsonl", path / "first-evaluation.json"
        self.csv, self.curve = path / "metrics.csv", path / "curve.png"
        self.corrupted = path / "corrupted"
        self.of_trajectory = tuple(path / name for name in of_trajectory)
        self.base, *_, self.frames, self.trajectory = self.of_trajectory

    def set_aside(self, name: str, paths: Iterable[Path]) -> Path | None:
        """Moves the existing ``paths`` to a new folder ``corrupted/NAME-N``; returns that, or None."""
        there = [path for path in paths if path.exists() or path.is_symlink()]
        if not there:
            return None
        kept = make_unused(self.corrupted, name)
        for path in there:
            path.rename(kept / path.name)
        for changed in (kept, self.corrupted, self.path):
            atomic.sync(changed)
        return kept

    def remove_leftovers(self) -> None:
        super().remove_leftovers()
        for path in (self.checkpoints, self.best):
            atomic.remove_leftovers_of(path, checkpoint.NAME)


def _checksum(stored: dict[str, Any], data: str) -> str:
    """A hash of everything that determines the run; model and data may move."""
    record = {name: value for name, value in stored.items() if name not in _PLACES}
    return hashlib.sha256(json.dumps([record, data], sort_keys=True).encode()).hexdigest()
