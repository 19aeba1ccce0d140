"""Rounding of updates to 16-bit weights, and the residuals that store the rounding error."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from zoext._parameters.parameters import Parameters
from zoext._parameters.shards import part_of
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
    """The parameters, with updates rounded by ``rounding``."""
    return dataclasses.replace(parameters, rounding=rounding)


def with_residuals(
    parameters: Parameters, state: MutableMapping[Tensor, MutableMapping[str, Any]]
) -> Parameters:
    """The parameters with their residuals from ``state``; missing residuals are created as zeros."""
    pairs = zip(parameters.tensors, parameters.owners, strict=True)
    residuals = tuple(_residual_of(tensor, owner, state) for tensor, owner in pairs)
    return dataclasses.replace(parameters, rounding=Rounding.RESIDUAL, residuals=residuals)


@dataclasses.dataclass(frozen=True)
class _Uncast:
    """Wraps a tensor so that ``torch.optim`` does not cast it to its parameter's dtype when loading."""

    tensor: Tensor


def checked_state(tensor: Tensor, state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a parameter, for torch to load. Raises a ValueError if its residual does not fit.

    For a sharded parameter, each rank holds the residual of its part.
    """
    residual = state.get(RESIDUAL)
    if residual is None:
        return dict(state)
    shape = part_of(tensor).shape
    if not isinstance(residual, Tensor) or residual.dtype != torch.int8 or residual.shape != shape:
        kind = f"{residual.dtype} {list(residual.shape)}" if isinstance(residual, Tensor) else repr(residual)
        raise ValueError(
            f"state_dict has the residual {kind} for a parameter of shape {list(shape)}, which takes "
            "int8 of that shape; load the state of the same model"
        )
    return {**state, RESIDUAL: _Uncast(residual)}


def own_state(tensor: Tensor, state: Mapping[str, Any]) -> dict[str, Any]:
    """The state that torch loaded, with a copy of its residual on the device of the parameter."""
    residual = state.get(RESIDUAL)
    if not isinstance(residual, _Uncast):
        return dict(state)
    return {**state, RESIDUAL: residual.tensor.to(tensor.device, copy=True)}


def _residual_of(
    tensor: Tensor, owner: Tensor, state: MutableMapping[Tensor, MutableMapping[str, Any]]
) -> Tensor:
    if not rounds(tensor.dtype):
        state.get(owner, {}).pop(RESIDUAL, None)  # left from before the parameter was cast to a wider dtype
        empty = torch.empty(0, dtype=torch.int8, device=tensor.device)
        return _NO_RESIDUAL.setdefault(tensor.device, empty)
    known: Tensor | None = state[owner].get(RESIDUAL)
    if known is None or known.shape != tensor.shape:
        known = torch.zeros(tensor.shape, dtype=torch.int8, device=tensor.device)
    state[owner][RESIDUAL] = known = known.to(tensor.device)  # a model may have been moved
    return known
