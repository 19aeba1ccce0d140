"""Hashes of tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def digest_of(named: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of names, shapes, dtypes and bits."""
    sha256 = hashlib.sha256()
    for name, tensor in named:
        sha256.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        sha256.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return sha256.hexdigest()
