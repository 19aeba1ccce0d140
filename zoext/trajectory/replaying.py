"""Does a recorded run again: bit for bit, without a forward."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from itertools import groupby, islice
from pathlib import Path

import torch
from torch import Tensor, nn

from zoext import noise
from zoext._engine.applied_step import GroupOptions, TakenStep
from zoext._parameters import shards
from zoext._runtime import interrupts
from zoext.directions import Frame, Step
from zoext.directions.factored import Factored, matrix_shape
from zoext.estimators import Estimate
from zoext.optimizer import ZerothOrderOptimizer
from zoext.trajectory import frames, matching
from zoext.trajectory.agreement import agreed
from zoext.trajectory.fields import TrajectoryError
from zoext.trajectory.reading import Part, read_until
from zoext.trajectory.steps import RecordedStep, keys_in

#: Steps in one pass over the weights, and where each has factors in memory.
AT_ONCE, AT_ONCE_FACTORED = 64, 16

StrPath = str | os.PathLike[str]


def replay(
    target: nn.Module | ZerothOrderOptimizer, path: StrPath | Sequence[StrPath], *, to_step: int | None = None
) -> ZerothOrderOptimizer:
    """Moves the weights that a run began with to where it had them, bit for bit, without a forward.

    The device, the number of threads, the instruction set and the way in which parameters are sharded may be
    others than those of the run. Many steps go into one pass over the weights, each rounded as it was in the
    run.

    Where parameters are DTensors, all ranks that have parts of them must call this; if one refuses, all do.

    Args:
        target: the model, with the weights that the run began with; its parameters are found by name, and
            those that the run did not move are frozen. Or an optimizer of the run's recipe and parameters,
            at the step where the recording began.
        path: the trajectory. With several, all of runs that began with these weights, their changes are added
            up: each is replayed on what the one before left.
        to_step: the step of the run to stop after; by default the last that is recorded.

    Warns:
        UserWarning: for a run with probes in place, to which the replay is near but not equal.

    Returns:
        The optimizer of the (last) trajectory, where that run had it: training can go on with it.

    Raises:
        TrajectoryError: for a trajectory that is damaged (within ``to_step``), of another version, or of
            other weights, and for one of AGZO without its bases; on one of several ranks also where another
            refused, or read another trajectory. No weight was moved.
        ValueError: for a ``to_step`` that the trajectory does not reach.
        RuntimeError: for an optimizer whose steps are recorded.
        OSError: for a file that cannot be read.
    """
    paths = [Path(path)] if isinstance(path, str | os.PathLike) else [Path(each) for each in path]
    if len(paths) != 1 and (not paths or to_step is not None or not isinstance(target, nn.Module)):
        raise ValueError("path: several trajectories are replayed whole, at least one, and on a module")
    if to_step is not None and (isinstance(to_step, bool) or not isinstance(to_step, int)):
        raise TypeError(f"to_step must be an integer, not {to_step!r}")
    with agreed(_tensors(target)):
        parts = [read_until(each, to_step) for each in paths]
    return replay_parts(target, parts)


def replay_parts(target: nn.Module | ZerothOrderOptimizer, parts: Sequence[Part]) -> ZerothOrderOptimizer:
    """Replays what was read of one or several trajectories, as ``replay`` does."""
    tensors = _tensors(target)
    with agreed(tensors, on=" ".join(part.sha256 for part in parts)):
        replays = [_Replay(target, part) for part in parts]
    with agreed(tensors):
        for each in replays:
            each.check_weights()
    for each in replays:
        if not each.is_exact:
            warnings.warn(
                f"{each.path}: the probes of this run changed the weights in place and took that back to "
                "rounding, which no line tells of: the replay is near the run, but not equal to it",
                stacklevel=3,
            )
    for each in replays:
        try:
            each.run()
        except BaseException as error:
            error.add_note(f"{each.path}: {each.place}")
            raise
    return replays[-1].optimizer


def _tensors(target: nn.Module | ZerothOrderOptimizer) -> list[Tensor]:
    """The parameters of ``target``, as they are between forwards."""
    module = target if isinstance(target, nn.Module) else target._module
    if module is not None:
        shards.reshard(module)
    if isinstance(target, nn.Module):
        return list(target.parameters())
    return [tensor for group in target.param_groups for tensor in group["params"]]


class _Replay:
    """A replay of which everything was read and checked but the weights."""

    def __init__(self, target: nn.Module | ZerothOrderOptimizer, part: Part) -> None:
        if isinstance(target, ZerothOrderOptimizer):
            target._check_not_recorded("replay")
        header, path = part.header, part.path
        self.path = path
        self._header = header
        self.is_exact = header.exact
        self._steps = part.steps
        self._drawn: tuple[int, Frame] | None = None
        if isinstance(target, ZerothOrderOptimizer):
            matching.check_optimizer(header, target, path)
            groups = [group["params"] for group in target.param_groups]
        else:
            groups = matching.find(header, target, path)
        # All that any step moves, so that each can be moved, or nothing happens.
        moves = {key for ranges in {step.setting.moves for step in part.steps} for key in keys_in(ranges)}
        matching.check_movable(header, groups, moves, path)
        with matching.moving(groups, moves if self._steps else matching.movable(groups)):
            if isinstance(target, ZerothOrderOptimizer):
                self.optimizer = target
            else:
                self.optimizer = matching.optimizer_of(header, target, groups, path)
        if header.frames or self.optimizer._axes.direction.watches:
            self._check_frames(header.frames)

    @property
    def _groups(self) -> matching.Groups:
        return [group["params"] for group in self.optimizer.param_groups]

    @property
    def step(self) -> int:
        return int(self.optimizer.param_groups[0]["step"])

    @property
    def place(self) -> str:
        """Where the weights are after a replay that raised."""
        if self.optimizer._is_torn:
            return f"the weights are between step {self.step} and a later one now; load the base again"
        return f"the weights are those of step {self.step} now, between base and end"

    def check_weights(self) -> None:
        matching.check_weights(self._header, self._groups, self.path)

    def run(self) -> None:
        optimizer, groups = self.optimizer, self._groups
        optimizer._pending.clear()  # estimates at weights that there will not be any more
        at_once = AT_ONCE_FACTORED if isinstance(optimizer._axes.direction, Factored) else AT_ONCE
        with torch.inference_mode(False), torch.no_grad():
            for moves, steps in groupby(self._steps, key=lambda step: step.setting.moves):
                matching.let_move(groups, keys_in(moves))
                optimizer._current_groups()
                self._drawn = None
                while some := list(islice(steps, at_once)):
                    with interrupts.deferred():
                        optimizer._take(self._taken(some))
        if self._steps:
            self._set_options(self._steps[-1])

    def _taken(self, steps: Sequence[RecordedStep]) -> list[TakenStep]:
        sizes = [len(step.seeds) for step in steps]
        seeds = self._tensor([noise.signed(seed) for step in steps for seed in step.seeds], torch.int64)
        coefficients = self._tensor([c for step in steps for c in step.coefficients], torch.float32)
        columns = zip(
            steps,
            seeds.split(sizes),
            coefficients.split(sizes),
            self._tensor([step.loss for step in steps], torch.float32),
            self._tensor([step.spread for step in steps], torch.float32),
            self._tensor([step.finite for step in steps], torch.bool),
            strict=True,
        )
        return [
            TakenStep(
                Estimate(seeds, coefficients, loss, spread, step.forwards, finite),
                self._frame(step),
                tuple(map(GroupOptions, step.lr, step.setting.mu, step.setting.weight_decay)),
            )
            for step, seeds, coefficients, loss, spread, finite in columns
        ]

    def _tensor(self, values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self._device)

    @property
    def _device(self) -> torch.device:
        return next(group.device for group in self.optimizer._groups if len(group))

    def _frame(self, step: RecordedStep) -> Frame:
        optimizer = self.optimizer
        if step.frame is not None:
            frame = frames.read(frames.path_beside(self.path), step.frame)
            return Frame(left=_moved(frame.left, self._device), right=_moved(frame.right, self._device))
        first = optimizer.param_groups[0]
        origin = optimizer._axes.direction.origin(step.number - 1)
        if self._drawn is None or self._drawn[0] != origin:
            seed = self._tensor([noise.signed(noise.step_seed(first["seed"], origin))], torch.int64)
            self._drawn = origin, optimizer._axes.direction.frame(Step(seed, optimizer._groups))
        return self._drawn[1]

    def _check_frames(self, has_frames: bool) -> None:
        if not has_frames:
            raise TrajectoryError(
                f"{self.path}: was recorded without the bases of AGZO, which come from data and not from "
                "seeds, so it cannot be replayed; record the run with frames=True"
            )
        if not self.optimizer._axes.direction.watches:
            raise TrajectoryError(f"{self.path}: line 1: frames must be false for a direction without bases")
        tensors = [tensor for group in self.optimizer.param_groups for tensor in group["params"]]
        beside = frames.path_beside(self.path)
        kinds: dict[int, tuple[int, torch.Size]] = {}  # the side of a factor, and its shape
        for step in self._steps:
            assert step.frame is not None
            frame = frames.read(beside, step.frame)
            for side, factors in enumerate((frame.left, frame.right)):
                for key, factor in factors.items():
                    if (
                        not any(first <= key < end for first, end in step.setting.moves)
                        or not _fits(factor, tensors[key], side)
                        or kinds.setdefault(key, (side, factor.shape)) != (side, factor.shape)
                    ):
                        raise TrajectoryError(
                            f"{beside}: damaged at byte {step.frame.offset}: the factor of parameter {key} "
                            "does not fit it"
                        )

    def _set_options(self, last: RecordedStep) -> None:
        columns = zip(last.lr, last.setting.mu, last.setting.weight_decay, strict=True)
        for group, (lr, mu, weight_decay) in zip(self.optimizer.param_groups, columns, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
            group["mu"], group["weight_decay"] = mu, weight_decay


def _fits(factor: Tensor, tensor: Tensor, side: int) -> bool:
    """Whether a factor is one of a matrix: float32 [rank, rows] on the left, [rank, columns] on the right."""
    if factor.dtype != torch.float32 or factor.dim() != 2 or tensor.dim() < 2:
        return False
    length = matrix_shape(tensor.shape)[side]
    return factor.shape[1] == length and 0 < factor.shape[0] <= length


def _moved(factors: Mapping[int, Tensor], device: torch.device) -> dict[int, Tensor]:
    return {key: factor.to(device) for key, factor in factors.items()}
