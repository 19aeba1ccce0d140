"""Which tensors move, their keys, and their place in the unsharded parameter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from zoext import ops
from zoext.noise import FLOATING

_Row = tuple[Tensor, int, ops.Span, str, int]


@dataclass(frozen=True, slots=True)
class Parameters:
    """Tensors that move together: what one call of an operator takes."""

    tensors: tuple[Tensor, ...]
    keys: tuple[int, ...]
    spans: tuple[ops.Span, ...]
    names: tuple[str, ...]
    addresses: tuple[int, ...]  # where the weights lay when this was made
    rounding: ops.Rounding = ops.Rounding.NEAREST  # of what is written to them
    residuals: tuple[Tensor, ...] = ()  # int8, one for each tensor where that is Rounding.RESIDUAL

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    def __len__(self) -> int:
        return len(self.tensors)

    def take(self, positions: Sequence[int]) -> Parameters:
        """Those at ``positions``."""
        columns = (self.tensors, self.keys, self.spans, self.names, self.addresses)
        taken = Parameters(*(tuple(column[i] for i in positions) for column in columns))  # type: ignore[arg-type]
        residuals = tuple(self.residuals[i] for i in positions) if self.residuals else ()
        return replace(taken, rounding=self.rounding, residuals=residuals)

    def same_as(self, other: Parameters) -> bool:
        """Whether the tensors are the same objects in the same memory, with the same keys."""
        if (self.keys, self.spans, self.addresses) != (other.keys, other.spans, other.addresses):
            return False
        if len(self.residuals) != len(other.residuals):
            return False
        pairs = zip(self.tensors + self.residuals, other.tensors + other.residuals, strict=True)
        return all(a is b for a, b in pairs)


def _from_rows(rows: Iterable[_Row]) -> Parameters:
    columns = tuple(zip(*rows, strict=True)) or ((), (), (), (), ())
    return Parameters(*columns)  # type: ignore[arg-type]


def trainable(param_groups: list[dict[str, Any]]) -> list[Parameters]:
    """The tensors of each group that require grad.

    A key is the ordinal among all parameters, frozen ones included, so that freezing a layer does not
    change the noise of the others.
    """
    groups = []
    first_key = 0
    for group in param_groups:
        groups.append(_from_rows(_trainable_rows(group, first_key)))
        first_key += len(group["params"])
    return groups


def _trainable_rows(group: dict[str, Any], first_key: int) -> Iterator[_Row]:
    names = group.get("param_names")
    for position, tensor in enumerate(group["params"]):
        if tensor.requires_grad:
            key = first_key + position
            name = names[position] if names else f"parameter {key}"
            yield tensor, key, ops.span_of(tensor), name, tensor.data_ptr()


def check(tensor: object, name: str) -> None:
    """Raises for what cannot be moved; frozen tensors may be anything."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"params: {name} must be a Tensor, not {type(tensor).__name__}")
    if not tensor.requires_grad:
        return
    remedy = None
    if isinstance(tensor, UninitializedParameter):
        remedy = "is lazy and has no shape yet; run the model once first"
    elif type(tensor.detach()) is not Tensor:
        kind = type(tensor.detach()).__name__
        remedy = f"is a {kind}; only plain tensors can be moved, so freeze it with requires_grad_(False)"
    elif tensor.is_meta:
        remedy = "is on the meta device; give the model its weights first, with model.to_empty(device=...)"
    elif tensor.layout != torch.strided:
        remedy = f"has layout {tensor.layout}; use a dense tensor, or freeze it with requires_grad_(False)"
    elif tensor.dtype not in FLOATING:
        known = ", ".join(map(str, FLOATING))
        remedy = f"has dtype {tensor.dtype}; use one of {known}, or freeze it with requires_grad_(False)"
    elif not tensor.is_contiguous():
        remedy = "is not contiguous; use param.data = param.data.contiguous()"
    if remedy:
        raise ValueError(f"params: {name} {remedy}")


def check_one_device(groups: list[Parameters]) -> None:
    """Raises unless all tensors that move are on one device."""
    seen: dict[torch.device, str] = {}
    for group in groups:
        for tensor, name in zip(group.tensors, group.names, strict=True):
            seen.setdefault(tensor.device, name)
    if len(seen) > 1:
        places = ", ".join(f"{name} on {device}" for device, name in seen.items())
        raise ValueError(
            f"params: parameters are on several devices ({places}); move them to one, or use an optimizer "
            "for each device"
        )
