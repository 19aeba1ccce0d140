"""What a matrix lacks of the steps that were taken, and how it is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from zoext._parameters import shards
from zoext._parameters.parameters import Parameters
from zoext._runtime.notices import warn
from zoext.directions.factored import write_product
from zoext.noise import FLOATING
from zoext.ops import Rounding


@dataclass(slots=True)
class Held:
    """``sum^T right``, which the only matrix in ``parameters`` lacks."""

    parameters: Parameters
    sum: Tensor  # float32 [rank, m]
    right: Tensor  # float32 [1, rank, n]
    was_written: bool = False  # by somebody else, since the sum began
    _dtype: torch.dtype = field(init=False)
    _version: int = field(init=False)  # of the matrix, when we last had it to ourselves

    def __post_init__(self) -> None:
        self._dtype = self.owner.dtype
        self.excuse_writes()

    @property
    def owner(self) -> Tensor:
        return self.parameters.owners[0]

    @property
    def name(self) -> str:
        return self.parameters.names[0]

    def notice_writes(self) -> bool:
        """Whether somebody wrote to the matrix since the last call of ``excuse_writes``, or before it."""
        self.was_written |= self.owner._version != self._version
        return self.was_written

    def excuse_writes(self) -> None:
        """Called after probes, which count as writes for autograd and leave the values as they were."""
        self._version = self.owner._version

    def write(self, seed: Tensor) -> bool:
        """Adds the product to the matrix; False if that has another shape now or no values.

        A matrix that was moved or cast since has the values that it had, so it gets what these lack.
        """
        now = self._now()
        if now is None:
            return False
        left, right = (each.to(now.device) for each in (self.sum.unsqueeze(0), self.right))
        write_product(now, left, right, seed.to(now.device))
        now.tell_autograd()
        return True

    def _now(self) -> Parameters | None:
        before, owner = self.parameters, self.owner
        if owner.is_meta or owner.shape != before.blocks[0].shape or owner.dtype not in FLOATING:
            return None
        if owner.data_ptr() == before.addresses[0] and owner.dtype == self._dtype:
            return before
        now = replace(
            before, tensors=(owner,), blocks=(shards.block_of(owner),), addresses=(owner.data_ptr(),)
        )
        if now.rounding is not Rounding.RESIDUAL:
            return now
        if owner.dtype == self._dtype and owner.device == before.residuals[0].device:
            return now
        return replace(now, rounding=Rounding.NEAREST, residuals=())  # they are those of the old values


def report(lost: list[str], written: list[str], replaced: list[str], loads: bool) -> None:
    """Tells of weights, by their names, whose steps went elsewhere; see ``Deferral.merge``."""
    if written:
        warn(
            f"weights were written to while defer=True held back steps of them: {listed(written)}. They stay "
            "as they were written, and those steps are dropped. Call optimizer.merge() before you write to "
            "weights"
        )
    if replaced:
        warn(
            "weights that are no parameters of the model any more got the steps that defer=True held back: "
            f"{listed(replaced)}. If others took their place, these lack the steps. Call optimizer.merge() "
            "before you replace weights or merge adapters"
        )
    if lost:
        message = (
            f"weights have another shape or no values (meta) now: {listed(lost)}. The steps that defer=True "
            "held back of them are lost; load a checkpoint, and call optimizer.merge() before you change "
            "weights"
        )
        if not loads:
            raise RuntimeError(message)
        warn(message)


def listed(names: Sequence[str]) -> str:
    """The first names, and how many there are more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
