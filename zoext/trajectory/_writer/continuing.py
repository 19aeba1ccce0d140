"""Begins a trajectory, or cuts an existing one to the step where it is continued."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import NamedTuple

from zoext._runtime import atomic
from zoext.optimizer import ZerothOrderOptimizer
from zoext.trajectory import _optimizers
from zoext.trajectory._format import frames, lines
from zoext.trajectory._format.fields import TrajectoryError
from zoext.trajectory._format.header import Header, RecordedParameter
from zoext.trajectory._format.header import digest as digest_of
from zoext.trajectory._format.reading import open_recording
from zoext.trajectory._format.steps import Setting


class End(NamedTuple):
    """The end of a trajectory, which its next line depends on.

    Attributes:
        checksum: of the last line.
        frames: the size of the side file; None if there is none.
        setting: of the last step; None if there is none.
    """

    checksum: int
    frames: int | None
    setting: Setting | None


def begin(path: Path, header: Header) -> End:
    """Writes a new trajectory without steps, atomically.

    Raises:
        OSError: if it exists or cannot be written.
    """
    _check_place(path)
    beside = frames.path_beside(path)
    if header.frames and beside == path:
        raise ValueError(f"path must not be {path}, the name of its own side file; use .jsonl")
    for file in [path, beside] if header.frames else [path]:
        if file.exists():
            raise FileExistsError(f"path: {file} exists; give another path, or resume=True to continue it")
    line, checksum = lines.encode(header.record(), 0)
    try:
        atomic.create_text(path, line.decode())
    except FileExistsError:
        raise FileExistsError(f"path: another recording has just created {path}; give another path") from None
    except OSError as error:  # its filename is that of a temporary file
        raise OSError(error.errno, error.strerror, str(path)) from None
    if header.frames:
        _make(beside)  # after the header, so that a side file always has a trajectory
    return End(checksum, 0 if header.frames else None, None)


def _make(beside: Path) -> None:
    """Creates an empty side file and makes its name durable before any line refers to it."""
    beside.touch()
    atomic.sync(beside.absolute().parent)


def _check_place(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "path must be a file to write, not a folder", str(path))
    if path.parent.exists() and not path.parent.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"path: {path.parent} is not a folder", str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(
            errno.ENOENT, f"path: its folder {path.parent} is missing; make it first", str(path)
        )


class Continuation(NamedTuple):
    """A trajectory up to the step where it is continued; nothing was changed yet.

    Attributes:
        path: its file.
        header: its first line.
        at_beginning: whether it is continued from the step where it begins, where its header has digests of
            the weights.
        size: of the file up to that step, in bytes.
        end: the end up to that step.
    """

    path: Path
    header: Header
    at_beginning: bool
    size: int
    end: End


def find(path: Path, optimizer: ZerothOrderOptimizer, frames_wanted: bool) -> Continuation:
    """Reads a trajectory up to the current step of ``optimizer``.

    Raises:
        TrajectoryError: if the trajectory or its side file is corrupted before that step, ends before it,
            belongs to another run, or was begun without the frames that are wanted.
    """
    recording = open_recording(path)
    _check_same_run(path, recording.header, optimizer)
    if frames_wanted and not recording.header.frames:
        raise TrajectoryError(f"{path}: was begun without frames; record to another path for frames=True")
    wanted = optimizer.param_groups[0]["step"]
    at, last, used = recording.header.step, recording.first, 0
    setting = None
    while at < wanted:
        step, last = next(recording.rest, (None, last))
        if step is None:
            raise TrajectoryError(
                f"{path}: ends with step {at}, but the optimizer is at step {wanted}; load a checkpoint of "
                f"step {at} or earlier, or record to another path"
            )
        at, setting = step.number, step.setting
        if step.frame is not None:
            frames.read(frames.path_beside(path), step.frame)  # only to check it
            used = step.frame.offset + step.frame.length
    if at > wanted:
        raise TrajectoryError(
            f"{path}: begins with step {at}, but the optimizer is at step {wanted}; load a checkpoint of "
            f"step {at} or later, or record to another path"
        )
    end = End(last.checksum, used if recording.header.frames else None, setting)
    return Continuation(path, recording.header, wanted == recording.header.step, last.end, end)


def cut(found: Continuation) -> None:
    """Moves all lines after the step, and their frames, to files ``NAME.cut``.

    Files of that name are replaced. If the process is killed here, the next call gives the same result.

    Raises:
        OSError: if the lines after that step cannot be saved. None is lost.
    """
    path = found.path
    ends = [(path, found.size)]
    if found.end.frames is not None:
        beside = frames.path_beside(path)
        if not found.end.frames:
            _make(beside)  # missing if the run was killed before it was created
        ends.insert(0, (beside, found.end.frames))
    if _has_line_after(path, found.size):
        for file, size in ends:
            if file.stat().st_size > size:
                atomic.copy_tail(file, size, file.with_name(f"{file.name}.cut"))
    for file, size in ends:
        os.truncate(file, size)
        if file == path:
            _end_line(path, size)
        atomic.sync(file)


def _end_line(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.seek(size - 1)
        file.write(b"\n")


def _has_line_after(path: Path, end: int) -> bool:
    """Whether the file has a complete line after byte ``end``, and not just a torn one."""
    with path.open("rb") as file:
        file.seek(end)
        return file.readline(lines.LONGEST).endswith(b"\n")


def check_weights(found: Continuation, optimizer: ZerothOrderOptimizer) -> None:
    """Raises a TrajectoryError unless the weights are those that the trajectory begins with.

    It is a collective for DTensors, in which ``header.gather`` is the part of ranks without the file.
    """
    header = found.header
    tensors = [tensor for group in _optimizers.named_groups(optimizer) for _, _, tensor in group]
    for parameter, digest in zip(header.parameters, list(map(digest_of, tensors)), strict=True):
        if parameter.digest and parameter.digest != digest:
            raise TrajectoryError(
                f"{found.path}: {parameter.name} has other weights than the run had at step {header.step}, "
                "where it began, so it could not be replayed; load the weights of that run, or record to "
                "another path"
            )


def _check_same_run(path: Path, header: Header, optimizer: ZerothOrderOptimizer) -> None:
    ours = Header.of(optimizer, header.frames, {}, digests=False)
    for name in ("recipe", "precision", "seed", "exact"):
        if getattr(header, name) != getattr(ours, name):
            raise TrajectoryError(
                f"{path}: run mismatch: its {name} is {getattr(header, name)}, but the optimizer has "
                f"{getattr(ours, name)}; record to another path"
            )
    theirs = [[_outline(parameter) for parameter in group] for group in header.groups]
    if theirs != [[_outline(parameter) for parameter in group] for group in ours.groups]:
        raise TrajectoryError(
            f"{path}: model mismatch: the names, shapes, dtypes or groups of its parameters are not those of "
            "the optimizer; record to another path"
        )


def _outline(parameter: RecordedParameter) -> tuple[object, ...]:
    return parameter.name, parameter.shape, parameter.dtype
