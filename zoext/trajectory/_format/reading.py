"""Reads a trajectory: the header, then the steps, each checked against what precedes it."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from zoext.trajectory._format import frames, lines
from zoext.trajectory._format.fields import TrajectoryError
from zoext.trajectory._format.header import Header
from zoext.trajectory._format.lines import Line
from zoext.trajectory._format.steps import StepRecord


class Recording(NamedTuple):
    """A trajectory of which only the header has been read.

    Attributes:
        path: the file.
        header: its header.
        first: the line of the header.
        rest: reads the steps and their lines, and raises a ``TrajectoryError`` at the first invalid one.
    """

    path: Path
    header: Header
    first: Line
    rest: Iterator[tuple[StepRecord, Line]]


class Part(NamedTuple):
    """The steps of a trajectory up to some step, as they were at the time of reading.

    Attributes:
        path: the file. A run may have appended to it since.
        header: its header.
        steps: its first steps.
        sha256: of the lines that were read, including the header.
    """

    path: Path
    header: Header
    steps: list[StepRecord]
    sha256: str

    @property
    def end(self) -> int:
        """The number of the last step in the run, or of the step where recording began if there is none."""
        return self.header.step + len(self.steps)


def read_until(path: Path, to_step: int | None) -> Part:
    """Reads the header and the steps up to ``to_step``, or all steps if it is None.

    Raises:
        TrajectoryError: if the file is not a trajectory, is in another version, or is corrupted up to
            ``to_step``.
        ValueError: for a ``to_step`` before the first or after the last step of the file.
        OSError: if the file cannot be read.
    """
    recording = open_recording(path)
    begin = recording.header.step
    if to_step is not None and to_step < begin:
        raise ValueError(f"to_step must be at least {begin}, the step where {path} begins, not {to_step}")
    rest = recording.rest if to_step is None else islice(recording.rest, min(to_step - begin, sys.maxsize))
    sha256 = hashlib.sha256(recording.first.text)
    steps = []
    for step, line in rest:
        steps.append(step)
        sha256.update(line.text)
    part = Part(path, recording.header, steps, sha256.hexdigest())
    if to_step is not None and part.end < to_step:
        raise ValueError(f"to_step must be at most {part.end}, the last step of {path}, not {to_step}")
    return part


def open_recording(path: Path) -> Recording:
    """Reads the header.

    Raises:
        TrajectoryError: if the file is not a trajectory, is in another version, or has a corrupted header.
        OSError: if the file cannot be read.
    """
    read = lines.read(path)
    first = next(read, None)
    if first is None:
        raise TrajectoryError(f"{path}: has no header: the file is empty or its only line is torn")
    header = Header.parse(first.record, f"{path}: line 1")
    return Recording(path, header, first, _steps(header, read, path, None))


def read_on(
    path: Path, header: Header, line: Line, step: StepRecord | None
) -> Iterator[tuple[StepRecord, Line]]:
    """Reads what was appended since ``line`` was the last one, that of ``step`` (None: the header).

    Raises like ``Recording.rest``, and if the file was cut.
    """
    return _steps(header, lines.read(path, line), path, step)


def last_whole_step(path: Path) -> int | None:
    """The last step that can be replayed, with its frame if it needs one; None if there is none."""
    last = None
    with suppress(TrajectoryError, OSError):
        for step, _ in open_recording(path).rest:
            if step.frame is not None:
                frames.read(frames.path_beside(path), step.frame)
            last = step.number
    return last


def _steps(
    header: Header, read: Iterator[Line], path: Path, last: StepRecord | None
) -> Iterator[tuple[StepRecord, Line]]:
    groups, keys = len(header.groups), len(header.parameters)
    setting = last.setting if last is not None else None
    # In the side file.
    offset = last.frame.offset + last.frame.length if last is not None and last.frame is not None else 0
    for number, line in enumerate(read, (header.step if last is None else last.number) + 1):
        where = f"{path}: line {line.number}"
        step = StepRecord.parse(line.record, where, groups, keys, setting)
        if step.number != number:
            raise TrajectoryError(f"{where}: is step {step.number}, but step {number} comes next")
        if header.frames != (step.frame is not None):
            has = "no" if header.frames else "a"
            raise TrajectoryError(
                f"{where}: has {has} frame, but frames is {str(header.frames).lower()} in the header"
            )
        if header.defers and any(step.setting.weight_decay):
            raise TrajectoryError(f"{where}: weight_decay must be 0 for a direction that holds steps back")
        if step.merged and not header.defers:
            raise TrajectoryError(f"{where}: merged must be false for a direction that holds no steps back")
        if step.frame is not None:
            if step.frame.offset != offset:
                raise TrajectoryError(f"{where}: frame has the offset {step.frame.offset}, not {offset}")
            offset += step.frame.length
        setting = step.setting
        yield step, line
