"""The side file of a trajectory: factors that come from data, one safetensors document per step."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from zoext.directions import Frame
from zoext.trajectory._format.fields import Fields, TrajectoryError, is_integer


class Place(NamedTuple):
    """The bytes of the side file that hold the frame of a step, and their CRC-32."""

    offset: int
    length: int
    checksum: int

    @classmethod
    def parse(cls, fields: Fields) -> Place:
        numbers = fields.list_of("frame", lambda value: is_integer(value, 0, 2**62), "integers")
        if len(numbers) != len(cls._fields):
            raise fields.error(
                f"frame must be an offset, a length and a checksum, not {len(numbers)} numbers"
            )
        return cls(*numbers)


def path_beside(path: Path) -> Path:
    """The path of the side file of the trajectory ``path``."""
    return path.with_name(f"{path.stem}.frames")


def encode(frame: Frame, offset: int) -> tuple[bytes, Place]:
    """The document of a frame whose tensors are on the CPU, and its place if written at ``offset``."""
    from safetensors.torch import save

    unused = {key: torch.empty(0) for key in sorted(frame.unused)}
    sides = (("left", frame.left), ("right", frame.right), ("unused", unused))
    data = save({f"{side}.{key}": factor for side, factors in sides for key, factor in factors.items()})
    return data, Place(offset, len(data), zlib.crc32(data))


def read(path: Path, place: Place) -> Frame:
    """Reads the frame at ``place`` of the side file ``path``, on the CPU.

    Raises:
        TrajectoryError: if the file is missing, too short or corrupted.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    sides: dict[str, dict[int, Tensor]] = {"left": {}, "right": {}, "unused": {}}
    document = _document(path, place)
    try:
        for name, factor in load(document).items():
            side, _, key = name.partition(".")
            sides[side][int(key)] = factor
    except (SafetensorError, KeyError, ValueError) as error:
        raise corrupted(path, place, f"it is not a document of factors ({str(error)[:80]})") from None
    return Frame(sides["left"], sides["right"], frozenset(sides["unused"]))


def corrupted(path: Path, place: Place, how: str) -> TrajectoryError:
    return TrajectoryError(f"{path}: corrupted at byte {place.offset}: {how}")


def _document(path: Path, place: Place) -> bytes:
    try:
        with path.open("rb") as file:
            # Checked before read() allocates the length, which a hostile file may set to anything.
            if os.fstat(file.fileno()).st_size < place.offset + place.length:
                raise TrajectoryError(f"{path}: is too short: byte {place.offset + place.length} is missing")
            file.seek(place.offset)
            data = file.read(place.length)
    except FileNotFoundError:
        raise TrajectoryError(f"{path}: is missing; put it back beside its trajectory") from None
    if zlib.crc32(data) != place.checksum:
        raise corrupted(path, place, "checksum mismatch")
    return data
