"""Records a run."""

from __future__ import annotations

import errno
import json
import os
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from zoext._engine.applied_step import TakenStep
from zoext._parameters import parameters
from zoext.directions import Frame
from zoext.optimizer import ZerothOrderOptimizer
from zoext.trajectory import continuing, lines, matching
from zoext.trajectory import frames as side_file
from zoext.trajectory.fields import TrajectoryError
from zoext.trajectory.header import Header
from zoext.trajectory.owned import OwnedFile
from zoext.trajectory.sending import Fetch, send
from zoext.trajectory.steps import RecordedStep, Setting, moving
from zoext.trajectory.writer import BackgroundWriter, Piece


class Trajectory:
    """Records what an optimizer does from now on, a line of text for each step, to be replayed.

        with zoext.Trajectory("run.jsonl", optimizer):
            for batch in loader:
                optimizer.step(lambda: model(**batch).loss)

    The first line is a header: versions, the recipe, and name, shape, dtype, key and digest of every
    parameter. A step has its seeds, coefficients, lr, loss and forwards: some hundred bytes. Each line ends
    with a checksum of itself and of all before it. A thread writes them: no step waits for the disk or for
    the device, and what was recorded is on the disk less than a second later. While a disk stalls, what waits
    for it is kept in memory, without a bound: a line for each step, and with ``frames`` the bases.

    Args:
        path: the file. It must not exist, unless ``resume`` is given.
        optimizer: whose steps are recorded, until ``close``. One that remembers steps (AdaMeZO, or
            ``precision="residual"``) must not have taken any yet.
        frames: also record what cannot be drawn from seeds: the bases of AGZO, in a file beside this one
            (``run.frames``), r floats for each input of each layer and step. Without it a run of AGZO is
            recorded, but cannot be replayed.
        notes: plain data to keep in the header.
        resume: go on with the file at ``path``, from the step that the optimizer is at. Later lines
            are moved to a file beside it, ``run.jsonl.cut``, and their frames to ``run.frames.cut``; older
            ones of these names are replaced. It must be of the same recipe and parameters, and where it has
            no steps yet, of the same weights.

    Warns:
        UserWarning: for a run that cannot be replayed, or not to the bit: one of AGZO without ``frames``, and
            one with probes in place.

    Raises:
        FileExistsError: if ``path`` exists, without ``resume``.
        ValueError: for an optimizer that is in the middle of what it remembers, and for sharded parameters.
        TrajectoryError: for a file that cannot be continued.
        BlockingIOError: if another recording is writing the file. It is locked until ``close``, or the end of
            the process; where the file system has no locks, a second one is told at its first write at best.
        OSError: if the file cannot be written, or was moved, removed or replaced since. A write that is
            refused later is raised before the next step moves anything, and by ``flush`` and ``close``; each
            of them tries it again. The end of the interpreter does so once more; how many steps are lost
            then is told on stderr, unless ``close`` has raised.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        optimizer: ZerothOrderOptimizer,
        *,
        frames: bool = False,
        notes: Mapping[str, Any] | None = None,
        resume: bool = False,
    ) -> None:
        self.path = Path(path)
        if optimizer.recorder is not None:
            raise ValueError("optimizer: its steps are recorded already; close that trajectory first")
        parameters.check_not_sharded(parameters.trainable(optimizer.param_groups))
        self._optimizer = optimizer
        watches = optimizer._axes.direction.watches
        if watches and not frames and not resume:
            warnings.warn(
                "the bases of AGZO come from data and not from seeds: this trajectory cannot be replayed. "
                "Record them with frames=True",
                stacklevel=2,
            )
        if not optimizer._probe.is_exact and not resume:
            warnings.warn(
                "probe='inplace' restores the weights to rounding only, which no trajectory tells of: a "
                "replay will be near the run, but not equal to it. Pass the module as params, or "
                "probe=StreamedProbe(module)",
                stacklevel=2,
            )
        with ExitStack() as opened:
            if resume:
                file = opened.enter_context(OwnedFile(self.path))
                end = continuing.cut(self.path, optimizer, frames and watches)
            else:
                _check_fresh(optimizer)
                notes = _checked(notes or {})
                end = continuing.begin(self.path, Header.of(optimizer, frames and watches, notes))
                file = opened.enter_context(OwnedFile(self.path))
            files = [file]
            if end.frames is not None:
                files.insert(0, opened.enter_context(OwnedFile(side_file.path_beside(self.path))))
            self._writer = BackgroundWriter(*files)
            opened.pop_all()  # they are the writer's now
        self._chain = _Chain(self.path, end)
        self._step = optimizer.param_groups[0]["step"]
        self._outline = _outline(optimizer)
        optimizer.recorder = self

    def check(self) -> None:
        """Called by the optimizer before a step."""
        try:
            self._writer.check()
        except OSError as error:
            remedy = "Make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "Put that right"
            raise OSError(
                error.errno,
                f"{error.strerror}; no weight was moved now, and no step is lost yet. {remedy} and step "
                "again, or close() the trajectory to go on without it",
                error.filename,
            ) from None
        step = self._optimizer.param_groups[0]["step"]
        if step != self._step or _outline(self._optimizer) != self._outline:
            raise RuntimeError(
                f"{self.path}: the optimizer was at step {self._step} when its last step was recorded and is "
                f"at {step}, or its seed, the number of its parameters or a dtype is another, which no line "
                "tells of; close() the trajectory and begin another one"
            )

    def record(self, step: TakenStep) -> None:
        """Called by the optimizer after a step."""
        groups = self._optimizer._groups
        setting = Setting(
            tuple(options.mu for options in step.options),
            tuple(options.weight_decay for options in step.options),
            moving(groups),
        )
        frame = step.frame if self._chain.has_frames else Frame()
        self._writer.put(self._chain.piece(self._step + 1, setting, send(step, frame)))
        self._step += 1  # last: should it not get here, the next step is told

    def flush(self) -> None:
        """Waits until all steps that were taken are on the disk."""
        self._writer.flush()

    def close(self) -> None:
        """Ends the recording; the optimizer goes on without it. Where it raises, it can be tried again."""
        if self._optimizer.recorder is self:
            self._optimizer.recorder = None
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        try:
            self.close()
        except OSError as refusal:
            if error is None:
                raise
            error.add_note(f"{refusal}; close() the trajectory again when that is put right")


def _outline(optimizer: ZerothOrderOptimizer) -> list[object]:
    """What must not change while steps are recorded."""
    groups = optimizer.param_groups
    return [groups[0]["seed"], *([tensor.dtype for tensor in group["params"]] for group in groups)]


def _checked(notes: Mapping[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(dict(notes), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise type(error)(f"notes must be what JSON can hold: {error}") from None
    return dict(notes)


def _check_fresh(optimizer: ZerothOrderOptimizer) -> None:
    if matching.remembers(optimizer):
        raise ValueError(
            f"optimizer: at step {optimizer.param_groups[0]['step']} it remembers steps that would not be in "
            "the trajectory; record from its first step on"
        )


class _Chain:
    """What a line depends on of those before it."""

    def __init__(self, path: Path, end: continuing.End) -> None:
        self._path = path
        self._checksum = end.checksum
        self._offset = end.frames or 0
        self.has_frames = end.frames is not None
        self._setting = end.setting

    def piece(self, number: int, setting: Setting, fetch: Fetch) -> Piece:
        def make() -> tuple[bytes, ...]:
            step = fetch()
            data, place = side_file.encode(step.frame, self._offset) if self.has_frames else (b"", None)
            record = RecordedStep(number, *step.numbers, setting, place)
            try:
                line, self._checksum = lines.encode(record.record(self._setting), self._checksum)
            except ValueError as error:  # such as an lr that is no number, on a device that nobody waits for
                raise TrajectoryError(
                    f"{self._path}: step {number} cannot be recorded: {error}; close() the trajectory to go "
                    "on without it, or go back to a checkpoint of an earlier step and resume it"
                ) from None
            self._setting = setting
            self._offset += len(data)
            return (data, line) if self.has_frames else (line,)

        return make
