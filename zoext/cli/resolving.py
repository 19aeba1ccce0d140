"""From the options of a command to its folder and its settings: of a new run, or of one to go on with."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoext.cli.errors import UserError
from zoext.cli.output_folder import OutputFolder
from zoext.cli.stored_settings import SettingsT


@dataclass(frozen=True)
class Request:
    """The options, those of ``options.add_output`` apart from the settings that are ``given``."""

    given: dict[str, Any]
    out: Path | None = None
    resume: bool = False
    overwrite: bool = False
    quiet: bool = False

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Request:
        """Options that exclude each other raise a UserError."""
        given = vars(arguments).copy()
        names = [field.name for field in dataclasses.fields(cls)]
        request = cls(**{name: given.pop(name) for name in names if name in given}, given=given)
        if request.resume and request.out is None:
            raise UserError("--resume needs --out DIR")
        if request.resume and request.overwrite:
            raise UserError("--resume and --overwrite exclude each other")
        return request

    @property
    def is_demo(self) -> bool:
        return "model" not in self.given and "data" not in self.given

    def settings(
        self, folder: OutputFolder[SettingsT], usual: SettingsT, changeable: Collection[str]
    ) -> SettingsT:
        """The settings of the run, checked against what is in ``folder``; nothing is written yet.

        Raises:
            UserError: if the run would replace what it must not; if there is none to resume, or it has
                another value of what is given and not ``changeable``.
        """
        if self.resume:
            return self._resumed(folder, changeable)
        settings = dataclasses.replace(usual, **self.given)
        folder.check_spares_inputs(settings)
        folder.check_free(self.overwrite)
        return settings

    def _resumed(self, folder: OutputFolder[SettingsT], changeable: Collection[str]) -> SettingsT:
        settings, _ = folder.read_note()
        folder.check_spares_inputs(settings)
        for name, value in self.given.items():
            if name not in changeable and value != getattr(settings, name):
                option = "--" + name.replace("_", "-")
                raise UserError(
                    f"{option} {value}: the run in {folder.path} has {getattr(settings, name)}; "
                    f"leave {option} out to resume it"
                )
        return dataclasses.replace(settings, **self.given)
