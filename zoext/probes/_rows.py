"""Displaces the rows that an embedding reads, in place of its whole table.

The vocabulary table is often the largest module, and a batch reads a small part of it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from zoext._parameters import shards
from zoext._parameters.parameters import Parameters
from zoext._parameters.shards import Block
from zoext.directions import Direction, Terms

#: How many rows of a whole table are displaced in the time that handling a single row separately takes.
ROW_OVERHEAD = 8


def to_read(
    module: nn.Embedding, args: Any, own: list[tuple[Parameters, Terms]], swapped: Collection[int]
) -> list[int] | None:
    """The rows that an embedding is about to read, if displacing only those is cheaper.

    ``swapped`` has the ids of the weights that are displaced already. On CUDA the indices would have to be
    copied to the host, so the whole table is displaced there.
    """
    if (
        id(module.weight) in swapped
        or module.max_norm is not None
        or torch.is_grad_enabled()
        or shards.is_distributed(module.weight)
    ):
        return None
    others_hook = len(module._forward_hooks) > 1 or len(module._forward_pre_hooks) > 1
    if others_hook or module.weight.device.type != "cpu":
        return None  # a user's hook may read the table itself
    index = args[0] if args and isinstance(args[0], Tensor) else None
    if index is None or index.device.type != "cpu":
        return None
    if not 0 < index.numel() * ROW_OVERHEAD <= module.num_embeddings:
        return None
    if not own:
        return None
    ((parameters, terms),) = own
    if terms.frame.holds(parameters.keys[0]):  # its entries depend on more than their index
        return None
    rows: list[int] = index.flatten().tolist()
    return rows


def displace(
    rows: list[int], output: Tensor, own: list[tuple[Parameters, Terms]], direction: Direction
) -> None:
    """Adds the combination to rows read from the original table, with the same bits as a full pass."""
    ((parameters, terms),) = own
    width = output.shape[-1]
    tensors = output.view(-1, width).unbind(0)
    count = len(tensors)
    (table,), shape = parameters.owners, parameters.blocks[0].shape
    read = Parameters(
        tensors,
        parameters.keys * count,
        tuple(Block.of_shard(shape, (row, 0), (1, width)) for row in rows),
        parameters.names * count,
        tuple(tensor.data_ptr() for tensor in tensors),
        (table,) * count,
    )
    direction.axpy_(read, [terms])
