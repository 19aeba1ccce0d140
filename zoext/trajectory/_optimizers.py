"""What recording and replaying read of an optimizer, and the operations of its step engine that they use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zoext import noise
from zoext._engine.applied_step import AppliedStep
from zoext._parameters import wrappers
from zoext._parameters.parameters import Parameters
from zoext._parameters.precision import RESIDUAL
from zoext.directions import Direction
from zoext.optimizer import ZerothOrderOptimizer


def named_groups(optimizer: ZerothOrderOptimizer) -> list[list[tuple[str, int, Tensor]]]:
    """The name, the key and the tensor of each parameter, by group.

    The name is that in the module if the optimizer knows the module, else the one it was given.
    """
    module = module_of(optimizer)
    own = wrappers.named_parameters(module) if module is not None else ()
    names = {id(tensor): name for name, tensor in own}
    groups, key = [], 0
    for group in optimizer.param_groups:
        given = group.get("param_names") or [None] * len(group["params"])
        rows = []
        for name, tensor in zip(given, group["params"], strict=True):
            rows.append((names.get(id(tensor)) or name or f"parameter {key}", key, tensor))
            key += 1
        groups.append(rows)
    return groups


def unsigned_seed(optimizer: ZerothOrderOptimizer) -> int:
    """The seed of the run as an unsigned 64-bit integer."""
    return noise.signed(optimizer.param_groups[0]["seed"]) % 2**64


def remembers(optimizer: ZerothOrderOptimizer) -> bool:
    """Whether the next step depends on earlier ones by more than the weights and the step number.

    It does for an update with a window (AdaMeZO) and for ``precision="residual"`` after the first step.
    """
    residuals = (state[RESIDUAL] for state in optimizer.state.values() if RESIDUAL in state)
    return any(group["update_state"] for group in optimizer.param_groups) or any(map(Tensor.any, residuals))


def module_of(optimizer: ZerothOrderOptimizer) -> nn.Module | None:
    return optimizer._module


def direction_of(optimizer: ZerothOrderOptimizer) -> Direction:
    return optimizer._axes.direction


def restores_exactly(optimizer: ZerothOrderOptimizer) -> bool:
    """Whether its probe restores the weights bit for bit."""
    return optimizer._probe.is_exact


def last_groups(optimizer: ZerothOrderOptimizer) -> list[Parameters]:
    """The parameters that the last step moved."""
    return optimizer._groups


def refresh_groups(optimizer: ZerothOrderOptimizer) -> list[Parameters]:
    """The parameters that move now, after ``requires_grad`` of some may have changed."""
    return optimizer._current_groups()


def device_of(optimizer: ZerothOrderOptimizer) -> torch.device:
    return next(group.device for group in last_groups(optimizer) if len(group))


def check_not_recorded(optimizer: ZerothOrderOptimizer, action: str) -> None:
    """Raises a RuntimeError while a trajectory records the optimizer."""
    optimizer._check_not_recorded(action)


def drop_estimates(optimizer: ZerothOrderOptimizer) -> None:
    """Discards estimates that no step has applied."""
    optimizer._pending.clear()


def apply(optimizer: ZerothOrderOptimizer, steps: Sequence[AppliedStep]) -> None:
    """Applies steps in order, in one pass over the weights, with the bits of one step at a time."""
    optimizer._take(steps)


def is_torn(optimizer: ZerothOrderOptimizer) -> bool:
    """Whether an update raised after it had moved some of the parameters."""
    return optimizer._is_torn
