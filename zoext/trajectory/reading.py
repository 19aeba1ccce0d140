"""Reads a trajectory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from zoext.trajectory import header, lines, steps
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
