"""The tensors of a model, and plain data with tensors, in the form that safetensors and JSON can store."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoext.cli._problem import adapters
from zoext.cli._problem.digests import digest_of

_TENSOR, _TUPLE, _PAIRS = "$tensor", "$tuple", "$pairs"


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; tied ones once. Of a model with adapters, without what is frozen."""
    is_adapted = adapters.is_adapted(model)
    moved = {name: each for name, each in model.named_parameters() if each.requires_grad or not is_adapted}
    return {**moved, **dict(model.named_buffers())}


@torch.no_grad()
def copy_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of parameters and buffers, on their device."""
    return {name: tensor.detach().clone() for name, tensor in tensors_of(model).items()}


@torch.no_grad()
def put(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies ``tensors`` into the parameters and buffers of the same names."""
    for name, tensor in tensors_of(model).items():
        tensor.copy_(tensors[name])


def write(path: Path, model: nn.Module) -> None:
    """Writes the tensors of ``model`` as safetensors."""
    from safetensors.torch import save_file

    # safetensors refuses tensors that share memory, such as buffers that are views of one table.
    copies = {name: tensor.detach().cpu().clone() for name, tensor in tensors_of(model).items()}
    save_file({name: tensor.contiguous() for name, tensor in copies.items()}, path)


def digest(model: nn.Module) -> str:
    """A hash of names, shapes, dtypes and bits, also of what is frozen."""
    return digest_of([*model.named_parameters(), *model.named_buffers()])


def pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Converts ``value`` to JSON types; copies of its tensors go into ``tensors`` under the names used in it.

    A tensor that occurs several times, such as a basis that layers share, is stored once.

    Raises:
        TypeError: for anything but None, bool, int, float, str, list, tuple, dict and Tensor.
    """
    return _pack(value, tensors, {})


def _pack(value: Any, tensors: dict[str, Tensor], names: dict[int, str]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        if id(value) not in names:
            names[id(value)] = name = str(len(tensors))
            # Copies, because safetensors refuses tensors that share memory.
            tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {_TENSOR: names[id(value)]}
    if isinstance(value, list):
        return [_pack(item, tensors, names) for item in value]
    if isinstance(value, tuple):
        return {_TUPLE: [_pack(item, tensors, names) for item in value]}
    if isinstance(value, dict):
        pairs = [[_pack(key, tensors, names), _pack(item, tensors, names)] for key, item in value.items()]
        return {_PAIRS: pairs}
    raise TypeError(
        f"optimizer state contains a {type(value).__name__}; only plain data and tensors can be saved"
    )


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of ``pack``."""
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    if isinstance(value, dict):
        ((kind, content),) = value.items()
        if kind == _TENSOR:
            return tensors[content]
        items = unpack(content, tensors)
        return tuple(items) if kind == _TUPLE else dict(items)
    return value
