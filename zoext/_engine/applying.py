"""Applies steps: an estimate, its frame and its options become an update of the parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from zoext._engine.axes import Axes
from zoext._engine.deferral import Deferral
from zoext._engine.estimation import Estimation
from zoext._parameters import gathering
from zoext._parameters.parameters import Parameters
from zoext._parameters.precision import rounded
from zoext._runtime import interrupts
from zoext._runtime.devices import widest
from zoext._runtime.profiling import Phase, record
from zoext.directions import Frame, Terms
from zoext.estimators import Estimate
from zoext.ops import Rounding
from zoext.probes import Session
from zoext.updates import GroupStep, LinearUpdate, State


class GroupOptions(NamedTuple):
    """The hyperparameters of a parameter group in one step."""

    lr: float | Tensor
    mu: float
    weight_decay: float


@dataclass(frozen=True, slots=True)
class AppliedStep:
    """An estimate, the frame of its directions, and the options of each parameter group.

    ``merged`` tells, when the step was taken, whether a look had the steps before it written (``Deferral``).
    """

    estimate: Estimate
    frame: Frame
    options: tuple[GroupOptions, ...]
    merged: bool = False


class Recorder(Protocol):
    """Receives every step; see ``ZerothOrderOptimizer.recorder``."""

    def check(self) -> None:
        """Called before a step moves any parameter. Raises if the step could not be recorded."""

    def record(self, step: AppliedStep) -> None:
        """Called after a step. Must not wait for the device."""


class Target(NamedTuple):
    """What an update moves, and how."""

    axes: Axes
    groups: tuple[Parameters, ...]
    rounding: Rounding
    deferral: Deferral


def apply(target: Target, states: Sequence[State], steps: Sequence[AppliedStep]) -> list[State]:
    """Applies the steps to all groups in order, and returns the new states of the groups."""
    return [_apply_to_group(target, position, state, steps, None) for position, state in enumerate(states)]


def can_restore(target: Target) -> bool:
    """Whether a single pass may both restore theta and update it.

    Requires float32 weights. Restoring 16-bit weights rounds to nearest, which undoes the rounding of the
    displacement; stochastic rounding in a single pass would turn that rounding into a random walk. The
    coefficient of the single pass is a float32, which is too coarse for float64 weights.
    """
    update = target.axes.update
    is_linear = isinstance(update, LinearUpdate) and type(update).apply is LinearUpdate.apply
    return is_linear and all(
        tensor.dtype == torch.float32 for group in target.groups for tensor in group.tensors
    )


def restore_and_apply(
    target: Target, states: Sequence[State], step: AppliedStep, session: Session, estimation: Estimation
) -> list[State]:
    """``apply``, starting from where the last in-place probe left theta, in one pass over theta."""
    moved = []
    for position, state in enumerate(states):
        is_empty = not len(target.groups[position])
        displaced = None if is_empty else estimation.displacement(position)
        moved.append(_apply_to_group(target, position, state, [step], displaced))
        if not is_empty:
            session.settle()
    return moved


@contextmanager
def updating(module: nn.Module | None) -> Iterator[None]:
    """The block of an update. ``module`` gathers sharded weights again, which have moved."""
    with interrupts.deferred(), record(Phase.UPDATE):
        try:
            yield
        finally:
            if module is not None:
                gathering.reshard(module)


def _apply_to_group(
    target: Target, position: int, state: State, steps: Sequence[AppliedStep], displaced: Terms | None
) -> State:
    axes = target.axes
    movable = target.groups[position]
    if target.rounding is Rounding.STOCHASTIC:
        movable = rounded(movable, target.rounding)
    group_steps = [_group_step(axes, step, position) for step in steps]
    if axes.direction.defers:
        assert isinstance(axes.update, LinearUpdate)
        frames = [step.frame for step in steps]
        pairs = list(zip(group_steps, frames, strict=True))
        new = target.deferral.apply(axes.update, movable, pairs, state)
    elif displaced is None:
        new = axes.update.apply(axes.direction, movable, group_steps, state)
    else:
        assert isinstance(axes.update, LinearUpdate)
        new = axes.update.restore_and_apply(axes.direction, movable, group_steps[0], displaced, state)
    movable.tell_autograd()
    return new


def _group_step(axes: Axes, step: AppliedStep, position: int) -> GroupStep:
    lr, mu, weight_decay = step.options[position]
    # Coefficients refer to the mu of the first group; a group with another mu scales them.
    relative = step.options[0].mu / mu
    coefficients = step.estimate.coefficients
    terms = Terms(step.estimate.seeds, coefficients if relative == 1 else coefficients * relative, step.frame)
    # Treat a tensor as the float that it holds, so that products with it are rounded in the same way.
    lr = lr.to(widest(lr.device)) if isinstance(lr, Tensor) else lr
    return GroupStep(axes.direction.gradient(terms), step.estimate, lr, weight_decay)
