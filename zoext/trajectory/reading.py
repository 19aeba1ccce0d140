"""Reads a trajectory."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from zoext.trajectory import frames, header, lines, steps
from zoext.trajectory.fields import TrajectoryError
from zoext.trajectory.header import Header
from zoext.trajectory.lines import Line
from zoext.trajectory.steps import RecordedStep


class Recording(NamedTuple):
    """A trajectory whose header was read; ``rest`` has its steps, each checked when it is asked for."""

    path: Path
    header: Header
    first: Line
    rest: Iterator[tuple[RecordedStep, Line]]


class Part(NamedTuple):
    """A trajectory up to a step, read at one moment: a run may be writing more of it.

    ``sha256`` is that of the lines which were read, the header's among them.
    """

    path: Path
    header: Header
    steps: list[RecordedStep]
    sha256: str

    @property
    def end(self) -> int:
        """The step of the run that it ends with."""
        return self.header.step + len(self.steps)


def read_until(path: Path, to_step: int | None) -> Part:
    """Reads and checks the header and the steps up to ``to_step``; all that are there, if it is None.

    Raises:
        TrajectoryError: for a file that is no trajectory, is of another version, or is damaged by then.
        ValueError: for a ``to_step`` that the trajectory does not reach.
        OSError: for a file that cannot be read.
    """
    recording = open_recording(path)
    begin = recording.header.step
    if to_step is not None and to_step < begin:
        raise ValueError(f"to_step must be at least {begin}, with which {path} begins, not {to_step}")
    rest = recording.rest if to_step is None else islice(recording.rest, min(to_step - begin, sys.maxsize))
    sha256 = hashlib.sha256(recording.first.text)
    steps = []
    for step, line in rest:
        steps.append(step)
        sha256.update(line.text)
    part = Part(path, recording.header, steps, sha256.hexdigest())
    if to_step is not None and part.end < to_step:
        raise ValueError(f"to_step must be at most {part.end}, the last of {path}, not {to_step}")
    return part


def open_recording(path: Path) -> Recording:
    """Reads the header.

    Raises:
        TrajectoryError: for a file that is no trajectory, is of another version, or is damaged.
        OSError: for a file that cannot be read.
    """
    read = lines.read(path)
    first = next(read, None)
    if first is None:
        raise TrajectoryError(f"{path}: has no header: it is empty, or its only line is torn")
    found = header.parse(first.record, f"{path}: line 1")
    return Recording(path, found, first, _steps(path, found, read))


def last_whole_step(path: Path) -> int | None:
    """The last step that can be replayed, with its frame if it has one; None if not even the first can."""
    last = None
    with suppress(TrajectoryError, OSError):
        for step, _ in open_recording(path).rest:
            if step.frame is not None:
                frames.read(frames.path_beside(path), step.frame)
            last = step.number
    return last


def _steps(path: Path, found: Header, read: Iterator[Line]) -> Iterator[tuple[RecordedStep, Line]]:
    groups, keys = len(found.groups), len(found.parameters)
    setting, end = None, 0  # of the side file
    for number, line in enumerate(read, found.step + 1):
        where = f"{path}: line {line.number}"
        step = steps.parse(line.record, where, groups, keys, setting)
        if step.number != number:
            raise TrajectoryError(f"{where}: is of step {step.number}, and step {number} was to follow")
        if found.frames != (step.frame is not None):
            has, are = ("no", "are") if found.frames else ("a", "are no")
            raise TrajectoryError(f"{where}: has {has} frame, and the header says that there {are} frames")
        if step.frame is not None:
            if step.frame.offset != end:
                raise TrajectoryError(f"{where}: frame has the offset {step.frame.offset}, not {end}")
            end += step.frame.length
        setting = step.setting
        yield step, line
