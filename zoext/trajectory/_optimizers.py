"""What recording and replaying read of an optimizer."""

from __future__ import annotations

from torch import Tensor

from zoext import noise
from zoext._parameters import shards, wrappers
from zoext._parameters.precision import RESIDUAL
from zoext.optimizer import ZerothOrderOptimizer


def named_groups(optimizer: ZerothOrderOptimizer) -> list[list[tuple[str, int, Tensor]]]:
    """The name, the key and the tensor of each parameter, by group.

    The name is that in the module if the optimizer knows the module, else the one it was given.
    """
    module = optimizer.engine.module
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
    residuals = (shards.part_of(state[RESIDUAL]) for state in optimizer.state.values() if RESIDUAL in state)
    return any(group["update_state"] for group in optimizer.param_groups) or any(map(Tensor.any, residuals))
