"""JSON lines, each with a checksum that covers the line and all lines before it."""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from zoext.trajectory._format.fields import TrajectoryError

LONGEST = 2**24  # bytes per line; the header of a model with 80,000 parameters fits

_CHECKSUM = re.compile(rb'^(\{.*),"crc32":"([0-9a-f]{8})"\}$', re.DOTALL)


class Line(NamedTuple):
    """A line of a file.

    Attributes:
        number: counted from 1.
        record: the parsed JSON object.
        checksum: CRC-32 of this line and all lines before it.
        end: the offset of the byte after its newline.
        text: the bytes that were read.
    """

    number: int
    record: Any
    checksum: int
    end: int
    text: bytes


def encode(record: dict[str, Any], previous: int) -> tuple[bytes, int]:
    """The line of a non-empty record and its checksum, given the checksum of the ``previous`` line.

    Raises:
        ValueError: for a number that is not finite, or a line that is too long to be read back.
    """
    body = json.dumps(record, separators=(",", ":"), allow_nan=False).encode()[:-1]
    checksum = zlib.crc32(body, previous)
    line = body + b',"crc32":"%08x"}\n' % checksum
    if len(line) > LONGEST:
        raise ValueError(f"a line of a trajectory must have at most {LONGEST} bytes, not {len(line)}")
    return line, checksum


def read(path: Path, after: Line | None = None) -> Iterator[Line]:
    """Reads and checks the lines of a file, without the last one if it is torn.

    A last line that lacks only its newline counts as complete. With ``after``, a line that was read before,
    only the lines behind it are read.

    Raises:
        TrajectoryError: for a corrupted line.
        OSError: if the file cannot be read.
    """
    number, checksum, end = (after.number, after.checksum, after.end) if after is not None else (0, 0, 0)
    with path.open("rb") as file:
        # The newline of the last line may be missing.
        if file.seek(0, os.SEEK_END) < end - 1:
            raise TrajectoryError(f"{path}: is shorter than it was when line {number} was read; it was cut")
        file.seek(end)
        while line := file.readline(LONGEST):
            number += 1
            if not line.endswith(b"\n"):
                if len(line) == LONGEST:
                    raise _corrupted(path, number, f"is longer than {LONGEST} bytes")
                try:
                    body = line[: line.rfind(b'"}') + 2]
                    record, checksum = _decode(body, checksum, path, number)
                except TrajectoryError:
                    return
                yield Line(number, record, checksum, end + len(body) + 1, body)
                return
            record, checksum = _decode(line[:-1], checksum, path, number)
            end += len(line)
            yield Line(number, record, checksum, end, line)


def _decode(line: bytes, previous: int, path: Path, number: int) -> tuple[Any, int]:
    match = _CHECKSUM.match(line)
    if match is None:
        raise _corrupted(path, number, "does not end with a checksum")
    body, written = match[1], int(match[2], 16)
    if zlib.crc32(body, previous) != written:
        raise _corrupted(path, number, "has a checksum mismatch: it or a line before it was changed")
    try:
        return json.loads(body + b"}", parse_constant=_refuse), written
    except (ValueError, RecursionError) as error:
        reason = str(error)[:80] or type(error).__name__
        raise _corrupted(path, number, f"is not valid JSON ({reason})") from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")


def _corrupted(path: Path, number: int, how: str) -> TrajectoryError:
    last = number - 2  # the first line is the header
    remedy = f"; replay the steps before it with to_step={last} or fewer" if last > 0 else ""
    return TrajectoryError(f"{path}: line {number} {how}; the file is corrupted{remedy}")
