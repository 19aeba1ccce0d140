"""Sums of a few numbers over ranks, which show whether the ranks belong together."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from zoext._runtime.devices import widest
from zoext._runtime.late_reads import LateReads

#: Bits of a number whose square, added up over ranks, is exact.
_MASKS = {torch.float64: 2**20 - 1, torch.float32: 2**8 - 1}
#: The number of ranks that failed, in units of this, and the sum of their numbers are sent as one.
_FAILED = {torch.float64: 2**26, torch.float32: 2**12}


class Identity(NamedTuple):
    """What all ranks of a sum must agree on.

    Attributes:
        seed: int64 [], of the step.
        digest: int64 [], of weights and options; None if they are not compared at this step.
        weighs: whether the closure returns a weight for its loss.
    """

    seed: Tensor
    digest: Tensor | None
    weighs: bool

    def numbers(self, dtype: torch.dtype) -> Tensor:
        digest = self.digest if self.digest is not None else torch.zeros_like(self.seed)
        weighs = torch.full_like(self.seed, int(self.weighs))
        return torch.stack((self.seed, digest, weighs)).bitwise_and(_MASKS[dtype]).to(dtype)


class Found(NamedTuple):
    """What a sum found out about its ranks."""

    steps_differ: bool
    weights_differ: bool
    weighing_differs: bool
    failed: int  # how many ranks whose closure raised
    failed_rank: int  # if it is one


class CheckedSum:
    """Adds up numbers over the ranks of a group. What must be the same on all of them is added up with it."""

    def __init__(self) -> None:
        self._found = LateReads()
        self._unit = _FAILED[torch.float64]

    def of(
        self, values: Tensor, identity: Identity, failed: Tensor | None, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        """Returns the sums of ``values`` [n], and of the numbers that tell which ranks failed, [].

        Args:
            values: of the widest dtype of their device.
            identity: see ``Identity``.
            failed: such a sum over other ranks; None if this rank has not failed.
            group: the ranks.
        """
        dtype = values.dtype
        self._unit = _FAILED[dtype]
        # Sums of values and of their squares are those of equal values only if all are equal.
        own = identity.numbers(dtype)
        failures = failed if failed is not None else values.new_zeros(())
        total = torch.cat((values, failures.view(1), own, own * own))
        dist.all_reduce(total, group=group)
        end = len(values)
        differs = total[end + 1 :] != dist.get_world_size(group) * torch.cat((own, own * own))
        differs = differs.view(2, 3).any(0)
        self._found.send(torch.cat((differs.to(dtype), total[end : end + 1])))
        return total[:end], total[end]

    @staticmethod
    def failure(rank: int, device: torch.device) -> Tensor:
        """What a rank adds up if its closure raised, []."""
        dtype = widest(device)
        return torch.full((), _FAILED[dtype] + rank, dtype=dtype, device=device)

    def take(self) -> list[Found]:
        """What the sums since the last call found, if anything is wrong."""
        found = []
        for *differs, failed in self._found.take():
            steps, weights, weighing = map(bool, differs)
            count, rank = divmod(int(failed), self._unit)
            if count or steps or weights or weighing:
                found.append(Found(steps, weights, weighing, count, rank))
        return found
