"""Keeps a model at the end of a trajectory that another process still writes."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from zoext._parameters import shards
from zoext.optimizer import ZerothOrderOptimizer, unwrap
from zoext.trajectory._format.reading import Part, open_recording, read_on
from zoext.trajectory._format.steps import StepRecord
from zoext.trajectory._replay.part_replay import PartReplay


class Follower:
    """Replays a trajectory that is still being written, step by step, as its lines arrive.

    With it a process that does not train has the weights of a run, bit for bit, to evaluate or to serve them:

        follower = zoext.Follower(model, "run.jsonl")      # at the last step that is recorded by now
        while wait_for_more():
            follower.catch_up()
            evaluate(model)

    The file may be that of the run, or a copy to which another process appends whole or torn lines.

    Args:
        target: the model, with the weights that the run began with, or an optimizer; as for ``replay``.
        path: the trajectory.

    Attributes:
        optimizer: the optimizer of the run, in its state after ``step``.
        header: the header of the trajectory, with the ``notes`` of the run.
        step: the step of the run that the weights are at.
        checksum: the ``crc32`` of the last line that was applied. It depends on all lines before, so two
            processes that followed the same run to the same step have the same one.

    Warns:
        UserWarning: for a run with an in-place probe, which a replay approximates but does not reproduce.

    Raises:
        TrajectoryError: as for ``replay``; no weight was moved.
        ValueError: for sharded parameters, and for a run with ``defer=True``: a look in the middle of an
            interval would change the bits of the steps that follow.
        TypeError: for an optimizer that is not zoext's.
        RuntimeError: for an optimizer whose steps are being recorded.
        OSError: if a file cannot be read.
    """

    def __init__(self, target: nn.Module | torch.optim.Optimizer, path: str | os.PathLike[str]) -> None:
        target = target if isinstance(target, nn.Module) else unwrap(target)
        _check_not_sharded(target)
        self.path = Path(path)
        recording = open_recording(self.path)
        read = list(recording.rest)
        self.header = recording.header
        if self.header.defers:
            raise ValueError(
                f"path: the run of {self.path} holds steps back (defer=True), and a look in the middle of an "
                "interval would change the bits of later steps; call zoext.replay on the base instead"
            )
        self._last: StepRecord | None = None
        self._line = recording.first
        if read:
            self._last, self._line = read[-1]
        steps = [step for step, _ in read]
        self._replay = PartReplay(target, Part(self.path, self.header, steps, sha256=""))
        self._replay.check_weights()
        self.optimizer = self._replay.optimizer
        self._replay.warn_if_inexact(stacklevel=2)
        self._replay.run()

    @property
    def step(self) -> int:
        return self.header.step if self._last is None else self._last.number

    @property
    def checksum(self) -> str:
        return f"{self._line.checksum:08x}"

    def catch_up(self) -> int:
        """Applies the steps that were appended since the last call, and returns how many they are.

        All of them are read and checked before a weight moves.

        Raises:
            TrajectoryError: for a corrupted line, for steps that do not match the model, and if the file was
                cut. No weight was moved.
            RuntimeError: if the optimizer has taken steps of its own.
            OSError: if the file cannot be read.
        """
        read = list(read_on(self.path, self.header, self._line, self._last))
        if read:
            self._replay.take([step for step, _ in read])
            self._replay.run()
            self._last, self._line = read[-1]
        return len(read)


def _check_not_sharded(target: nn.Module | ZerothOrderOptimizer) -> None:
    tensors = (
        target.parameters()
        if isinstance(target, nn.Module)
        else (tensor for group in target.param_groups for tensor in group["params"])
    )
    if any(map(shards.is_distributed, tensors)):
        raise ValueError(
            "target: it has DTensors, which a Follower cannot move; call zoext.replay on all ranks instead"
        )
