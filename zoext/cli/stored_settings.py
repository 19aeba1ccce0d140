"""Settings as the plain data of a JSON file, and back."""

from __future__ import annotations

import argparse
import types
from collections.abc import Callable
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from zoext.cli.settings import CommonSettings

SettingsT = TypeVar("SettingsT", bound=CommonSettings)


class OtherVersionError(ValueError):
    """The file has other fields than this version writes; says which."""


def parse(
    record: Any, kind: type[SettingsT], add_arguments: Callable[[argparse.ArgumentParser], None]
) -> SettingsT:
    """Settings from the fields that a file holds, checked as if they were given as options.

    Raises:
        OtherVersionError: for a field that is absent or unknown.
        ValueError: for one of another type or out of range.
    """
    wanted = get_type_hints(kind)
    if not isinstance(record, dict):
        raise ValueError("settings: not an object")
    for what, names in (("lacks", wanted.keys() - record.keys()), ("has", record.keys() - wanted.keys())):
        if names:
            raise OtherVersionError(f"{what} {', '.join(sorted(names))}")
    for name, value in record.items():
        if type(value) not in _types_in_json(wanted[name]):
            raise ValueError(f"{name} is {value!r}")
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_arguments(parser)
    given = [
        _as_option(f"--{name.replace('_', '-')}", value)
        for name, value in record.items()
        if value is not None and value is not False and value != {}
    ]
    try:
        return kind(**vars(parser.parse_args(given)))
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None


def _types_in_json(hint: Any) -> set[type]:
    alternatives = get_args(hint) if get_origin(hint) is types.UnionType else (hint,)
    plain = {get_origin(alternative) or alternative for alternative in alternatives}
    return {list if alternative is tuple else alternative for alternative in plain}


def _as_option(option: str, value: Any) -> str:
    if value is True:
        return option
    if isinstance(value, list):
        value = ",".join(map(str, value))
    if isinstance(value, dict):
        value = ",".join(f"{name}={item}" for name, item in value.items())
    return f"{option}={value}"
