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
        digest: int64 [], of weights and options; 0 if they are not compared at this step.
        kind: a number for what the closure returns.
    """

    seed: Tensor
    digest: Tensor
    kind: int

    def numbers(self, dtype: torch.dtype) -> Tensor:
        return (
            torch.stack((self.seed, self.digest, torch.full_like(self.seed, self.kind)))
            .bitwise_and(_MASKS[dtype])
            .to(dtype)
        )


class Found(NamedTuple):
    """What a sum found out about its ranks."""

    steps_differ: bool
    weights_differ: bool
    kinds_differ: bool
    failed: int  # how many ranks whose closure raised
    failed_rank: int  # if it is one


class Sums(NamedTuple):
    """What the ranks of a group have together.

    Attributes:
        values: their sums, [n].
        failed: the sum of the numbers that tell which ranks failed, [].
        differs: whether something differs that must be the same, bool [].
    """

    values: Tensor
    failed: Tensor
    differs: Tensor


class CheckedSum:
    """Adds up numbers over the ranks of a group. What must be the same on all of them is added up with it."""

    def __init__(self) -> None:
        self._found = LateReads()
        self._unit = _FAILED[torch.float64]

    def of(self, values: Tensor, identity: Identity, failed: Tensor | None, group: dist.ProcessGroup) -> Sums:
        """Adds up ``values`` [n] over ``group``.

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
        # A rank whose closure raised does not know what it would have returned.
        differs = torch.cat((differs[:2], (differs[2] & (total[end] == 0)).view(1)))
        self._found.send(torch.cat((differs.to(dtype), total[end : end + 1])))
        return Sums(total[:end], total[end], differs.any())

    @staticmethod
    def failure(rank: int, device: torch.device) -> Tensor:
        """What a rank adds up if its closure raised, []."""
        dtype = widest(device)
        return torch.full((), _FAILED[dtype] + rank, dtype=dtype, device=device)

    def take(self) -> list[Found]:
        """What the sums since the last call found, if anything is wrong."""
        found = []
        for *differs, failed in self._found.take():
            steps, weights, kinds = map(bool, differs)
            count, rank = divmod(int(failed), self._unit)
            if count or steps or weights or kinds:
                found.append(Found(steps, weights, kinds, count, rank))
        return found
