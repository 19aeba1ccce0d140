"""Where a recording begins, and where it goes on."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import NamedTuple

from zoext._runtime import atomic
from zoext.optimizer import ZerothOrderOptimizer
from zoext.trajectory import frames, lines
from zoext.trajectory.fields import TrajectoryError
from zoext.trajectory.header import Header, RecordedParameter, named_groups
from zoext.trajectory.reading import open_recording
from zoext.trajectory.steps import Setting


class End(NamedTuple):
    """The end of a trajectory: what its next line depends on.

    The checksum of its last line, the bytes of its side file, if any, and the setting of its last step.
    """

    checksum: int
    frames: int | None
    setting: Setting | None


def begin(path: Path, header: Header) -> End:
    """Writes a new trajectory that has no steps yet, there whole or not at all.

    Raises:
        OSError: if it exists or cannot be written.
    """
    _check_place(path)
    beside = frames.path_beside(path)
    if header.frames and beside == path:
        raise ValueError(f"path must not be {path}, the name of its own side file; use .jsonl")
    for file in [path, beside] if header.frames else [path]:
        if file.exists():
            raise FileExistsError(f"path: {file} exists; give another path, or resume=True to go on with it")
    line, checksum = lines.encode(header.record(), 0)
    try:
        atomic.create_text(path, line.decode())
    except FileExistsError:
        raise FileExistsError(f"path: {path} has just been made by another recording") from None
    except OSError as error:  # of a temporary file, whose name says nothing to anybody
        raise OSError(error.errno, error.strerror, str(path)) from None
    if header.frames:
        _make(beside)  # after the header: it is nobody's without one
    return End(checksum, 0 if header.frames else None, None)


def _make(beside: Path) -> None:
    """Makes an empty file of frames, with a durable name before a line tells of any."""
    beside.touch()
    atomic.sync(beside.absolute().parent)


def _check_place(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "path must be a file to write, not a folder", str(path))
    if path.parent.exists() and not path.parent.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"path: {path.parent} is no folder", str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(
            errno.ENOENT, f"path: its folder {path.parent} is missing; make it first", str(path)
        )


def cut(path: Path, optimizer: ZerothOrderOptimizer, frames_wanted: bool) -> End:
    """Moves all lines after the step that ``optimizer`` is at, and their frames, to files ``NAME.cut``.

    Older files of that name are replaced. A run that was killed in here is cut again, with the same result.

    Raises:
        TrajectoryError: for a trajectory that is damaged before that step, in its lines or its frames, ends
            before it, is of another run or other weights, or was begun without the frames that are wanted.
            Nothing was changed.
        OSError: if the lines cannot be kept; none is lost then.
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
                f"{path}: ends with step {at}, and the optimizer is at step {wanted}; go on from a "
                "checkpoint of that step or an earlier one, or record to another path"
            )
        at, setting = step.number, step.setting
        if step.frame is not None:
            frames.read(frames.path_beside(path), step.frame)  # for nothing but its check
            used = step.frame.offset + step.frame.length
    if at > wanted:
        raise TrajectoryError(f"{path}: begins with step {at}, and the optimizer is at step {wanted}")
    if wanted == recording.header.step:
        _check_same_weights(path, recording.header, optimizer)
    ends = [(path, last.end)]
    if recording.header.frames:
        beside = frames.path_beside(path)
        if not used:
            _make(beside)  # a run may have been killed before it did
        ends.insert(0, (beside, used))
    if _has_line_after(path, last.end):
        for file, size in ends:
            if file.stat().st_size > size:
                atomic.copy_tail(file, size, file.with_name(f"{file.name}.cut"))
    for file, size in ends:
        os.truncate(file, size)
        if file == path:
            _end_line(path, size)
        atomic.sync(file)
    return End(last.checksum, used if recording.header.frames else None, setting)


def _end_line(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.seek(size - 1)
        file.write(b"\n")


def _has_line_after(path: Path, end: int) -> bool:
    """Whether more than a torn line is there, whole or not."""
    with path.open("rb") as file:
        file.seek(end)
        return file.readline(lines.LONGEST).endswith(b"\n")


def _check_same_weights(path: Path, header: Header, optimizer: ZerothOrderOptimizer) -> None:
    """Only where recording began are they known."""
    tensors = [tensor for group in named_groups(optimizer) for _, _, tensor in group]
    for parameter, tensor in zip(header.parameters, tensors, strict=True):
        difference = parameter.changed(tensor)
        if difference is not None:
            raise TrajectoryError(
                f"{path}: {parameter.name} {difference} than when its run began, at step {header.step}, so "
                "it could never be replayed; load those of that run, or record to another path"
            )


def _check_same_run(path: Path, header: Header, optimizer: ZerothOrderOptimizer) -> None:
    ours = Header.of(optimizer, header.frames, {}, digests=False)
    for name in ("recipe", "precision", "seed", "exact"):
        if getattr(header, name) != getattr(ours, name):
            raise TrajectoryError(
                f"{path}: is of another run: its {name} is {getattr(header, name)}, and the optimizer has "
                f"{getattr(ours, name)}; record to another path"
            )
    theirs = [[_outline(parameter) for parameter in group] for group in header.groups]
    if theirs != [[_outline(parameter) for parameter in group] for group in ours.groups]:
        raise TrajectoryError(f"{path}: is of another model, or of other groups; record to another path")


def _outline(parameter: RecordedParameter) -> tuple[object, ...]:
    return parameter.name, parameter.shape, parameter.dtype
