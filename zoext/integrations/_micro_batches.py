"""Micro-batches that wait for the step of their group, and the loss of the whole group.

Frameworks accumulate gradients: each micro-batch runs when it arrives. A forward-only step runs all of them
at each probe instead, as one large batch would run, because pools choose by the losses of the whole batch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """A micro-batch that has not run yet.

    Attributes:
        function: the function of the batch; a loss, or what contains one.
        args: the arguments of ``function``. Each call gets new containers, because a function may remove
            entries of its batch.
        kwargs: the keyword arguments of ``function``.
        weight: the weight of its loss in the mean of the group.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    weight: float | Tensor

    def run(self) -> Any:
        kwargs = {name: _fresh(value) for name, value in self.kwargs.items()}
        return self.function(*map(_fresh, self.args), **kwargs)


def samples(batch: object) -> int:
    """The number of samples of a batch: the length of the first tensor in it; 1 if there is none."""
    return _length(batch) or 1


def _length(batch: object) -> int | None:
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else None
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if not isinstance(batch, list | tuple):
        return None
    return next((length for part in batch if (length := _length(part))), None)


def shares_of(
    weights: Iterable[float | Tensor], device: torch.device, group: dist.ProcessGroup | None
) -> Tensor | None:
    """The factors of the losses in the mean of the group; None for a single loss, which is its own mean.

    With a process group, the means of the processes have the weighted mean of all processes as their average.
    """
    columns = [_number(weight, device).to(torch.float32) for weight in weights]
    if len(columns) == 1 and group is None:
        return None
    stacked = torch.stack(columns)
    total = stacked.sum()
    if group is None:
        return stacked / total
    dist.all_reduce(total, group=group)
    return stacked * dist.get_world_size(group) / total  # in this order, equal weights give exact shares


def mean_loss(losses: Sequence[Tensor | float], shares: Tensor | None) -> Tensor | float:
    """The weighted mean of the losses of a group. A weight of zero leaves out a loss that is not finite."""
    if shares is None:
        return losses[0]
    total = torch.zeros((), device=shares.device)
    for loss, share in zip(losses, shares, strict=True):
        value = _number(loss, shares.device)
        value = value.to(torch.promote_types(value.dtype, torch.float32))
        total = total + torch.where(share == 0, 0.0, value * share)
    return total


def not_run(device: torch.device) -> Tensor:
    """What stands for the loss of a micro-batch that waits."""
    return torch.full((), math.nan, dtype=torch.float32, device=device)


def _number(value: float | Tensor, device: torch.device) -> Tensor:
    """``value`` as a tensor [] on ``device``; a number of Python is filled in there, which copies nothing."""
    if isinstance(value, Tensor):
        return value.detach().reshape(()).to(device, non_blocking=True)
    return torch.full((), float(value), device=device)


def _fresh(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, MutableMapping | list) else value
