"""Typed access to the fields of JSON records that may hold anything."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

_SHOWN = 60  # characters of a rejected value that an error message quotes


class TrajectoryError(ValueError):
    """A trajectory that is corrupted or does not match. Nothing has been changed."""


class VersionError(TrajectoryError):
    """A trajectory in a version of the format, or of the noise field, that this zoext does not read."""


class Fields:
    """A JSON object whose fields are checked as they are read.

    Every getter raises a ``TrajectoryError`` that names the field if it is missing or has the wrong type.

    Args:
        record: the parsed JSON value.
        where: the location that error messages begin with, such as ``run.jsonl: line 3``.
    """

    def __init__(self, record: Any, where: str) -> None:
        self.where = where
        if not isinstance(record, Mapping):
            raise self.error(f"must be an object, not {shown(record)}")
        self._record = record

    def error(self, problem: str) -> TrajectoryError:
        return TrajectoryError(f"{self.where}: {problem}")

    def has(self, name: str) -> bool:
        return name in self._record

    def any(self, name: str) -> Any:
        if name not in self._record:
            raise self.error(f"has no field {name!r}")
        return self._record[name]

    def _field(self, name: str, is_valid: Callable[[Any], bool], kind: str) -> Any:
        value = self.any(name)
        if not is_valid(value):
            raise self.error(f"{name} must be {kind}, not {shown(value)}")
        return value

    def integer(self, name: str, low: int, high: int = 2**63 - 1) -> int:
        value: int = self._field(name, lambda v: is_integer(v, low, high), f"an integer from {low} to {high}")
        return value

    def number_or_null(self, name: str) -> float:
        """A finite number, or NaN for null: the format writes null for numbers that are not finite."""
        value = self._field(name, lambda v: v is None or is_number(v), "a finite number or null")
        return math.nan if value is None else float(value)

    def flag(self, name: str) -> bool:
        value: bool = self._field(name, lambda v: isinstance(v, bool), "true or false")
        return value

    def text(self, name: str) -> str:
        value: str = self._field(name, lambda v: isinstance(v, str), "a string")
        return value

    def hexadecimal(self, name: str) -> int:
        """An unsigned 64-bit integer, written as 16 hexadecimal digits."""
        text = self.text(name)
        if not is_hexadecimal(text):
            raise self.error(f"{name} must be 16 hexadecimal digits, not {shown(text)}")
        return int(text, 16)

    def list_of(self, name: str, is_valid: Callable[[Any], bool], kind: str) -> list[Any]:
        """A list of valid entries; ``kind`` describes them in the error message."""

        def is_list(value: Any) -> bool:
            return isinstance(value, list) and all(map(is_valid, value))

        value: list[Any] = self._field(name, is_list, f"a list of {kind}")
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        return dict(self._field(name, lambda v: isinstance(v, dict), "an object"))

    def objects(self, name: str) -> list[Fields]:
        entries = self.list_of(name, lambda entry: isinstance(entry, dict), "objects")
        return [Fields(entry, f"{self.where}: {name}[{i}]") for i, entry in enumerate(entries)]


def is_integer(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_number(value: Any) -> bool:
    """Whether ``value`` is a number that float64 represents as a finite one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= 2**1023 if isinstance(value, int) else math.isfinite(value)


def is_hexadecimal(value: Any, digits: int = 16) -> bool:
    return isinstance(value, str) and len(value) == digits and set(value) <= set("0123456789abcdef")


def shown(value: Any) -> str:
    """A short form of ``value`` for an error message."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**_SHOWN:
        return "a huge integer"
    if isinstance(value, list):
        entries = ["a list" if isinstance(entry, list) else shown(entry) for entry in value[:4]]
        text = "[" + ", ".join(entries) + (", ...]" if len(value) > 4 else "]")
    else:
        text = "an object" if isinstance(value, dict) else repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
