"""Settings as TOML: what a run writes as config.toml, and what ``--config`` reads."""

from __future__ import annotations

import argparse
import dataclasses
import json
import tomllib
from pathlib import Path
from typing import Any

from zoext.cli._errors import UserError
from zoext.cli._settings import AddArguments, CommonSettings, as_option

NAME = "config.toml"

#: Options that say where to write, not how to run.
_NO_SETTINGS = frozenset({"config", "out", "resume", "overwrite", "quiet", "json", "help"})


def text_of(settings: CommonSettings) -> str:
    """The settings as TOML, by the names of their options; those that are not set are left out."""
    lines = [
        f"{name.replace('_', '-')} = {_toml(value)}"
        for name, value in dataclasses.asdict(settings).items()
        if value is not None
    ]
    return "\n".join(["# All settings of a run; --config starts another one with them.", *lines, ""])


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        items = ", ".join(f"{_toml(name)} = {_toml(item)}" for name, item in value.items())
        return f"{{{items}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    # The strings of JSON are strings of TOML, except for DEL, which TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def read(path: Path, add_arguments: AddArguments) -> dict[str, Any]:
    """The settings in a TOML file, as if they were given as options.

    Raises:
        UserError: for a file that is not TOML, a name that is no option, or a value out of range.
    """
    try:
        record = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"--config {path}: not TOML: {error}") from None
    parser = argparse.ArgumentParser(exit_on_error=False, add_help=False, allow_abbrev=False)
    add_arguments(parser)
    names = {name: f"--{name.replace('_', '-')}" for name in record}
    given = [
        as_option(names[name], value) for name, value in record.items() if value is not False and value != {}
    ]
    try:
        found, unknown = parser.parse_known_args(given)
    except argparse.ArgumentError as error:
        raise UserError(f"--config {path}: {error}") from None
    for name, option in names.items():
        if name in _NO_SETTINGS or any(each.partition("=")[0] == option for each in unknown):
            raise UserError(f"--config {path}: {name}: no such setting; --help lists the options")
    return vars(found)
