"""Makes the ranks that share a run act together or not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from zoext._parameters import shards
from zoext.optimizer import ZerothOrderOptimizer
from zoext.trajectory._format.fields import TrajectoryError

if TYPE_CHECKING:  # a build of torch may lack them
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

_REFUSED = -1


class _Axis(NamedTuple):
    """Ranks that communicate, and the device of the tensors that they send."""

    group: ProcessGroup
    device: torch.device | str


class Agreement:
    """Ranks that act together or not at all; without others, it has no effect.

    Args:
        axes: process groups of this rank that together connect it to all others. All ranks must pass the
            same ones in the same order.
        purpose: what the ranks do, for error messages: "replay" or "record".
    """

    def __init__(self, axes: Sequence[_Axis], purpose: str) -> None:
        self._axes = axes
        self._purpose = purpose

    @classmethod
    def of_shards(cls, tensors: Iterable[Tensor]) -> Agreement:
        """The ranks that hold parts of ``tensors``, to replay."""
        return cls(_axes_of(tensors), "replay")

    @classmethod
    def of_run(cls, optimizer: ZerothOrderOptimizer) -> Agreement:
        """The ranks that take the steps of ``optimizer`` together, to record.

        Raises:
            ValueError: if ranks hold parts of the parameters but do not exchange losses. Ranks learn from the
                exchange that one of them cannot record.
        """
        ranks = optimizer.engine.ranks
        tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
        device = next((tensor.device for tensor in tensors if tensor.requires_grad), torch.device("cpu"))
        losses = [_Axis(group, device) for group in (ranks.probes, ranks.data) if group is not None]
        found = cls(losses, "record")
        connected = found._connected()
        with found.reached():
            _check_meshes(connected, tensors)
        return found

    @classmethod
    def of_one(cls, optimizer: ZerothOrderOptimizer) -> Agreement:
        """This rank alone, to record.

        Raises:
            ValueError: for sharded parameters, whose digests need all ranks.
        """
        tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
        if any(map(shards.is_distributed, tensors)):
            raise ValueError(
                "collective: the digests of sharded parameters need all ranks; leave it out, and open the "
                "trajectory on all of them"
            )
        return cls((), "record")

    @property
    def is_first(self) -> bool:
        """Whether no other rank has a lower number. A collective."""
        if not self._axes:
            return True
        own = dist.get_rank()
        return self._range(own)[0] == own

    @contextmanager
    def reached(self, on: str = "") -> Iterator[None]:
        """A block that raises on all ranks if it raises on one of them. A collective.

        Args:
            on: a text that must be the same on all ranks.

        Raises:
            TrajectoryError: if another rank raised, or passed another ``on``.
        """
        try:
            yield
        except Exception:
            self._range(_REFUSED)
            raise
        least, greatest = self._range(_number_of(on))
        if least == _REFUSED:
            raise TrajectoryError(
                f"another rank refused to {self._purpose}, so this one does too; see the error there"
            )
        if least != greatest:
            raise TrajectoryError(_DIFFERENT[self._purpose])

    def any(self, condition: bool) -> bool:
        """Whether it holds on one of the ranks. A collective."""
        return bool(self._range(int(condition))[1])

    def _connected(self) -> set[int]:
        """The numbers of the ranks. A collective."""
        if not self._axes:
            return set()
        table = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=self._axes[0].device)
        table[dist.get_rank()] = 1
        for group, _ in self._axes:
            dist.all_reduce(table, group=group)
        return {rank for rank, times in enumerate(table.tolist()) if times}

    def _range(self, number: int) -> tuple[int, int]:
        """The least and the greatest ``number`` of all ranks."""
        least, greatest = number, number
        for group, device in self._axes:
            pair = torch.tensor([-least, greatest], device=device)
            dist.all_reduce(pair, dist.ReduceOp.MAX, group=group)
            least, greatest = -int(pair[0]), int(pair[1])
        return least, greatest


_DIFFERENT = {
    "replay": (
        "the ranks have read different trajectories, or one that is still being written; give all ranks the "
        "same file and the same to_step"
    ),
    "record": (
        "the ranks record different runs; give all of them the same recipe, seed and parameters, and the "
        "same arguments of Trajectory"
    ),
}


def _number_of(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])


def _meshes_of(tensors: Iterable[Tensor]) -> list[DeviceMesh]:
    found = dict.fromkeys(tensor.device_mesh for tensor in tensors if shards.is_distributed(tensor))
    return [mesh for mesh in found if mesh.get_coordinate() is not None]


def _axes_of(tensors: Iterable[Tensor]) -> list[_Axis]:
    return [
        _Axis(mesh.get_group(axis), mesh.device_type)
        for mesh in _meshes_of(tensors)
        for axis in range(mesh.ndim)
    ]


def _check_meshes(connected: set[int], tensors: Iterable[Tensor]) -> None:
    """Raises a ValueError if another rank than the ``connected`` ones holds a part of ``tensors``."""
    for mesh in _meshes_of(tensors):
        if mesh.size() > 1 and not connected.issuperset(mesh.mesh.flatten().tolist()):
            raise ValueError(
                "process_group: some ranks that hold parts of the parameters do not exchange losses, so they "
                "could not learn that a step cannot be recorded; build the optimizer with "
                "process_group='auto'"
            )
