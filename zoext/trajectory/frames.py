"""The side file of a trajectory: the factors that come from data, a safetensors document for each step."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

from torch import Tensor

from zoext.directions import Frame
from zoext.trajectory.fields import TrajectoryError
from zoext.trajectory.steps import Place


def path_beside(path: Path) -> Path:
    """Where the side file of the trajectory ``path`` is."""
    return path.with_name(f"{path.stem}.frames")


def encode(frame: Frame, offset: int) -> tuple[bytes, Place]:
    """The document of a frame, whose tensors are on the CPU, and its place from ``offset`` on."""
    from safetensors.torch import save

    sides = (("left", frame.left), ("right", frame.right))
    data = save({f"{side}.{key}": factor for side, factors in sides for key, factor in factors.items()})
    return data, Place(offset, len(data), zlib.crc32(data))


def read(path: Path, place: Place) -> Frame:
    """The frame at ``place``, on the CPU.

    Raises:
        TrajectoryError: if the file is missing, too short or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    sides: dict[str, dict[int, Tensor]] = {"left": {}, "right": {}}
    document = _document(path, place)
    try:
        for name, factor in load(document).items():
            side, _, key = name.partition(".")
            sides[side][int(key)] = factor
    except (SafetensorError, KeyError, ValueError) as error:
        raise TrajectoryError(f"{path}: damaged at byte {place.offset} ({str(error)[:80]})") from None
    return Frame(**sides)


def _document(path: Path, place: Place) -> bytes:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < place.offset + place.length:  # before memory is asked for
                raise TrajectoryError(f"{path}: is too short: byte {place.offset + place.length} is missing")
            file.seek(place.offset)
            data = file.read(place.length)
    except FileNotFoundError:
        raise TrajectoryError(f"{path}: is missing; it must lie beside its trajectory") from None
    if zlib.crc32(data) != place.checksum:
        raise TrajectoryError(f"{path}: damaged at byte {place.offset}: it is not what was written there")
    return data
