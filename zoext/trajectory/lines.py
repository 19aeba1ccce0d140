"""Lines of JSON, each with a checksum of itself and of all lines before it."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from zoext.trajectory.fields import TrajectoryError

LONGEST = 2**24  # bytes of a line; a model of 80,000 parameters has such a header

_CHECKSUM = re.compile(rb'^(\{.*),"crc32":"([0-9a-f]{8})"\}$', re.DOTALL)


class Line(NamedTuple):
    """A record of a file: where it ends, newline and all, and its text as it was read."""

    number: int
    record: Any
    checksum: int
    end: int
    text: bytes


def encode(record: dict[str, Any], previous: int) -> tuple[bytes, int]:
    """The line of a record that is not empty, and its checksum; ``previous`` is that of the line before.

    Raises:
        ValueError: for one so long that it would not be read again.
    """
    body = json.dumps(record, separators=(",", ":"), allow_nan=False).encode()[:-1]
    checksum = zlib.crc32(body, previous)
    line = body + b',"crc32":"%08x"}\n' % checksum
    if len(line) > LONGEST:
        raise ValueError(f"a line of a trajectory must have at most {LONGEST} bytes, not {len(line)}")
    return line, checksum


def read(path: Path) -> Iterator[Line]:
    """The lines of a file; a last one that is torn is left out.

    One of which just the newline is lost is whole.

    Raises:
        TrajectoryError: for a line that is no record, or not the one that was written.
        OSError: for a file that cannot be read.
    """
    checksum = end = 0
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LONGEST):
            number += 1
            if not line.endswith(b"\n"):
                if len(line) == LONGEST:
                    raise _damaged(path, number, f"is longer than {LONGEST} bytes")
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
        raise _damaged(path, number, "does not end with a checksum")
    body, written = match[1], int(match[2], 16)
    if zlib.crc32(body, previous) != written:
        raise _damaged(path, number, "has another checksum than its text and the lines before it")
    try:
        return json.loads(body + b"}", parse_constant=_refuse), written
    except (ValueError, RecursionError) as error:
        raise _damaged(path, number, f"is no JSON ({str(error)[:80] or type(error).__name__})") from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def _damaged(path: Path, number: int, how: str) -> TrajectoryError:
    last = number - 2  # the first line is the header
    remedy = f"; the steps before it can be replayed, to_step={last} or fewer" if last > 0 else ""
    return TrajectoryError(f"{path}: line {number} {how}: it is damaged{remedy}")
