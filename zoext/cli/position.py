"""How far a trajectory had come when something else was saved."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from zoext import TrajectoryError

_PIECE = 2**20  # bytes that are in memory at a time


class Position(NamedTuple):
    """The end that a trajectory had: how many bytes it was, header and all, and their SHA-256."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Position:
        """Where the file ``path`` ends now."""
        with path.open("rb") as file:
            return cls.read(file)

    @classmethod
    def read(cls, file: BinaryIO, most: int = sys.maxsize) -> Position:
        """The end of what there is to read, or of the first ``most`` bytes of it; in pieces."""
        sha256, size = hashlib.sha256(), 0
        while piece := file.read(min(_PIECE, most - size)):
            sha256.update(piece)
            size += len(piece)
        return cls(size, sha256.hexdigest())

    @classmethod
    def of_record(cls, record: Any) -> Position:
        """The inverse of ``_asdict``; a record of something else raises a KeyError or a TypeError."""
        return cls(int(record["bytes"]), str(record["sha256"]))

    def check(self, path: Path) -> None:
        """Raises a TrajectoryError unless the file begins with all that it was here."""
        try:
            with path.open("rb") as file:
                found = Position.read(file, self.bytes)
        except FileNotFoundError:
            raise TrajectoryError(f"{path}: is missing") from None
        if found != self:
            raise TrajectoryError(f"{path}: is not what it was when the checkpoint was written")
