"""Turns applied steps into bytes to append, without making a step wait for its device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoext._engine import AppliedStep
from zoext.directions import Frame
from zoext.trajectory._format import frames, lines
from zoext.trajectory._format.fields import TrajectoryError
from zoext.trajectory._format.steps import Ranges, Setting, StepRecord
from zoext.trajectory._writer.background import Piece
from zoext.trajectory._writer.continuing import End


class Pieces:
    """The bytes of one step after another: each line depends on the lines before it.

    Args:
        path: the trajectory, for error messages.
        end: the current end of the trajectory.
    """

    def __init__(self, path: Path, end: End) -> None:
        self._path = path
        self._checksum = end.checksum
        self._offset = end.frames or 0
        self._has_frames = end.frames is not None
        self._setting = end.setting

    def of(self, number: int, step: AppliedStep, moves: Ranges) -> Piece:
        """The piece of step ``number``, which moved the parameters with the keys ``moves``.

        Call it when the step was taken. Call the piece in another thread: it waits for the device.
        """
        setting = Setting(
            tuple(options.mu for options in step.options),
            tuple(options.weight_decay for options in step.options),
            moves,
        )
        fetch = to_host(step if self._has_frames else dataclasses.replace(step, frame=Frame()))

        def make() -> tuple[bytes, ...]:
            on_host = fetch()
            data, place = frames.encode(on_host.frame, self._offset) if self._has_frames else (b"", None)
            record = _record(number, on_host, setting, place)
            try:
                line, self._checksum = lines.encode(record.record(self._setting), self._checksum)
            except ValueError as error:  # such as an lr tensor on CUDA that became NaN, which no step checks
                raise TrajectoryError(
                    f"{self._path}: step {number} cannot be recorded: {error}; close() the trajectory to "
                    "continue without it, or load a checkpoint of an earlier step and record with resume=True"
                ) from None
            self._setting = setting
            self._offset += len(data)
            return (data, line) if self._has_frames else (line,)

        return make


def _record(number: int, step: AppliedStep, setting: Setting, place: frames.Place | None) -> StepRecord:
    estimate = step.estimate
    return StepRecord(
        number=number,
        seeds=tuple(seed % 2**64 for seed in estimate.seeds.tolist()),
        coefficients=tuple(estimate.coefficients.tolist()),
        loss=float(estimate.loss),
        loss_std=float(estimate.loss_std),
        finite=bool(estimate.finite),
        forwards=estimate.forwards,
        lr=tuple(float(options.lr) for options in step.options),
        setting=setting,
        frame=place,
        merged=step.merged,
    )


def to_host(step: AppliedStep) -> Callable[[], AppliedStep]:
    """Starts to copy a step to the host; the returned function waits for the copies and returns them."""
    estimate = step.estimate
    values = {field.name: getattr(estimate, field.name) for field in dataclasses.fields(estimate)}
    copies: dict[str, Any] = {
        name: _copy(value) for name, value in values.items() if isinstance(value, Tensor)
    }
    copied = dataclasses.replace(
        step,
        estimate=dataclasses.replace(estimate, **copies),
        frame=Frame(_copies(step.frame.left), _copies(step.frame.right), step.frame.unused),
        options=tuple(
            options._replace(lr=_copy(options.lr)) if isinstance(options.lr, Tensor) else options
            for options in step.options
        ),
    )
    factors = [*step.frame.left.values(), *step.frame.right.values()]
    devices = {tensor.device for tensor in (estimate.coefficients, *factors)}
    arrivals = [_arrival(device) for device in devices if device.type == "cuda"]

    def fetch() -> AppliedStep:
        for arrival in arrivals:
            arrival.synchronize()
        return copied

    return fetch


def _copies(factors: Mapping[int, Tensor]) -> dict[int, Tensor]:
    return {key: _copy(factor) for key, factor in factors.items()}


def _copy(tensor: Tensor) -> Tensor:
    """A copy in host memory. The copy of a CUDA tensor is asynchronous."""
    if not tensor.is_cuda:
        return tensor.detach().clone()  # schedulers overwrite the learning rate in place
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor.detach(), non_blocking=True)


def _arrival(device: torch.device) -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event
