"""The part of a parameter that this rank holds, if the parameter is sharded over ranks (DTensor)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from math import prod
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

import torch
from torch import Tensor

from zoext import ops

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement


class Block(NamedTuple):
    """The place of a tensor within a parameter, of which it is a block or the whole."""

    shape: tuple[int, ...]  # of the whole parameter
    offsets: tuple[int, ...]  # of the block in the parameter, by dimension
    sizes: tuple[int, ...]  # of the block
    span: ops.Span

    @classmethod
    def of_whole(cls, tensor: Tensor) -> Block:
        shape = tensor.shape  # read once: this runs for every parameter at every step
        return cls(shape, (0,) * len(shape), shape, ops.span_of(tensor))

    @classmethod
    def of_shard(cls, shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]) -> Block:
        """A block that is cut along at most one dimension, or along the first and one other."""
        strides = [prod(shape[dim + 1 :]) for dim in range(len(shape))]
        base = sum(offset * stride for offset, stride in zip(offsets, strides, strict=True))
        cut = [dim for dim, (size, whole) in enumerate(zip(sizes, shape, strict=True)) if size != whole]
        last = cut[-1] if cut else 0
        span = (base, max(prod(sizes[last:]), 1), prod(shape[last:]) if last else 0)
        return cls(tuple(shape), tuple(offsets), tuple(sizes), span)

    @property
    def is_whole(self) -> bool:
        return self.sizes == self.shape


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a parameter as a matrix: its first dimension, and the product of the others."""
    return shape[0], prod(shape[1:])


def is_distributed(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether it is a DTensor, of which ``to_local()`` is the part of this rank."""
    # Not imported, because that takes seconds. While the module is not loaded, no DTensor can exist.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def part_of(tensor: Tensor) -> Tensor:
    """The part of a DTensor on this rank, sharing its memory; other tensors are returned unchanged."""
    if is_distributed(tensor):
        with torch.no_grad():
            return tensor.to_local()
    return tensor


def with_part(tensor: Tensor, part: Tensor) -> Tensor:
    """A tensor of the shape of ``tensor`` whose part on this rank is ``part``, sharing its memory.

    It is a DTensor if ``tensor`` is one, so that checkpoints know its place in the whole.
    """
    if not is_distributed(tensor):
        return part
    from torch.distributed.tensor import DTensor

    mesh, placements = tensor.device_mesh, tensor.placements
    return DTensor.from_local(
        part, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def is_spread_alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape, and are sharded over the same ranks in the same way."""
    if not is_distributed(a) or not is_distributed(b):
        return is_distributed(a) == is_distributed(b) and a.shape == b.shape
    return (a.shape, a.device_mesh, a.placements) == (b.shape, b.device_mesh, b.placements)


def local_of(tensor: Tensor) -> Tensor:
    """The tensor in which a DTensor keeps its part, of which ``part_of`` may return a view."""
    return tensor._local_tensor if is_distributed(tensor) else tensor


def block_of(tensor: Tensor) -> Block:
    """The place of ``part_of(tensor)`` in the whole parameter; requires that ``obstacle`` is None."""
    if is_distributed(tensor):
        return _block_of_shard(tensor.shape, tensor.device_mesh, tensor.placements)
    return Block.of_whole(tensor)


@lru_cache(maxsize=2**14)  # this runs for every parameter at every step, and torch takes long
def _block_of_shard(shape: torch.Size, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> Block:
    sizes, offsets = _local_shape_and_offset(shape, mesh, placements)
    return Block.of_shard(shape, offsets, sizes)


def whole(tensor: Tensor) -> Tensor:
    """The whole parameter, for reading only. For DTensors all ranks must call this, in the same order."""
    if is_distributed(tensor):
        with torch.no_grad():
            return tensor.full_tensor()
    return tensor


def obstacle(tensor: DTensor) -> str | None:
    """Why a span cannot describe the place of this rank's part, and how to fix it; None if it can.

    The result is the same on all ranks, except for a rank outside the mesh and for parts of nonstandard
    sizes.
    """
    held = tuple(part_of(tensor).shape)
    return _obstacle_of(tensor.shape, tensor.device_mesh, tensor.placements, held)


@lru_cache(maxsize=2**14)
def _obstacle_of(
    shape: torch.Size, mesh: DeviceMesh, placements: tuple[Placement, ...], held: tuple[int, ...]
) -> str | None:
    from torch.distributed.tensor import Replicate

    has = f"has the placements {', '.join(map(repr, placements))}"
    remedy = "; redistribute() it to Shard(0), or freeze it with requires_grad_(False)"
    if not all(isinstance(placement, Replicate) or _is_shard(placement) for placement in placements):
        return f"{has}, of which Shard and Replicate can be moved{remedy}"
    cut = sorted({_dim(placement) for placement in placements if _is_shard(placement)})
    if len(cut) > 2 or (len(cut) == 2 and cut[0] != 0):
        return f"{has}, which cut it along dimensions other than the first and one more{remedy}"
    if not all(_is_consecutive(shape, mesh, placements, dim) for dim in cut):
        return f"{has}, whose parts are not consecutive{remedy}"
    if mesh.get_coordinate() is None:
        return "is on a mesh that this rank is no part of; give each rank the modules that it has a part of"
    expected = _local_shape_and_offset(shape, mesh, placements)[0]
    if held != tuple(expected):
        return (
            f"{has} and is {list(held)} on this rank, not {list(expected)}; make it with distribute_tensor()"
        )
    return None


def _is_shard(placement: Placement) -> bool:
    from torch.distributed.tensor.placement_types import Shard, _StridedShard

    return isinstance(placement, Shard | _StridedShard)


def _dim(placement: Placement) -> int:
    dim: int = placement.dim  # type: ignore[attr-defined]
    return dim


def _local_shape_and_offset(
    shape: torch.Size, mesh: DeviceMesh, placements: tuple[Placement, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(shape, mesh, placements)


def _is_consecutive(shape: torch.Size, mesh: DeviceMesh, placements: tuple[Placement, ...], dim: int) -> bool:
    """Whether each rank's part is consecutive along ``dim``; strided shards (FSDP2 over TP) may not be."""
    from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
    from torch.distributed.tensor.placement_types import _StridedShard

    if not any(isinstance(placement, _StridedShard) for placement in placements):
        return True
    # torch gives the first offset and the size of each part. If a part is not consecutive, another part
    # begins within the range of that offset and size. So all parts are consecutive if and only if these
    # ranges cover the dimension without overlap.
    ranges = []
    axes = [
        range(size if _is_shard(placement) and _dim(placement) == dim else 1)
        for size, placement in zip(mesh.shape, placements, strict=True)
    ]
    for coordinate in product(*axes):
        sizes, offsets = _compute_local_shape_and_global_offset(
            shape, mesh.shape, list(coordinate), placements
        )
        if sizes[dim]:
            ranges.append((offsets[dim], offsets[dim] + sizes[dim]))
    ends = [0, *(end for _, end in sorted(ranges))]
    return [begin for begin, _ in sorted(ranges)] == ends[:-1] and ends[-1] == shape[dim]
