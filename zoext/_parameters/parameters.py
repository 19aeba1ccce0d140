"""The tensors that move, their noise keys, and their places in the unsharded parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from zoext import ops
from zoext._parameters import shards
from zoext._parameters.shards import Block
from zoext.noise import FLOATING

_ON_META = (
    "is on the meta device, where it has no values. If Accelerate offloads it (cpu_offload, disk_offload, a "
    'device_map with "cpu" or "disk"), load what trains onto a device, with accelerate.hooks.'
    "remove_hook_from_module(model, recurse=True) or another device_map, or freeze it; to() and to_empty() "
    "would lose its values. Otherwise give the model its weights first, with model.to_empty(device=...)"
)

#: How many things made of parameters are kept.
MOST_MADE = 16

_T = TypeVar("_T")
_Row = tuple[Tensor, int, Block, str, int, Tensor]


@dataclass(frozen=True, slots=True)
class Parameters:
    """Tensors that move together in one operator call."""

    tensors: tuple[Tensor, ...]  # for sharded parameters, this rank's parts
    keys: tuple[int, ...]
    blocks: tuple[Block, ...]  # their places in the unsharded parameters
    names: tuple[str, ...]
    addresses: tuple[int, ...]  # of the weights when this object was created
    owners: tuple[Tensor, ...]  # the parameters, as modules and the optimizer's state know them
    rounding: ops.Rounding = ops.Rounding.NEAREST  # of values written to them
    residuals: tuple[Tensor, ...] = ()  # int8, one per tensor for Rounding.RESIDUAL
    #: What others made of these parameters and need again, by what they made it from.
    made: dict[Any, Any] = field(init=False, compare=False, repr=False, default_factory=dict)
    spans: tuple[ops.Span, ...] = field(init=False)
    #: Whether one operator call takes them as they are: all are contiguous and on one device.
    is_whole: bool = field(init=False)

    def __post_init__(self) -> None:
        device = self.tensors[0].device if self.tensors else None
        is_whole = all(tensor.is_contiguous() and tensor.device == device for tensor in self.tensors)
        object.__setattr__(self, "is_whole", is_whole)
        object.__setattr__(self, "spans", tuple([block.span for block in self.blocks]))

    @property
    def device(self) -> torch.device:
        """That of the first tensor; others may be elsewhere."""
        return self.tensors[0].device

    def __len__(self) -> int:
        return len(self.tensors)

    def take(self, positions: Sequence[int]) -> Parameters:
        """The entries at ``positions``."""

        def of(column: tuple[_T, ...]) -> tuple[_T, ...]:
            return tuple([column[position] for position in positions])

        return Parameters(
            of(self.tensors),
            of(self.keys),
            of(self.blocks),
            of(self.names),
            of(self.addresses),
            of(self.owners),
            self.rounding,
            of(self.residuals) if self.residuals else (),
        )

    def part(self, positions: Sequence[int]) -> Parameters:
        """``take``, which returns the same object for the same positions."""
        key = ("part", *positions)
        known: Parameters | None = self.made.get(key)
        if known is None:
            known = self.take(positions)
            self.remember(key, known)
        return known

    def remember(self, key: Any, made: Any) -> None:
        """Keeps something in ``made``; few things, as the kinds of directions may change in every step."""
        if len(self.made) >= MOST_MADE:
            self.made.clear()
        self.made[key] = made

    def tell_autograd(self) -> None:
        """Increments the versions of DTensors, which writes to their local parts do not increment."""
        pairs = zip(self.owners, self.tensors, strict=True)
        torch.autograd.graph.increment_version([owner for owner, part in pairs if owner is not part])

    def same_as(self, other: Parameters) -> bool:
        """Whether the parameters are the same objects in the same memory, with the same keys."""
        if (self.keys, self.blocks, self.addresses) != (other.keys, other.blocks, other.addresses):
            return False
        if self.is_whole != other.is_whole:  # a square matrix may have been transposed in its memory
            return False
        if len(self.residuals) != len(other.residuals):
            return False
        pairs = zip(self.owners + self.residuals, other.owners + other.residuals, strict=True)
        return all(a is b for a, b in pairs)


def changed_names(before: Iterable[Parameters], now: Iterable[Parameters]) -> list[str]:
    """The names of parameters that are in other memory, or in one of the two only."""
    places = [
        {place for group in groups for place in zip(group.names, group.addresses, strict=True)}
        for groups in (before, now)
    ]
    return sorted({name for name, _ in places[0] ^ places[1]})


def _from_rows(rows: Iterable[_Row]) -> Parameters:
    columns = tuple(zip(*rows, strict=True)) or ((),) * 6
    return Parameters(*columns)  # type: ignore[arg-type]


def trainable(param_groups: list[dict[str, Any]]) -> list[Parameters]:
    """The tensors of each group that require grad.

    The key of a tensor is its index among all parameters, including frozen ones, so that freezing a layer
    does not change the noise of the others.
    """
    groups = []
    first_key = 0
    for group in param_groups:
        groups.append(_from_rows(_trainable_rows(group, first_key)))
        first_key += len(group["params"])
    return groups


def are_trainable(groups: Sequence[Parameters], param_groups: list[dict[str, Any]]) -> bool:
    """Whether ``trainable`` would return ``groups``; False where only a full look can tell.

    This runs twice in every step, and takes a tenth of the time of ``trainable``.
    """
    if len(groups) != len(param_groups):
        return False
    first_key = 0
    for group, known in zip(param_groups, groups, strict=True):
        if not known.is_whole or known.residuals:
            return False
        owners, tensors, keys = known.owners, known.tensors, known.keys
        addresses, blocks = known.addresses, known.blocks
        count = 0
        for key, tensor in enumerate(group["params"], first_key):
            if not tensor.requires_grad:
                continue
            if not (
                count < len(owners)
                and tensor is owners[count] is tensors[count]  # no DTensor
                and key == keys[count]
                and tensor.data_ptr() == addresses[count]
                and tensor.shape == blocks[count].shape
                and tensor.is_contiguous()
            ):
                return False
            count += 1
        if count != len(owners):
            return False
        first_key += len(group["params"])
    return True


def _trainable_rows(group: dict[str, Any], first_key: int) -> Iterator[_Row]:
    names = group.get("param_names")
    for position, tensor in enumerate(group["params"]):
        if tensor.requires_grad:
            key = first_key + position
            name = names[position] if names else f"parameter {key}"
            part = shards.part_of(tensor)
            yield part, key, shards.block_of(tensor), name, part.data_ptr(), tensor


def devices(param_groups: list[dict[str, Any]]) -> tuple[torch.device, ...]:
    """The devices of all parameters, including frozen ones."""
    return tuple(dict.fromkeys(tensor.device for group in param_groups for tensor in group["params"]))


def check(tensor: object, name: str) -> None:
    """Raises if a tensor cannot be moved; frozen tensors may be of any kind."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"params: {name} must be a Tensor, not {type(tensor).__name__}")
    if not tensor.requires_grad:
        return
    obstacle = shards.obstacle(tensor) if shards.is_distributed(tensor) else _absence(tensor)
    if obstacle or (obstacle := _obstacle(shards.part_of(tensor))):
        raise ValueError(f"params: {name} {obstacle}")


def _absence(tensor: Tensor) -> str | None:
    """Whether a framework keeps the weight elsewhere most of the time; None if it is here."""
    if getattr(tensor, "_fsdp_flattened", False):
        owner = "flattened and sharded by FullyShardedDataParallel"
    elif hasattr(tensor, "ds_id"):
        owner = "partitioned by DeepSpeed"
    else:
        return None
    return (
        f"is {owner}, so that this process lacks its values between forwards; keep one whole replica in each "
        "process: it takes no more memory than inference, and process_group='auto' averages the losses"
    )


def _obstacle(tensor: Tensor) -> str | None:
    """Why a local tensor cannot be moved, and how to fix it; None if it can."""
    if isinstance(tensor, UninitializedParameter):
        return "is lazy and has no shape yet; run the model once first"
    if type(tensor.detach()) is not Tensor:
        kind = type(tensor.detach()).__name__
        return f"is a {kind}; only plain tensors can be moved, so freeze it with requires_grad_(False)"
    if tensor.is_meta:
        return _ON_META
    if tensor.layout != torch.strided:
        return f"has layout {tensor.layout}; use a dense tensor, or freeze it with requires_grad_(False)"
    if tensor.dtype not in FLOATING:
        known = ", ".join(map(str, FLOATING))
        return f"has dtype {tensor.dtype}; use one of {known}, or freeze it with requires_grad_(False)"
    if _is_overlapping(tensor):
        return "has elements that share memory, as after expand(); use param.data = param.data.contiguous()"
    return None


def _is_overlapping(tensor: Tensor) -> bool:
    """Whether two elements may share memory, as in an expanded tensor."""
    if tensor.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def check_movable(groups: Sequence[Parameters]) -> None:
    """Raises unless there are tensors and all of them are of a kind that can be moved."""
    if not groups:
        raise RuntimeError(
            "no parameter of the optimizer requires grad, so none can move: unfreeze some with "
            "requires_grad_(), or build the optimizer after adapters were added, switched or enabled"
        )
    for group in groups:
        for tensor, name in zip(group.owners, group.names, strict=True):
            check(tensor, name)
