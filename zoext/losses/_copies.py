"""Several copies of a batch in one, for forwards that evaluate a whole round of probes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from enum import Enum
from numbers import Number
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import KeyPath, keystr, tree_flatten_with_path, tree_unflatten

from zoext._runtime.arguments import check_count

if TYPE_CHECKING:
    from numpy.typing import NDArray

_Batch = TypeVar("_Batch")

#: What a batch may hold besides tensors and containers: the same for every copy.
_PLAIN = (Number, str, bytes, Enum, torch.dtype, torch.device, torch.Size, slice, range)


def repeat(batch: _Batch, copies: int) -> _Batch:
    """Repeats every tensor of a batch, so that rows ``[c B, (c + 1) B)`` are the examples of copy ``c``.

    A tensor ``x`` of shape [B, ...] becomes ``x.repeat(copies, 1, ...)``: one whole batch after the other.

        >>> batch = {"input_ids": torch.tensor([[1, 2], [3, 4]]), "use_cache": False}
        >>> zoext.repeat(batch, 2)
        {'input_ids': tensor([[1, 2], [3, 4], [1, 2], [3, 4]]), 'use_cache': False}

    Args:
        batch: a tensor, or a nested container of tensors of one first dimension: mappings such as the
            ``BatchEncoding`` of transformers, lists, tuples, named tuples, dataclasses, and what is
            registered with ``torch.utils._pytree``. Containers of the result are new; numbers, strings and
            None are the same.
        copies: the number of copies, at least 1. For 1 the batch itself is returned.

    Raises:
        ValueError: for ``copies`` below 1, or an entry that has no examples to repeat: a tensor without
            dimensions, with another first dimension, or that is not dense. Nothing is repeated then.
        TypeError: for an entry of an unknown class, such as a cache of keys and values.
    """
    check_count("copies", copies)
    if copies == 1:
        return batch
    _Examples().check(batch)
    repeated: _Batch = _map(batch, "batch", lambda x, _: x.repeat(copies, *[1] * (x.dim() - 1)))
    return repeated


def mean_per_copy(
    losses: Tensor | Sequence[Any] | NDArray[Any],
    copies: int,
    weights: Tensor | Sequence[Any] | NDArray[Any] | None = None,
) -> Tensor:
    """The mean loss of each copy of a batch that ``repeat`` made.

    ``mean[c] = sum_i w_i loss_i / sum_i w_i`` over the examples (and tokens) ``i`` of copy ``c``.

        >>> zoext.mean_per_copy(torch.tensor([1.0, 3.0, 5.0, 9.0]), copies=2)
        tensor([2., 7.])
        >>> zoext.mean_per_copy([0.5, 1.5, 2.0, 4.0], copies=2)  # rewards
        tensor([1., 3.])

    Args:
        losses: [copies B, ...]: a loss per example, or per token; a tensor, a list of numbers or an array.
        copies: the number of copies, at least 1.
        weights: numbers or a mask, of the shape of ``losses`` or of the losses of one copy, [B, ...]; a list
            or an array as well. A loss with the weight 0 is left out even if it is not finite. Default: 1 for
            each.

    Returns:
        [copies], float64 for losses in float64 and else float32. NaN for a copy whose weights are all 0.

    Raises:
        ValueError: for a first dimension that ``copies`` does not divide, or weights of another shape.
        TypeError: for what is no tensor, list or array of numbers.
    """
    check_count("copies", copies)
    losses = _tensor(losses, "losses")
    weights = weights if weights is None else _tensor(weights, "weights").to(losses.device)
    if not losses.dim() or losses.shape[0] % copies:
        raise ValueError(
            f"losses must have a first dimension that copies={copies} divides, not the shape "
            f"{list(losses.shape)}; return the losses of the examples, before they are averaged"
        )
    wide = losses.to(torch.promote_types(losses.dtype, torch.float32)).reshape(copies, -1)
    if weights is None:
        return wide.mean(1)
    one_copy = (losses.shape[0] // copies, *losses.shape[1:])
    if weights.shape not in (losses.shape, one_copy):
        raise ValueError(
            f"weights must have the shape of the losses, {list(losses.shape)}, or of one copy's, "
            f"{list(one_copy)}, not {list(weights.shape)}"
        )
    factors = weights.to(wide.dtype).reshape(-1, wide.shape[1])
    return torch.where(factors == 0, 0.0, wide * factors).sum(1) / factors.sum(1)


def _tensor(values: Any, name: str) -> Tensor:
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name} must be a tensor, or a list or an array of numbers, not {type(values).__name__}: {error}"
        ) from None


class _Examples:
    """Checks that all tensors of a batch have the same number of examples."""

    def __init__(self) -> None:
        self._first: tuple[str, int] | None = None

    def check(self, batch: object) -> None:
        _map(batch, "batch", self._look)

    def _look(self, tensor: Tensor, name: str) -> Tensor:
        if tensor.is_nested or tensor.layout is not torch.strided:
            raise ValueError(f"{name} is not a dense tensor and cannot be repeated; pad it")
        if not tensor.dim():
            raise ValueError(
                f"{name} is a tensor without dimensions, so it has no examples to repeat; use a number of "
                "Python, or leave it out of the batch and pass it to the model yourself"
            )
        length = tensor.shape[0]
        self._first = self._first or (name, length)
        if length != self._first[1]:
            raise ValueError(
                f"{name} has {length} rows, but {self._first[0]} has {self._first[1]}, so they do not belong "
                "to the same examples; expand it to one row per example, or leave it out of the batch and "
                "pass it to the model yourself"
            )
        return tensor


def _map(value: Any, name: str, function: Callable[[Tensor, str], Tensor]) -> Any:
    """``value`` with ``function`` of every tensor in it and of the name of the tensor."""
    if isinstance(value, Tensor):
        return function(value, name)
    if value is None or isinstance(value, _PLAIN):
        return value
    if hasattr(value, "get_seq_length"):
        raise TypeError(
            f"{name} is a cache of keys and values ({type(value).__name__}), which grows as the model runs; "
            "leave it out of the batch"
        )
    entries, spec = tree_flatten_with_path(value, is_leaf=lambda part: part is not value)
    if not (len(entries) == 1 and entries[0][1] is value):
        return tree_unflatten([_map(part, _entry(name, path), function) for path, part in entries], spec)
    if isinstance(value, MutableMapping):
        result = copy.copy(value)  # which keeps the class and what else it holds
        result.update({key: _map(part, f"{name}[{key!r}]", function) for key, part in value.items()})
        return result
    if isinstance(value, Mapping):
        return {key: _map(part, f"{name}[{key!r}]", function) for key, part in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _map_fields(value, name, function)
    raise TypeError(
        f"{name} is a {type(value).__module__}.{type(value).__qualname__}, which cannot be repeated; use a "
        "tensor, a dict or a list, or register its class with torch.utils._pytree.register_pytree_node"
    )


def _map_fields(value: Any, name: str, function: Callable[[Tensor, str], Tensor]) -> Any:
    result = copy.copy(value)
    for field in dataclasses.fields(value):
        part = _map(getattr(value, field.name), f"{name}.{field.name}", function)
        object.__setattr__(result, field.name, part)  # also of frozen ones
    return result


def _entry(name: str, path: KeyPath) -> str:
    return name + keystr(path)
