"""How far a trajectory had come when something else was saved."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

from zoext.cli.errors import UserError


class Position(NamedTuple):
    """The end that a trajectory had: how many bytes it was, header and all, and their SHA-256."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Position:
        """Where the file ``path`` ends now."""
        data = path.read_bytes()
        return cls(len(data), hashlib.sha256(data).hexdigest())

    @classmethod
    def of_record(cls, record: Any) -> Position:
        """The inverse of ``_asdict``; a record of something else raises a KeyError or a TypeError."""
        return cls(int(record["bytes"]), str(record["sha256"]))

    def check(self, path: Path) -> None:
        """Raises a UserError unless the file begins with all that it was here."""
        remedy = "put back the one of this run, or start again with --overwrite"
        try:
            with path.open("rb") as file:
                data = file.read(self.bytes)
        except FileNotFoundError:
            raise UserError(f"{path}: is missing; {remedy}") from None
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise UserError(f"{path}: is not what it was when the checkpoint was written; {remedy}")
