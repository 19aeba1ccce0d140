"""Makes the ranks that share parameters replay together or not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed

from zoext._parameters import shards
from zoext.trajectory._format.fields import TrajectoryError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_REFUSED = -1


@contextmanager
def agreed(tensors: Iterable[Tensor], *, on: str = "") -> Iterator[None]:
    """A block that raises on all ranks that share ``tensors`` if it raises on one of them.

    It is a collective for DTensors, and has no effect without them.

    Args:
        tensors: the parameters that are about to move.
        on: a text that must be the same on all ranks.

    Raises:
        TrajectoryError: if another rank raised, or passed another ``on``.
    """
    found = dict.fromkeys(tensor.device_mesh for tensor in tensors if shards.is_distributed(tensor))
    meshes = [mesh for mesh in found if mesh.get_coordinate() is not None]
    try:
        yield
    except Exception:
        _range_over_ranks(_REFUSED, meshes)
        raise
    least, greatest = _range_over_ranks(_number_of(on), meshes)
    if least == _REFUSED:
        raise TrajectoryError("another rank refused to replay, so this one does too; see the error there")
    if least != greatest:
        raise TrajectoryError(
            "the ranks have read different trajectories, or one that is still being written; give all ranks "
            "the same file and the same to_step"
        )


def _number_of(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])


def _range_over_ranks(number: int, meshes: list[DeviceMesh]) -> tuple[int, int]:
    """The least and the greatest ``number`` of all ranks."""
    least, greatest = number, number
    for mesh in meshes:
        pair = torch.tensor([-least, greatest], device=mesh.device_type)
        for axis in range(mesh.ndim):
            distributed.all_reduce(pair, distributed.ReduceOp.MAX, group=mesh.get_group(axis))
        least, greatest = -int(pair[0]), int(pair[1])
    return least, greatest
