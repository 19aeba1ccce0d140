"""The replay of one trajectory: checks it against its target, then applies its steps."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import groupby, islice

import torch
from torch import Tensor, nn

from zoext import noise
from zoext._engine import AppliedStep, GroupOptions
from zoext._parameters.shards import matrix_shape
from zoext.directions import Frame, Step
from zoext.directions.factored import Factored
from zoext.estimators import Estimate
from zoext.optimizer import ZerothOrderOptimizer
from zoext.probes import Probe
from zoext.trajectory._format import frames
from zoext.trajectory._format.fields import TrajectoryError
from zoext.trajectory._format.reading import Part
from zoext.trajectory._format.steps import StepRecord, keys_in
from zoext.trajectory._replay import matching

#: Steps per pass over the weights. Fewer where each has factors in memory.
AT_ONCE, AT_ONCE_FACTORED = 64, 16


class PartReplay:
    """A part of a trajectory that matches its target, except that the weights are unchecked.

    Raises:
        TrajectoryError: if the trajectory does not match ``target``, or its side file is corrupted.
        RuntimeError: for an optimizer whose steps are being recorded.
        ValueError, TypeError: for a ``probe`` that the model cannot have.
    """

    def __init__(
        self, target: nn.Module | ZerothOrderOptimizer, part: Part, probe: str | Probe = "auto"
    ) -> None:
        if isinstance(target, ZerothOrderOptimizer):
            _check_not_recorded(target)
        header, path = part.header, part.path
        self.path = path
        self._header = header
        self._steps: Sequence[StepRecord] = part.steps
        self._drawn: tuple[int, Frame] | None = None
        if isinstance(target, ZerothOrderOptimizer):
            matching.check_optimizer(header, target, path)
            groups = [group["params"] for group in target.param_groups]
        else:
            groups = matching.find(header, target, path)
        moves = self._check_movable(groups)
        with matching.moving(groups, moves if self._steps else matching.movable(groups)):
            if isinstance(target, ZerothOrderOptimizer):
                self.optimizer = target
            else:
                self.optimizer = matching.optimizer_of(header, target, groups, path, probe)
        self._direction = self.optimizer.engine.axes.direction
        self.optimizer.engine.deferral.look(self.optimizer.param_groups)  # the weights are checked next
        if header.frames or self._direction.watches:
            self._check_frames()

    def take(self, steps: Sequence[StepRecord]) -> None:
        """Makes ``run`` apply these steps next, which follow those that it has applied.

        Raises:
            TrajectoryError: if they do not match the target.
            RuntimeError: if the optimizer has taken steps of its own, or if its steps are being recorded.
        """
        _check_not_recorded(self.optimizer)
        at = self.optimizer.param_groups[0]["step"]
        if steps and at != steps[0].number - 1:
            raise RuntimeError(
                f"{self.path}: step {steps[0].number} comes next, but the optimizer is at step {at}: it has "
                "moved on its own; load the weights that the run began with, and replay again"
            )
        before, self._steps = self._steps, steps
        try:
            self._check_movable(self._groups)
            if self._header.frames or self._direction.watches:
                self._check_frames()
        except BaseException:
            self._steps = before
            raise

    def _check_movable(self, groups: matching.Groups) -> set[int]:
        """The keys that any step moves: the replay must be able to move all of them, or it moves none."""
        moves = {key for ranges in {step.setting.moves for step in self._steps} for key in keys_in(ranges)}
        matching.check_movable(self._header, groups, moves, self.path)
        return moves

    def warn_if_inexact(self, stacklevel: int) -> None:
        """Warns if the replay cannot reproduce the bits of the run."""
        if not self._header.exact:
            warnings.warn(
                f"{self.path}: the in-place probes of this run restored the weights only to rounding, and "
                "the file does not record the error: the replay is near the run, but not equal to it",
                stacklevel=stacklevel + 1,
            )

    @property
    def progress(self) -> str:
        """Which weights a replay that raised has left."""
        step = self.optimizer.param_groups[0]["step"]
        if self.optimizer.engine.run.is_torn:
            return (
                f"the weights are now between step {step} and a later one; load the weights that the run "
                "began with"
            )
        return f"the weights are now those of step {step}, before the end of the replay"

    def check_weights(self) -> None:
        """Raises a TrajectoryError unless the weights are those that the run began with."""
        matching.check_weights(self._header, self._groups, self.path)

    def run(self) -> None:
        """Applies the steps. An error that it raises has a note that tells which weights are left."""
        try:
            self._run()
        except BaseException as error:
            error.add_note(f"{self.path}: {self.progress}")
            raise

    def _run(self) -> None:
        engine, groups = self.optimizer.engine, self._groups
        engine.run.cancel()  # estimates at the weights before the replay
        at_once = AT_ONCE_FACTORED if isinstance(self._direction, Factored) else AT_ONCE
        with torch.inference_mode(False), torch.no_grad():
            for moves, steps in groupby(self._steps, key=lambda step: step.setting.moves):
                matching.let_move(groups, keys_in(moves))
                engine.look()
                self._drawn = None
                while some := list(islice(steps, at_once)):
                    engine.apply(self._applied(some))
            engine.deferral.merge()
        if self._steps:
            self._set_options(self._steps[-1])

    @property
    def _groups(self) -> matching.Groups:
        return [group["params"] for group in self.optimizer.param_groups]

    @property
    def _device(self) -> torch.device:
        return next(group.device for group in self.optimizer.engine.groups if len(group))

    def _applied(self, steps: Sequence[StepRecord]) -> list[AppliedStep]:
        sizes = [len(step.seeds) for step in steps]
        seeds = self._tensor([noise.signed(seed) for step in steps for seed in step.seeds], torch.int64)
        coefficients = self._tensor([c for step in steps for c in step.coefficients], torch.float32)
        columns = zip(
            steps,
            seeds.split(sizes),
            coefficients.split(sizes),
            self._tensor([step.loss for step in steps], torch.float32),
            self._tensor([step.loss_std for step in steps], torch.float32),
            self._tensor([step.finite for step in steps], torch.bool),
            strict=True,
        )
        return [
            AppliedStep(
                Estimate(seeds, coefficients, loss, loss_std, step.forwards, finite),
                self._frame(step),
                tuple(map(GroupOptions, step.lr, step.setting.mu, step.setting.weight_decay)),
                step.merged,
            )
            for step, seeds, coefficients, loss, loss_std, finite in columns
        ]

    def _tensor(self, values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self._device)

    def _frame(self, step: StepRecord) -> Frame:
        if step.frame is not None:
            frame = frames.read(frames.path_beside(self.path), step.frame)
            left, right = (_moved(factors, self._device) for factors in (frame.left, frame.right))
            return Frame(left, right, frame.unused)
        origin = self._direction.origin(step.number - 1)
        if self._drawn is None or self._drawn[0] != origin:
            run_seed = self.optimizer.param_groups[0]["seed"]
            seed = self._tensor([noise.signed(noise.step_seed(run_seed, origin))], torch.int64)
            self._drawn = origin, self._direction.frame(Step(seed, self.optimizer.engine.groups))
        return self._drawn[1]

    def _check_frames(self) -> None:
        if not self._header.frames:
            raise TrajectoryError(
                f"{self.path}: was recorded without the bases of AGZO, which come from data and not from "
                "seeds, so it cannot be replayed; record the run with frames=True"
            )
        if not self._direction.watches:
            raise TrajectoryError(f"{self.path}: line 1: frames must be false for a direction without bases")
        tensors = [tensor for group in self._groups for tensor in group]
        beside = frames.path_beside(self.path)
        kinds: dict[int, tuple[int, torch.Size]] = {}  # the side and the shape of each factor
        for step in self._steps:
            assert step.frame is not None
            frame = frames.read(beside, step.frame)
            moving = set(keys_in(step.setting.moves))
            keys = [*frame.left, *frame.right, *frame.unused]
            if len(set(keys)) < len(keys) or not moving.issuperset(keys):
                raise frames.corrupted(
                    beside, step.frame, "its parameters are not those that move, once each"
                )
            for side, factors in enumerate((frame.left, frame.right)):
                for key, factor in factors.items():
                    if not _fits(factor, tensors[key], side) or kinds.setdefault(
                        key, (side, factor.shape)
                    ) != (side, factor.shape):
                        raise frames.corrupted(
                            beside, step.frame, f"the factor of parameter {key} does not fit it"
                        )

    def _set_options(self, last: StepRecord) -> None:
        columns = zip(last.lr, last.setting.mu, last.setting.weight_decay, strict=True)
        for group, (lr, mu, weight_decay) in zip(self.optimizer.param_groups, columns, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
            group["mu"], group["weight_decay"] = mu, weight_decay


def _check_not_recorded(optimizer: ZerothOrderOptimizer) -> None:
    if optimizer.recorder is not None:
        raise RuntimeError(
            "replay: the steps of this optimizer are recorded, and a trajectory cannot record a replay; "
            "close() the trajectory first, and begin another one or resume it afterwards"
        )


def _fits(factor: Tensor, tensor: Tensor, side: int) -> bool:
    """Whether it is a factor of the matrix: float32, left [rank, rows] or right [rank, columns].

    A stack of matrices has a factor for each of them.
    """
    if factor.dtype != torch.float32 or tensor.dim() < 2:
        return False
    is_stack = factor.dim() == 3 and tensor.dim() == 3 and factor.shape[0] == tensor.shape[0]
    if not is_stack and factor.dim() != 2:
        return False
    length = matrix_shape(tensor.shape[1:] if is_stack else tensor.shape)[side]
    return factor.shape[-1] == length and 0 < factor.shape[-2] <= length


def _moved(factors: Mapping[int, Tensor], device: torch.device) -> dict[int, Tensor]:
    return {key: factor.to(device) for key, factor in factors.items()}
