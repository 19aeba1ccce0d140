"""All that a model holds, by name."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; tied ones once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@torch.no_grad()
def copy_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of its tensors, on their device."""
    return {name: tensor.detach().clone() for name, tensor in tensors_of(model).items()}


@torch.no_grad()
def put(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Sets every parameter and buffer of ``model`` to that of the same name in ``tensors``."""
    for name, tensor in tensors_of(model).items():
        tensor.copy_(tensors[name])


def digest(model: nn.Module) -> str:
    """A hash of names, shapes, dtypes and bits."""
    sha256 = hashlib.sha256()
    for name, tensor in tensors_of(model).items():
        sha256.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        sha256.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return sha256.hexdigest()
