"""Records the steps of an optimizer."""

from __future__ import annotations

import errno
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from zoext._engine import AppliedStep
from zoext.optimizer import ZerothOrderOptimizer, unwrap
from zoext.trajectory import _optimizers
from zoext.trajectory._agreement import Agreement
from zoext.trajectory._format.header import Header
from zoext.trajectory._format.steps import ranges
from zoext.trajectory._writer import opening
from zoext.trajectory._writer.pieces import Pieces


class Trajectory:
    """Records every step of an optimizer from now on as a line of text, so that ``replay`` can repeat it.

        with zoext.Trajectory("run.jsonl", optimizer):
            for batch in loader:
                optimizer.step(lambda: model(**batch).loss)

    The first line is a header with the versions of zoext and torch, the recipe, and the name, shape, dtype,
    key and digest of every parameter. Each step adds a line of a few hundred bytes: its seeds, coefficients,
    learning rates, loss and number of forwards. A checksum at the end of each line covers that line and all
    lines before it.

    A background thread writes the lines, so a step waits neither for the disk nor for the device, and a step
    reaches the disk within a second. While the disk stalls, unwritten steps are kept in memory without a
    limit.

    If several ranks take the steps together, by ``process_group``, ``probe_group`` or sharded parameters, all
    of them create the trajectory, and the first one writes it. It has global shapes and the digests of whole
    weights, so it replays on one process and on any number of ranks. If the first rank cannot create the
    file, all raise. If it cannot write, the next step raises on all ranks, before it moves a weight. (With
    ``GraphedStep``, the others wait for the first until the ``timeout`` of their process group.) ``flush``
    and ``close`` concern the first rank alone.

    Args:
        path: the file to write. It must not exist, except with ``resume``.
        optimizer: the ``ZerothOrderOptimizer`` whose steps are recorded until ``close``, or a wrapper of it
            such as Accelerate's, Lightning's or Fabric's. If its steps depend on earlier ones
            (AdaMeZO, ``precision="residual"``), recording must begin before its first step.
        frames: also record the bases of AGZO, which come from data and not from seeds. They go to a side file
            (``run.frames`` beside ``run.jsonl``) with r floats per input of each layer and step. Without
            them, a run of AGZO is recorded but cannot be replayed.
        notes: plain JSON data to keep in the header.
        resume: continue the file at ``path`` from the current step of the optimizer. Later lines are moved to
            ``run.jsonl.cut`` and their frames to ``run.frames.cut``, replacing older files of these names.
            The file must have the recipe and the parameters of the optimizer, and also the same weights if it
            is continued from the step where it begins.
        collective: whether all ranks of the run open the trajectory, of which the first one writes (default).
            With False, one rank alone opens and writes it; the others must not wait for it if that raises.

    Warns:
        UserWarning: if a replay cannot reproduce the bits of the run: a run of AGZO without ``frames``, or
            with an in-place probe.

    Raises:
        FileExistsError: if ``path`` exists, without ``resume``.
        ValueError: if earlier steps of the optimizer would be missing from the recording, if the optimizer is
            already recorded, and if ranks that hold parts of the parameters do not exchange losses.
        TypeError: for an optimizer that is not zoext's.
        TrajectoryError: for a file that cannot be continued. It is unchanged. Also if another rank raised, or
            records another run.
        BlockingIOError: if another recording has the file open. The file is locked until ``close`` or the end
            of the process. On a file system without locks, a second recording is detected when it writes.
        OSError: if the file cannot be written, or was moved, removed or replaced. A failed background write
            raises from the next step, before it moves a weight, and from ``flush`` and ``close``; each of
            them retries the write first. The interpreter retries once more at exit, and reports on stderr how
            many steps are lost, unless ``close`` has already raised.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        optimizer: torch.optim.Optimizer,
        *,
        frames: bool = False,
        notes: Mapping[str, Any] | None = None,
        resume: bool = False,
        collective: bool = True,
    ) -> None:
        self.path = Path(path)
        self._optimizer = optimizer = unwrap(optimizer)
        agreement = Agreement.of_run(optimizer) if collective else Agreement.of_one(optimizer)
        is_first = agreement.is_first
        with_frames = frames and optimizer.engine.axes.direction.watches
        with agreement.reached(_outline_of_run(optimizer, with_frames, resume)):
            if optimizer.recorder is not None:
                raise ValueError("optimizer: its steps are recorded already; close that trajectory first")
            if is_first and not resume:
                _warn_if_inexact(optimizer, frames)
            if not resume:
                _check_fresh(optimizer)
            notes = _checked(notes or {})
            optimizer.engine.deferral.begin_recording(optimizer.param_groups, continues=resume)
        if resume:
            opened = opening.resume(self.path, optimizer, agreement, is_first=is_first, frames=with_frames)
        else:
            opened = opening.begin(
                self.path, optimizer, agreement, is_first=is_first, frames=with_frames, notes=notes
            )
        self._writer, self._pieces = None, None  # on another rank than the first
        if opened is not None:
            self._writer, end = opened
            self._pieces = Pieces(self.path, end)
        self._step = optimizer.param_groups[0]["step"]
        self._outline = _outline(optimizer)
        optimizer.recorder = self

    def check(self) -> None:
        """Raises if the next step could not be recorded. The optimizer calls it before it moves a weight."""
        try:
            if self._writer is not None:
                self._writer.check()
        except OSError as error:
            remedy = "Make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "Fix this"
            raise OSError(
                error.errno,
                f"{error.strerror}; no weight was moved now, and no step is lost yet. {remedy} and step "
                "again, or close() the trajectory to continue without it",
                error.filename,
            ) from None
        step = self._optimizer.param_groups[0]["step"]
        if step != self._step or _outline(self._optimizer) != self._outline:
            raise RuntimeError(
                f"{self.path}: the optimizer was at step {self._step} when its last step was recorded and is "
                f"at {step}, or its seed, its number of parameters or a dtype has changed, which the file "
                "does not record; close() the trajectory and begin another one"
            )

    def record(self, step: AppliedStep) -> None:
        """Records a step. The optimizer calls it after the step."""
        if self._writer is not None and self._pieces is not None:
            moves = ranges(key for group in self._optimizer.engine.groups for key in group.keys)
            self._writer.put(self._pieces.of(self._step + 1, step, moves))
        self._step += 1  # last, so that check() reports a step that could not be recorded

    def flush(self) -> None:
        """Waits until all steps so far are on the disk."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Ends the recording; the optimizer continues without it. If it raises, it can be called again."""
        if self._optimizer.recorder is self:
            self._optimizer.recorder = None
        if self._writer is not None:
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
            error.add_note(f"{refusal}; fix this and close() the trajectory again")


def _warn_if_inexact(optimizer: ZerothOrderOptimizer, frames: bool) -> None:
    if optimizer.engine.axes.direction.watches and not frames:
        warnings.warn(
            "the bases of AGZO come from data and not from seeds, so this trajectory cannot be replayed; "
            "record them with frames=True",
            stacklevel=3,
        )
    if not optimizer.engine.probe.is_exact:
        warnings.warn(
            "probe='inplace' restores the weights only to rounding, and the trajectory does not record the "
            "error: a replay will be near the run, but not equal to it. Pass the module as params, or "
            "probe=StreamedProbe(module)",
            stacklevel=3,
        )


def _outline_of_run(optimizer: ZerothOrderOptimizer, frames: bool, resume: bool) -> str:
    """What must be the same on all ranks."""
    record = Header.of(optimizer, frames, {}, digests=False).record()
    return json.dumps([record, resume])


def _outline(optimizer: ZerothOrderOptimizer) -> list[object]:
    """What must not change during a recording."""
    groups = optimizer.param_groups
    return [groups[0]["seed"], *([tensor.dtype for tensor in group["params"]] for group in groups)]


def _checked(notes: Mapping[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(dict(notes), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise type(error)(f"notes must be what JSON can hold: {error}") from None
    return dict(notes)


def _check_fresh(optimizer: ZerothOrderOptimizer) -> None:
    if _optimizers.remembers(optimizer):
        raise ValueError(
            f"optimizer: at step {optimizer.param_groups[0]['step']}, its next step depends on earlier ones, "
            "which would not be in the trajectory; begin recording before its first step"
        )
