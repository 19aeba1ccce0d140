"""Checkpoints: the whole state of a run, or only a position in its trajectory, from which it is replayed.

Weights and optimizer tensors are safetensors, everything else is JSON. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor, nn

from zoext import TrajectoryError
from zoext._runtime import atomic
from zoext.cli._errors import writing
from zoext.cli._runs.tensors import pack, unpack, write
from zoext.trajectory import NOISE_FIELD

NAME = r"step-\d{8,}"

_WEIGHTS, _OPTIMIZER, _STATE = "weights.safetensors", "optimizer.safetensors", "state.json"
_KEPT = 2  # the newest, and one to fall back on
_PIECE = 2**20  # bytes in memory at a time


class CorruptedError(Exception):
    """A checkpoint is not what was written; the message names the file."""


class Position(NamedTuple):
    """The end of a trajectory: its size in bytes, header included, and their SHA-256."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Position:
        """The current end of the file ``path``."""
        with path.open("rb") as file:
            return cls._read(file)

    @classmethod
    def of_steps(cls, path: Path, steps: int) -> Position:
        """The end of the first ``steps`` steps in the file ``path``: a line each, after the header."""
        with path.open("rb") as file:
            size = sum(map(len, islice(file, 1 + steps)))
            file.seek(0)
            return cls._read(file, size)

    @classmethod
    def _read(cls, file: BinaryIO, most: int = sys.maxsize) -> Position:
        sha256, size = hashlib.sha256(), 0
        while piece := file.read(min(_PIECE, most - size)):
            sha256.update(piece)
            size += len(piece)
        return cls(size, sha256.hexdigest())

    @classmethod
    def of_record(cls, record: Any) -> Position:
        """The inverse of ``_asdict``; raises a KeyError or a TypeError for anything else."""
        return cls(int(record["bytes"]), str(record["sha256"]))

    def check(self, path: Path) -> None:
        """Raises a TrajectoryError unless the file begins with the content that ended here."""
        try:
            with path.open("rb") as file:
                found = Position._read(file, self.bytes)
        except FileNotFoundError:
            raise TrajectoryError(f"{path}: is missing") from None
        if found != self:
            raise TrajectoryError(f"{path}: is not what it was when the checkpoint was written")


class Reached(NamedTuple):
    """How far a run has come: its steps, their forward passes, and the end of its trajectory on the disk.

    ``trajectory`` is None for a run that continues without one.
    """

    step: int
    forwards: int
    trajectory: Position | None

    def check(self, trajectory: Path) -> None:
        """Raises a TrajectoryError unless the file begins with the content it had at the checkpoint."""
        if self.trajectory is None:
            raise TrajectoryError(
                f"{trajectory}: recording had already stopped when the checkpoint was written"
            )
        self.trajectory.check(trajectory)


@dataclass(frozen=True)
class Saved:
    """Weights and optimizer state."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A complete and intact checkpoint in memory.

    Attributes:
        path: its folder; ``state`` is the file in it that says what it is.
        reached: how far the run had come.
        saved: weights and optimizer state; None if they are to be replayed from the trajectory.
        threads: the number of threads that torch used in the process that wrote it.
        batch_parts: the number of ranks that each batch was divided over.
        noise_field: the version of the noise field, which determines the directions.
    """

    path: Path
    reached: Reached
    saved: Saved | None
    threads: int
    batch_parts: int
    noise_field: object

    @property
    def state(self) -> Path:
        return self.path / _STATE


def save(
    folder: Path, reached: Reached, model: nn.Module, optimizer: torch.optim.Optimizer, batch_parts: int = 1
) -> None:
    """Atomically writes a checkpoint with weights below ``folder`` and removes the oldest ones."""
    from safetensors.torch import save_file

    if (path := _path(folder, reached)).exists():  # the run was resumed from it and has taken no step
        return
    state_tensors: dict[str, Tensor] = {}
    state = pack(optimizer.state_dict(), state_tensors)
    with _saving(path), atomic.new_folder(path) as temporary:
        write(temporary / _WEIGHTS, model)
        save_file(state_tensors, temporary / _OPTIMIZER)
        digests = {name: _digest(temporary / name) for name in (_WEIGHTS, _OPTIMIZER)}
        _write_state(temporary, reached, batch_parts, {"sha256": digests, "optimizer": state})
    _drop_old(folder)


def save_position(folder: Path, reached: Reached, batch_parts: int = 1) -> None:
    """Atomically writes a checkpoint that is restored by replaying the trajectory."""
    if (path := _path(folder, reached)).exists():
        return
    with _saving(path), atomic.new_folder(path) as temporary:
        _write_state(temporary, reached, batch_parts, {})
    _drop_old(folder)


def _saving(path: Path) -> AbstractContextManager[None]:
    return writing(path, f"zoext finetune --out {path.parents[1]} --resume")


def _path(folder: Path, reached: Reached) -> Path:
    return folder / f"step-{reached.step:08d}"


def _write_state(folder: Path, reached: Reached, batch_parts: int, more: dict[str, Any]) -> None:
    position = None if reached.trajectory is None else reached.trajectory._asdict()
    record = {
        **reached._asdict(),
        "trajectory": position,
        "threads": torch.get_num_threads(),
        "batch_parts": batch_parts,
        "noise_field": NOISE_FIELD,
        **more,
    }
    text = json.dumps({"checksum": _checksum(record), **record}, indent=1)
    (folder / _STATE).write_text(text, encoding="utf-8")


def _checksum(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _drop_old(folder: Path) -> None:
    for old in existing(folder)[:-_KEPT]:
        shutil.rmtree(old)


def existing(folder: Path) -> list[Path]:
    """The checkpoints below ``folder``, oldest first."""
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(NAME, path.name))


def read(path: Path) -> Checkpoint:
    """Reads and verifies the checkpoint ``path``.

    Raises:
        CorruptedError: if it is incomplete, or not what was written.
    """
    try:
        record = json.loads((path / _STATE).read_text(encoding="utf-8"))
        if record.pop("checksum") != _checksum(record):
            raise CorruptedError(f"{path / _STATE}: corrupted, checksum mismatch")
        position = record["trajectory"]
        if position is not None:
            position = Position.of_record(position)
        reached = Reached(int(record["step"]), int(record["forwards"]), position)
        digests = dict(record["sha256"]) if "sha256" in record else None
        saved = None if digests is None else _read_saved(path, record, digests)
        parts = int(record.get("batch_parts", 1))  # which earlier versions did not write
        return Checkpoint(path, reached, saved, int(record["threads"]), parts, record["noise_field"])
    except OSError as error:
        raise CorruptedError(f"{path / _STATE}: cannot be read ({error.strerror})") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise CorruptedError(f"{path / _STATE}: corrupted, not a checkpoint") from None


def _read_saved(path: Path, record: dict[str, Any], digests: dict[str, str]) -> Saved:
    weights, state_tensors = (_read_tensors(path / name, digests[name]) for name in (_WEIGHTS, _OPTIMIZER))
    return Saved(weights, unpack(record["optimizer"], state_tensors))


def _read_tensors(path: Path, digest: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if _digest(path) == digest:
            return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CorruptedError(f"{path}: cannot be read ({error})") from None
    raise CorruptedError(f"{path}: corrupted, its checksum differs from the one in {_STATE}")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
