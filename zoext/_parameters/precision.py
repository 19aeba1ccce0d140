"""Rounding of updates to 16-bit weights, and the residuals that store the rounding error."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from zoext._parameters import shards
from zoext._parameters.parameters import Parameters
from zoext.ops import Rounding, rounds

#: The key of a parameter's residual in ``optimizer.state[parameter]``.
RESIDUAL = "residual"

_NO_RESIDUAL: dict[torch.device, Tensor] = {}


def rounding_of(precision: str) -> Rounding:
    """The rounding of updates for ``precision=``: "nearest", "stochastic" or "residual"."""
    try:
        return Rounding[precision.upper()] if precision == precision.lower() else Rounding[""]
    except (KeyError, AttributeError):
        names = ", ".join(repr(rounding.name.lower()) for rounding in Rounding)
        raise ValueError(f"precision must be one of {names}, not {precision!r}") from None


def rounded(parameters: Parameters, rounding: Rounding) -> Parameters:
    """The parameters, with updates rounded by ``rounding``; the same object at every call."""
    known: Parameters | None = parameters.made.get(rounding)
    if known is None:
        known = dataclasses.replace(parameters, rounding=rounding)
        parameters.remember(rounding, known)
    return known


def with_residuals(
    parameters: Parameters, state: MutableMapping[Tensor, MutableMapping[str, Any]]
) -> Parameters:
    """The parameters with their residuals from ``state``; missing residuals are created as zeros.

    The residual of a DTensor in ``state`` is a DTensor too.
    """
    pairs = zip(parameters.tensors, parameters.owners, strict=True)
    residuals = tuple(_residual_of(tensor, owner, state) for tensor, owner in pairs)
    return dataclasses.replace(parameters, rounding=Rounding.RESIDUAL, residuals=residuals)


@dataclasses.dataclass(frozen=True)
class _Uncast:
    """Wraps a tensor so that ``torch.optim`` does not cast it to its parameter's dtype when loading."""

    tensor: Tensor


def checked_state(tensor: Tensor, state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a parameter, for torch to load. Raises a ValueError if its residual does not fit."""
    residual = state.get(RESIDUAL)
    if residual is None:
        return dict(state)
    shape = tensor.shape
    if not isinstance(residual, Tensor) or residual.dtype != torch.int8 or residual.shape != shape:
        kind = f"{residual.dtype} {list(residual.shape)}" if isinstance(residual, Tensor) else repr(residual)
        raise ValueError(
            f"state_dict has the residual {kind} for a parameter of shape {list(shape)}, which takes "
            "int8 of that shape; load the state of the same model"
        )
    if not shards.is_spread_alike(residual, tensor):
        raise ValueError(
            f"state_dict has a residual that is {_spread(residual)} for a parameter that is "
            f"{_spread(tensor)}; save and load it with torch.distributed.checkpoint, which shards it anew"
        )
    return {**state, RESIDUAL: _Uncast(residual)}


def own_state(tensor: Tensor, state: Mapping[str, Any]) -> dict[str, Any]:
    """The state that torch loaded, with a copy of its residual on the device of the parameter."""
    residual = state.get(RESIDUAL)
    if not isinstance(residual, _Uncast):
        return dict(state)
    part = shards.part_of(residual.tensor).to(tensor.device, copy=True)
    return {**state, RESIDUAL: shards.with_part(tensor, part)}


def _residual_of(
    tensor: Tensor, owner: Tensor, state: MutableMapping[Tensor, MutableMapping[str, Any]]
) -> Tensor:
    if not rounds(tensor.dtype):
        state.get(owner, {}).pop(RESIDUAL, None)  # left from before the parameter was cast to a wider dtype
        empty = torch.empty(0, dtype=torch.int8, device=tensor.device)
        return _NO_RESIDUAL.setdefault(tensor.device, empty)
    known: Tensor | None = state[owner].get(RESIDUAL)
    if known is None or not shards.is_spread_alike(known, owner):
        known = shards.with_part(owner, torch.zeros(tensor.shape, dtype=torch.int8, device=tensor.device))
    part = shards.part_of(known)
    if part.device != tensor.device:  # a model may have been moved
        part = part.to(tensor.device)
        known = shards.with_part(owner, part)
    state[owner][RESIDUAL] = known
    return part


def _spread(tensor: Tensor) -> str:
    if not shards.is_distributed(tensor):
        return "whole"
    return f"sharded by {', '.join(map(repr, tensor.placements))} over {tensor.device_mesh}"
